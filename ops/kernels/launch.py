"""From checked tensors to kernel launches: `forward`, `backward` and `step_`. No copy to the host, no synchronisation.

    forward:   [gates] -> [states of segments -> scan over segments] -> pass
    backward:  [gates] -> [the same two, for S and dS] -> pass (dq, dk, dv)
    backward in blocks:  [gates] -> [the same two] -> S and dS between blocks -> dq, dk, dv -> [dg]

In blocks, dg needs no sum that leaves its block: that keeps it exact. With the normaliser, its denominators (in a walk
after z of every chunk) come between what S needs and what dS needs. What stands in brackets runs only where needed.
Everything is chosen from shapes, strides and the alignment of addresses, so CUDA graphs capture every call. What is
chosen is remembered: a call like an earlier one only allocates, and hands over its arguments.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..reference import EPS
from . import chunk, segments, step, tiles
from .dispatch import Launch, compiled_at_once, form

_forward, _local_state, _boundaries = chunk.forward, chunk.local_state, chunk.boundaries
_key_sums, _normaliser, _backward = chunk.key_sums, chunk.normaliser, chunk.backward
_gate_sums, _segment_table = segments.gate_sums, segments.segment_table
_scan, _gate_gradient = segments.scan, segments.gate_gradient
_step = step.step

# The dialect that hopper.py is written in is experimental: only where it has been tried.
_hopper_walk = _hopper_backward = None
if triton.__version__.startswith("3.6.") and not triton.knobs.runtime.interpret:
    with contextlib.suppress(ImportError):
        from . import hopper

        _hopper_walk, _hopper_backward = hopper.walk, hopper.backward

BLOCK = 64  # tokens of a block, token by token
SHORTEST = 1024  # tokens of a segment: shorter ones move more bytes of states than of tokens
DENSE, PACKED, PACKED_CUT = 0, 1, 2  # the layouts of chunk.py

_remembered = functools.lru_cache(maxsize=1024)


@functools.cache
def _processors(index: int | None) -> int:
    return 132 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _copies_tiles(device: torch.device | int | None) -> int:
    """The capability, if the hardware copies tiles by descriptors and has the memory for the rows that do; or 0.

    So it is from Hopper (9) on, but not on the smaller chips of 12, whose shared memory is less than half of it.
    """
    if device is None:
        return 9
    major = torch.cuda.get_device_capability(device)[0] if torch.version.hip is None else 0
    return major if major in (9, 10) else 0


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


_HERE = contextlib.nullcontext()
_begun: set[tuple[Any, ...]] = set()


def _begin(plan: _Plan) -> contextlib.AbstractContextManager[object]:
    """The first call of a kind compiles its kernels at once."""
    if plan.begun:
        return _HERE
    plan.begun = True
    if plan.code[0] is None or plan.code in _begun:
        return _HERE
    _begun.add(plan.code)
    return compiled_at_once()


def _rows(x: Tensor) -> Tensor:
    """Kernels need the last dimension contiguous, and offsets inside a chunk in 32 bits."""
    _, step, _, last = x.stride()
    if (last != 1 and x.shape[3] != 1) or step >= 1 << 23:
        return x.contiguous()
    return x


def _vector(x: Tensor | None) -> Tensor | None:
    """Kernels step through g_gamma and the offsets one by one."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def _ceil(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` takes 2 us of the host for each call, and there are many.)"""
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _power(n: int) -> int:
    return max(16, _power_of_2(n))


_View = tuple[list[int], list[int]]  # shape and strides


@dataclass(eq=False)
class _Plan:
    """What the kernels of one call share. Calls share a plan if only addresses and the scale differ between them."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    W: int  # columns of a state
    N: int  # sequences
    gate: int  # 0 none, 1 g, 2 g_gamma
    normalize: bool
    reverse: bool
    tokens: bool  # token by token, in exact float32
    in_blocks: bool  # the backward: blocks of one chunk, whose states are kept in memory
    dtype: torch.dtype  # of q, k and v
    precision: str  # of products
    kind: str  # of the rows of the tile table
    tile: tiles.Tile
    layout: int
    cuts: int  # segments of a dense sequence
    length: int  # tokens of a segment
    slots: int
    strides: tuple[tuple[int, ...], ...]  # of q, k, v and in the backward do, without the last
    views: tuple[_View, ...] | None  # q, k, v and do as descriptors show them, if the pass reads them by descriptors
    hopper: str  # the pass is that of hopper.py: the row of the tile table that it takes, or ""
    code: tuple[Any, ...]  # the device, and what tells one kind of call from others whose kernels differ
    begun: bool = False
    block_slots: int = 0  # those of the blocks, where the backward works in blocks or needs denominators
    blocks: int = 0  # and those of a dense sequence

    @property
    def on_hopper(self) -> bool:
        return bool(self.hopper)

    @functools.cached_property
    def cut(self) -> bool:
        return self.layout == PACKED_CUT or self.cuts > 1

    def columns(self, width: int, tile: tiles.Tile | None = None) -> int:
        """Columns of the state that a program holds."""
        return min((tile or self.tile).block, max(_power(width), 32 if self.tokens else 16))

    def rows(self, width: int) -> int:
        """And rows. Token by token, smaller tiles than 64 x 32 leave several lanes that hold, and write, the same."""
        return max(_power(width), 64 if self.tokens else 16)

    def described(self, x: Tensor, index: int, columns: int) -> Any:
        """x, which is the tensor `index` of q, k, v, do: a descriptor of tiles of so many columns, or as it is."""
        if self.views is None:
            return x
        shape, strides = self.views[index]
        return TensorDescriptor(x, shape, strides, [1] * (len(shape) - 2) + [self.C, columns])

    @property
    def states_tile(self) -> tiles.Tile:
        """For the kernels that only move the state."""
        if self.tokens or self.precision == "ieee":
            return self.tile
        tile = tiles.tile("states", self.kind, self.K, self.V)
        return replace(tile, stages=max(1, tile.stages * tile.chunk // self.C))  # longer chunks, the same memory

    @functools.cached_property
    def output_tiles(self) -> tuple[int, int]:
        """Of the backward: how many share the columns of dq, and of dk; and of dv."""
        BN = self.columns(max(self.K, self.V))
        return _ceil(self.K, BN), _ceil(self.V, BN)

    @functools.cached_property
    def C(self) -> int:
        """Tokens of a block."""
        return BLOCK if self.tokens else self.tile.chunk

    @functools.cached_property
    def sums(self) -> torch.dtype:
        """Of the sums of gates."""
        # R of a strong decay is in the thousands: in float32 its differences would lose what float16 still shows
        exact = self.precision == "ieee" or self.tokens or self.dtype == torch.float16
        return torch.float64 if exact else torch.float32


def _view(shape: tuple[int, ...], stride: tuple[int, ...], packed: bool) -> _View | None:
    """[B, T, H, width] as [B, H, T, width], if descriptors take its strides: multiples of 16 bytes, none 0.

    Packed sequences end inside the tensor. There, two more dimensions let the caller say where (the trick of
    triton.tools.ragged_tma): token t of rows that end before `end` has the address t s = 2^30 (2^34 - s) + end s +
    (2^30 - end + t) s, in the 64 bits of an address, and lies outside the dimension of 2^30 tokens from `end` on.
    """
    B, T, H, width = shape
    strides = [s if n > 1 else 8 for n, s in ((B, stride[0]), (H, stride[2]), (T, stride[1]))]
    if any(s <= 0 or s % 8 for s in strides):
        return None
    b, h, t = strides
    if packed:
        most = 0x7FFF0000
        return ([most, most, H, 1 << 30, width], [(1 << 34) - t, t, h, t, 1]) if T <= 1 << 30 else None
    return [B, H, T, width], [b, h, t, 1]


def _plan(
    op: str, kernel: str, normalize: bool, reverse: bool, in_blocks: bool, q: Tensor, *inputs: Tensor | None
) -> _Plan:
    """The plan of a call. `inputs`: all other tensors that it is given: k, v, g, g_gamma, cu_seqlens, then the rest."""
    device = q.get_device() if q.is_cuda else None
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    options = op, kernel, normalize, reverse, in_blocks, exact
    describable = _copies_tiles(device)
    for x in (q, *inputs[:2], *inputs[7:8]):
        if x is None or x.data_ptr() & 15:
            describable = 0
    return _planned(*options, device, _processors(device), describable, tiles.settings(), form(q, *inputs))


@_remembered
def _planned(
    op: str, kernel: str, normalize: bool, reverse: bool, in_blocks: bool, exact: bool, device: int | None,
    processors: int, describable: int, settings: tuple[Any, ...], inputs: tuple[Any, ...],
) -> _Plan:  # fmt: skip
    # (the device and the settings of the table only tell plans apart: each device compiles, the table reads its own)
    (dtype, (B, T, H, K), _), _, (_, (_, _, HV, V), _), g, g_gamma, cu, *_ = inputs
    gate = 2 if g_gamma is not None else int(g is not None)
    packed = None if cu is None else cu[1][0] - 1
    precision = "tf32"
    kind = "half"
    if dtype == torch.float32:
        kind = precision = "ieee" if exact else "tf32"
    read = (*inputs[:3], *inputs[8:9])
    views: tuple[_View, ...] | None = None
    large = tiles.described <= B * T * HV * (K + V)
    known = in_blocks or tiles.copies(kernel, tiles.name(kind, False, True, normalize, gate), K, V)
    if describable and large and known and op != "recurrent" and kind == "half":
        seen = [_view(x[1], x[2], packed is not None) for x in read]
        views = tuple(x for x in seen if x) if all(seen) else None
    on = ""  # hopper.py
    if (
        tiles.hopper and views is not None and describable == 9 and _hopper_walk is not None
        and kernel not in tiles.override and max(K, V) > 64 and K % 8 == V % 8 == 0
        and not (in_blocks or normalize) and packed is None
    ):  # fmt: skip
        # Two consumers of a program read a and b once for both. But half of the processors must not stand idle for
        # that, no sequence be cut; and wide states gain only where all processors have work.
        pairs = B * HV * _ceil(V if kernel == "forward" else min(K, V), 128)
        cuts_below = 1.1 if op == "chunk" and kernel == "forward" else 2
        few = pairs * (1 if max(K, V) > 128 else cuts_below) < processors
        on = "hopper_few" if few else "hopper"
        tile = tiles.tile(on, kind, K, V)
    else:
        row = tiles.name(kind, in_blocks, views is not None, normalize, gate)
        tile = tiles.tile("tokens" if op == "recurrent" else kernel, row, K, V)
    tokens = tile.chunk == 1
    N = B if packed is None else packed
    # cut so that about eight warps run on every multiprocessor
    in_blocks |= kernel == "backward" and tokens
    walks = tile
    if in_blocks and not tokens and precision != "ieee":  # `boundaries` walks, and the blocks need no cut
        walks = tiles.tile("states", kind, K, V)
    programs = HV * _ceil(V, walks.block)
    if in_blocks:
        programs *= 1 if normalize else 2
    elif kernel == "backward" and on and max(K, V) > 128:  # one launch for each role
        programs = min(programs, HV * _ceil(K, walks.block))
    elif kernel == "backward":
        programs += 2 * HV * _ceil(K, walks.block)
    length = T
    if kernel == "backward" or op == "chunk":
        wanted = max(1, 8 // walks.warps) * processors
        if 1.1 * B * programs < wanted:
            length = max(SHORTEST, -(-T * B * programs // wanted))
        if tiles.segment is not None:
            length = tiles.segment
    unit = max(tile.chunk, BLOCK if tokens else 16)
    length = min(-(-length // unit) * unit, -(-max(T, 1) // unit) * unit)
    cuts = _ceil(T, length) if packed is None else 1
    if packed is None:
        layout, slots = DENSE, B * cuts
    elif length >= T:
        layout, slots = PACKED, N
    else:
        layout, slots = PACKED_CUT, T // length + N
    if in_blocks and max(_power(K), _power(V)) <= tile.block:
        views = None  # one program does a whole block then: more of it goes through registers
    plan = _Plan(
        B, T, H, HV, K, V, V + normalize, N, gate, normalize, reverse, tokens, in_blocks, dtype, precision, kind, tile,
        layout, cuts, length, slots, tuple(x[2][:3] for x in read), views, on,
        (
            device, views is None, on, op, kernel, normalize, reverse, in_blocks, precision, dtype, H < HV, K, V,
            layout, cuts > 1, *(x is None for x in inputs),
        ),
    )  # fmt: skip
    if in_blocks or (normalize and kernel == "backward"):
        plan.blocks = _ceil(T, plan.C)
        plan.block_slots = B * plan.blocks if packed is None else T // plan.C + N
    return plan


@_remembered
def _table_launch(plan: _Plan, length: int, slots: int) -> Launch:
    return Launch(_ceil(slots, 128), BS=128, num_warps=4)


def _table(plan: _Plan, cu: Tensor, length: int, slots: int) -> Tensor:
    """The sequence of each slot, for packed sequences cut into segments of `length`."""
    table = torch.empty(slots, dtype=torch.int32, device=cu.device)
    _table_launch(plan, length, slots)(_segment_table, cu, table, plan.T, plan.N, length, slots)
    return table


@_remembered
def _gates_launch(plan: _Plan) -> Launch:
    chunk = plan.tile.chunk
    BT, BH = max(chunk, 64), min(16, _power_of_2(plan.HV))
    return Launch(
        plan.B * _ceil(plan.T, BT) * _ceil(plan.HV, BH),
        PACKED=plan.layout != DENSE, REVERSE=plan.reverse, C=chunk, BT=BT, BH=BH, num_warps=4,
    )  # fmt: skip


def _gates(plan: _Plan, g: Tensor | None, cu: Tensor) -> Tensor | None:
    """R of walk.py, for gates in `g`: float64 where float32 would lose digits."""
    if plan.gate != 1 or g is None:
        return None
    R = torch.empty(plan.B * plan.HV, plan.T, dtype=plan.sums, device=g.device)
    _gates_launch(plan)(_gate_sums, g, *g.stride(), R, cu, plan.T, plan.N, plan.HV)
    return R


@_remembered
def _local_state_launch(plan: _Plan, mirror: bool, last: bool) -> Launch:
    tile = plan.states_tile
    BN = plan.columns(plan.V, tile)
    return Launch(
        _ceil(plan.V, BN) * plan.HV * plan.slots,
        K=plan.K, V=plan.V, BK=plan.rows(plan.K), BN=BN, C=plan.C, GATE=plan.gate,
        REVERSE=plan.reverse, MIRROR=mirror, NORMALIZE=plan.normalize, LAST=last, LAYOUT=plan.layout,
        TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=tile.registers,
    )  # fmt: skip


@_remembered
def _scan_launch(plan: _Plan, mirror: bool, has_s0: bool, has_s1: bool) -> Launch:
    KW = plan.K * plan.W
    size = min(2048, _power_of_2(KW))
    return Launch(
        _ceil(KW, size) * plan.HV * plan.N,
        KW=KW, W=plan.W, PACKED=plan.layout != DENSE, REVERSE=plan.reverse, MIRROR=mirror, GATE=plan.gate,
        TOKENS=plan.tokens, HAS_S0=has_s0, HAS_S1=has_s1, BLOCK=size, num_warps=4,
    )  # fmt: skip


def _segment_states(
    plan: _Plan,
    k: Tensor,
    v: Tensor,
    R: Tensor | None,
    gamma: Tensor | None,
    packed: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor] | None,
    initial: Tensor | None,
    final: Tensor | None,
    scale: float,
    mirror: bool,
) -> Tensor:
    """The state in which every segment starts, [slots, HV, K, W]. `mirror`: their gradients, divided by the scale."""
    states = torch.empty(plan.slots, plan.HV, plan.K, plan.W, dtype=torch.float32, device=k.device)
    decay = torch.empty(plan.slots, plan.HV, dtype=torch.float32, device=k.device) if plan.gate else states
    _local_state_launch(plan, mirror, final is not None)(
        _local_state,
        k, *k.stride()[:3], v, *v.stride()[:3], _or(R, k), _or(gamma, k), *(weights or (k, k)), states, decay,
        *packed, plan.T, plan.H, plan.HV, plan.cuts, plan.length,
    )  # fmt: skip
    S0 = _or(initial, states)
    _scan_launch(plan, mirror, initial is not None, final is not None)(
        _scan,
        states, decay, S0, *S0.stride(), _or(final, states), _or(R, k), _or(gamma, k), packed[0],
        plan.T, plan.HV, plan.cuts, plan.length, 1.0 / scale if mirror else 1.0, scale if mirror else 1.0,
    )  # fmt: skip
    return states


@_remembered
def _boundaries_launch(plan: _Plan, first: int, directions: int, has_s0: bool, has_ds1: bool, has_ds0: bool) -> Launch:
    tile = plan.states_tile
    BN = plan.columns(plan.V, tile)
    return Launch(
        directions * _ceil(plan.V, BN) * plan.HV * plan.slots,
        DIRECTIONS=directions, K=plan.K, V=plan.V, BK=plan.rows(plan.K), BN=BN, C=plan.C, GATE=plan.gate,
        REVERSE=plan.reverse, NORMALIZE=plan.normalize, HAS_S0=has_s0, HAS_DS1=has_ds1, HAS_DS0=has_ds0,
        LAYOUT=plan.layout, TOKENS=plan.tokens, PRECISION=plan.precision,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


@_remembered
def _key_sums_launch(plan: _Plan, has_s0: bool) -> Launch:
    BM = min(64, _power(plan.K))
    return Launch(
        _ceil(plan.K, BM) * plan.HV * plan.slots,
        K=plan.K, V=plan.V, BM=BM, C=plan.C, GATE=plan.gate, REVERSE=plan.reverse, HAS_S0=has_s0, LAYOUT=plan.layout,
        PRECISION=plan.precision, num_warps=4, num_stages=3,
    )  # fmt: skip


class _Kept:
    """The states in which blocks start, and their gradients where blocks end, as `boundaries` leaves them.

    A walk keeps z alone, for the denominators: `key_sums`.
    """

    def __init__(
        self, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, do: Tensor, R: Tensor | None, gamma: Tensor | None,
        packed: tuple[Tensor, Tensor], scale: float,
    ) -> None:  # fmt: skip
        self.plan, self.inputs, self.packed, self.scale = plan, (q, k, v, do, R, gamma), packed, scale
        count, normalize = plan.block_slots, plan.normalize
        # operands as the products take them, but for the normaliser (walk.py)
        dtype = torch.float32 if normalize or plan.tokens else q.dtype
        self.states = self.z = q
        if plan.in_blocks:
            self.states = torch.empty(2, count, plan.HV, plan.K, plan.V, dtype=dtype, device=q.device)
        if normalize:
            # (a walk needs that of the states alone)
            self.z = torch.empty(1 + plan.in_blocks, count, plan.HV, plan.K, dtype=torch.float32, device=q.device)

    def walk(
        self, start: Tensor | None, dend: Tensor | None, dstart: Tensor | None, d_scale: float,
        weights: tuple[Tensor, Tensor] | None, first: int, directions: int,
    ) -> None:  # fmt: skip
        plan, (q, k, v, do, R, gamma) = self.plan, self.inputs
        q_, k_, v_, do_ = plan.strides
        S0, dS1 = _or(start, q), _or(dend, q)
        _boundaries_launch(plan, first, directions, start is not None, dend is not None, dstart is not None)(
            _boundaries,
            q, *q_, k, *k_, v, *v_, do, *do_, _or(R, q), _or(gamma, q),
            *(weights or (q, q)), S0, *S0.stride(), dS1, *dS1.stride(), d_scale,
            _or(dstart, q), self.scale, self.states, self.z, self.states.stride(0), self.z.stride(0),
            *self.packed, plan.T, plan.H, plan.HV, plan.cuts, plan.length, plan.blocks, first,
        )  # fmt: skip

    def only_z(self, start: Tensor | None) -> None:
        plan, (q, k, _, _, R, gamma) = self.plan, self.inputs
        S0 = _or(start, q)
        _key_sums_launch(plan, start is not None)(
            _key_sums,
            k, *plan.strides[1], _or(R, q), _or(gamma, q), S0, *S0.stride(), self.z,
            *self.packed, plan.T, plan.H, plan.HV, plan.cuts, plan.length, plan.blocks,
        )  # fmt: skip


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that the kernel will not touch."""
    return other if x is None else x


@_remembered
def _forward_launch(plan: _Plan, has_s0: bool, has_s1: bool) -> Launch:
    K, V, tile = plan.K, plan.V, plan.tile
    BN = plan.columns(V)
    # Loads of columns under a mask take the pipeline more shared memory than a multiprocessor has. (Copied tiles have
    # no mask, and must keep their stages: one stage of 32 copied columns reads illegal memory, docs/kernels.)
    stages = 1 if K > 128 and V % BN and plan.views is None else tile.stages
    return Launch(
        _ceil(V, BN) * plan.HV * plan.slots,
        EPS=EPS, K=K, V=V, BK=plan.rows(K), BN=BN, C=tile.chunk, GATE=plan.gate, REVERSE=plan.reverse,
        NORMALIZE=plan.normalize, HAS_S0=has_s0, HAS_S1=has_s1, LAYOUT=plan.layout,
        TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=tile.warps, num_stages=stages,
    )  # fmt: skip


def _hopper_options(plan: _Plan, M: int) -> dict[str, Any]:
    """M: rows of the state as the role holds it."""
    tile = tiles.tile(plan.hopper, plan.kind, M, 128)
    BM = max(128, _power(M))
    return {
        "BM": BM, "SA": min(tile.stages, 2) if BM == 256 else tile.stages, "SB": tile.stages, "NC": tile.block // 64,
        "GATE": plan.gate, "REVERSE": plan.reverse, "REGISTERS": tile.registers, "num_warps": 4,
    }  # fmt: skip


@_remembered
def _role_launch(plan: _Plan, role: int, has_s0: bool, has_s1: bool) -> Launch:
    M, N = (plan.V, plan.K) if role in (1, 3) else (plan.K, plan.V)
    options = _hopper_options(plan, M)
    programs = _ceil(N, 64 * options["NC"]) * plan.HV * plan.slots
    return Launch(programs, MIRROR=role >= 2, HAS_S0=has_s0, HAS_S1=has_s1, **options)


def _near(state: Tensor | None) -> Tensor | None:
    """A state as hopper.py reads it: offsets inside one have 32 bits."""
    return state.contiguous() if state is not None and max(state.stride()[2:]) >= 1 << 22 else state


def _role_on_hopper(
    plan: _Plan, role: int, a: Tensor, b: Tensor, c: Tensor, order: tuple[int, int, int], out: Tensor,
    R: Tensor | None, gamma: Tensor | None, start: Tensor | None, final: Tensor | None,
    scale: float, in_scale: float = 1.0, out_scale: float = 1.0,
) -> None:  # fmt: skip
    """One role of walk.py by hopper.py. order: which of q, k, v and do a, b and c are."""
    assert plan.views is not None
    start = _near(start)
    launch = _role_launch(plan, role, start is not None, final is not None)
    views = (*(plan.views[i] for i in order), _view(out.shape, out.stride(), False))
    BM = launch.constants["BM"]
    S0 = _or(start, a)
    s_slot, s_h, s_k, s_v = S0.stride()
    launch(
        _hopper_walk,
        *map(hopper.described, (a, b, c, out), views, (BM, BM, 64, 64)), _or(R, a), _or(gamma, a),
        S0, s_slot, s_h, *((s_v, s_k) if role in (1, 3) else (s_k, s_v)), _or(final, a),
        plan.T, a.shape[2], c.shape[2], plan.HV, a.shape[3], out.shape[3], plan.cuts, plan.length,
        scale, in_scale, out_scale,
    )  # fmt: skip


@_remembered
def _roles_launch(plan: _Plan, has_s0: bool, has_ds1: bool, has_ds0: bool) -> Launch:
    options = _hopper_options(plan, max(plan.K, plan.V))
    block = 64 * options["NC"]
    programs = (2 * _ceil(plan.K, block) + _ceil(plan.V, block)) * plan.HV * plan.slots
    return Launch(programs, HAS_S0=has_s0, HAS_DS1=has_ds1, HAS_DS0=has_ds0, **options)


def _backward_on_hopper(
    plan: _Plan, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    R: Tensor | None, gamma: Tensor | None, start: Tensor | None, dend: Tensor | None, dstart: Tensor | None,
    scale: float, d_scale: float,
) -> None:  # fmt: skip
    """Up to a width of 128 in one launch, whose roles share L2. Wider ones compile faster, and run as fast, apart."""
    if max(plan.K, plan.V) > 128:
        gates = R, gamma
        _role_on_hopper(plan, 1, do, v, k, (3, 2, 1), dq, *gates, start, None, scale)
        _role_on_hopper(plan, 3, v, do, q, (2, 3, 0), dk, *gates, dend, None, scale, d_scale)
        _role_on_hopper(plan, 2, k, q, do, (1, 0, 3), dv, *gates, dend, dstart, scale, d_scale, scale)
        return
    assert plan.views is not None
    start, dend = _near(start), _near(dend)
    read, views, S0, dS1 = (q, k, v, do), plan.views, _or(start, q), _or(dend, q)
    launch = _roles_launch(plan, start is not None, dend is not None, dstart is not None)
    launch(
        _hopper_backward,
        *(hopper.described(x, view, 128) for x, view in zip(read, views, strict=True)),
        *(hopper.described(read[i], views[i], 64) for i in (0, 1, 3)),
        *(hopper.described(x, _view(x.shape, x.stride(), False), 64) for x in (dq, dk, dv)),
        _or(R, q), _or(gamma, q), S0, *S0.stride(), dS1, *dS1.stride(), _or(dstart, q),
        plan.T, plan.H, plan.HV, plan.K, plan.V, plan.cuts, plan.length, scale, d_scale,
    )  # fmt: skip


def forward(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor | None]:
    """o and the final state. `op` in {"chunk", "fused_chunk", "recurrent"}."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    W = V + normalize
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = torch.empty(N, HV, K, W, dtype=torch.float32, device=q.device) if output_final_state else None
    if v.numel() == 0 or q.numel() == 0 or N == 0:
        if final is not None:
            final.copy_(initial_state) if initial_state is not None else final.zero_()
        return torch.zeros(B, T, HV, V, dtype=v.dtype, device=v.device), final
    q, k, v = _rows(q), _rows(k), _rows(v)
    g_gamma, cu_seqlens = _vector(g_gamma), _vector(cu_seqlens)
    plan = _plan(op, "forward", normalize, reverse, False, q, k, v, g, g_gamma, cu_seqlens, initial_state)
    with _on(q), _begin(plan):
        o = torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
        cu = _or(cu_seqlens, q)
        packed = cu, _table(plan, cu, plan.length, plan.slots) if plan.layout == PACKED_CUT else q
        R = _gates(plan, g, cu)
        start, pass_final = initial_state, final
        if plan.cut:
            start = _segment_states(plan, k, v, R, g_gamma, packed, None, initial_state, final, scale, mirror=False)
            pass_final = None
        if plan.on_hopper:
            _role_on_hopper(plan, 0, q, k, v, (0, 1, 2), o, R, g_gamma, start, pass_final, scale)
            return o, final
        S0, S1 = _or(start, q), _or(pass_final, q)
        q_, k_, v_ = plan.strides
        BK, BN, tiles_of = plan.rows(plan.K), plan.columns(V), plan.described
        _forward_launch(plan, start is not None, pass_final is not None)(
            _forward,
            tiles_of(q, 0, BK), *q_, tiles_of(k, 1, BK), *k_, tiles_of(v, 2, BN), *v_, o, _or(R, q), _or(g_gamma, q),
            S0, *S0.stride(), S1, *packed,
            T, N, plan.H, HV, plan.cuts, plan.length, plan.slots, scale,
        )  # fmt: skip
    return o, final


@_remembered
def _normaliser_launch(plan: _Plan, layout: int) -> Launch:
    return Launch(
        plan.HV * plan.block_slots,
        EPS=EPS, K=plan.K, V=plan.V, BK=_power(plan.K), BV=_power(plan.V), C=plan.C, GATE=plan.gate,
        REVERSE=plan.reverse, LAYOUT=layout, TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=8, num_stages=1,
    )  # fmt: skip


@_remembered
def _backward_launch(
    plan: _Plan, layout: int, slots: int, rho: bool, has_s0: bool, has_ds1: bool, has_ds0: bool
) -> Launch:
    K, V, tile = plan.K, plan.V, plan.tile
    BN = plan.columns(max(K, V))
    TK, TV = plan.output_tiles
    together = plan.in_blocks and not plan.tokens and TK == TV == 1  # as the kernel decides: one program for a block
    return Launch(
        (1 if together else 2 * TK + TV) * plan.HV * slots,
        EPS=EPS, K=K, V=V, BK=plan.rows(K), BV=plan.rows(V), BN=BN, C=plan.C, GATE=plan.gate, REVERSE=plan.reverse,
        NORMALIZE=plan.normalize, RHO=rho, HAS_S0=has_s0, HAS_DS1=has_ds1, HAS_DS0=has_ds0, LAYOUT=layout,
        BLOCKS=plan.in_blocks, TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=tile.warps,
        num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


@_remembered
def _gate_gradient_launch(plan: _Plan, layout: int, total: bool) -> Launch:
    TK, TV = plan.output_tiles
    NB = max(1, 1024 // plan.C)
    return Launch(
        plan.HV * _ceil(plan.block_slots, NB),
        TILES=TK, ACROSS=TV, REVERSE=plan.reverse, LAYOUT=layout, SUM=total, C=plan.C, NB=NB, num_warps=4,
    )  # fmt: skip


def backward(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalize: bool,
    reverse: bool,
    o: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dq, dk, dv, dg, dg_gamma, dinitial_state."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    W = V + normalize
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    device = q.device
    wants_dg, wants_dgamma = gate_grad and g is not None, gate_grad and g_gamma is not None
    dS0 = None
    if initial_state is not None:
        dS0 = torch.empty(N, HV, K, W, dtype=torch.float32, device=device)
    if v.numel() == 0 or q.numel() == 0 or N == 0:
        if dS0 is not None:
            dS0.copy_(dfinal_state) if dfinal_state is not None else dS0.zero_()
        wanted = (True, True, True, wants_dg, wants_dgamma)
        zeros: list[Any] = [
            torch.zeros(x.shape, dtype=x.dtype, device=device) if x is not None and want else None
            for x, want in zip((q, k, v, g, g_gamma), wanted, strict=True)
        ]
        return *zeros, dS0
    if scale == 0.0:  # dS is held divided by the scale: let q be zero in its place
        zero = torch.zeros_like(q)
        args = (op, zero, k, v, g, g_gamma, initial_state, cu_seqlens, 1.0, normalize, reverse)
        dq, dk, dv, dg, dgamma, dS0 = backward(*args, o, do, dfinal_state, gate_grad)
        return dq.zero_(), dk, dv, dg, dgamma, dS0
    q, k, v, do = _rows(q), _rows(k), _rows(v), _rows(do)
    o = None if o is None else o.contiguous()  # our own, but a vmap may have folded it into another shape
    g_gamma, cu_seqlens = _vector(g_gamma), _vector(cu_seqlens)
    groups = HV // H
    rho_wanted = wants_dg or wants_dgamma
    # (with the normaliser, wide heads are as fast in blocks)
    in_blocks = rho_wanted or tiles.in_blocks or (normalize and max(K, V) > 128)
    inputs = q, k, v, g, g_gamma, cu_seqlens, initial_state, o, do, dfinal_state
    plan = _plan(op, "backward", normalize, reverse, in_blocks, *inputs)
    with _on(q), _begin(plan):
        # Float32 where groups are summed; but hopper.py writes the dtype that it reads.
        dqk = torch.float32 if groups > 1 and not plan.on_hopper else q.dtype
        dq = torch.empty(B, T, HV, K, dtype=dqk, device=device)
        dk = torch.empty(B, T, HV, K, dtype=dqk, device=device)
        dv = torch.empty(B, T, HV, V, dtype=v.dtype, device=device)
        cu = _or(cu_seqlens, q)
        packed = cu, _table(plan, cu, plan.length, plan.slots) if plan.layout == PACKED_CUT else q
        block_packed = packed
        if plan.blocks and cu_seqlens is not None:
            block_packed = cu, _table(plan, cu, plan.C, plan.block_slots)
        R = _gates(plan, g, cu)
        gates = R, g_gamma
        q_, k_, v_, do_ = plan.strides
        start, dend, dstart, d_scale = initial_state, dfinal_state, dS0, 1.0 / scale
        weights: tuple[Tensor, Tensor] | None = None
        z = dz = q
        layout, cuts, length, slots = plan.layout, plan.cuts, plan.length, plan.slots
        if plan.cut:
            start = _segment_states(plan, k, v, *gates, packed, None, initial_state, None, scale, mirror=False)
        if plan.cut and not normalize:
            dend = _segment_states(plan, q, do, *gates, packed, None, dfinal_state, dS0, scale, mirror=True)
            d_scale, dstart = 1.0, None
        if plan.blocks:
            block_layout = DENSE if cu_seqlens is None else PACKED_CUT
            kept = _Kept(plan, q, k, v, do, *gates, packed, scale)
            if plan.in_blocks:
                both = not normalize
                kept.walk(start, dend if both else None, dstart if both else None, d_scale, None, 0, 1 + both)
            else:
                kept.only_z(start)
            if normalize:
                rden, dden = (torch.empty(B * HV, T, dtype=torch.float32, device=device) for _ in range(2))
                weights = rden, dden
                _normaliser_launch(plan, block_layout)(
                    _normaliser,
                    q, *q_, k, *k_, o, do, *do_, _or(R, q), _or(g_gamma, q),
                    kept.z, *weights, *block_packed, T, H, HV, plan.blocks, scale,
                )  # fmt: skip
                if plan.cut:
                    dend = _segment_states(plan, q, do, *gates, packed, weights, dfinal_state, dS0, scale, mirror=True)
                    d_scale, dstart = 1.0, None
            if plan.in_blocks:
                if normalize:
                    kept.walk(start, dend, dstart, d_scale, weights, first=1, directions=1)
                    z, dz = kept.z[0], kept.z[1]
                layout, cuts, length, slots = block_layout, plan.blocks, plan.C, plan.block_slots
                start, dend, dstart, d_scale = kept.states[0], kept.states[1], None, 1.0
                packed = block_packed
        TK, TV = plan.output_tiles
        rho = across = q
        if rho_wanted:
            rho = torch.empty(3, TK, B * HV, T, dtype=torch.float32, device=device)
            across = torch.empty(slots, HV, TV, dtype=torch.float32, device=device)
        if plan.on_hopper:
            _backward_on_hopper(plan, q, k, v, do, dq, dk, dv, *gates, start, dend, dstart, scale, d_scale)
        else:
            S0, dS1 = _or(start, q), _or(dend, q)
            BK, BV, BN, tiles_of = plan.rows(K), plan.rows(V), plan.columns(max(K, V)), plan.described
            launch = _backward_launch(
                plan, layout, slots, rho_wanted, start is not None, dend is not None, dstart is not None
            )
            launch(
                _backward,
                tiles_of(q, 0, BK), *q_, tiles_of(k, 1, BK), *k_, tiles_of(v, 2, BV), *v_, tiles_of(do, 3, BV), *do_,
                tiles_of(q, 0, BN), tiles_of(k, 1, BN), tiles_of(do, 3, BN), dq, dk, dv,
                _or(R, q), _or(g_gamma, q), *(weights or (q, q)), rho, across, S0, *S0.stride(),
                dS1, *dS1.stride(), z, dz, _or(dstart, q), *packed,
                T, N, H, HV, cuts, length, slots, B * HV, scale, d_scale,
            )  # fmt: skip
        dg = dgamma = None
        if rho_wanted:
            launch = _gate_gradient_launch(plan, layout, wants_dgamma)
            programs = launch.grid[0] // HV
            part = torch.empty(programs, HV, dtype=torch.float32, device=device) if wants_dgamma else rho
            dg = torch.empty(B, T, HV, dtype=g.dtype, device=device) if wants_dg and g is not None else None
            launch(
                _gate_gradient,
                rho, across, _or(dg, rho), part, *packed, T, N, HV, cuts, slots, B * HV,
            )  # fmt: skip
    if wants_dgamma and g_gamma is not None:
        dgamma = part.sum(0).to(g_gamma.dtype)
    return *_summed(dq, dk, q), dv, dg, dgamma, dS0


def _summed(dq: Tensor, dk: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Over the value heads that share one of q and k."""
    B, T, H, K = q.shape
    if dq.shape[2] == H:
        return dq, dk
    return dq.view(B, T, H, -1, K).sum(3).to(q.dtype), dk.view(B, T, H, -1, K).sum(3).to(q.dtype)


@_remembered
def _step_launch(normalize: bool, device: int, settings: tuple[Any, ...], inputs: tuple[Any, ...]) -> Launch:
    (_, (B, _, K), _), _, (_, (_, HV, V), _), _, g, g_gamma, indices = inputs
    gate = 2 if g_gamma is not None else int(g is not None)
    tile = tiles.tile("step", "any", K, V)
    BN = min(tile.block, _power(V))
    return Launch(
        (1 if normalize else _ceil(V, BN)) * HV * B,
        EPS=EPS, K=K, V=V, BK=_power(K), BN=BN, GATE=gate, NORMALIZE=normalize, INDEXED=indices is not None,
        num_warps=tile.warps,
    )  # fmt: skip


def step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    state_indices: Tensor | None,
    scale: float,
    normalize: bool,
) -> Tensor:
    """One token for every row of q; `state` is updated in place."""
    (B, H, _), (HV, V) = q.shape, v.shape[1:]
    o = torch.empty(B, HV, V, dtype=v.dtype, device=v.device)
    if q.numel() == 0 or v.numel() == 0:
        return o.zero_()
    q, k, v = [x if x.stride()[-1] == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v)]
    g_gamma = _vector(g_gamma)
    rate = _or(g, q)
    with _on(q):
        inputs = form(q, k, v, state, g, g_gamma, state_indices)
        _step_launch(normalize, q.get_device(), tiles.settings(), inputs)(
            _step,
            q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], o, state, *state.stride(),
            rate, *rate.stride()[:2], _or(g_gamma, q), _or(state_indices, q),
            1 if state_indices is None else state_indices.stride(0), H, HV, state.shape[0], scale,
        )  # fmt: skip
    return o

"""From checked tensors to kernel launches: `forward`, `backward` and `step_`. No copy to the host, no synchronisation.

    forward:   [gates] -> [states of segments -> scan over segments] -> pass
    backward:  [gates] -> [the same two, for S and dS] -> pass (dq, dk, dv; on hopper.py also: dk and dv -> dq -> dg)
    backward in blocks:  [gates] -> [the same two] -> S and dS between blocks -> dq, dk, dv -> [dg]

In blocks, dg needs no sum that leaves its block: that keeps it exact. With the normaliser, its denominators (in a walk
after z of every chunk) come between what S needs and what dS needs. What stands in brackets runs only where needed.
Everything is chosen from shapes, strides and the alignment of addresses, in plan.py, so CUDA graphs capture every call.
What is chosen is remembered: a call like an earlier one only allocates, and hands over its arguments.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ..reference import EPS
from . import chunk, segments, step, tiles
from .dispatch import Launch, compiled_at_once, form
from .plan import DENSE, PACKED_CUT, Plan, ceil, planned, power, power_of_2, remembered, view_of

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


def _begin(plan: Plan) -> contextlib.AbstractContextManager[object]:
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


def _plan(
    op: str,
    kernel: str,
    normalize: bool,
    reverse: bool,
    in_blocks: bool,
    gate_grad: bool,
    q: Tensor,
    *inputs: Tensor | None,
) -> Plan:
    """The plan of a call. `inputs`: all other tensors that it is given: k, v, g, g_gamma, cu_seqlens, then the rest."""
    device = q.get_device() if q.is_cuda else None
    exact = q.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    options = op, kernel, normalize, reverse, in_blocks, gate_grad, exact
    describable = _copies_tiles(device)
    for x in (q, *inputs[:2], *inputs[7:8]):
        if x is None or x.data_ptr() & 15:
            describable = 0
    can = _processors(device), describable, _hopper_walk is not None
    return planned(*options, device, *can, tiles.settings(), form(q, *inputs))


@remembered
def _table_launch(plan: Plan, length: int, slots: int) -> Launch:
    return Launch(ceil(slots, 128), BS=128, num_warps=4)


def _table(plan: Plan, cu: Tensor, length: int, slots: int) -> Tensor:
    """The sequence of each slot, for packed sequences cut into segments of `length`."""
    table = torch.empty(slots, dtype=torch.int32, device=cu.device)
    _table_launch(plan, length, slots)(_segment_table, cu, table, plan.T, plan.N, length, slots)
    return table


@remembered
def _gates_launch(plan: Plan) -> Launch:
    chunk = plan.tile.chunk
    BT, BH = max(chunk, 64), min(16, power_of_2(plan.HV))
    return Launch(
        plan.B * ceil(plan.T, BT) * ceil(plan.HV, BH),
        PACKED=plan.layout != DENSE, REVERSE=plan.reverse, C=chunk, BT=BT, BH=BH, num_warps=4,
    )  # fmt: skip


def _gates(plan: Plan, g: Tensor | None, cu: Tensor) -> Tensor | None:
    """R of walk.py, for gates in `g`: float64 where float32 would lose digits."""
    if plan.gate != 1 or g is None:
        return None
    R = torch.empty(plan.B * plan.HV, plan.T, dtype=plan.sums, device=g.device)
    _gates_launch(plan)(_gate_sums, g, *g.stride(), R, cu, plan.T, plan.N, plan.HV)
    return R


@remembered
def _local_state_launch(plan: Plan, mirror: bool, last: bool) -> Launch:
    tile = plan.states_tile
    BN = plan.columns(plan.V, tile)
    return Launch(
        ceil(plan.V, BN) * plan.HV * plan.slots,
        K=plan.K, V=plan.V, BK=plan.rows(plan.K), BN=BN, C=plan.C, GATE=plan.gate,
        REVERSE=plan.reverse, MIRROR=mirror, NORMALIZE=plan.normalize, LAST=last, LAYOUT=plan.layout,
        TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=tile.warps, num_stages=tile.stages,
        maxnreg=tile.registers,
    )  # fmt: skip


@remembered
def _scan_launch(plan: Plan, mirror: bool, has_s0: bool, has_s1: bool) -> Launch:
    KW = plan.K * plan.W
    size = min(2048, power_of_2(KW))
    return Launch(
        ceil(KW, size) * plan.HV * plan.N,
        KW=KW, W=plan.W, PACKED=plan.layout != DENSE, REVERSE=plan.reverse, MIRROR=mirror, GATE=plan.gate,
        TOKENS=plan.tokens, HAS_S0=has_s0, HAS_S1=has_s1, BLOCK=size, num_warps=4,
    )  # fmt: skip


def _segment_states(
    plan: Plan,
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


@remembered
def _boundaries_launch(plan: Plan, first: int, directions: int, has_s0: bool, has_ds1: bool, has_ds0: bool) -> Launch:
    tile = plan.states_tile
    BN = plan.columns(plan.V, tile)
    return Launch(
        directions * ceil(plan.V, BN) * plan.HV * plan.slots,
        DIRECTIONS=directions, K=plan.K, V=plan.V, BK=plan.rows(plan.K), BN=BN, C=plan.C, GATE=plan.gate,
        REVERSE=plan.reverse, NORMALIZE=plan.normalize, HAS_S0=has_s0, HAS_DS1=has_ds1, HAS_DS0=has_ds0,
        LAYOUT=plan.layout, TOKENS=plan.tokens, PRECISION=plan.precision,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip


@remembered
def _key_sums_launch(plan: Plan, has_s0: bool) -> Launch:
    BM = min(64, power(plan.K))
    return Launch(
        ceil(plan.K, BM) * plan.HV * plan.slots,
        K=plan.K, V=plan.V, BM=BM, C=plan.C, GATE=plan.gate, REVERSE=plan.reverse, HAS_S0=has_s0, LAYOUT=plan.layout,
        PRECISION=plan.precision, num_warps=4, num_stages=3,
    )  # fmt: skip


class _Kept:
    """The states in which blocks start, and their gradients where blocks end, as `boundaries` leaves them.

    A walk keeps z alone, for the denominators: `key_sums`.
    """

    def __init__(
        self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, do: Tensor, R: Tensor | None, gamma: Tensor | None,
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


@remembered
def _forward_launch(plan: Plan, has_s0: bool, has_s1: bool) -> Launch:
    K, V, tile = plan.K, plan.V, plan.tile
    BN = plan.columns(V)
    # Loads of columns under a mask take the pipeline more shared memory than a multiprocessor has. (Copied tiles have
    # no mask, and must keep their stages: one stage of 32 copied columns reads illegal memory, docs/kernels.)
    stages = 1 if K > 128 and V % BN and plan.views is None else tile.stages
    return Launch(
        ceil(V, BN) * plan.HV * plan.slots,
        EPS=EPS, K=K, V=V, BK=plan.rows(K), BN=BN, C=tile.chunk, GATE=plan.gate, REVERSE=plan.reverse,
        NORMALIZE=plan.normalize, HAS_S0=has_s0, HAS_S1=has_s1, LAYOUT=plan.layout,
        TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=tile.warps, num_stages=stages,
    )  # fmt: skip


def _hopper_options(plan: Plan, M: int) -> dict[str, Any]:
    """M: rows of the state as the role holds it."""
    tile = tiles.tile(plan.hopper, plan.kind, M, 128)
    BM = max(128, power(M))
    return {
        "BM": BM, "SA": min(tile.stages, 2) if BM == 256 else tile.stages, "SB": tile.stages, "NC": tile.block // 64,
        "GATE": plan.gate, "REVERSE": plan.reverse, "REGISTERS": tile.registers, "num_warps": 4,
    }  # fmt: skip


@remembered
def _role_launch(plan: Plan, role: int, has_s0: bool, has_s1: bool) -> Launch:
    M, N = (plan.V, plan.K) if role in (1, 3) else (plan.K, plan.V)
    options = _hopper_options(plan, M)
    programs = ceil(N, 64 * options["NC"]) * plan.HV * plan.slots
    return Launch(
        programs, MIRROR=role >= 2, NORMALIZE=plan.normalize, EPS=EPS, HAS_S0=has_s0, HAS_S1=has_s1, **options
    )


def _near(state: Tensor | None) -> Tensor | None:
    """A state as hopper.py reads it: offsets inside one have 32 bits."""
    return state.contiguous() if state is not None and max(state.stride()[2:]) >= 1 << 22 else state


def _role_on_hopper(
    plan: Plan, role: int, a: Tensor, b: Tensor, c: Tensor, order: tuple[int, int, int], out: Tensor,
    R: Tensor | None, gamma: Tensor | None, start: Tensor | None, final: Tensor | None,
    scale: float, in_scale: float = 1.0, out_scale: float = 1.0,
) -> None:  # fmt: skip
    """One role of walk.py by hopper.py. order: which of q, k, v and do a, b and c are."""
    assert plan.views is not None
    start = _near(start)
    launch = _role_launch(plan, role, start is not None, final is not None)
    views = (*(plan.views[i] for i in order), view_of(out.shape, out.stride(), False))
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


@remembered
def _roles_launch(plan: Plan, roles: int, has_s0: bool, has_ds1: bool, has_ds0: bool) -> Launch:
    options = _hopper_options(plan, max(plan.K, plan.V))
    TK, TV = plan.output_tiles
    programs = (TK * (roles & 1) + TK * (roles >> 1 & 1) + TV * (roles >> 2)) * plan.HV * plan.slots
    # (what these roles do not look at is no reason to compile them again)
    return Launch(
        programs, SUMS=plan.gate_grad, ROLES=roles, HAS_S0=has_s0 and bool(roles & 1),
        HAS_DS1=has_ds1 and bool(roles & 6), HAS_DS0=has_ds0 and bool(roles & 4), **options,
    )  # fmt: skip


class _Sums:
    """What dg is made of, as gate_gradient takes it."""

    def __init__(self, plan: Plan, q: Tensor) -> None:
        slots, (*rows, across) = plan.block_slots, plan.dg_parts
        self.rho = torch.empty(sum(rows), plan.B * plan.HV, plan.T, dtype=torch.float32, device=q.device)
        self.across = torch.empty(slots, plan.HV, across, dtype=torch.float32, device=q.device)
        self.kept = self.factor = self.rho
        if plan.on_hopper:
            size = plan.output_tiles[0] * plan.tile.block * 128
            self.kept = torch.empty(slots, plan.HV, size, dtype=q.dtype, device=q.device)
            self.factor = torch.empty(slots, plan.HV, dtype=torch.float32, device=q.device)


def _backward_on_hopper(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, do: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    R: Tensor | None, gamma: Tensor | None, start: Tensor | None, dend: Tensor | None, dstart: Tensor | None,
    sums: _Sums | None, scale: float, d_scale: float,
) -> None:  # fmt: skip
    """Up to a width of 128 in one launch, whose roles share L2. Wider ones compile faster, and run as fast, apart.

    With gradients of gates in two: dq reads the dS of every chunk, which dk keeps.
    """
    if max(plan.K, plan.V) > 128:
        gates = R, gamma
        _role_on_hopper(plan, 1, do, v, k, (3, 2, 1), dq, *gates, start, None, scale)
        _role_on_hopper(plan, 3, v, do, q, (2, 3, 0), dk, *gates, dend, None, scale, d_scale)
        _role_on_hopper(plan, 2, k, q, do, (1, 0, 3), dv, *gates, dend, dstart, scale, d_scale, scale)
        return
    assert plan.views is not None
    start, dend = _near(start), _near(dend)
    read, views, S0, dS1 = (q, k, v, do), plan.views, _or(start, q), _or(dend, q)
    found = (q, q, q, q) if sums is None else (sums.rho, sums.kept, sums.across, sums.factor)
    args = (
        *(hopper.described(x, view, 128) for x, view in zip(read, views, strict=True)),
        *(hopper.described(read[i], views[i], 64) for i in (0, 1, 3)),
        *(hopper.described(x, view_of(x.shape, x.stride(), False), 64) for x in (dq, dk, dv)),
        _or(R, q), _or(gamma, q), S0, *S0.stride(), dS1, *dS1.stride(), _or(dstart, q), *found,
        plan.T, plan.H, plan.HV, plan.K, plan.V, plan.cuts, plan.length, scale, d_scale, plan.B * plan.HV, plan.blocks,
    )  # fmt: skip
    for roles in (7,) if sums is None else (6, 1):
        _roles_launch(plan, roles, start is not None, dend is not None, dstart is not None)(_hopper_backward, *args)


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
    plan = _plan(op, "forward", normalize, reverse, False, False, q, k, v, g, g_gamma, cu_seqlens, initial_state)
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


@remembered
def _normaliser_launch(plan: Plan, layout: int) -> Launch:
    return Launch(
        plan.HV * plan.block_slots,
        EPS=EPS, K=plan.K, V=plan.V, BK=power(plan.K), BV=power(plan.V), C=plan.C, GATE=plan.gate,
        REVERSE=plan.reverse, LAYOUT=layout, TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=8, num_stages=1,
    )  # fmt: skip


@remembered
def _backward_launch(
    plan: Plan, layout: int, slots: int, rho: bool, has_s0: bool, has_ds1: bool, has_ds0: bool
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


@remembered
def _gate_gradient_launch(plan: Plan, layout: int, total: bool) -> Launch:
    read, inside, wrote, across = plan.dg_parts
    NB = max(1, 1024 // plan.C)
    return Launch(
        plan.HV * ceil(plan.block_slots, NB),
        READ=read, INSIDE=inside, WROTE=wrote, ACROSS=across, FACTOR=plan.on_hopper,
        REVERSE=plan.reverse, LAYOUT=layout, SUM=total, C=plan.C, NB=NB, num_warps=4,
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
    in_blocks = tiles.in_blocks or (normalize and max(K, V) > 128)
    inputs = q, k, v, g, g_gamma, cu_seqlens, initial_state, o, do, dfinal_state
    plan = _plan(op, "backward", normalize, reverse, in_blocks, rho_wanted, *inputs)
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
        block_layout = DENSE if cu_seqlens is None else PACKED_CUT
        if plan.in_blocks or normalize:
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
        sums = _Sums(plan, q) if rho_wanted else None
        if plan.on_hopper:
            _backward_on_hopper(plan, q, k, v, do, dq, dk, dv, *gates, start, dend, dstart, sums, scale, d_scale)
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
                _or(R, q), _or(g_gamma, q), *(weights or (q, q)),
                *((q, q) if sums is None else (sums.rho, sums.across)), S0, *S0.stride(),
                dS1, *dS1.stride(), z, dz, _or(dstart, q), *packed,
                T, N, H, HV, cuts, length, slots, B * HV, scale, d_scale,
            )  # fmt: skip
        dg = dgamma = None
        if sums is not None:
            launch = _gate_gradient_launch(plan, block_layout, wants_dgamma)
            programs = launch.grid[0] // HV
            part = torch.empty(programs, HV, dtype=torch.float32, device=device) if wants_dgamma else q
            dg = torch.empty(B, T, HV, dtype=g.dtype, device=device) if wants_dg and g is not None else None
            launch(
                _gate_gradient,
                sums.rho, sums.across, sums.factor, _or(dg, sums.rho), part, *block_packed,
                T, N, HV, plan.blocks, plan.block_slots, B * HV,
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


@remembered
def _step_launch(normalize: bool, device: int, settings: tuple[Any, ...], inputs: tuple[Any, ...]) -> Launch:
    (_, (B, _, K), _), _, (_, (_, HV, V), _), _, g, g_gamma, indices = inputs
    gate = 2 if g_gamma is not None else int(g is not None)
    tile = tiles.tile("step", "any", K, V)
    BN = min(tile.block, power(V))
    return Launch(
        (1 if normalize else ceil(V, BN)) * HV * B,
        EPS=EPS, K=K, V=V, BK=power(K), BN=BN, GATE=gate, NORMALIZE=normalize, INDEXED=indices is not None,
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

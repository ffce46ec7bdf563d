"""From checked tensors to kernel launches: `forward`, `backward` and `step_`. No copy to the host, no synchronisation.

    forward:   [gates] -> [states of segments -> scan over segments] -> pass
    backward:  [gates] -> [the same two, for S and dS] -> pass (dq, dk, dv)
    backward in blocks:  [gates] -> [the same two] -> S and dS between blocks -> dq, dk, dv -> [dg]

In blocks, dg needs no sum that leaves its block: that keeps it exact. The normaliser runs between S and dS. What stands
in brackets runs only where needed. Everything is chosen from shapes, so CUDA graphs capture every call.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference import EPS
from . import chunk, segments, step, tiles
from .dispatch import dispatch

_forward, _local_state, _boundaries = dispatch(chunk.forward), dispatch(chunk.local_state), dispatch(chunk.boundaries)
_normaliser, _backward = dispatch(chunk.normaliser), dispatch(chunk.backward)
_gate_sums, _segment_table = dispatch(segments.gate_sums), dispatch(segments.segment_table)
_scan, _gate_gradient = dispatch(segments.scan), dispatch(segments.gate_gradient)
_step = dispatch(step.step)

BLOCK = 64  # tokens of a block, token by token
SHORTEST = 1024  # tokens of a segment: shorter ones move more bytes of states than of tokens
DENSE, PACKED, PACKED_CUT = 0, 1, 2  # the layouts of chunk.py


@functools.cache
def _processors(index: int | None) -> int:
    return 132 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def _on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _rows(x: Tensor) -> Tensor:
    """Kernels need the last dimension contiguous, and offsets inside a chunk in 32 bits."""
    if (x.stride(-1) != 1 and x.shape[-1] != 1) or any(s >= 1 << 23 for s in x.stride()[1:2]):
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


@dataclass
class _Plan:
    """What the kernels of one call share."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    W: int  # columns of a state
    N: int  # sequences
    tokens: bool  # token by token, in exact float32
    precision: str  # of products
    kind: str  # of the rows of the tile table
    tile: tiles.Tile
    layout: int
    cuts: int  # segments of a dense sequence
    length: int  # tokens of a segment
    slots: int
    cu: Tensor
    device: torch.device
    table: Tensor
    block_table: Tensor  # that of the blocks, where the backward works in blocks
    block_slots: int = 0  # their slots
    blocks: int = 0  # and those of a dense sequence

    @property
    def cut(self) -> bool:
        return self.layout == PACKED_CUT or self.cuts > 1

    def columns(self, width: int, tile: tiles.Tile | None = None) -> int:
        """Columns of the state that a program holds."""
        return min((tile or self.tile).block, max(_power(width), 32 if self.tokens else 16))

    def rows(self, width: int) -> int:
        """And rows. Token by token, smaller tiles than 64 x 32 leave several lanes that hold, and write, the same."""
        return max(_power(width), 64 if self.tokens else 16)

    @property
    def states_tile(self) -> tiles.Tile:
        """For the kernels that only move the state."""
        if self.tokens or self.precision == "ieee":
            return self.tile
        return tiles.tile("states", self.kind, self.K, self.V)

    @property
    def C(self) -> int:
        """Tokens of a block."""
        return BLOCK if self.tokens else self.tile.chunk

    def states(self) -> Tensor:
        return torch.empty(self.slots, self.HV, self.K, self.W, dtype=torch.float32, device=self.device)


def _plan(q: Tensor, v: Tensor, cu: Tensor | None, op: str, kernel: str, normalize: bool, in_blocks: bool) -> _Plan:
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    precision = "tf32"
    kind = "half"
    if q.dtype == torch.float32:
        kind = precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    tile = tiles.tile(
        "tokens" if op == "recurrent" else kernel, kind + "+blocks" * in_blocks + "+norm" * normalize, K, V
    )
    tokens = tile.chunk == 1
    N = B if cu is None else cu.shape[0] - 1
    # cut so that about two programs run on every multiprocessor
    programs = HV * _ceil(V, tile.block)
    in_blocks |= kernel == "backward" and tokens
    if in_blocks:
        programs *= 1 if normalize else 2
    elif kernel == "backward":
        programs += 2 * HV * _ceil(K, tile.block)
    length = T
    if kernel == "backward" or op == "chunk":
        wanted = 2 * _processors(q.device.index if q.is_cuda else None)
        if 1.1 * B * programs < wanted:
            length = max(SHORTEST, -(-T * B * programs // wanted))
        if tiles.segment is not None:
            length = tiles.segment
    unit = max(tile.chunk, BLOCK if tokens else 16)
    length = min(-(-length // unit) * unit, -(-max(T, 1) // unit) * unit)
    cuts = _ceil(T, length) if cu is None else 1
    if cu is None:
        layout, slots = DENSE, B * cuts
    elif length >= T:
        layout, slots = PACKED, N
    else:
        layout, slots = PACKED_CUT, T // length + N
    plan = _Plan(
        B, T, H, HV, K, V, V + normalize, N, tokens, precision, kind, tile, layout, cuts, length, slots,
        q if cu is None else cu, q.device, q, q,
    )  # fmt: skip
    if layout == PACKED_CUT:
        plan.table = _table(plan, length, slots)
    if in_blocks:
        plan.blocks = _ceil(T, plan.C)
        plan.block_slots = B * plan.blocks if cu is None else T // plan.C + N
        plan.block_table = q if cu is None else _table(plan, plan.C, plan.block_slots)
    return plan


def _table(plan: _Plan, length: int, slots: int) -> Tensor:
    """The sequence of each slot, for packed sequences cut into segments of `length`."""
    table = torch.empty(slots, dtype=torch.int32, device=plan.device)
    _segment_table[(_ceil(slots, 128),)](plan.cu, table, plan.T, plan.N, length, slots, BS=128, num_warps=4)
    return table


def _gates(
    plan: _Plan, g: Tensor | None, g_gamma: Tensor | None, reverse: bool, half: bool
) -> tuple[int, Tensor | None]:
    """Kind of gate, and R of walk.py: float64 where float32 would lose digits."""
    if g_gamma is not None:
        return 2, None
    if g is None:
        return 0, None
    # R of a strong decay is in the thousands: in float32 its differences would lose what float16 still shows
    exact = plan.precision == "ieee" or plan.tokens or half
    R = torch.empty(plan.B * plan.HV, plan.T, dtype=torch.float64 if exact else torch.float32, device=g.device)
    packed = plan.layout != DENSE
    chunk = plan.tile.chunk
    BT, BH = max(chunk, 64), min(16, _power_of_2(plan.HV))
    _gate_sums[(plan.B * _ceil(plan.T, BT) * _ceil(plan.HV, BH),)](
        g, *g.stride(), R, plan.cu, plan.T, plan.N, plan.HV,
        PACKED=packed, REVERSE=reverse, C=chunk, BT=BT, BH=BH, num_warps=4,
    )  # fmt: skip
    return 1, R


def _segment_states(
    plan: _Plan,
    k: Tensor,
    v: Tensor,
    gate: tuple[int, Tensor | None, Tensor | None],
    weights: tuple[Tensor, Tensor] | None,
    initial: Tensor | None,
    final: Tensor | None,
    scale: float,
    normalize: bool,
    reverse: bool,
    mirror: bool,
) -> Tensor:
    """The state in which every segment starts, [slots, HV, K, W]. `mirror`: their gradients, divided by the scale."""
    kind, R, gamma = gate
    states = plan.states()
    decay = torch.empty(plan.slots, plan.HV, dtype=torch.float32, device=k.device) if kind else states
    tile = plan.states_tile
    BN = plan.columns(plan.V, tile)
    rden, dden = weights or (k, k)
    _local_state[(_ceil(plan.V, BN) * plan.HV * plan.slots,)](
        k, *k.stride()[:3], v, *v.stride()[:3], _or(R, k), _or(gamma, k), rden, dden, states, decay,
        plan.cu, plan.table, plan.T, plan.H, plan.HV, plan.cuts, plan.length,
        K=plan.K, V=plan.V, BK=plan.rows(plan.K), BN=BN, C=plan.C, GATE=kind,
        REVERSE=reverse, MIRROR=mirror, NORMALIZE=normalize, LAYOUT=plan.layout, TOKENS=plan.tokens,
        PRECISION=plan.precision, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
    )  # fmt: skip
    KW = plan.K * plan.W
    size = min(512, _power_of_2(KW))
    _scan[(_ceil(KW, size) * plan.HV * plan.N,)](
        states, decay, _or(initial, states), *_or(initial, states).stride(), _or(final, states),
        _or(R, k), _or(gamma, k), plan.cu, plan.T, plan.HV, plan.cuts, plan.length,
        1.0 / scale if mirror else 1.0, scale if mirror else 1.0,
        KW=KW, W=plan.W, PACKED=plan.layout != DENSE, REVERSE=reverse, MIRROR=mirror, GATE=kind, TOKENS=plan.tokens,
        HAS_S0=initial is not None, HAS_S1=final is not None, BLOCK=size, num_warps=4,
    )  # fmt: skip
    return states


class _Kept:
    """The states in which blocks start, and their gradients where blocks end, as `boundaries` leaves them."""

    def __init__(
        self, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, do: Tensor, gate: tuple[int, Tensor | None, Tensor | None],
        normalize: bool, reverse: bool, scale: float,
    ) -> None:  # fmt: skip
        self.plan, self.inputs, self.gate = plan, (q, k, v, do), gate
        self.normalize, self.reverse, self.scale = normalize, reverse, scale
        count = plan.block_slots
        # operands as the products take them, but for the normaliser (walk.py)
        dtype = torch.float32 if normalize or plan.tokens else q.dtype
        self.states = torch.empty(2, count, plan.HV, plan.K, plan.V, dtype=dtype, device=plan.device)
        # (without the normaliser, nothing reads or writes z)
        self.z = torch.empty(2, count * normalize, plan.HV, plan.K, dtype=torch.float32, device=plan.device)

    def walk(
        self, start: Tensor | None, dend: Tensor | None, dstart: Tensor | None, d_scale: float,
        weights: tuple[Tensor, Tensor] | None, first: int, directions: int,
    ) -> None:  # fmt: skip
        plan, (q, k, v, do), (kind, R, gamma) = self.plan, self.inputs, self.gate
        tile = plan.states_tile
        BN = plan.columns(plan.V, tile)
        rden, dden = weights or (q, q)
        _boundaries[(directions * _ceil(plan.V, BN) * plan.HV * plan.slots,)](
            q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], do, *do.stride()[:3], _or(R, q), _or(gamma, q),
            rden, dden, _or(start, q), *_or(start, q).stride(), _or(dend, q), *_or(dend, q).stride(), d_scale,
            _or(dstart, q), self.scale, self.states, self.z, self.states[0].numel(), self.z[0].numel(),
            plan.cu, plan.table, plan.T, plan.H, plan.HV, plan.cuts, plan.length, plan.blocks, first,
            DIRECTIONS=directions, K=plan.K, V=plan.V, BK=plan.rows(plan.K), BN=BN, C=plan.C, GATE=kind,
            REVERSE=self.reverse, NORMALIZE=self.normalize, HAS_S0=start is not None, HAS_DS1=dend is not None,
            HAS_DS0=dstart is not None, LAYOUT=plan.layout, TOKENS=plan.tokens, PRECISION=plan.precision,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        )  # fmt: skip


def _or(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that the kernel will not touch."""
    return other if x is None else x


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
    with _on(q):
        o = torch.empty(B, T, HV, V, dtype=v.dtype, device=v.device)
        plan = _plan(q, v, cu_seqlens, op, "forward", normalize, False)
        kind, R = _gates(plan, g, g_gamma, reverse, q.dtype == torch.float16)
        start, pass_final = initial_state, final
        if plan.cut:
            gate = (kind, R, g_gamma)
            start = _segment_states(
                plan, k, v, gate, None, initial_state, final, scale, normalize, reverse, mirror=False
            )
            pass_final = None
        BN = plan.columns(V)
        # columns under a mask take the pipeline more shared memory than a multiprocessor has
        stages = 1 if K > 128 and V % BN else plan.tile.stages
        _forward[(_ceil(V, BN) * HV * plan.slots,)](
            q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], o, _or(R, q), _or(g_gamma, q),
            _or(start, q), *_or(start, q).stride(), _or(pass_final, q), plan.cu, plan.table,
            T, N, plan.H, HV, plan.cuts, plan.length, plan.slots, scale,
            EPS=EPS, K=K, V=V, BK=plan.rows(K), BN=BN, C=plan.tile.chunk, GATE=kind, REVERSE=reverse,
            NORMALIZE=normalize, HAS_S0=start is not None, HAS_S1=pass_final is not None, LAYOUT=plan.layout,
            TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=plan.tile.warps, num_stages=stages,
        )  # fmt: skip
    return o, final


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
    with _on(q):
        dqk = torch.float32 if groups > 1 else q.dtype
        dq = torch.empty(B, T, HV, K, dtype=dqk, device=device)
        dk = torch.empty(B, T, HV, K, dtype=dqk, device=device)
        dv = torch.empty(B, T, HV, V, dtype=v.dtype, device=device)
        rho_wanted = wants_dg or wants_dgamma
        plan = _plan(q, v, cu_seqlens, op, "backward", normalize, rho_wanted or normalize or tiles.in_blocks)
        kind, R = _gates(plan, g, g_gamma, reverse, q.dtype == torch.float16)
        gate = (kind, R, g_gamma)
        options = (scale, normalize, reverse)
        start, dend, dstart, d_scale = initial_state, dfinal_state, dS0, 1.0 / scale
        weights: tuple[Tensor, Tensor] | None = None
        z = dz = q
        layout, cuts, length, slots, table = plan.layout, plan.cuts, plan.length, plan.slots, plan.table
        if plan.cut:
            start = _segment_states(plan, k, v, gate, None, initial_state, None, *options, mirror=False)
        if plan.cut and not normalize:
            dend = _segment_states(plan, q, do, gate, None, dfinal_state, dS0, *options, mirror=True)
            d_scale, dstart = 1.0, None
        if plan.blocks:
            layout = DENSE if cu_seqlens is None else PACKED_CUT
            cuts, length, slots, table = plan.blocks, plan.C, plan.block_slots, plan.block_table
            kept = _Kept(plan, q, k, v, do, gate, normalize, reverse, scale)
            if normalize:
                kept.walk(start, dend, None, d_scale, None, first=0, directions=1)
                rden, dden = (torch.empty(B * HV, T, dtype=torch.float32, device=device) for _ in range(2))
                weights = rden, dden
                _normaliser[(HV * slots,)](
                    q, *q.stride()[:3], k, *k.stride()[:3], o, do, *do.stride()[:3], _or(R, q), _or(g_gamma, q),
                    kept.z, *weights, plan.cu, table, T, H, HV, cuts, scale,
                    EPS=EPS, K=K, V=V, BK=_power(K), BV=_power(V), C=length, GATE=kind, REVERSE=reverse, LAYOUT=layout,
                    TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=8, num_stages=1,
                )  # fmt: skip
                if plan.cut:
                    dend = _segment_states(plan, q, do, gate, weights, dfinal_state, dS0, *options, mirror=True)
                    d_scale, dstart = 1.0, None
                kept.walk(start, dend, dstart, d_scale, weights, first=1, directions=1)
            else:
                kept.walk(start, dend, dstart, d_scale, None, first=0, directions=2)
            start, dend, dstart, d_scale = kept.states[0], kept.states[1], None, 1.0
            z, dz = kept.z[0], kept.z[1]
        BN = plan.columns(max(K, V))
        TK, TV = _ceil(K, BN), _ceil(V, BN)
        rho = across = q
        if rho_wanted:
            rho = torch.empty(3, TK, B * HV, T, dtype=torch.float32, device=device)
            across = torch.empty(slots, HV, TV, dtype=torch.float32, device=device)
        together = plan.blocks and not plan.tokens and TK == TV == 1  # one program for all of a block
        _backward[((1 if together else 2 * TK + TV) * HV * slots,)](
            q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], do, *do.stride()[:3], dq, dk, dv,
            _or(R, q), _or(g_gamma, q), *(weights or (q, q)), rho, across, _or(start, q), *_or(start, q).stride(),
            _or(dend, q), *_or(dend, q).stride(), z, dz, _or(dstart, q), plan.cu, table,
            T, N, H, HV, cuts, length, slots, B * HV, scale, d_scale,
            EPS=EPS, K=K, V=V, BK=plan.rows(K), BV=plan.rows(V), BN=BN, C=plan.C, GATE=kind, REVERSE=reverse,
            NORMALIZE=normalize, RHO=rho_wanted, HAS_S0=start is not None, HAS_DS1=dend is not None,
            HAS_DS0=dstart is not None, LAYOUT=layout, BLOCKS=plan.blocks > 0, TOKENS=plan.tokens,
            PRECISION=plan.precision, num_warps=plan.tile.warps, num_stages=plan.tile.stages,
            maxnreg=plan.tile.registers,
        )  # fmt: skip
        dg = dgamma = None
        if rho_wanted:
            NB = max(1, 1024 // length)
            programs = _ceil(slots, NB)
            part = torch.empty(programs, HV, dtype=torch.float32, device=device) if wants_dgamma else rho
            dg = torch.empty(B, T, HV, dtype=g.dtype, device=device) if wants_dg and g is not None else None
            _gate_gradient[(HV * programs,)](
                rho, across, _or(dg, rho), part, plan.cu, table, T, N, HV, cuts, slots, B * HV,
                TILES=TK, ACROSS=TV, REVERSE=reverse, LAYOUT=layout,
                SUM=wants_dgamma, C=length, NB=NB, num_warps=4,
            )  # fmt: skip
            if wants_dgamma and g_gamma is not None:
                dgamma = part.sum(0).to(g_gamma.dtype)
        if groups > 1:
            dq, dk = (x.view(B, T, H, groups, K).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dgamma, dS0


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
    (B, H, K), (HV, V) = q.shape, v.shape[1:]
    o = torch.empty(B, HV, V, dtype=v.dtype, device=v.device)
    if q.numel() == 0 or v.numel() == 0:
        return o.zero_()
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    g_gamma = _vector(g_gamma)
    tile = tiles.tile("step", "any", K, V)
    BN = min(tile.block, _power(V))
    kind = 1 if g is not None else 2 if g_gamma is not None else 0
    with _on(q):
        _step[((1 if normalize else _ceil(V, BN)) * HV * B,)](
            q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], o, state, *state.stride(),
            _or(g, q), *_or(g, q).stride()[:2], _or(g_gamma, q), _or(state_indices, q),
            1 if state_indices is None else state_indices.stride(0), H, HV, state.shape[0], scale,
            EPS=EPS, K=K, V=V, BK=_power(K), BN=BN, GATE=kind, NORMALIZE=normalize,
            INDEXED=state_indices is not None, num_warps=tile.warps,
        )  # fmt: skip
    return o

"""From checked tensors to kernel launches: `forward`, `backward` and `step_`. No copy to the host, no synchronisation.

    forward:   [gates] -> [states of segments -> scan over segments] -> pass
    backward:  [gates] -> [the same two] -> [normaliser] -> [the same two for dS] -> pass (dq, dk, dv) -> [dg]

What stands in brackets runs only where needed. Everything is chosen from shapes, so CUDA graphs capture every call.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..reference import EPS
from . import tiles
from .chunk import backward as _backward
from .chunk import forward as _forward
from .chunk import local_state as _local_state
from .chunk import normaliser as _normaliser
from .segments import gate_gradient as _gate_gradient
from .segments import gate_sums as _gate_sums
from .segments import scan as _scan
from .segments import segment_table as _segment_table
from .step import step as _step

SHORTEST = 1024  # tokens of a segment: shorter ones move more bytes of states than of tokens
LONGEST_WITH_DG = 4096  # dg is one block of a segment's tokens, and its rounding error gathers: docs/kernels.md
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


def _power(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


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
    tile: tiles.Tile
    layout: int
    cuts: int  # segments of a dense sequence
    length: int  # tokens of a segment
    slots: int
    cu: Tensor
    device: torch.device
    table: Tensor | None = None
    first: Tensor | None = None

    @property
    def cut(self) -> bool:
        return self.layout == PACKED_CUT or self.cuts > 1

    def states(self) -> Tensor:
        return torch.empty(self.slots, self.HV, self.K, self.W, dtype=torch.float32, device=self.device)


def _plan(
    q: Tensor, v: Tensor, cu: Tensor | None, op: str, kernel: str, normalize: bool, gated: bool, cap: int | None
) -> _Plan:
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    precision = "tf32"
    kind = "half"
    if q.dtype == torch.float32:
        kind = precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    tile = tiles.tile("tokens" if op == "recurrent" else kernel, kind, K, V, gated)
    tokens = tile.chunk == 1
    N = B if cu is None else cu.shape[0] - 1
    # cut so that about two programs run on every multiprocessor
    programs = HV * triton.cdiv(V, tile.block)
    if kernel == "backward":
        programs += 2 * HV * triton.cdiv(K, tile.block)
    length = T
    if kernel == "backward" or op == "chunk":
        wanted = 2 * _processors(q.device.index if q.is_cuda else None)
        if 1.1 * B * programs < wanted:
            length = max(SHORTEST, -(-T * B * programs // wanted))
        if cap is not None:
            length = min(length, cap)
        if tiles.segment is not None:
            length = tiles.segment
    unit = max(tile.chunk, 16)
    length = min(-(-length // unit) * unit, max(T, 1))
    cuts = triton.cdiv(T, length) if cu is None else 1
    if cu is None:
        layout, slots = DENSE, B * cuts
    elif length >= T:
        layout, slots = PACKED, N
    else:
        layout, slots = PACKED_CUT, T // length + N
    plan = _Plan(
        B, T, H, HV, K, V, V + normalize, N, tokens, precision, tile, layout, cuts, length, slots,
        q if cu is None else cu, q.device,
    )  # fmt: skip
    if layout == PACKED_CUT:
        plan.table = torch.empty(slots, 2, dtype=torch.int32, device=q.device)
        plan.first = torch.empty(N + 1, dtype=torch.int32, device=q.device)
        _segment_table[(triton.cdiv(slots, 32),)](
            cu, plan.table, plan.first, N, length, slots, BN=min(256, _power(N)), BS=32, num_warps=4
        )
    else:
        plan.table = plan.first = plan.cu
    return plan


def _gates(plan: _Plan, g: Tensor | None, g_gamma: Tensor | None, reverse: bool) -> tuple[int, Tensor | None]:
    """Kind of gate, and R of walk.py: float64 where products are exact to float32."""
    if g_gamma is not None:
        return 2, None
    if g is None:
        return 0, None
    exact = plan.precision == "ieee" or plan.tokens
    R = torch.empty(plan.B * plan.HV, plan.T, dtype=torch.float64 if exact else torch.float32, device=g.device)
    packed = plan.layout != DENSE
    chunk = plan.tile.chunk
    BT, BH = max(chunk, 64), min(16, triton.next_power_of_2(plan.HV))
    _gate_sums[(plan.B * triton.cdiv(plan.T, BT) * triton.cdiv(plan.HV, BH),)](
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
    block = plan.tile.block
    BM = min(_power(plan.K), 64)
    tiles_ = triton.cdiv(plan.K, BM) * triton.cdiv(plan.V, block)
    rden, dden = weights or (k, k)
    _local_state[(tiles_ * plan.HV * plan.slots,)](
        k, *k.stride()[:3], v, *v.stride()[:3], _or(R, k), _or(gamma, k), rden, dden, states, decay,
        plan.cu, plan.table, plan.T, plan.N, plan.H, plan.HV, plan.cuts, plan.length,
        EPS=EPS, K=plan.K, V=plan.V, BM=BM, BN=min(block, _power(plan.V)), C=plan.tile.chunk, GATE=kind,
        REVERSE=reverse, MIRROR=mirror, NORMALIZE=normalize, LAYOUT=plan.layout, TOKENS=plan.tokens,
        PRECISION=plan.precision, num_warps=4, num_stages=plan.tile.stages,
    )  # fmt: skip
    KW = plan.K * plan.W
    BLOCK = min(512, triton.next_power_of_2(KW))
    _scan[(triton.cdiv(KW, BLOCK) * plan.HV * plan.N,)](
        states, decay, _or(initial, states), *_or(initial, states).stride(), _or(final, states), plan.first,
        plan.HV, plan.cuts, 1.0 / scale if mirror else 1.0, scale if mirror else 1.0,
        KW=KW, W=plan.W, PACKED=plan.layout != DENSE, BACK=reverse != mirror, GATED=kind != 0,
        HAS_S0=initial is not None, HAS_S1=final is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return states


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
        gated = g is not None or g_gamma is not None
        plan = _plan(q, v, cu_seqlens, op, "forward", normalize, gated, None)
        kind, R = _gates(plan, g, g_gamma, reverse)
        start, pass_final = initial_state, final
        if plan.cut:
            gate = (kind, R, g_gamma)
            start = _segment_states(
                plan, k, v, gate, None, initial_state, final, scale, normalize, reverse, mirror=False
            )
            pass_final = None
        BN = min(plan.tile.block, _power(V))
        _forward[(triton.cdiv(V, BN) * HV * plan.slots,)](
            q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], o, _or(R, q), _or(g_gamma, q),
            _or(start, q), *_or(start, q).stride(), _or(pass_final, q), plan.cu, plan.table,
            T, N, plan.H, HV, plan.cuts, plan.length, plan.slots, scale,
            EPS=EPS, K=K, V=V, BK=_power(K), BN=BN, C=plan.tile.chunk, GATE=kind, REVERSE=reverse,
            NORMALIZE=normalize, HAS_S0=start is not None, HAS_S1=pass_final is not None, LAYOUT=plan.layout,
            TOKENS=plan.tokens, PRECISION=plan.precision, num_warps=plan.tile.warps, num_stages=plan.tile.stages,
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
    g_gamma, cu_seqlens = _vector(g_gamma), _vector(cu_seqlens)
    groups = HV // H
    with _on(q):
        dqk = torch.float32 if groups > 1 else q.dtype
        dq = torch.empty(B, T, HV, K, dtype=dqk, device=device)
        dk = torch.empty(B, T, HV, K, dtype=dqk, device=device)
        dv = torch.empty(B, T, HV, V, dtype=v.dtype, device=device)
        rho_wanted = wants_dg or wants_dgamma
        gated = g is not None or g_gamma is not None
        plan = _plan(q, v, cu_seqlens, op, "backward", normalize, gated, LONGEST_WITH_DG if rho_wanted else None)
        kind, R = _gates(plan, g, g_gamma, reverse)
        gate = (kind, R, g_gamma)
        start, dend, dstart, d_scale, weights = initial_state, dfinal_state, dS0, 1.0 / scale, None
        if plan.cut:
            start = _segment_states(
                plan, k, v, gate, None, initial_state, None, scale, normalize, reverse, mirror=False
            )
        if normalize:
            both = torch.empty(2, B * HV, T, dtype=torch.float32, device=device)
            weights = both[0], both[1]
            _normaliser[(HV * plan.slots,)](
                q, *q.stride()[:3], k, *k.stride()[:3], o, do, *do.stride()[:3], _or(R, q), _or(g_gamma, q),
                _or(start, q), *_or(start, q).stride(), *weights, plan.cu, plan.table,
                T, H, HV, plan.cuts, plan.length, scale,
                EPS=EPS, K=K, V=V, BK=_power(K), BV=_power(V), C=plan.tile.chunk, GATE=kind, REVERSE=reverse,
                HAS_S0=start is not None, LAYOUT=plan.layout, PRECISION=plan.precision, num_warps=8, num_stages=1,
            )  # fmt: skip
        if plan.cut:
            dend = _segment_states(
                plan, q, do, gate, weights, dfinal_state, dS0, scale, normalize, reverse, mirror=True
            )
            d_scale, dstart = 1.0, None
        BN = min(plan.tile.block, _power(max(K, V)))
        TK, TV = triton.cdiv(K, BN), triton.cdiv(V, BN)
        rho = edge = q
        if rho_wanted:
            rho = torch.empty(2, TK, B * HV, T, dtype=torch.float32, device=device)
            edge = torch.empty(plan.slots, HV, 2, TK, dtype=torch.float32, device=device)
        _backward[((2 * TK + TV) * HV * plan.slots,)](
            q, *q.stride()[:3], k, *k.stride()[:3], v, *v.stride()[:3], do, *do.stride()[:3], dq, dk, dv,
            _or(R, q), _or(g_gamma, q), *(weights or (q, q)), rho, edge, _or(start, q), *_or(start, q).stride(),
            _or(dend, q), *_or(dend, q).stride(), _or(dstart, q), plan.cu, plan.table,
            T, N, H, HV, plan.cuts, plan.length, plan.slots, B * HV, scale, d_scale,
            EPS=EPS, K=K, V=V, BK=_power(K), BV=_power(V), BN=BN, C=plan.tile.chunk, GATE=kind, REVERSE=reverse,
            NORMALIZE=normalize, RHO=rho_wanted, HAS_S0=start is not None, HAS_DS1=dend is not None,
            HAS_DS0=dstart is not None, LAYOUT=plan.layout, TOKENS=plan.tokens, PRECISION=plan.precision,
            num_warps=plan.tile.warps, num_stages=plan.tile.stages,
        )  # fmt: skip
        dg = dgamma = None
        if rho_wanted:
            part = torch.empty(plan.slots, HV, dtype=torch.float32, device=device) if wants_dgamma else rho
            dg = torch.empty(B, T, HV, dtype=g.dtype, device=device) if wants_dg and g is not None else None
            _gate_gradient[(HV * plan.slots,)](
                rho, edge, _or(dg, rho), part, plan.cu, plan.table,
                T, N, HV, plan.cuts, plan.length, plan.slots, B * HV,
                TILES=TK, REVERSE=reverse, LAYOUT=plan.layout, SUM=wants_dgamma,
                BL=_power(plan.length), num_warps=8,
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
    tile = tiles.tile("step", "any", K, V, False)
    BN = min(tile.block, _power(V))
    kind = 1 if g is not None else 2 if g_gamma is not None else 0
    with _on(q):
        _step[((1 if normalize else triton.cdiv(V, BN)) * HV * B,)](
            q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2], o, state, *state.stride(),
            _or(g, q), *_or(g, q).stride()[:2], _or(g_gamma, q), _or(state_indices, q),
            1 if state_indices is None else state_indices.stride(0), H, HV, state.shape[0], scale,
            EPS=EPS, K=K, V=V, BK=_power(K), BN=BN, GATE=kind, NORMALIZE=normalize,
            INDEXED=state_indices is not None, num_warps=tile.warps,
        )  # fmt: skip
    return o

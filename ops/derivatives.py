"""The derivatives of linear attention, written as calls of linear attention.

The family is closed under differentiation. With LA the operator and LA~ the anticausal pass (token t sees what later
tokens wrote, decayed by exp(g_{t+1}) and on: the reversed operator with its gates moved by one token),

    o  = s LA(q, k, v)        dq = s LA(do, v, k)     state transposed
    dv =   LA~(k, s q, do)    dk =   LA~(v, do, s q)  state transposed
    dg_t = sum over i >= t of (q_i . dq_i - k_i . dk_i), plus <S_T, dS_T>

so `gradients` below is the backward operator in terms of the forward one. The backward kernels compute the same faster;
this form is what makes them differentiable, to any order and in either mode, on any device. `tangent` is forward mode.
Both work in float32 (float64 for float64 inputs), whatever the dtype of the inputs: sums over time that cancel need it.

`op(q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse)` is the forward
operator. Derivation and proofs: docs/mathematics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import state_dtype
from . import private
from .reference import EPS
from .rules import uncast

Forward = Callable[..., Any]  # returns (Tensor, Tensor | None)


class _Time:
    """Sums and shifts along time inside each sequence, in walking order, without a copy to the host.

    The first token walked is the first of the sequence, or with `reverse` the last. Every method takes [B, T, ...].
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> None:
        self.reverse, self.packed = reverse, cu_seqlens is not None
        T = x.shape[1]
        if cu_seqlens is None:
            cu_seqlens = torch.arange(2, device=x.device) * T
        starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        # The sequence of each token; N, one past the last sequence, for tokens outside every one.
        at = torch.arange(T, device=x.device)
        row = torch.searchsorted(ends, at, right=True)
        self.inside = (row < starts.shape[0]) & (at >= cu_seqlens[0])
        self.row = row.masked_fill(~self.inside, starts.shape[0])
        empty = starts == ends
        first, last = (ends - 1, starts) if reverse else (starts, ends - 1)
        # T stands for "no such token"; the methods put a zero there.
        self.first, self.last = first.masked_fill(empty, T), last.masked_fill(empty, T)

    def _at(self, x: Tensor, index: Tensor) -> Tensor:
        """The values at one token of every sequence: [N, ...]. Zero for empty sequences."""
        x = torch.cat([x, torch.zeros_like(x[:, :1]) if x.shape[1] else x.new_zeros(x.shape[0], 1, *x.shape[2:])], 1)
        return x[0].index_select(0, index) if self.packed else x.index_select(1, index)[:, 0]

    def at_first(self, x: Tensor) -> Tensor:
        return self._at(x, self.first)

    def at_last(self, x: Tensor) -> Tensor:
        return self._at(x, self.last)

    def spread(self, x: Tensor) -> Tensor:
        """A value of every sequence, [N, ...], at each of its tokens: [B, T, ...]. Zero outside the sequences."""
        if not self.packed:
            return x[:, None].expand(-1, self.row.shape[0], *x.shape[1:])
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])]).index_select(0, self.row)[None]

    def cumsum(self, x: Tensor) -> Tensor:
        """From the first token walked to each token, inclusive. Zero outside the sequences."""
        total = x.flip(1).cumsum(1).flip(1) if self.reverse else x.cumsum(1)
        if not self.packed:
            return total
        return self._mask(total - self.spread(self.at_first(total - x)), ~self.inside)

    def next(self, x: Tensor) -> Tensor:
        """At each token the value of the token walked after it in its sequence; zero at the last."""
        zero = x.new_zeros(x.shape[0], 1, *x.shape[2:])
        moved = torch.cat([zero, x], 1)[:, :-1] if self.reverse else torch.cat([x, zero], 1)[:, 1:]
        row = torch.cat([self.row.new_full((1,), -1), self.row, self.row.new_full((1,), -1)])
        neighbour = row[:-2] if self.reverse else row[2:]
        return self._mask(moved, (neighbour != self.row) | ~self.inside)

    def within(self, x: Tensor) -> Tensor:
        """Zero at tokens outside every sequence: what stands there may be NaN, and a sum over time would spread it."""
        return self._mask(x, ~self.inside) if self.packed else x

    @staticmethod
    def _mask(x: Tensor, tokens: Tensor) -> Tensor:
        return x.masked_fill(tokens.view(1, -1, *[1] * (x.ndim - 2)), 0)


def _scale(q: Tensor, scale: float | None) -> float:
    """The factor on q. As a number also while sizes are symbolic: widths do not vary, and PyTorch's pass over symbolic
    floats stumbles over graphs that need this one and nothing else of the width (torch 2.13, KeyError)."""
    return int(q.shape[3]) ** -0.5 if scale is None else scale


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None, scale: float | None, time: _Time
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """s q, k, v and the gates in the working dtype, with as many key heads as value heads, zero outside sequences."""
    dtype, (B, T, H, K), HV = state_dtype(q), q.shape, v.shape[2]
    q = q.to(dtype) * _scale(q, scale)
    q, k = (x.to(dtype).unsqueeze(3).expand(B, T, H, HV // H, K).reshape(B, T, HV, K) for x in (q, k))
    if g_gamma is not None:
        g = g_gamma.expand(B, T, HV)
    gate = None if g is None else time.within(g.to(dtype))
    return time.within(q), time.within(k), time.within(v.to(dtype)), gate


def _split(state: Tensor | None, V: int) -> tuple[Tensor | None, Tensor | None]:
    """The state of v and z, [N, HV, K, V] and [N, HV, K, 1]."""
    return (None, None) if state is None else (state[..., :V], state[..., V:])


def _add(terms: Sequence[Tensor | None]) -> Tensor | None:
    given = [x for x in terms if x is not None]
    return sum(given[1:], given[0]) if given else None


def gradients(
    op: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    normalize: bool,
    reverse: bool,
    do: Tensor,
    dfinal_state: Tensor | None,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What the backward operator returns, by calls of the forward one. Differentiable in every tensor argument."""
    H, V = q.shape[2], v.shape[3]
    time = _Time(v, cu_seqlens, reverse)
    a, b, c, gate = _prepare(q, k, v, g, g_gamma, scale, time)
    behind = None if gate is None else time.next(gate)

    def causal(x: Tensor, y: Tensor, z: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
        return op(x, y, z, gate, None, S, True, cu_seqlens, 1.0, False, reverse)

    def anticausal(x: Tensor, y: Tensor, z: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
        out, S = op(x, y, z, behind, None, S, True, cu_seqlens, 1.0, False, not reverse)
        return out, S if gate is None else time.at_first(gate).exp()[..., None, None] * S

    S0, z0 = _split(initial_state, V) if normalize else (initial_state, None)
    dS1, dz1 = _split(dfinal_state, V) if normalize else (dfinal_state, None)
    d = time.within(do.to(a.dtype))
    ones = torch.ones_like(c[..., :1])
    if normalize:
        den = causal(a, b, ones, z0)[0] + EPS
        o = causal(a, b, c, S0)[0] / den
        d = d / den
        dden = -(d * o).sum(-1, keepdim=True)  # the gradient of the denominator

    da, S1 = causal(d, c, b, None if S0 is None else S0.mT)
    dc, dS0 = anticausal(b, a, d, dS1)
    db, _ = anticausal(c, d, a, None if dS1 is None else dS1.mT)
    inner = None if dS1 is None else (S1 * dS1.mT).sum((-1, -2))
    if normalize:  # the same with the column of ones in the place of v
        da_z, z1 = causal(dden, ones, b, None if z0 is None else z0.mT)
        db_z, _ = anticausal(ones, dden, a, None if dz1 is None else dz1.mT)
        _, dz0 = anticausal(b, a, dden, dz1)
        da, db, dS0 = da + da_z, db + db_z, torch.cat([dS0, dz0], -1)
        inner = None if dz1 is None or inner is None else inner + (z1 * dz1.mT).sum((-1, -2))

    dgate = None
    if gate_grad and gate is not None:
        rho = (a * da).sum(-1) - (b * db).sum(-1)
        whole = time.cumsum(rho)
        dgate = time.spread(time.at_last(whole)) - whole + rho  # the sum over this token and those walked later
        if inner is not None:
            dgate = dgate + time.spread(inner)

    def per_key_head(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], H, x.shape[2] // H, x.shape[3]).sum(3)

    return (
        (_scale(q, scale) * per_key_head(da)).to(q.dtype),
        per_key_head(db).to(k.dtype),
        dc.to(v.dtype),
        None if dgate is None or g is None else dgate.to(g.dtype),
        None if dgate is None or g_gamma is None else dgate.sum((0, 1)).to(g_gamma.dtype),
        None if initial_state is None else dS0,
    )


def tangent(
    op: Forward,
    primals: Sequence[Any],
    tangents: Sequence[Any],
) -> tuple[Tensor, Tensor | None]:
    """Forward mode: the tangents of (o, final_state). Both sequences hold the operator's arguments in order."""
    q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse = primals
    tq, tk, tv, tg, tg_gamma, tS0 = tangents[:6]
    V = v.shape[3]
    time = _Time(v, cu_seqlens, reverse)
    a, b, c, gate = _prepare(q, k, v, g, g_gamma, scale, time)
    ta, tb, tc, tgate = _prepare(
        torch.zeros_like(q) if tq is None else tq,
        torch.zeros_like(k) if tk is None else tk,
        torch.zeros_like(v) if tv is None else tv,
        tg,
        tg_gamma,
        scale,
        time,
    )
    # d exp(G_i - G_j) = (G'_i - G'_j) exp(G_i - G_j): the tangent of the gates is a difference of two calls
    G = None if tgate is None else time.cumsum(tgate)

    def run(x: Tensor, y: Tensor, z: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
        return op(x, y, z, gate, None, S, True, cu_seqlens, 1.0, False, reverse)

    def linear(c: Tensor, tc: Tensor | None, S0: Tensor | None, tS0: Tensor | None) -> tuple[Tensor, Tensor]:
        """The tangent of run(a, b, c, S0), the operator without its normaliser."""
        terms: list[tuple[Tensor, Tensor | None]] = []
        if tq is not None:
            terms.append((run(ta, b, c, S0)[0], None))
        if tk is not None or tS0 is not None:
            terms.append(run(a, tb, c, tS0))
        if tc is not None:
            terms.append(run(a, b, tc, None))
        if G is not None:
            full, S_full = run(a, b, c, S0)
            less, S_less = run(a, G.unsqueeze(-1) * b, c, None)
            terms.append((G.unsqueeze(-1) * full - less, time.at_last(G)[..., None, None] * S_full - S_less))
        out, S = _add([x for x, _ in terms]), _add([x for _, x in terms])
        if S is None:  # only q has a tangent
            rows = c.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            S = c.new_zeros(rows, c.shape[2], b.shape[3], c.shape[3])
        return torch.zeros_like(c) if out is None else out, S

    if not normalize:
        out, S = linear(c, None if tv is None else tc, initial_state, tS0)
    else:
        (S0, z0), (tS, tz) = _split(initial_state, V), _split(tS0, V)
        ones = torch.ones_like(c[..., :1])
        den = run(a, b, ones, z0)[0] + EPS
        o = run(a, b, c, S0)[0] / den
        out, S = linear(c, None if tv is None else tc, S0, tS)
        tden, z = linear(ones, None, z0, tz)
        out, S = (out - o * tden) / den, torch.cat([S, z], -1)
    return out.to(v.dtype), S if output_final_state else None


def vjp_of_gradients(
    op: Forward, arguments: Sequence[Any], needed: Sequence[bool], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Reverse mode through the backward operator: an entry for each of its arguments, None where none is needed."""
    wanted = [i for i, need in enumerate(needed) if need and i != 10]  # all but o, which `gradients` makes again
    defined = [i for i, x in enumerate(cotangents) if x is not None]

    if not wanted or not defined:
        return [None] * len(arguments)

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        full = list(arguments)
        for i, x in zip(wanted, tensors, strict=True):
            full[i] = x
        with uncast(full[0].device.type):
            outputs = gradients(op, *full[:10], *full[11:])
        return tuple(x for x, c in zip(outputs, cotangents, strict=True) if x is not None and c is not None)

    inputs, given = [arguments[i] for i in wanted], tuple(cotangents[i] for i in defined)
    if private.AVAILABLE:
        pull: Any = torch.func.vjp(function, *inputs)[1]
        found = pull(given)
    else:  # torch.func does not know an operator that has `register_autograd` alone
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs = [x.view_as(x) if x.requires_grad else x.detach().requires_grad_() for x in inputs]
            outputs = function(*inputs)
        found = torch.autograd.grad(
            outputs, inputs, given, create_graph=again, allow_unused=True, materialize_grads=True
        )
    result: list[Tensor | None] = [None] * len(arguments)
    for i, x in zip(wanted, found, strict=True):
        result[i] = x
    return result

"""The operators on a CPU: batched ATen products, one loop over segments, memory linear in T, float64 included.

- `chunk_forward`, `chunk_backward`: by chunks of C tokens. A segment of n chunks is the unit of work: large enough that
  the calls themselves cost little, small enough that its products stay in the cache.
- `recurrent_forward`, `recurrent_backward`: the definition, one token at a time.
- `step_`: one token, the state updated in place.

Arguments are those of the operators (see `torch_la.checks`), already checked. Inside, all are batches of matrices:

    [N, C, width]     N = n * B * HV   n chunks of a segment   B batch   HV value heads   C tokens of a chunk

q and k are repeated for the value heads that share them. States are [B * HV, K, V], in float32 (float64 for float64).
`reference.chunk` explains the three steps of a chunk; the gradients are proved in docs/mathematics. With `reverse` the
walk is from the last chunk to the first, and "before" a token stands what follows it.
"""

from __future__ import annotations

import itertools
from functools import cached_property

import torch
from torch import Tensor

from .. import checks
from .reference import EPS

CHUNK = 64
# Elements of q, k or v that a segment has for each thread: calls cost little, and a core's cache holds a few of them.
SEGMENT = 1 << 16
# With so many for each thread in one chunk, the products of a chunk are enough for a call. Where there is nothing else
# to do (one row, no gate, no normaliser) a segment is then one chunk: its products read their operands by strides,
# while those of several chunks need a copy of each (`_Sequence.read`).
VIEW = 1 << 14
# exp(-128) is 0 in float32 and exp(-1000) in float64: a stronger decay is the same decay. The bound keeps -inf, and the
# sums of huge log-decays, from turning into NaN or losing the digits of their weak neighbours.
STRONGEST = {torch.float32: -128.0, torch.float64: -1000.0}

# The vector library behind `exp` sets its accuracy up in its first call. If that call is a parallel one, another thread
# may run before it is done: the first decays of a process then had errors of 1e-9 in float64, one process in ten.
# So: one call first that is not parallel.
torch.zeros(1, dtype=torch.float64, device="cpu").exp_()


class Decay:
    """How a chunk decays what passes through it. None instead of a Decay: nothing decays."""

    def __init__(self, gate: Tensor, dtype: torch.dtype, reverse: bool) -> None:
        """gate: [N, C] log-decays in float64, where their sums keep the digits that float32 differences need."""
        self.dtype, self.reverse = dtype, reverse
        self.G = _sums(gate, reverse).unsqueeze(2)
        self.G_end = self.G[:, :1] if reverse else self.G[:, -1:]

    @cached_property
    def within(self) -> Tensor:
        """[N, C, C]  W_ij = exp(G_i - G_j) for j <= i, else 0: from token j to token i."""
        return _triangle((self.G - self.G.mT).to(self.dtype).exp_(), self.reverse)

    @cached_property
    def before(self) -> Tensor:
        """[N, C, 1]  exp(G_i): from the start of the chunk to token i."""
        return self.G.to(self.dtype, copy=True).exp_()

    @cached_property
    def after(self) -> Tensor:
        """[N, C, 1]  exp(G_end - G_j): from token j to the end of the chunk."""
        return (self.G_end - self.G).to(self.dtype).exp_()

    @cached_property
    def whole(self) -> Tensor:
        """[N, 1, 1]  exp(G_end)."""
        return self.G_end.to(self.dtype, copy=True).exp_()


def _triangle(x: Tensor, reverse: bool) -> Tensor:
    """What a token sees of its chunk: what stands before it (with `reverse`: behind it). In place."""
    return x.triu_() if reverse else x.tril_()


def _sums(x: Tensor, reverse: bool) -> Tensor:
    """Sums over the tokens of a chunk, [N, C, ...], each with those before it (with `reverse`: those behind it)."""
    return x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)


class _Sequence:
    """Sequences of one length that are walked together: all rows of a batch, or one packed sequence.

    A segment has a place (run, i): `runs` are stretches of equal segments. `places` are in walking order.
    """

    def __init__(
        self,
        start: int,
        end: int,
        states: slice,
        heads: int,
        dtype: torch.dtype,
        gate: Tensor | None,
        reverse: bool,
        chunk: int,
        chunks: int,
    ) -> None:
        self.states, self.heads, self.dtype, self.reverse = states, heads, dtype, reverse
        self.chunk_count = -(-(end - start) // chunk)
        self.runs: list[tuple[slice, tuple[int, int, int]]] = []  # tokens; segments, chunks of each, tokens of each
        self.places: list[tuple[int, int]] = []
        whole, rest = divmod((end - start) // chunk, chunks)
        for count, n, C in ((whole, chunks, chunk), (1, rest, chunk), (1, 1, (end - start) % chunk)):
            size = count * n * C
            if size:
                order = range(count)
                self.places += [(len(self.runs), i) for i in (reversed(order) if reverse else order)]
                self.runs.append((slice(end - size, end) if reverse else slice(start, start + size), (count, n, C)))
                start, end = (start, end - size) if reverse else (start + size, end)
        self.gate = None if gate is None else self.cut(gate.unsqueeze(3))
        # A fixed decay, which is expanded over time, is computed once for each run.
        self.fixed: dict[int, Decay] | None = {} if gate is not None and gate.stride(1) == 0 else None

    def cut(self, x: Tensor) -> list[Tensor | tuple[Tensor, ...]]:
        """[B, T, heads, width] -> for each run its segments, views [n, B, heads, C, width], or without n = B = 1."""
        views = [x[:, at].unflatten(1, sizes).permute(1, 2, 0, 4, 3, 5) for at, sizes in self.runs]
        views = [x.flatten(1, 3) if x.shape[1:3] == (1, 1) else x for x in views]
        return [x.unbind() if x.size(-2) > 1 else x for x in views]  # at once: faster, but not for a view of each token

    def read(self, x: Tensor) -> Tensor:
        """One segment of those, [N, C, width]: no copy if n = B = 1, the dtype is right and no heads are shared."""
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if x.size(-3) < self.heads:
            x = x.repeat_interleave(self.heads // x.size(-3), -3)
        return x if x.dim() == 3 else x.flatten(0, -3)

    def write(self, into: Tensor, x: Tensor) -> None:
        """The inverse of `read`. The gradients of the value heads that share a key head are added."""
        if into.size(-3) < self.heads:
            x = x.unflatten(0, (*into.shape[:-2], self.heads // into.size(-3))).sum(-3)
        into.copy_(x if into.dim() == x.dim() else x.view_as(into))

    def chunks(self, m: int, *segments: Tensor) -> list[tuple[Tensor, ...]]:
        """The chunks of segments [N, ...], each of m matrices, in walking order."""
        if segments[0].size(0) == m:
            return [segments]
        chunks = list(zip(*(x.split(m) for x in segments), strict=True))
        return chunks[::-1] if self.reverse else chunks

    def decay(self, run: int, i: int) -> Decay | None:
        if self.gate is None:
            return None
        if self.fixed is not None and run in self.fixed:
            return self.fixed[run]
        gate = self.gate[run][i].to(torch.float64).clamp(min=STRONGEST[self.dtype])
        decay = Decay(gate.flatten(0, -3).squeeze(2), self.dtype, self.reverse)
        if self.fixed is not None:
            self.fixed[run] = decay
        return decay


def _sequences(
    q: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    reverse: bool,
    chunk: int,
) -> list[_Sequence]:
    """Every packed sequence, or all rows at once."""
    B, T, _, K = q.shape
    HV, V = v.shape[2:]
    gate = g if g_gamma is None else g_gamma.expand(B, T, HV)
    size, threads = max(1, B * HV * CHUNK * max(K, V)), torch.get_num_threads()
    chunks = max(1, SEGMENT * threads // size) if chunk > 1 else 1
    if B == 1 and gate is None and not normalize and size >= VIEW * threads:
        chunks = 1
    parts = [(0, T, slice(None))]  # with the rows of the state that are its own
    if cu_seqlens is not None:
        cuts = itertools.pairwise(checks.offsets(cu_seqlens, T))
        parts = [(start, end, slice(n, n + 1)) for n, (start, end) in enumerate(cuts)]
    return [_Sequence(*part, HV, checks.state_dtype(q), gate, reverse, chunk, chunks) for part in parts]


def _state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, given: Tensor | None, normalize: bool) -> Tensor:
    """A fresh contiguous state [N, HV, K, V (+ 1)], zero or a copy of the given one."""
    if given is not None:
        return given.clone(memory_format=torch.contiguous_format)
    shape = (checks.states(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3] + normalize)
    return torch.zeros(shape, dtype=checks.state_dtype(q))


def _outputs(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Contiguous; zero where a packed batch may hold tokens outside every sequence."""
    return like.new_empty(like.shape) if cu_seqlens is None else like.new_zeros(like.shape)


def _ones(x: Tensor, normalize: bool) -> Tensor:
    """The normaliser is a value that is always 1, whose state is z."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if normalize else x


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _causal(scores: Tensor, decay: Decay | None, reverse: bool) -> Tensor:
    return _triangle(scores, reverse) if decay is None else scores.mul_(decay.within)


def _whole(decay: Decay | None) -> list[Tensor]:
    """To be cut into chunks with other arguments, or not to be there."""
    return [] if decay is None else [decay.whole]


def _pass(S: Tensor, b: Tensor, c: Tensor, *whole: Tensor, scale: float = 1.0) -> None:
    """Takes a state past a chunk, in place: S = whole S + scale b^T c, b or c decayed to the end of the chunk."""
    for factor in whole:
        S.mul_(factor)
    S.baddbmm_(b.mT, c, alpha=scale)


def chunk_forward(
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
    o = _outputs(v, cu_seqlens)
    state = _state(q, v, cu_seqlens, initial_state, normalize)
    for walk in _sequences(q, v, g, g_gamma, cu_seqlens, normalize, reverse, CHUNK):
        S = state[walk.states].flatten(0, 1)
        q_, k_, v_, o_ = map(walk.cut, (q, k, v, o))
        left = walk.chunk_count
        for run, i in walk.places:
            a, b, c = walk.read(q_[run][i]), walk.read(k_[run][i]), _ones(walk.read(v_[run][i]), normalize)
            decay = walk.decay(run, i)
            out = torch.bmm(_causal(torch.bmm(a, b.mT), decay, reverse), c)
            if decay is not None:
                a, c = decay.before * a, decay.after * c
            for out_i, a_i, b_i, c_i, *whole in walk.chunks(len(S), out, a, b, c, *_whole(decay)):
                out_i.baddbmm_(a_i, S, beta=scale, alpha=scale)
                left -= 1
                if left or output_final_state:
                    _pass(S, b_i, c_i, *whole)
            if normalize:
                out = out[..., :-1] / (out[..., -1:] + EPS)
            walk.write(o_[run][i], out)
    return o, state if output_final_state else None


def chunk_backward(
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
    dq, dk, dv = (_outputs(x, cu_seqlens) for x in (q, k, v))
    gate_grad = gate_grad and not (g is None and g_gamma is None)
    dgate = torch.zeros(v.shape[:3], dtype=checks.state_dtype(q)) if gate_grad else None
    state = _state(q, v, cu_seqlens, initial_state, normalize)
    dstate = _state(q, v, cu_seqlens, dfinal_state, normalize)
    for walk in _sequences(q, v, g, g_gamma, cu_seqlens, normalize, reverse, CHUNK):
        S, dS = state[walk.states].flatten(0, 1), dstate[walk.states].flatten(0, 1)
        q_, k_, v_, do_, dq_, dk_, dv_ = map(walk.cut, (q, k, v, do, dq, dk, dv))
        o_ = walk.cut(o) if o is not None else None
        dgate_ = walk.cut(dgate.unsqueeze(3)) if dgate is not None else None
        kept = []  # the states in which the walk enters each chunk, by segments
        left = walk.chunk_count
        for run, i in walk.places:
            b, c = walk.read(k_[run][i]), _ones(walk.read(v_[run][i]), normalize)
            decay = walk.decay(run, i)
            c = c if decay is None else decay.after * c
            entered = []
            for b_i, c_i, *whole in walk.chunks(len(S), b, c, *_whole(decay)):
                entered.append(S)
                left -= 1
                if left or dgate_ is not None:
                    S = S.clone()
                    _pass(S, b_i, c_i, *whole)
            kept.append(torch.cat(entered[::-1] if reverse else entered) if len(entered) > 1 else entered[0])
        left = walk.chunk_count
        for run, i in reversed(walk.places):
            states = kept.pop()
            a, b, c = walk.read(q_[run][i]), walk.read(k_[run][i]), _ones(walk.read(v_[run][i]), normalize)
            d = walk.read(do_[run][i])
            decay = walk.decay(run, i)
            before, after = (None, None) if decay is None else (decay.before, decay.after)
            P = _causal(torch.bmm(a, b.mT), decay, reverse)
            if normalize:
                assert o_ is not None
                total = P.sum(-1, keepdim=True) + _times(torch.bmm(a, states[..., -1:]), before)
                d = d / (scale * total + EPS)
                d = torch.cat([d, -(d * walk.read(o_[run][i])).sum(-1, keepdim=True)], -1)
            R = _causal(torch.bmm(d, c.mT), decay, reverse)
            d_start = _times(d, before)
            da = torch.bmm(R, b).baddbmm_(d_start, states.mT, beta=scale, alpha=scale)
            db, dc = torch.bmm(R.mT, a), torch.bmm(P.mT, d)
            b_end, c_end = _times(b, after), _times(c, after)
            owed = []
            segments = db, dc, b_end, c_end, a, d_start, states, *_whole(decay)
            for db_i, dc_i, b_i, c_i, a_i, d_i, S_i, *whole in reversed(walk.chunks(len(S), *segments)):
                db_i.baddbmm_(c_i, dS.mT, beta=scale)
                dc_i.baddbmm_(b_i, dS, beta=scale)
                if dgate_ is not None:
                    owed.append((S * dS).sum((1, 2), keepdim=True))
                    S = S_i
                left -= 1
                if left or initial_state is not None:
                    _pass(dS, a_i, d_i, *whole, scale=scale)
            walk.write(dq_[run][i], da)
            walk.write(dk_[run][i], db)
            walk.write(dv_[run][i], dc[..., :-1] if normalize else dc)
            if dgate_ is not None:
                # Summed inside the chunk only; what later chunks owe to the gates stands in <S, dS> at the chunk's end.
                rho = (a * da).sum(-1, keepdim=True) - (b * db).sum(-1, keepdim=True)
                later = torch.cat(owed if reverse else owed[::-1])
                walk.write(dgate_[run][i], _sums(rho, not reverse) + later)
    return dq, dk, dv, *_gate_grads(dgate, g, g_gamma), dstate if initial_state is not None else None


def _gate_grads(dgate: Tensor | None, g: Tensor | None, g_gamma: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A fixed decay is a gate that is the same at every token, so its gradient is the sum over tokens."""
    if dgate is None:
        return None, None
    if g is not None:
        return dgate.to(g.dtype), None
    assert g_gamma is not None
    return None, dgate.sum((0, 1)).to(g_gamma.dtype)


def recurrent_forward(
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
    o = _outputs(v, cu_seqlens)
    state = _state(q, v, cu_seqlens, initial_state, normalize)
    for walk in _sequences(q, v, g, g_gamma, cu_seqlens, normalize, reverse, 1):
        S = state[walk.states].flatten(0, 1)
        q_, k_, v_, o_ = map(walk.cut, (q, k, v, o))
        for run, i in walk.places:
            a, b, c = walk.read(q_[run][i]), walk.read(k_[run][i]), _ones(walk.read(v_[run][i]), normalize)
            S = _token(S, b, c, walk.decay(run, i))
            out = scale * torch.bmm(a, S)
            if normalize:
                out = out[..., :-1] / (out[..., -1:] + EPS)
            walk.write(o_[run][i], out)
        state[walk.states] = S.view_as(state[walk.states])
    return o, state if output_final_state else None


def _token(S: Tensor, b: Tensor, c: Tensor, decay: Decay | None) -> Tensor:
    """The recurrence itself: S_t = exp(g_t) S_{t-1} + k_t v_t^T."""
    return torch.addcmul(S if decay is None else decay.whole * S, b.mT, c)


def recurrent_backward(
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
    dq, dk, dv = (_outputs(x, cu_seqlens) for x in (q, k, v))
    gate_grad = gate_grad and not (g is None and g_gamma is None)
    dgate = torch.zeros(v.shape[:3], dtype=checks.state_dtype(q)) if gate_grad else None
    state = _state(q, v, cu_seqlens, initial_state, normalize)
    dstate = _state(q, v, cu_seqlens, dfinal_state, normalize)
    for walk in _sequences(q, v, g, g_gamma, cu_seqlens, normalize, reverse, 1):
        q_, k_, v_, do_, dq_, dk_, dv_ = map(walk.cut, (q, k, v, do, dq, dk, dv))
        o_ = walk.cut(o) if o is not None else None
        dgate_ = walk.cut(dgate.unsqueeze(3)) if dgate is not None else None
        # The backward walk needs the state at every token. Only every CHUNK-th is kept; those between are made again.
        kept, S = [], state[walk.states].flatten(0, 1)
        for n, (run, i) in enumerate(walk.places):
            if n % CHUNK == 0:
                kept.append(S)
            S = _token(S, walk.read(k_[run][i]), _ones(walk.read(v_[run][i]), normalize), walk.decay(run, i))
        dS = dstate[walk.states].flatten(0, 1)
        for n, S in reversed(list(enumerate(kept))):
            segment = walk.places[n * CHUNK : (n + 1) * CHUNK]
            states = [S]
            for run, i in segment:
                b, c = walk.read(k_[run][i]), _ones(walk.read(v_[run][i]), normalize)
                states.append(_token(states[-1], b, c, walk.decay(run, i)))
            for run, i in reversed(segment):
                S, S_before = states.pop(), states[-1]
                a, b, c = walk.read(q_[run][i]), walk.read(k_[run][i]), _ones(walk.read(v_[run][i]), normalize)
                a, d = scale * a, walk.read(do_[run][i])
                if normalize:
                    assert o_ is not None
                    d = d / (torch.bmm(a, S[..., -1:]) + EPS)
                    d = torch.cat([d, -(d * walk.read(o_[run][i])).sum(-1, keepdim=True)], -1)
                dS = torch.addcmul(dS, a.mT, d)
                walk.write(dq_[run][i], scale * torch.bmm(d, S.mT))
                walk.write(dk_[run][i], torch.bmm(c, dS.mT))
                walk.write(dv_[run][i], torch.bmm(b, dS)[..., : v.shape[-1]])
                decay = walk.decay(run, i)
                if decay is not None:
                    dS = decay.whole * dS
                if dgate_ is not None:
                    walk.write(dgate_[run][i], (dS * S_before).sum((1, 2), keepdim=True))
        dstate[walk.states] = dS.view_as(dstate[walk.states])
    return dq, dk, dv, *_gate_grads(dgate, g, g_gamma), dstate if initial_state is not None else None


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
    dtype, HV = state.dtype, v.shape[1]
    a, b = (x.to(dtype).repeat_interleave(HV // q.shape[1], 1) for x in (q, k))  # [B, HV, K]
    c = _ones(v.to(dtype), normalize)
    gate = g_gamma.unsqueeze(0) if g_gamma is not None else g
    S, inside = state, None
    if state_indices is not None:
        inside = (state_indices >= 0) & (state_indices < state.shape[0])
        a, b, c = a[inside], b[inside], c[inside]
        gate = g[inside] if g is not None else gate
        slots = state_indices[inside].to(torch.int64)
        S = state[slots]
    if gate is not None:
        S.mul_(gate.to(dtype).exp()[..., None, None])
    S.add_(b.unsqueeze(-1) * c.unsqueeze(-2))
    out = scale * (a.unsqueeze(-2) @ S).squeeze(-2)
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + EPS)
    if state_indices is None:
        return out.to(v.dtype)
    state[slots] = S
    o = torch.zeros(v.shape, dtype=v.dtype)
    o[inside] = out.to(v.dtype)
    return o

"""The operators on a CPU: batched ATen products, one loop over segments, memory linear in T, float64 included.

- `chunk_forward`, `chunk_backward`: by chunks of C tokens. A segment of n chunks is the unit of work: large enough that
  the calls themselves cost little, small enough that its products stay in the cache.
- `recurrent_forward`, `recurrent_backward`: the definition, one token at a time.
- `step_`: one token, the state updated in place.

Arguments are those of the operators (see `torch_la.checks`), already checked. Inside, time stands next to the widths:

    [B, H, G, n, C, width]     B batch   H key heads   G value heads that share a key head
                               n chunks of a segment   C tokens of a chunk

so that q and k, whose G is 1, broadcast over their group. States are [B, H, G, K, V], in float32 (float64 for float64).
`reference.chunk` explains the three steps of a chunk; the gradients are proved in docs/mathematics.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import checks
from .reference import EPS

CHUNK = 64
SEGMENT = 1 << 18  # elements of q, k or v in a segment: 1 MiB of float32, so that a few of them share a core's cache
# exp(-128) is 0 in float32 and exp(-1000) in float64: a stronger decay is the same decay. The bound keeps -inf, and the
# sums of huge log-decays, from turning into NaN or losing the digits of their weak neighbours.
STRONGEST = {torch.float32: -128.0, torch.float64: -1000.0}

# The vector library behind `exp` sets its accuracy up in its first call. If that call is a parallel one, another thread
# may run before it is done: the first decays of a process then had errors of 1e-9 in float64, one process in ten.
# So: one call first that is not parallel.
torch.zeros(1, dtype=torch.float64).exp_()


class Decay(NamedTuple):
    """How a chunk decays what passes through it. None instead of a Decay: nothing decays."""

    within: Tensor  # [B, H, G, n, C, C]  W_ij = exp(G_i - G_j) for j <= i, else 0: from token j to token i
    before: Tensor  # [B, H, G, n, C, 1]  exp(G_i): from the start of the chunk to token i
    after: Tensor  # [B, H, G, n, C, 1]  exp(G_end - G_j): from token j to the end of the chunk
    whole: Tensor  # [B, H, G, n, 1, 1]  exp(G_end)


def _decay(gate: Tensor | None, dtype: torch.dtype) -> Decay | None:
    """gate: [B, H, G, n, C] log-decays in float64, where their sums keep the digits that float32 differences need."""
    if gate is None:
        return None
    G = gate.cumsum(-1)
    end = G[..., -1:]
    later = torch.ones(G.shape[-1], G.shape[-1], dtype=torch.bool).triu(1)
    within = (G.unsqueeze(-1) - G.unsqueeze(-2)).to(dtype).masked_fill_(later, -torch.inf).exp_()
    before, after, whole = (x.to(dtype).exp_().unsqueeze(-1) for x in (G.clone(), end - G, end.clone()))
    return Decay(within, before, after, whole)


class _Sequence:
    """One batch of equally long sequences (all rows, or one packed sequence), read by segments in walking order."""

    def __init__(
        self,
        start: int,
        end: int,
        H: int,
        dtype: torch.dtype,
        gate: Tensor | None,
        constant_gate: bool,
        reverse: bool,
        chunk: int,
        chunks: int,
    ) -> None:
        self.start, self.end, self.H, self.dtype, self.reverse = start, end, H, dtype, reverse
        self.gate, self.constant_gate, self.chunk, self.chunks = gate, constant_gate, chunk, chunks
        self._constant: dict[int, Decay | None] = {}

    def __iter__(self) -> Iterator[slice]:
        """The segments, in walking order: whole chunks, and at the end of the walk what is left of one."""
        length = self.end - self.start
        rest = length % self.chunk
        cuts = [*range(0, length - rest, self.chunk * self.chunks), length - rest]
        if rest:
            cuts.append(length)
        for a, b in itertools.pairwise(cuts):
            yield slice(self.end - b, self.end - a) if self.reverse else slice(self.start + a, self.start + b)

    def _chunks(self, at: slice) -> tuple[int, int]:
        length = at.stop - at.start
        return (length // self.chunk, self.chunk) if length >= self.chunk else (1, length)

    def read(self, x: Tensor, at: slice) -> Tensor:
        """[B, T, heads, width] -> [B, H, heads / H, n, C, width] in walking order.

        Contiguous: several products read it, and each would make a copy of its own.
        """
        x = x[:, at].to(self.dtype)
        x = x.flip(1) if self.reverse else x
        return x.unflatten(1, self._chunks(at)).unflatten(3, (self.H, -1)).permute(0, 3, 4, 1, 2, 5).contiguous()

    def write(self, into: Tensor, at: slice, x: Tensor) -> None:
        """The inverse of `read`, into a tensor [B, T, heads, width] of any dtype."""
        x = x.permute(0, 3, 4, 1, 2, 5).flatten(3, 4).flatten(1, 2)
        into[:, at].copy_(x.flip(1) if self.reverse else x)

    def decay(self, at: slice) -> Decay | None:
        length = at.stop - at.start
        if self.constant_gate and length in self._constant:
            return self._constant[length]
        gate = None
        if self.gate is not None:
            gate = self.gate[:, at].unsqueeze(3).to(torch.float64).clamp(min=STRONGEST[self.dtype])
            gate = gate.flip(1) if self.reverse else gate
            gate = gate.unflatten(1, self._chunks(at)).unflatten(3, (self.H, -1)).permute(0, 3, 4, 1, 2, 5).squeeze(5)
        decay = _decay(gate, self.dtype)
        if self.constant_gate:
            self._constant[length] = decay
        return decay


def _sequences(
    q: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    chunk: int,
) -> list[tuple[_Sequence, slice]]:
    """Every sequence with the rows of the state that are its own: all of them at once unless they are packed."""
    B, T, H, K = q.shape
    chunks = max(1, SEGMENT // (max(B, 1) * v.shape[2] * CHUNK * max(K, v.shape[3]))) if chunk > 1 else 1
    gate = g
    if g_gamma is not None:
        gate = g_gamma.expand(1, T, -1)
    cuts = [0, T] if cu_seqlens is None else checks.offsets(cu_seqlens, T)
    return [
        (
            _Sequence(start, end, H, checks.state_dtype(q), gate, g is None, reverse, chunk, chunks),
            slice(None) if cu_seqlens is None else slice(n, n + 1),
        )
        for n, (start, end) in enumerate(itertools.pairwise(cuts))
    ]


def _state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, given: Tensor | None, normalize: bool) -> Tensor:
    """A fresh contiguous state [N, H, G, K, V (+ 1)], zero or a copy of the given one."""
    H, K, (HV, V) = q.shape[2], q.shape[3], v.shape[2:]
    shape = (checks.states(q, cu_seqlens), HV, K, V + normalize)
    if given is None:
        state = torch.zeros(shape, dtype=checks.state_dtype(q))
    else:
        state = given.clone(memory_format=torch.contiguous_format)
    return state.unflatten(1, (H, HV // H))


def _outputs(like: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Contiguous; zero where a packed batch may hold tokens outside every sequence."""
    return like.new_empty(like.shape) if cu_seqlens is None else like.new_zeros(like.shape)


def _ones(x: Tensor, normalize: bool) -> Tensor:
    """The normaliser is a value that is always 1, whose state is z."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1) if normalize else x


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _per_key_head(x: Tensor) -> Tensor:
    """The gradients of the value heads that share a key head, added."""
    return x.sum(2, keepdim=True) if x.shape[2] > 1 else x


def _causal(scores: Tensor, decay: Decay | None) -> Tensor:
    return scores.tril_() if decay is None else scores * decay.within  # within may have more heads than scores


def _added(b: Tensor, c: Tensor, decay: Decay | None) -> Tensor:
    """What each chunk adds to the state: [B, H, G, n, K, V]."""
    return b.mT @ (c if decay is None else decay.after * c)


def _scan(S: Tensor, added: Tensor, decay: Decay | None, backward: bool = False) -> tuple[Tensor, Tensor]:
    """The state in which the walk enters each chunk [B, H, G, n, K, V], and the one in which it leaves the last.

    `backward`: the walk enters the last chunk first, as the gradient of the state does.
    """
    states = torch.empty_like(added)
    order = range(added.shape[3])
    for i in reversed(order) if backward else order:
        states[:, :, :, i] = S
        S = added[:, :, :, i] + S if decay is None else torch.addcmul(added[:, :, :, i], decay.whole[:, :, :, i], S)
    return states, S


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
    for sequence, rows in _sequences(q, v, g, g_gamma, cu_seqlens, reverse, CHUNK):
        S = state[rows]
        for at in sequence:
            a, b, c = scale * sequence.read(q, at), sequence.read(k, at), _ones(sequence.read(v, at), normalize)
            decay = sequence.decay(at)
            states, S = _scan(S, _added(b, c, decay), decay)
            out = _times(a @ states, None if decay is None else decay.before)
            out += _causal(a @ b.mT, decay) @ c
            if normalize:
                out = out[..., :-1] / (out[..., -1:] + EPS)
            sequence.write(o, at, out)
        if output_final_state:
            state[rows] = S
    return o, state.flatten(1, 2) if output_final_state else None


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
    for sequence, rows in _sequences(q, v, g, g_gamma, cu_seqlens, reverse, CHUNK):
        segments = list(sequence)
        kept, S = [], state[rows]  # the states in which the walk enters each chunk, by segments
        for at in segments:
            decay = sequence.decay(at)
            c = _ones(sequence.read(v, at), normalize)
            states, S = _scan(S, _added(sequence.read(k, at), c, decay), decay)
            kept.append(states)
        dS = dstate[rows]  # the gradient of the state at the end of the segment
        for at in reversed(segments):
            states = kept.pop()
            a, b, c = scale * sequence.read(q, at), sequence.read(k, at), _ones(sequence.read(v, at), normalize)
            d = sequence.read(do, at)
            decay = sequence.decay(at)
            before, after = (None, None) if decay is None else (decay.before, decay.after)
            P = _causal(a @ b.mT, decay)
            if normalize:
                assert o is not None
                d = d / (P.sum(-1, keepdim=True) + _times(a @ states[..., -1:], before) + EPS)
                d = torch.cat([d, -(d * sequence.read(o, at)).sum(-1, keepdim=True)], -1)
            dstates, dS = _scan(dS, _times(a, before).mT @ d, decay, backward=True)  # at the end of each chunk
            R = _causal(d @ c.mT, decay)
            da = R @ b + _times(d @ states.mT, before)
            db = R.mT @ a + _times(c @ dstates.mT, after)
            dc = P.mT @ d + _times(b @ dstates, after)
            sequence.write(dq, at, scale * _per_key_head(da))
            sequence.write(dk, at, _per_key_head(db))
            sequence.write(dv, at, dc[..., :-1] if normalize else dc)
            if dgate is not None:
                # Summed inside the chunk only; what later chunks owe to the gates stands in <S, dS> at the chunk's end.
                rho = (a * da).sum(-1, keepdim=True) - (b * db).sum(-1, keepdim=True)
                ends = torch.cat([states[:, :, :, 1:], S.unsqueeze(3)], 3)
                owed = (ends * dstates).sum((4, 5)).unsqueeze(-1).unsqueeze(-1)
                sequence.write(dgate.unsqueeze(-1), at, rho.flip(4).cumsum(4).flip(4) + owed)
            S = states[:, :, :, 0]
        dstate[rows] = dS
    return dq, dk, dv, *_gate_grads(dgate, g, g_gamma), dstate.flatten(1, 2) if initial_state is not None else None


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
    for sequence, rows in _sequences(q, v, g, g_gamma, cu_seqlens, reverse, 1):
        S = state[rows]
        for at in sequence:
            a, b, c = scale * sequence.read(q, at), sequence.read(k, at), _ones(sequence.read(v, at), normalize)
            S = _token(S, b, c, sequence.decay(at))
            out = a @ S.unsqueeze(3)
            if normalize:
                out = out[..., :-1] / (out[..., -1:] + EPS)
            sequence.write(o, at, out)
        if output_final_state:
            state[rows] = S
    return o, state.flatten(1, 2) if output_final_state else None


def _token(S: Tensor, b: Tensor, c: Tensor, decay: Decay | None) -> Tensor:
    """The recurrence itself: S_t = exp(g_t) S_{t-1} + k_t v_t^T."""
    return (S if decay is None else decay.whole[:, :, :, 0] * S) + (b.mT * c)[:, :, :, 0]


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
    for sequence, rows in _sequences(q, v, g, g_gamma, cu_seqlens, reverse, 1):
        tokens = list(sequence)
        # The backward walk needs the state at every token. Only every CHUNK-th is kept; those between are made again.
        kept, S = [], state[rows]
        for i, at in enumerate(tokens):
            if i % CHUNK == 0:
                kept.append(S)
            S = _token(S, sequence.read(k, at), _ones(sequence.read(v, at), normalize), sequence.decay(at))
        dS = dstate[rows]
        for n, S in reversed(list(enumerate(kept))):
            segment = tokens[n * CHUNK : (n + 1) * CHUNK]
            states = [S]
            for at in segment:
                b, c = sequence.read(k, at), _ones(sequence.read(v, at), normalize)
                states.append(_token(states[-1], b, c, sequence.decay(at)))
            for at in reversed(segment):
                S, S_before = states.pop(), states[-1]
                a, b, c = scale * sequence.read(q, at), sequence.read(k, at), _ones(sequence.read(v, at), normalize)
                d = sequence.read(do, at)
                if normalize:
                    assert o is not None
                    d = d / (a @ S[..., -1:].unsqueeze(3) + EPS)
                    d = torch.cat([d, -(d * sequence.read(o, at)).sum(-1, keepdim=True)], -1)
                dS = dS + (a.mT * d)[:, :, :, 0]
                S1, dS1 = S.unsqueeze(3), dS.unsqueeze(3)
                sequence.write(dq, at, scale * _per_key_head(d @ S1.mT))
                sequence.write(dk, at, _per_key_head(c @ dS1.mT))
                sequence.write(dv, at, (b @ dS1)[..., : v.shape[-1]])
                decay = sequence.decay(at)
                if decay is not None:
                    dS = decay.whole[:, :, :, 0] * dS
                if dgate is not None:
                    sequence.write(dgate.unsqueeze(-1), at, (dS * S_before).sum((3, 4))[..., None, None, None])
        dstate[rows] = dS
    return dq, dk, dv, *_gate_grads(dgate, g, g_gamma), dstate.flatten(1, 2) if initial_state is not None else None


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

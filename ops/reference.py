"""Causal linear attention in plain PyTorch: the definition, and the chunked form derived from it.

- `recurrent`: the definition, one token at a time. Truth for every test of this library.
- `chunk`: the same function by chunks, as matrix products. Every fast kernel computes this; read it before them.

Both are ordinary differentiable PyTorch without in-place writes, on any device, in float64 for float64 inputs
and in float32 for every other dtype. They take the arguments of the operators, and check nothing.

    B batch   T time   H key heads   HV value heads (a multiple of H)   K key width   V value width
    N states: B, or the number of packed sequences

    S_t = exp(g_t) S_{t-1} + k_t v_t^T          S: [K, V]
    o_t = scale * q_t S_t

With `normalize`, v grows a column of ones, so that the last column of the state is z_t = exp(g_t) z_{t-1} + k_t, and

    o_t = scale * q_t S_t / (scale * q_t z_t + EPS)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-10  # keeps 0 / 0 (a token that has met no key yet) at 0

Result = tuple[Tensor, Tensor | None]


def recurrent(
    q: Tensor,  # [B, T, H, K]
    k: Tensor,  # [B, T, H, K]
    v: Tensor,  # [B, T, HV, V]
    g: Tensor | None = None,  # [B, T, HV], log-decay of each token, natural logarithm
    g_gamma: Tensor | None = None,  # [HV], one log-decay per head for all tokens
    initial_state: Tensor | None = None,  # [N, HV, K, V], or [N, HV, K, V + 1] with normalize
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,  # [N + 1], offsets of packed sequences; then B = 1
    scale: float | None = None,  # default K ** -0.5
    normalize: bool = False,
    reverse: bool = False,
) -> Result:
    """The definition: a loop over tokens. Returns o [B, T, HV, V] and the final state, or None."""

    def sequence(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for t in range(q.shape[1]):
            if g is not None:
                S = g[:, t, :, None, None].exp() * S
            S = S + k[:, t, :, :, None] * v[:, t, :, None, :]
            out.append((q[:, t, :, None, :] @ S).squeeze(-2))
        return (torch.stack(out, 1) if out else torch.zeros_like(v)), S

    return _per_sequence(
        sequence, q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse
    )


def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    reverse: bool = False,
    chunk_size: int = 64,
) -> Result:
    """The same function by chunks of `chunk_size` tokens. Arguments and results as in `recurrent`."""

    def sequence(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, S: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for t in range(0, q.shape[1], chunk_size):
            # one chunk, heads before time: [B, HV, C, width]
            a, b, c = (x[:, t : t + chunk_size].transpose(1, 2) for x in (q, k, v))
            gates = a.new_zeros(a.shape[:3]) if g is None else g[:, t : t + chunk_size].transpose(1, 2)
            # log-decay from the start of the chunk to token i, inclusive: in float64, since the differences of large
            # ones keep the digits of small ones; and finite, since -inf less -inf is NaN (exp(-1000) is 0)
            G = gates.double().clamp(min=-1000).cumsum(-1)
            # 1. What token j wrote reaches token i >= j of the same chunk, decayed by exp(G_i - G_j). The mask is
            #    inside the exponent: above the diagonal the difference is positive and could overflow.
            causal = torch.ones(a.shape[2], a.shape[2], dtype=torch.bool, device=a.device).tril()
            W = (G[..., :, None] - G[..., None, :]).masked_fill(~causal, -torch.inf).exp().to(a.dtype)
            within = (a @ b.mT * W) @ c
            # 2. What came before the chunk stands in the state, decayed by exp(G_i).
            before = G.exp().to(a.dtype)[..., None] * (a @ S)
            out.append((within + before).transpose(1, 2))
            # 3. The state moves to the end of the chunk: each token's write decays by exp(G_end - G_j).
            end = G[..., -1:]
            S = end.exp().to(a.dtype)[..., None] * S + b.mT @ ((end - G).exp().to(a.dtype)[..., None] * c)
        return (torch.cat(out, 1) if out else torch.zeros_like(v)), S

    return _per_sequence(
        sequence, q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse
    )


def _per_sequence(
    sequence: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
    cu_seqlens: Tensor | None,
    scale: float | None,
    normalize: bool,
    reverse: bool,
) -> Result:
    """What the two forms share: dtype, scale, head groups, normaliser, direction and packing."""
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    (B, T, H, K), (HV, V) = q.shape, v.shape[2:]
    q = q.to(dtype) * (K**-0.5 if scale is None else scale)
    q, k = (x.to(dtype).repeat_interleave(HV // H, dim=2) for x in (q, k))
    x = v.to(dtype)
    if normalize:
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    if g_gamma is not None:
        g = g_gamma.expand(B, T, HV)
    if g is not None:
        g = g.to(dtype)

    offsets = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    S0 = x.new_zeros(B if cu_seqlens is None else len(offsets) - 1, HV, K, x.shape[-1])
    if initial_state is not None:
        S0 = S0 + initial_state.to(dtype)
    parts, states = [torch.zeros_like(x[:, : offsets[0]])], []  # tokens before the first offset
    for n, (start, end) in enumerate(itertools.pairwise(offsets)):
        S = S0 if cu_seqlens is None else S0[n : n + 1]
        inputs = [None if y is None else y[:, start:end] for y in (q, k, x, g)]
        if reverse:
            inputs = [None if y is None else y.flip(1) for y in inputs]
        out, S = sequence(*inputs, S)
        parts.append(out.flip(1) if reverse else out)
        states.append(S)
    parts.append(torch.zeros_like(x[:, offsets[-1] :]))  # tokens past the last offset
    o = torch.cat(parts, 1)
    if normalize:
        o = o[..., :V] / (o[..., V:] + EPS)
    final_state = (torch.cat(states) if states else S0) if output_final_state else None
    return o.to(v.dtype), final_state

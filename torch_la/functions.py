"""The public functions. Each is ten lines: take the arguments, call the operator.

Every function takes the same arguments with the same defaults:

    B batch   T time   H key heads   HV value heads, a multiple of H (each key head serves HV / H value heads)
    K key width   V value width   N states: B, or the number of packed sequences

    S_t = exp(g_t) S_{t-1} + k_t v_t^T         S: [K, V], float32
    o_t = scale * q_t S_t
    o_t = scale * q_t S_t / (scale * q_t z_t + 1e-10), z_t = exp(g_t) z_{t-1} + k_t         with normalize

Source of the formula: Katharopoulos et al. 2020 (https://arxiv.org/abs/2006.16236), with the decay of RetNet
(https://arxiv.org/abs/2307.08621) and the data-dependent scalar decay of Mamba-2 (https://arxiv.org/abs/2405.21060).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks, ops

_ARGUMENTS = """
    Args:
        q: queries [B, T, H, K]; float32, bfloat16, float16, and float64 on the CPU. Any strides; where the last
            dimension is contiguous nothing is copied, so slices of a packed qkv projection may be passed as they are.
        k: keys [B, T, H, K], dtype and device of q.
        v: values [B, T, HV, V], dtype and device of q.
        g: log-decay of each token and value head [B, T, HV], natural logarithm, any floating dtype. Usually at most 0;
            above 0 the state grows. None: no decay.
        g_gamma: one log-decay for each value head [HV], the same at every token (see `torch_la.decay`). Not together
            with g.
        initial_state: [N, HV, K, V], or [N, HV, K, V + 1] with `normalize`, whose last column is z. float32 (float64
            for float64 inputs), any strides. None: zeros.
        output_final_state: return the state after the last token too.
        cu_seqlens: [N + 1] int32 or int64 on the device of q: sequence n is the tokens cu_seqlens[n] to
            cu_seqlens[n + 1]. B must be 1. Empty sequences are legal. Tokens past the last offset give zeros. On CUDA
            the host never reads it.
        scale: factor on q; default K ** -0.5.
        normalize: divide by the running sum of the attention weights, in float32.
        reverse: run from the last token to the first: flip in time, run, flip back.

    Returns:
        o [B, T, HV, V] in the dtype of v, and the final state [N, HV, K, V (+ 1)] in float32, or None. Both contiguous.

    Raises:
        ValueError: a wrong shape, a wrong value, or two arguments that exclude each other.
        TypeError: a wrong dtype, device or Python type. Every message names the argument and shows what came.

    Differentiable in q, k, v, g, g_gamma and initial_state, to any order, in reverse and forward mode.
"""


def _documented(function: Any) -> Any:
    function.__doc__ += "\n" + _ARGUMENTS
    return function


@_documented
def chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention, the sequence in segments that run at once: few heads, long sequences."""
    return ops.chunk.operator(
        q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse
    )


@_documented
def fused_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention in one kernel that reads every input once: batch x heads enough to fill the GPU."""
    return ops.fused_chunk.operator(
        q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse
    )


@_documented
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention token by token in exact float32: a few tokens, or checking the other operators."""
    return ops.recurrent.operator(
        q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse
    )


# On a GPU: up to this many tokens behind a state the recurrence is mostly the cheaper form (docs/performance.md); from
# this many walks on, one per head fills it.
RECURRENT_TOKENS = 4
FILLING_PROGRAMS = 128


@_documented
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention by the operator that suits the shapes.

    The rule reads no values, so it traces: `recurrent` on a GPU for at most 4 tokens that continue an initial state,
    `fused_chunk` where N * HV * ceil(V / 64), the walks that run at once, is at least 128, else `chunk`. While tracing
    with dynamic sizes, `chunk` too wherever they would decide.
    """
    operator = select(q, v, initial_state, cu_seqlens)
    return operator(q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse)


def select(q: Any, v: Any, initial_state: Any, cu_seqlens: Any, device: str | None = None) -> Any:
    """The operator that `linear_attention` calls on this type of device, by default that of q.

    Any of them for arguments that all refuse.
    """
    if not (isinstance(q, Tensor) and q.ndim == 4):
        return ops.chunk.operator
    continues = initial_state is not None and (device or q.device.type) != "cpu"
    if continues and _surely(q.shape[1] <= RECURRENT_TOKENS):
        return ops.recurrent.operator
    packed = isinstance(cu_seqlens, Tensor) and cu_seqlens.ndim == 1
    rows = cu_seqlens.shape[0] - 1 if packed else q.shape[0]
    heads, width = (v.shape[2], v.shape[3]) if isinstance(v, Tensor) and v.ndim == 4 else (1, 1)
    filling = _surely(rows * heads * ((width + 63) // 64) >= FILLING_PROGRAMS)
    return ops.fused_chunk.operator if filling else ops.chunk.operator


def _surely(condition: Any) -> bool:
    """Does it hold whatever the sizes that are still symbolic? A guard instead would split a dynamic length in two.

    `chunk` is then the answer, and a good one: on a GPU it cuts sequences into segments only where that is needed.
    """
    if isinstance(condition, bool) and not torch.compiler.is_compiling():  # Dynamo takes a symbolic bool for one
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    *,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """One token of `recurrent`, for generation: the state is updated in place.

    Args:
        q: [B, H, K], one token of each row; dtypes as in `recurrent`.
        k: [B, H, K].
        v: [B, HV, V].
        state: the states [B, HV, K, V], or a pool of S slots [S, HV, K, V]; one column wider with `normalize`. float32
            (float64 for float64 inputs), any strides. Written in place.
        g: log-decay [B, HV], or None.
        g_gamma: log-decay per head [HV], or None.
        state_indices: [B] int32 or int64, the slot of each row. Rows whose slot lies outside 0 to S - 1 are skipped: no
            state is touched and their output is zero. Two rows must not name the same slot. None: row b owns state b.
        scale: default K ** -0.5.
        normalize: as in `recurrent`.

    Returns:
        o [B, HV, V] in the dtype of v.

    Raises:
        ValueError, TypeError: as in `recurrent`.
        RuntimeError: an input requires a gradient or carries a tangent. A write in place has no derivative;
            use `recurrent` with T = 1.
    """
    return ops.recurrent_step.operator(q, k, v, state, g, g_gamma, state_indices, scale, normalize)


def normalize_output(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Divides an unnormalised output by its denominator: o_t / (scale * q_t z_t + 1e-10), z_t = exp(g_t) z_{t-1} + k_t.

    What `normalize=True` does inside the operators, as a function of its own. The flag is more precise, since o is then
    not rounded to its dtype before the division.

    Args:
        o: the output of an operator with `normalize=False`, [B, T, HV, V].
        q, k, g, g_gamma, cu_seqlens, scale, reverse: what made it.
        initial_state: z before the first token, [N, HV, K, 1] in float32. None: zeros.
        output_final_state: return z after the last token too.

    Returns:
        the normalised output in the dtype of o, and the final z [N, HV, K, 1] or None.

    Raises:
        ValueError, TypeError: as in the operators.
    """
    checks.tensors(o=o, q=q)
    checks._ndim("q", q, "B, T, H, K")
    checks._ndim("o", o, "B, T, HV, V")
    checks._shape("o", o, (*q.shape[:2], *o.shape[2:]), "B, T, HV, V")
    checks._dtype("o", o, q.dtype, "like q")
    ones = torch.ones_like(o[..., :1])
    den, z = linear_attention(
        *(q, k, ones, g, g_gamma),
        initial_state=initial_state,
        output_final_state=output_final_state,
        cu_seqlens=cu_seqlens,
        scale=scale,
        reverse=reverse,
    )
    dtype = checks.state_dtype(o)
    return (o.to(dtype) / (den.to(dtype) + ops.reference.EPS)).to(o.dtype), z

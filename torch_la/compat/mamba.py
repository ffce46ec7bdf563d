"""mamba_ssm's scan and one-token update (2.3.2), computed by the operators of this library.

Mamba-2 (https://arxiv.org/abs/2405.21060, section 3) is linear attention with a decay for each token and head:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T          h: [P, N], the transpose of this library's state
    y_t = h_t C_t + D x_t                               q = C, k = B, v = dt x, g = dt A, scale 1

    B batch   T tokens   H heads   P width of a head   G groups of B and C, H a multiple of G   N state width

Names and defaults are those of `mamba_ssm.ops.triton.ssd_combined` and `.selective_state_update`; every difference is
on the page docs/moving. Mamba-1, whose decay differs from channel to channel, is another family: it raises.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import checks, functions

Limit = tuple[float, float]


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: Limit = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The selective state-space scan of Mamba-2 over whole sequences.

    Args:
        x: [B, T, H, P]; float32, bfloat16, float16, and float64 on the CPU.
        dt: step sizes [B, T, H], before bias, softplus and limits; any floating dtype.
        A: [H], usually negative; the log-decay of a token is dt A. Any floating dtype.
        B: [B, T, G, N], dtype of x.
        C: [B, T, G, N], dtype of x.
        chunk_size: a positive int. The result does not depend on it; the tiles are this library's.
        D: factor of the skip connection, [H] or [H, P].
        z: gate [B, T, H, P]: the output is multiplied by silu(z).
        dt_bias: [H], added to dt.
        initial_states: [B, H, P, N], any floating dtype, any strides. None: zeros.
        seq_idx: [B, T], an integer for each token: the state starts afresh wherever it changes.
        cu_seqlens: [S + 1], only with `return_varlen_states`: sequence s is the tokens cu_seqlens[s] to
            cu_seqlens[s + 1] of the one row, and seq_idx must say the same.
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: dt is clamped to this range, last of all.
        return_final_states: return the state after the last token of each row too.
        return_varlen_states: return the final state of each of the S sequences too.
        state_dtype: None or the dtype of the state here, float32 (float64 for float64 inputs).

    Returns:
        y [B, T, H, P] in the dtype of x; (y, final_states [B, H, P, N]) with `return_final_states`;
        (y, varlen_states [S, H, P, N]) with `return_varlen_states`. States are float32, contiguous.

    Raises:
        ValueError, TypeError: wrong arguments, by name, before anything runs.
        NotImplementedError: a combination that this family does not cover, by name.

    Differentiable in every floating argument, to any order; compiles with fullgraph=True.
    """
    checks.tensors(x=x, dt=dt, A=A, B=B, C=C, D_or_None=D, z_or_None=z, dt_bias_or_None=dt_bias)
    checks.tensors(initial_states_or_None=initial_states, seq_idx_or_None=seq_idx, cu_seqlens_or_None=cu_seqlens)
    checks.options(
        None,
        dt_softplus=dt_softplus,
        return_final_states=return_final_states,
        return_varlen_states=return_varlen_states,
    )
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, (int, torch.SymInt)) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive int: got {chunk_size=}")
    dtype = checks.state_dtype(x)
    if state_dtype not in (None, dtype):
        raise NotImplementedError(f"state_dtype must be None or {dtype}, which states are kept in: got {state_dtype=}")
    checks._ndim("x", x, "B, T, H, P")
    rows, T, H, P = x.shape
    checks._shape("dt", dt, (rows, T, H), "B, T, H")
    checks._ndim("B", B, "B, T, G, N")
    G, N = B.shape[2:]
    checks._shape("B", B, (rows, T, G, N), "B, T, G, N")
    checks._shape("C", C, (rows, T, G, N), "B, T, G, N")
    checks._shape("A", A, (H,), "H")
    _common(x, B, C, dt=dt, A=A, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states)
    if D is not None:
        checks._shape("D", D, (H,) if D.ndim == 1 else (H, P), "H" if D.ndim == 1 else "H, P")
        D = D[:, None] if D.ndim == 1 else D
    if z is not None:
        checks._shape("z", z, (rows, T, H, P), "B, T, H, P")
    if dt_bias is not None:
        checks._shape("dt_bias", dt_bias, (H,), "H")
    if initial_states is not None:
        checks._shape("initial_states", initial_states, (rows, H, P, N), "B, H, P, N")
    if seq_idx is not None:
        checks._shape("seq_idx", seq_idx, (rows, T), "B, T")
        _same_device("seq_idx", seq_idx, x)
        if seq_idx.dtype.is_floating_point:
            raise TypeError(f"seq_idx must have an integer dtype: got seq_idx.dtype={seq_idx.dtype}")
    _varlen(seq_idx, cu_seqlens, initial_states, return_final_states, return_varlen_states)

    v, g = discretize(x, dt, A, dt_bias, dt_softplus, dt_limit)
    if seq_idx is not None:
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[:, :T]
        g = g.masked_fill(starts[..., None], -math.inf)  # forgets everything before
    y, state = functions.linear_attention(
        *(C, B, v, g),
        initial_state=None if initial_states is None else initial_states.to(dtype).mT,
        output_final_state=return_final_states or return_varlen_states,
        cu_seqlens=cu_seqlens,
        scale=1.0,
    )
    y = skip_and_gate(y, x, D, z)
    return y if state is None else (y, state.mT.contiguous())


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """One token of the scan, for generation: the state is updated in place.

    Every tensor may lack its H dimension; there is one head then.

    Args:
        state: [B, H, P, N], or a pool of slots [S, H, P, N] with `state_batch_indices`. Any strides. Written in place:
            float32 directly (float64 for float64 inputs), any other floating dtype by way of a float32 copy of it all.
        x: [B, H, P].
        dt: [B, H, P], the same over P: one step size for each head, expanded (stride 0).
        A: [H, P, N], the same over P and N: one value for each head, expanded (stride 0).
        B: [B, G, N], dtype of x.
        C: [B, G, N], dtype of x.
        D: factor of the skip connection, [H, P].
        z: gate [B, H, P]: the output is multiplied by silu(z).
        dt_bias: [H, P], the same over P, expanded (stride 0).
        dt_softplus: apply softplus to dt + dt_bias.
        state_batch_indices: [B] int32 or int64, the slot of each row; a row whose slot lies outside the pool (-1:
            padding) touches no state, and its output is zero.

    Returns:
        y [B, H, P] in the dtype of x.

    Raises:
        ValueError, TypeError: wrong arguments, by name, before anything runs.
        NotImplementedError: dt, A or dt_bias that are not one value for each head: Mamba-1.
        RuntimeError: an input requires a gradient. A write in place has no derivative.
    """
    checks.tensors(state=state, x=x, dt=dt, A=A, B=B, C=C, D_or_None=D, z_or_None=z, dt_bias_or_None=dt_bias)
    checks.options(None, dt_softplus=dt_softplus)
    heads = state.ndim > 3
    state = state.unsqueeze(1) if state.ndim == 3 else state
    x, dt, B, C = (y.unsqueeze(1) if y.ndim == 2 else y for y in (x, dt, B, C))
    A = A.unsqueeze(0) if A.ndim == 2 else A
    z = z.unsqueeze(1) if z is not None and z.ndim == 2 else z
    D, dt_bias = (y.unsqueeze(0) if y is not None and y.ndim == 1 else y for y in (D, dt_bias))

    checks._ndim("state", state, "B, H, P, N")
    S, H, P, N = state.shape
    checks._ndim("x", x, "B, H, P")
    rows = x.shape[0]
    checks._shape("x", x, (rows, H, P), "B, H, P")
    checks._shape("dt", dt, (rows, H, P), "B, H, P")
    checks._shape("A", A, (H, P, N), "H, P, N")
    checks._ndim("B", B, "B, G, N")
    checks._shape("B", B, (rows, B.shape[1], N), "B, G, N")
    checks._shape("C", C, (rows, B.shape[1], N), "B, G, N")
    _common(x, B, C, dt=dt, A=A, D=D, z=z, dt_bias=dt_bias, state=state)
    if D is not None:
        checks._shape("D", D, (H, P), "H, P")
    if z is not None:
        checks._shape("z", z, (rows, H, P), "B, H, P")
    if dt_bias is not None:
        checks._shape("dt_bias", dt_bias, (H, P), "H, P")
        dt_bias = _per_head("dt_bias", dt_bias, 1)
    if state_batch_indices is None:
        checks._shape("state", state, (rows, H, P, N), "B, H, P, N")
    else:
        checks.tensors(state_batch_indices=state_batch_indices)
        checks._shape("state_batch_indices", state_batch_indices, (rows,), "B")
        _same_device("state_batch_indices", state_batch_indices, x)
        if state_batch_indices.dtype not in (torch.int32, torch.int64):
            got = f"got state_batch_indices.dtype={state_batch_indices.dtype}"
            raise TypeError(f"state_batch_indices must be int32 or int64: {got}")

    dtype = checks.state_dtype(x)
    dt, A = _per_head("dt", dt, 1), _per_head("A", A, 2)
    v, g = discretize(x, dt, A, dt_bias, dt_softplus, (-math.inf, math.inf))
    pool = state.to(dtype)  # itself, where the dtype is right
    y = functions.recurrent_step(C, B, v, pool.mT, g, state_indices=state_batch_indices, scale=1.0)
    if state.dtype != dtype:
        if state_batch_indices is not None:  # slots that nobody names keep digits which `dtype` may not have
            named = torch.isin(torch.arange(S, device=x.device), state_batch_indices)
            pool = torch.where(named[:, None, None, None], pool.to(state.dtype), state)
        state.copy_(pool)
    y = skip_and_gate(y, x, D, z)
    if state_batch_indices is not None:
        padding = (state_batch_indices < 0) | (state_batch_indices >= S)
        y = y.masked_fill(padding[:, None, None], 0)  # without the skip connection too, as in mamba_ssm
    return y if heads else y.squeeze(1)


def discretize(
    x: Tensor, dt: Tensor, A: Tensor, bias: Tensor | None, softplus: bool, limit: Limit
) -> tuple[Tensor, Tensor]:
    """What the operators take: the values v = dt x in the dtype of x, and the log-decays g = dt A in float32.

    x is [..., H, P]; dt [..., H] before bias, softplus and limits; A and bias [H].
    """
    dtype = checks.state_dtype(x)
    dt = dt.to(dtype)
    if bias is not None:
        dt = dt + bias.to(dtype)
    if softplus:
        dt = F.softplus(dt)
    pair = isinstance(limit, (tuple, list)) and len(limit) == 2
    if not pair or not all(isinstance(x, (int, float)) for x in limit) or limit[0] > limit[1]:
        raise ValueError(f"dt_limit must be (low, high), numbers with low <= high: got dt_limit={limit!r}")
    low, high = limit
    if high < math.inf or low > (0 if softplus else -math.inf):  # else clamping would be work for nothing
        dt = dt.clamp(low, high)
    return (x * dt[..., None]).to(x.dtype), dt * A.to(dtype)


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """(y + D x) silu(z) in float32, D as [H, P] or [H, 1]."""
    dtype = checks.state_dtype(x)
    if D is not None:
        y = y.to(dtype) + D.to(dtype) * x.to(dtype)
    if z is not None:
        y = y.to(dtype) * F.silu(z.to(dtype))
    return y.to(x.dtype)


def _per_head(name: str, x: Tensor, dims: int) -> Tensor:
    """x without its last `dims` dimensions, over which it must be expanded: its values are then one for each head."""
    out = x
    for d in range(-1, -dims - 1, -1):
        if x.shape[d] != 1 and x.stride(d) != 0:
            raise NotImplementedError(
                f"{name} must be one value for each head, expanded over its last {dims} dimension(s) so that their "
                f"strides are 0; a decay for each channel (Mamba-1) is not of this family: "
                f"got {name}.shape={tuple(x.shape)}, {name}.stride()={x.stride()}"
            )
        out = out.select(-1, 0)
    return out


def _common(x: Tensor, B: Tensor, C: Tensor, **others: Tensor | None) -> None:
    """dtypes, devices and groups."""
    H, P, G, N = x.shape[-2], x.shape[-1], B.shape[-2], B.shape[-1]
    if x.dtype not in checks.DTYPES:
        raise TypeError(f"x must be float32, bfloat16, float16 or (on the CPU) float64: got x.dtype={x.dtype}")
    checks._require(P > 0, lambda: f"x has width 0: got x.shape={tuple(x.shape)}")
    checks._require(N > 0, lambda: f"B has width 0: got B.shape={tuple(B.shape)}")
    checks._require(G > 0, lambda: f"B must have at least one group: got B.shape={tuple(B.shape)}")
    checks._require(
        H % G == 0,
        lambda: f"x must have a multiple of the groups of B: got x.shape={tuple(x.shape)}, B.shape={tuple(B.shape)}",
    )
    for name, y in (("B", B), ("C", C)):
        checks._dtype(name, y, x.dtype, "like x")
    for name, other in ({"B": B, "C": C} | others).items():
        if other is not None:
            checks._floating(name, other)
            _same_device(name, other, x)


def _same_device(name: str, other: Tensor, x: Tensor) -> None:
    if other.device != x.device:
        raise TypeError(f"{name} must be on the device of x: got {name}.device={other.device}, x.device={x.device}")


def _varlen(
    seq_idx: Tensor | None, cu_seqlens: Tensor | None, initial_states: Tensor | None, final: bool, varlen: bool
) -> None:
    """What goes with `return_varlen_states`. mamba_ssm ignores `cu_seqlens` without it; here that raises."""
    if not varlen:
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens is read only with return_varlen_states=True; seq_idx keeps packed sequences apart: "
                f"got cu_seqlens.shape={tuple(cu_seqlens.shape)}, return_varlen_states=False"
            )
        return
    if cu_seqlens is None or seq_idx is None:
        raise ValueError(
            "return_varlen_states=True needs cu_seqlens and seq_idx: "
            f"got cu_seqlens={type(cu_seqlens).__name__}, seq_idx={type(seq_idx).__name__}"
        )
    if initial_states is not None or final:
        raise NotImplementedError(
            "return_varlen_states goes with neither initial_states nor return_final_states; torch_la.linear_attention "
            "takes and returns a state for each sequence"
        )

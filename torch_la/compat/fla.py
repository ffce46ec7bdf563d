"""flash-linear-attention's functions (0.6.0) for this family, computed by the operators of this library.

- linear attention: `chunk_linear_attn`, `fused_chunk_linear_attn`, `fused_recurrent_linear_attn`
- simple GLA: `chunk_simple_gla`, `fused_chunk_simple_gla`, `fused_recurrent_simple_gla`, `parallel_simple_gla`
- retention: `chunk_retention`, `fused_chunk_retention`, `fused_recurrent_retention`, `parallel_retention`
- lightning attention: `chunk_lightning_attn`, `fused_recurrent_lightning_attn`
- in plain PyTorch: `naive_*`

Same arguments, defaults and results; every difference is on the page docs/moving. Unlike there, an argument that nobody
reads raises, everything runs on the CPU too, compiles with fullgraph=True, and is differentiable to any order,
`g_gamma` included.

    B batch   T time   H heads   K key width   V value width   N states: B, or the number of packed sequences

    S_t = exp(g_t) S_{t-1} + k_t v_t^T          o_t = scale * q_t S_t
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import checks, functions
from ..ops import reference

Result = tuple[Tensor, Tensor | None]
Pair = tuple[Tensor, Tensor]

_COMMON = """
    Args:
        q: queries [B, T, H, K]; float32, bfloat16, float16, and float64 on the CPU.
        k: keys [B, T, H, K], dtype of q.
        v: values [B, T, H, V], dtype of q.
"""
_TAIL = """        scale: factor on q; default K ** -0.5.
        initial_state: [N, H, K, V], any floating dtype. None: zeros.
        output_final_state: return the state after the last token too.
        cu_seqlens: offsets of packed sequences [N + 1], int32 or int64, on the device of q; B is 1 then.
"""
_RETURNS = """
    Returns:
        o [B, T, H, V] in the dtype of q, and the final state [N, H, K, V] in float32 (float64 for float64 inputs), or
        None.

    Raises:
        ValueError: a wrong shape, a wrong value, or two arguments that exclude each other.
        TypeError: a wrong dtype, device or Python type; an argument that does not exist.
"""


def _documented(*parts: str) -> Callable[[Any], Any]:
    def document(function: Any) -> Any:
        function.__doc__ += "\n" + "".join(parts)
        return function

    return document


# ----------------------------------------------------------------------------------------------------- what they share


def _unknown(function: str, kwargs: dict[str, Any]) -> None:
    """TypeError for arguments that no one reads. fla swallows them, a misspelt or misplaced gate among them."""
    if kwargs:
        removed = "; head_first is gone from fla too: inputs are [B, T, H, ...]" if "head_first" in kwargs else ""
        raise TypeError(f"{function}() got unexpected keyword arguments {sorted(kwargs)}{removed}")


def _chunk_size(kwargs: dict[str, Any]) -> None:
    """Takes chunk_size out of the arguments: it changes no result, and the tiles are this library's own."""
    size = kwargs.pop("chunk_size", None)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1 or size & (size - 1)):
        raise ValueError(f"chunk_size must be a power of 2: got chunk_size={size!r}")


def _v_first(state_v_first: bool, kwargs: dict[str, Any]) -> bool:
    """state_v_first, or the name that it used to have."""
    if "transpose_state_layout" in kwargs:
        if state_v_first:
            raise ValueError("transpose_state_layout is the old name of state_v_first: got both")
        warnings.warn("transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=3)
        state_v_first = kwargs.pop("transpose_state_layout")
    return state_v_first


def _heads(q: Any) -> int:
    """The heads of q, once it is known to have any: what is made from them comes before the operator's checks."""
    checks.tensors(q=q)
    checks._ndim("q", q, "B, T, H, K")
    H: int = q.shape[2]
    checks._require(H > 0, lambda: f"q must have at least one head: got q.shape={tuple(q.shape)}")
    return H


def _host_offsets(cu_seqlens: Tensor | None, cu_seqlens_cpu: Tensor | None, T: int) -> None:
    """cu_seqlens_cpu saves fla a copy to the host. Here nothing is copied; what it says is checked."""
    if cu_seqlens_cpu is None:
        return
    checks.tensors(cu_seqlens_or_None=cu_seqlens, cu_seqlens_cpu=cu_seqlens_cpu)
    if cu_seqlens is None:
        raise ValueError("cu_seqlens_cpu is a copy of cu_seqlens: got cu_seqlens=None")
    if cu_seqlens_cpu.device.type != "cpu":
        raise TypeError(f"cu_seqlens_cpu must be on the CPU: got cu_seqlens_cpu.device={cu_seqlens_cpu.device}")
    if cu_seqlens_cpu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens_cpu must be int32 or int64: got cu_seqlens_cpu.dtype={cu_seqlens_cpu.dtype}")
    checks._shape("cu_seqlens_cpu", cu_seqlens_cpu, cu_seqlens.shape, "N + 1")
    if not torch.compiler.is_compiling():
        values = checks.offsets(cu_seqlens_cpu, T)
        if cu_seqlens.device.type == "cpu" and values != cu_seqlens.tolist():
            raise ValueError(f"cu_seqlens_cpu must equal cu_seqlens: got {values} and {cu_seqlens.tolist()}")


def _attend(
    function: Callable[..., Result],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    state_v_first: bool = False,
    **options: Any,
) -> Result:
    """One of the operators, with fla's two state layouts and states of any dtype."""
    checks.tensors(q=q, k=k, v=v, initial_state_or_None=initial_state)
    checks.options(None, state_v_first=state_v_first)
    if initial_state is not None:
        checks._floating("initial_state", initial_state)
        checks._ndim("initial_state", initial_state, "N, H, V, K" if state_v_first else "N, H, K, V")
        initial_state = initial_state.to(checks.state_dtype(q))
        initial_state = initial_state.mT if state_v_first else initial_state
    o, state = function(q, k, v, initial_state=initial_state, **options)
    if state is not None and state_v_first:
        state = state.mT.contiguous()
    return o, state


def _attend_normalized(
    function: Callable[..., Result], q: Tensor, k: Tensor, v: Tensor, initial_state: Pair | None, **options: Any
) -> tuple[Tensor, Pair | None]:
    """The same with the normaliser. fla's state is the pair (kv, z); this library's has z as its last column."""
    checks.tensors(q=q, k=k, v=v)
    state = None
    if initial_state is not None:
        if not isinstance(initial_state, tuple) or len(initial_state) != 2:
            raise ValueError(
                "initial_state must be the pair (kv_state, z_state) with normalize=True, since o is divided by q z: "
                f"got {type(initial_state).__name__}"
            )
        kv, z = initial_state
        checks.tensors(**{"initial_state[0]": kv, "initial_state[1]": z})
        checks._ndim("initial_state[0]", kv, "N, H, K, V")
        N, H, K, _ = kv.shape
        checks._shape("initial_state[1]", z, (N, 1, H, K), "N, 1, H, K")
        dtype = checks.state_dtype(q)
        state = torch.cat([kv.to(dtype), z.to(dtype).permute(0, 2, 3, 1)], -1)
    o, final = function(q, k, v, initial_state=state, normalize=True, **options)
    if final is None:
        return o, None
    return o, (final[..., :-1].contiguous(), final[..., -1:].permute(0, 3, 1, 2).contiguous())


def _linear_attn(
    function: Callable[..., Result],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Any,
    normalize: bool,
    **options: Any,
) -> tuple[Tensor, Tensor | Pair | None]:
    checks.options(None, normalize=normalize)
    if normalize:
        return _attend_normalized(function, q, k, v, initial_state, **options)
    if isinstance(initial_state, (tuple, list)):
        raise ValueError("initial_state must be one tensor with normalize=False: got a pair, which has a z_state")
    return _attend(function, q, k, v, initial_state, **options)


# ---------------------------------------------------------------------------------------------------- linear attention

_PAIR = """        scale: factor on q; default K ** -0.5.
        initial_state: [N, H, K, V], or with `normalize` the pair of that and z [N, 1, H, K], the sum of the keys so
            far; any floating dtype. None: zeros.
        output_final_state: return the state after the last token too.
        normalize: divide o_t by scale * q_t z_t + 1e-10.
        cu_seqlens: offsets of packed sequences [N + 1], int32 or int64, on the device of q; B is 1 then.

    Returns:
        o [B, T, H, V] in the dtype of q, and the final state as `initial_state`, in float32, or None.

    Raises:
        ValueError, TypeError: wrong arguments, by name; a state without z with `normalize`, or with z without it.
"""


@_documented(_COMMON, _PAIR)
def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | Pair | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | Pair | None]:
    """Linear attention without decay, by `torch_la.chunk`. `normalize` is True by default, as in fla."""
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    return _linear_attn(functions.chunk, q, k, v, initial_state, normalize, **options)


@_documented(_COMMON, _PAIR)
def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | Pair | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | Pair | None]:
    """Linear attention without decay, by `torch_la.fused_chunk`. `normalize` is True by default, as in fla."""
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    return _linear_attn(functions.fused_chunk, q, k, v, initial_state, normalize, **options)


@_documented(_COMMON, _PAIR)
def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | Pair | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | Pair | None]:
    """Linear attention without decay, by `torch_la.recurrent`. `normalize` is False by default, as in fla.

    With `reverse`, from the last token to the first.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "reverse": reverse,
    }
    return _linear_attn(functions.recurrent, q, k, v, initial_state, normalize, **options)


# ---------------------------------------------------------------------------------------------------------- simple GLA

_GATES = """        g: log-decay of each token and head [B, T, H], natural logarithm, any floating dtype, or None.
        g_gamma: one log-decay for each head [H]; not together with g.
"""


@_documented(_COMMON, _GATES, _TAIL, _RETURNS)
def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Linear attention with a decay for each token and head, by `torch_la.chunk`.

    `state_v_first`: states are [N, H, V, K]. `cu_seqlens_cpu`: a copy of `cu_seqlens`; checked, otherwise not needed.
    `chunk_size` is taken, and changes nothing; any other name raises.
    """
    _chunk_size(kwargs)
    _unknown("chunk_simple_gla", kwargs)
    checks.tensors(q=q)
    _heads(q)
    _host_offsets(cu_seqlens, cu_seqlens_cpu, q.shape[1])
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    return _attend(functions.chunk, q, k, v, initial_state, state_v_first, g=g, g_gamma=g_gamma, **options)


@_documented(_COMMON, _GATES, _TAIL, _RETURNS)
def fused_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """Linear attention with a decay for each token and head, by `torch_la.fused_chunk`."""
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    return _attend(functions.fused_chunk, q, k, v, initial_state, g=g, g_gamma=g_gamma, **options)


@_documented(_COMMON, _GATES, _TAIL, _RETURNS)
def fused_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """Linear attention with a decay for each token and head, by `torch_la.recurrent`.

    `reverse`: from the last token to the first. `state_v_first`: states are [N, H, V, K]; its old name,
    `transpose_state_layout`, warns. Any other name raises.
    """
    state_v_first = _v_first(state_v_first, kwargs)
    _unknown("fused_recurrent_simple_gla", kwargs)
    options: dict[str, Any] = {
        "scale": scale,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "reverse": reverse,
    }
    return _attend(functions.recurrent, q, k, v, initial_state, state_v_first, g=g, g_gamma=g_gamma, **options)


_ATTENTIONS = """        scale: factor on q; default K ** -0.5.
        output_attentions: return the attention matrix [B, H, T, T] too, in the dtype of q. It costs T^2 memory; not
            with packed sequences.
        cu_seqlens: offsets of packed sequences [N + 1], int32 or int64, on the device of q; B is 1 then.

    Returns:
        o [B, T, H, V] in the dtype of q, and the attention matrix or None. No state.

    Raises:
        ValueError, TypeError: wrong arguments, by name.
"""


@_documented(_COMMON, "        g: log-decay of each token and head [B, T, H], or None.\n", _ATTENTIONS)
def parallel_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
) -> Result:
    """Linear attention with a decay for each token and head; the output by `torch_la.chunk`, in linear time.

    `cu_seqlens_cpu`: a copy of `cu_seqlens`; checked, otherwise not needed.
    """
    checks.tensors(q=q)
    checks.options(None, output_attentions=output_attentions)
    _heads(q)
    _host_offsets(cu_seqlens, cu_seqlens_cpu, q.shape[1])
    if output_attentions and cu_seqlens is not None:
        raise ValueError("output_attentions=True does not go with cu_seqlens: sequences of one row share no matrix")
    o, _ = functions.chunk(q, k, v, g, cu_seqlens=cu_seqlens, scale=scale)
    return o, _attentions(q, k, g, scale, v.shape[2]).to(q.dtype) if output_attentions else None


def _attentions(q: Tensor, k: Tensor, g: Tensor | None, scale: float | None, HV: int) -> Tensor:
    """scale (q_i k_j) exp(g_{j+1} + ... + g_i) for j <= i, else 0: [B, HV, T, T] in float32 (float64)."""
    dtype = checks.state_dtype(q)
    q, k = (x.to(dtype).repeat_interleave(HV // x.shape[2], dim=2).transpose(1, 2) for x in (q, k))
    T = q.shape[2]
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    weights = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if g is not None:
        # Row i, column j: the sum of the gates after j up to i; never as a difference of two longer sums.
        terms = g.to(dtype).transpose(1, 2)[..., None].expand(*weights.shape).masked_fill(causal.mT, 0)
        weights = weights * terms.cumsum(-2).masked_fill(~causal, -math.inf).exp()
    return weights.masked_fill(~causal, 0)


# ------------------------------------------------------------------------------------------- retention, with its decay


def _retnet(heads: int, device: torch.device) -> Tensor:
    """RetNet's log(1 - 2^(-5 - h)), made on the device: a copy from the host would stop it."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float32, device=device)))


@_documented(_COMMON, _TAIL, _RETURNS)
def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """`chunk_simple_gla` with RetNet's decay, log(1 - 2^(-5 - h)) for head h (https://arxiv.org/abs/2307.08621).

    `chunk_size` is taken, and changes nothing; any other name raises.
    """
    _chunk_size(kwargs)
    _unknown("chunk_retention", kwargs)
    g_gamma = _retnet(_heads(q), q.device)
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    return _attend(functions.chunk, q, k, v, initial_state, g_gamma=g_gamma, **options)


@_documented(_COMMON, _TAIL, _RETURNS)
def fused_chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`fused_chunk_simple_gla` with RetNet's decay."""
    g_gamma = _retnet(_heads(q), q.device)
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    return _attend(functions.fused_chunk, q, k, v, initial_state, g_gamma=g_gamma, **options)


@_documented(_COMMON, _TAIL, _RETURNS)
def fused_recurrent_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """`fused_recurrent_simple_gla` with RetNet's decay."""
    state_v_first = _v_first(state_v_first, kwargs)
    _unknown("fused_recurrent_retention", kwargs)
    g_gamma = _retnet(_heads(q), q.device)
    options: dict[str, Any] = {
        "scale": scale,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "reverse": reverse,
    }
    return _attend(functions.recurrent, q, k, v, initial_state, state_v_first, g_gamma=g_gamma, **options)


@_documented(_COMMON, _ATTENTIONS)
def parallel_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    output_attentions: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`parallel_simple_gla` with RetNet's decay."""
    g = _retnet(_heads(q), q.device).expand(q.shape[:3])
    return parallel_simple_gla(q, k, v, g, scale, output_attentions, cu_seqlens)


# ------------------------------------------------------------------------------------------------- lightning attention

_LAYER = """        layer_idx: the layer, from 0.
        num_layers: how many layers there are.
"""


def _lightning(heads: int, layer: int, layers: int, device: torch.device) -> Tensor:
    """fla's decay: linear in the head, 0 for head 0. Not that of MiniMax, Ling or MiniCPM: see `torch_la.decay`."""
    checks.sizes(0, layer_idx=layer)
    checks.sizes(num_layers=layers)
    return -(8 / heads * (1 - layer / layers)) * torch.arange(heads, dtype=torch.float32, device=device)


@_documented(_COMMON, _LAYER, _TAIL, _RETURNS)
def chunk_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> Result:
    """`chunk_simple_gla` with fla's own decay, -(8 / H) (1 - layer_idx / num_layers) h for head h.

    It is not the decay of MiniMax, Ling or MiniCPM; for those pass `torch_la.decay.minimax(...)` and the like as
    `g_gamma` of `torch_la.linear_attention`. `chunk_size` is taken, and changes nothing; any other name raises,
    `g_gamma` too, which fla ignores here.
    """
    _chunk_size(kwargs)
    _unknown("chunk_lightning_attn", kwargs)
    g_gamma = _lightning(_heads(q), layer_idx, num_layers, q.device)
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state, "cu_seqlens": cu_seqlens}
    return _attend(functions.chunk, q, k, v, initial_state, g_gamma=g_gamma, **options)


@_documented(_COMMON, _LAYER, _TAIL, _RETURNS)
def fused_recurrent_lightning_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layer_idx: int,
    num_layers: int,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Result:
    """`fused_recurrent_simple_gla` with the decay of `chunk_lightning_attn`."""
    g_gamma = _lightning(_heads(q), layer_idx, num_layers, q.device)
    options: dict[str, Any] = {
        "scale": scale,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "reverse": reverse,
    }
    return _attend(functions.recurrent, q, k, v, initial_state, g_gamma=g_gamma, **options)


# ----------------------------------------------------------------------------------------------------- in plain PyTorch


def naive_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | Pair | None = None,
    output_final_state: bool = False,
    normalize: bool = False,
) -> tuple[Tensor, Tensor | Pair | None]:
    """Linear attention as a loop over tokens. Arguments and results as in `fused_recurrent_linear_attn`."""
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state}
    return _linear_attn(_checked(reference.recurrent), q, k, v, initial_state, normalize, **options)


def naive_chunk_linear_attn(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, normalize: bool = False
) -> Tensor:
    """Linear attention by chunks; any T. Returns o [B, T, H, V] alone."""
    checks.options(scale, normalize=normalize)
    return _checked(reference.chunk)(q, k, v, scale=scale, normalize=normalize)[0]


def naive_chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    scale: float | None = None,
) -> Result:
    """Simple GLA by chunks of `chunk_size` tokens. Returns o in float32 (float64), and the state or None."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be a positive int: got {chunk_size=}")
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state, "chunk_size": chunk_size}
    checks.tensors(q=q, k=k, v=v, g=g)
    q, k, v = (x.to(checks.state_dtype(x)) for x in (q, k, v))  # so that o is not rounded
    return _attend(_checked(reference.chunk), q, k, v, initial_state, g=g, **options)


def naive_recurrent_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = True,
) -> Result:
    """Simple GLA as a loop over tokens. Returns o in the dtype of q, and the state: here it is on by default."""
    checks.tensors(g=g)
    options: dict[str, Any] = {"scale": scale, "output_final_state": output_final_state}
    return _attend(_checked(reference.recurrent), q, k, v, initial_state, g=g, **options)


def naive_parallel_simple_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Simple GLA as one matrix of attention weights. Returns o [B, T, H, V] and the weights [B, H, T, T], float32."""
    checks.tensors(q=q, k=k, v=v, g_or_None=g)
    checks.options(scale)
    checks.attention(q, k, v, g, None, None, None, False)
    weights = _attentions(q, k, g, scale, v.shape[2])
    return (weights @ v.to(weights.dtype).transpose(1, 2)).transpose(1, 2), weights


def naive_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Retention as one matrix of attention weights. Heads come first here, as in fla: [B, H, T, K] and [B, H, T, V]."""
    checks.tensors(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks._ndim(name, x, "B, H, T, width")
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    g = _retnet(q.shape[2], q.device).expand(q.shape[:3])
    return naive_parallel_simple_gla(q, k, v, g)[0].transpose(1, 2).to(q.dtype)


def _checked(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function of `reference`, which checks nothing, behind the checks of the operators."""

    def checked(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        initial_state: Tensor | None = None,
        g: Tensor | None = None,
        normalize: bool = False,
        **options: Any,
    ) -> Result:
        checks.tensors(q=q, k=k, v=v)
        checks.options(options["scale"], output_final_state=options.get("output_final_state", False))
        checks.attention(q, k, v, g, None, initial_state, None, normalize)
        return function(q, k, v, g, initial_state=initial_state, normalize=normalize, **options)

    return checked

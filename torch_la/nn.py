"""The layer: projections, feature map, decay, causal linear attention, output norm and gate.

    q, k = phi(W_q x), phi(W_k x)      v = W_v x      g: no decay, fixed, learned, or computed from x
    S_t = exp(g_t) S_{t-1} + k_t v_t^T      o_t = scale q_t S_t, with `normalize` divided by scale q_t z_t
    y = W_o (norm(o) * silu(W_gate x))      norm and gate are options

The same layer trains (all tokens at once), prefills, verifies drafts and generates: `cache` says which. It traces into
one graph under `torch.compile(fullgraph=True)` and exports with a dynamic length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, decay, feature_maps
from .feature_maps import FeatureMap
from .functions import linear_attention
from .generation import StateCache

BY_HEAD = {"alibi": decay.alibi, "retnet": decay.retnet}
BY_LAYER = {"minimax": decay.minimax, "minimax_transformers": decay.minimax_transformers, "bailing": decay.bailing}
DECAYS = ("data", "learnable", *BY_HEAD, *BY_LAYER)


class LinearAttention(nn.Module):
    """Multi-head causal linear attention on x [B, T, d_model].

    Args:
        d_model: width of the input and the output.
        num_heads: H, key heads.
        head_dim: width of a key head before the feature map; default d_model // num_heads.
        num_value_heads: HV, a multiple of H; default H. Each key head serves HV / H value heads.
        value_head_dim: V, width of a value head; default head_dim.
        feature_map: a name of `torch_la.feature_maps.NAMES`; or a function of (head_dim, num_heads) that returns a
            `FeatureMap`, such as `lambda width, heads: Dpfp(width, heads, nu=3)`.
        tie_feature_maps: queries and keys share the weights of a learned map. False: each has its own.
        decay: the log-decay of each token and value head.

            - None: no decay.
            - "data": logsigmoid(W x + b) / 16, computed from the token (GLA, https://arxiv.org/abs/2312.06635, with one
              gate for each head). The 16 starts the memory long.
            - "learnable": one for each head, -exp(decay_log), which starts at RetNet's.
            - "alibi", "retnet": fixed, of `torch_la.decay`; "minimax", "minimax_transformers", "bailing": those that
              depend on the layer too, and want `layer` and `layers`.
            - a tensor [HV]: fixed log-decays, natural logarithm.
        layer, layers: the index of this layer from 0, and how many there are; for the decays that depend on them.
        normalize: divide by the sum of the attention weights. Needs a feature map that keeps them from being negative.
        scale: factor on q; default features ** -0.5. Without effect under `normalize`, but for its 1e-10.
        output_norm: RMSNorm over each head of o, eps 1e-5.
        output_gate: o times silu(W_gate x).
        bias: of the projections. The gate of "data" always has one.
        device, dtype: of the weights.

    State dict (all that there can be; `W.weight` is [out, in] as in `torch.nn.Linear`):
        q_proj.weight, k_proj.weight [H head_dim, d_model], v_proj.weight [HV V, d_model],
        o_proj.weight [d_model, HV V]; with `bias` each has its .bias
        feature_map_q.weight, feature_map_q.bias, feature_map_k.weight, feature_map_k.bias: learned feature maps
        decay_proj.weight [HV, d_model], decay_proj.bias [HV]: decay="data"
        decay_log [HV]: decay="learnable"
        o_norm.weight [V]: output_norm
        gate_proj.weight [HV V, d_model]: output_gate; with `bias` its .bias

        Fixed decays are not in it: the arguments say what they are. They stay float32 whatever the layer is cast to.

    Weights start as those of `torch.nn.Linear` do: the same after the same `torch.manual_seed`.

    Raises:
        ValueError: a size, name or combination that makes no layer; the message names the argument and shows what came.
        TypeError: a wrong Python type.
    """

    g_gamma: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        feature_map: str | Callable[[int, int], FeatureMap] = "elu",
        tie_feature_maps: bool = False,
        decay: str | Tensor | None = None,
        layer: int | None = None,
        layers: int | None = None,
        normalize: bool = True,
        scale: float | None = None,
        output_norm: bool = False,
        output_gate: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.sizes(d_model=d_model, num_heads=num_heads)
        if head_dim is None:
            if d_model % num_heads:
                raise ValueError(f"num_heads must divide d_model, or give head_dim: got {num_heads=}, {d_model=}")
            head_dim = d_model // num_heads
        HV = num_heads if num_value_heads is None else num_value_heads
        V = head_dim if value_head_dim is None else value_head_dim
        checks.sizes(head_dim=head_dim, num_value_heads=HV, value_head_dim=V)
        if HV % num_heads:
            raise ValueError(f"num_value_heads must be a multiple of num_heads: got num_value_heads={HV}, {num_heads=}")
        checks.options(scale, normalize=normalize, tie_feature_maps=tie_feature_maps, bias=bias)
        checks.options(None, output_norm=output_norm, output_gate=output_gate)
        self.d_model, self.num_heads, self.head_dim = d_model, num_heads, head_dim
        self.num_value_heads, self.value_head_dim = HV, V
        self.normalize, self.scale, self.decay = normalize, scale, decay if isinstance(decay, str) else None

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(d_model, num_heads * head_dim, bias=bias, **where)
        self.k_proj = nn.Linear(d_model, num_heads * head_dim, bias=bias, **where)
        self.v_proj = nn.Linear(d_model, HV * V, bias=bias, **where)
        self.o_proj = nn.Linear(HV * V, d_model, bias=bias, **where)
        self.feature_map_q = _feature_map(feature_map, head_dim, num_heads, where)
        self.feature_map_k = (
            self.feature_map_q if tie_feature_maps else _feature_map(feature_map, head_dim, num_heads, where)
        )
        if normalize and not self.feature_map_q.positive:
            raise ValueError(
                "normalize divides by sums of attention weights, and this feature map lets them cross zero: "
                f"got {normalize=}, {feature_map=}"
            )
        self.o_norm = nn.RMSNorm(V, eps=1e-5, **where) if output_norm else None
        self.gate_proj = nn.Linear(d_model, HV * V, bias=bias, **where) if output_gate else None

        fixed = _fixed_decay(decay, HV, layer, layers)
        # the values themselves, so that they survive casts, to_empty() and meta devices: see _apply
        self._fixed: list[float] | None = None if fixed is None else fixed.tolist()
        self.register_buffer(
            "g_gamma", None if fixed is None else fixed.to(self.q_proj.weight.device), persistent=False
        )
        self.decay_proj = nn.Linear(d_model, HV, **where) if self.decay == "data" else None
        self.decay_log = nn.Parameter(torch.empty(HV, **where)) if self.decay == "learnable" else None
        self.register_load_state_dict_post_hook(_follow)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The parameters that belong to no submodule: `decay_log`, at RetNet's decays."""
        if self.decay_log is not None:
            with torch.no_grad():
                self.decay_log.copy_((-decay.retnet(self.num_value_heads, device="cpu")).log())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearAttention:
        """Casts and moves, but a fixed decay stays what it is: in bfloat16 an error of 0.4% in log-decay would last."""
        super()._apply(fn, recurse)
        if self.g_gamma is not None:
            self.g_gamma = torch.tensor(self._fixed, dtype=torch.float32, device=self.g_gamma.device)
        return self

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cache: StateCache | None = None,
        slots: Tensor | None = None,
        verify: bool = False,
    ) -> Tensor:
        """y [B, T, d_model], in the dtype of the projections.

        Args:
            x: [B, T, d_model].
            attention_mask: [B, T], bool or integer: 0 where x is padding, on the left, on the right or in between. Such
                a token writes nothing into the state, does not decay it, and its output is 0; so every sequence gives
                what it gives alone.
            cu_seqlens: offsets of packed sequences, as in `torch_la.linear_attention`; then B is 1.
            cache: the states of this layer (`make_cache`). The sequences go on from there, and the cache moves on by T
                tokens, in place. Without gradients.
            slots: [B], or [N] with cu_seqlens: the slot of each sequence in the cache; see `StateCache.attend`.
            verify: read the T tokens of a draft without moving the cache, until `cache.accept(counts)`.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or combination; the message names the argument.
            RuntimeError: a gradient is wanted and a cache is given.
        """
        self._check(x, attention_mask, cu_seqlens, cache, slots, verify)
        padding = None
        if attention_mask is not None:
            padding = (attention_mask == 0).unsqueeze(-1)  # [B, T, 1]
            x = x.masked_fill(padding, 0)  # what stands there may be NaN, and would reach the gradients of the weights
        q = self.feature_map_q(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)))
        k = self.feature_map_k(self.k_proj(x).unflatten(-1, (self.num_heads, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (self.num_value_heads, self.value_head_dim))
        g, g_gamma = self._decays(x)
        if padding is not None:
            # after the feature map, which need not map 0 to 0; v too, since 0 times inf would be NaN
            k, v = (y.masked_fill(padding.unsqueeze(-1), 0) for y in (k, v))
            if g_gamma is not None:
                g, g_gamma = g_gamma.expand(*x.shape[:2], -1), None
            if g is not None:
                g = g.masked_fill(padding, 0)

        if cache is None:
            o, _ = linear_attention(
                *(q, k, v, g, g_gamma), cu_seqlens=cu_seqlens, scale=self.scale, normalize=self.normalize
            )
        elif verify:
            o = cache.verify(q, k, v, g, g_gamma, slots=slots, scale=self.scale)
        else:
            o = cache.attend(q, k, v, g, g_gamma, slots=slots, cu_seqlens=cu_seqlens, scale=self.scale)

        if self.o_norm is not None:
            o = self.o_norm(o)
        o = o.flatten(-2)
        if self.gate_proj is not None:
            o = o * F.silu(self.gate_proj(x))
        y: Tensor = self.o_proj(o)
        return y if padding is None else y.masked_fill(padding, 0)

    def make_cache(self, slots: int, *, draft: int = 0) -> StateCache:
        """An empty cache for this layer, on its device, of `slots` sequences and drafts of up to `draft` tokens."""
        weight = self.q_proj.weight
        return StateCache(
            slots,
            self.num_heads,
            self.feature_map_q.features,
            self.value_head_dim,
            value_heads=self.num_value_heads,
            normalize=self.normalize,
            draft=draft,
            dtype=checks.state_dtype(weight),
            device=weight.device,
        )

    def extra_repr(self) -> str:
        parts = [f"d_model={self.d_model}", f"num_heads={self.num_heads}", f"head_dim={self.head_dim}"]
        if self.num_value_heads != self.num_heads:
            parts.append(f"num_value_heads={self.num_value_heads}")
        if self.value_head_dim != self.head_dim:
            parts.append(f"value_head_dim={self.value_head_dim}")
        decay = "fixed" if self.g_gamma is not None and self.decay is None else self.decay
        return ", ".join([*parts, f"decay={decay}", f"normalize={self.normalize}", f"scale={self.scale}"])

    def _decays(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """g [B, T, HV] or g_gamma [HV], in float32 and more."""
        if self.decay_proj is not None:
            gate = self.decay_proj(x)
            # logsigmoid, in a form whose derivative DTensor knows; the threshold is where float64 sees no difference
            return -F.softplus(-gate.to(checks.state_dtype(gate)), threshold=40) / 16, None
        if self.decay_log is not None:
            return None, -self.decay_log.to(checks.state_dtype(self.decay_log)).exp()
        return None, self.g_gamma

    def _check(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: StateCache | None,
        slots: Tensor | None,
        verify: bool,
    ) -> None:
        checks.tensors(x=x, attention_mask_or_None=attention_mask, cu_seqlens_or_None=cu_seqlens, slots_or_None=slots)
        checks.options(None, verify=verify)
        if x.ndim != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"x must be [B, T, {self.d_model}]: got x.shape={tuple(x.shape)}")
        wide = self.feature_map_q.features
        if x.is_cuda and wide > checks.MAX_WIDTH_CUDA:
            raise ValueError(
                f"the operators take at most {checks.MAX_WIDTH_CUDA} features on CUDA: got {wide} features of "
                f"head_dim={self.head_dim}, {self.feature_map_q}"
            )
        if attention_mask is not None:
            sizes = zip(attention_mask.shape, x.shape[:2], strict=False)
            for condition in (attention_mask.ndim == 2, *(size == right for size, right in sizes)):
                checks._require(
                    condition,
                    lambda: (
                        f"attention_mask must be [B, T] = {tuple(x.shape[:2])}, 0 for padding: "
                        f"got attention_mask.shape={tuple(attention_mask.shape)}"
                    ),
                )
            if attention_mask.dtype.is_floating_point or attention_mask.dtype.is_complex:
                raise TypeError(f"attention_mask must be bool or integer: got {attention_mask.dtype=}")
        if cache is not None and not isinstance(cache, StateCache):
            raise TypeError(f"cache must be the StateCache of this layer: got {type(cache).__name__}")
        if cache is not None and cache.normalize != self.normalize:
            raise ValueError(f"cache was made for normalize={cache.normalize}: this layer has {self.normalize=}")
        if cache is None and (slots is not None or verify):
            raise ValueError(f"slots and verify need a cache: got cache=None, {slots=}, {verify=}")
        if verify and cu_seqlens is not None:
            raise ValueError(f"verify takes one draft for each row, not packed sequences: got {cu_seqlens=}")


def _follow(layer: LinearAttention, _: Any) -> None:
    """A layer made on the meta device, whose weights were assigned: its fixed decay, which no state dict has, too."""
    device = layer.q_proj.weight.device
    if layer.g_gamma is not None and layer.g_gamma.device != device:
        layer.g_gamma = torch.tensor(layer._fixed, dtype=torch.float32, device=device)


def _feature_map(
    feature_map: str | Callable[[int, int], FeatureMap], width: int, heads: int, where: dict[str, Any]
) -> FeatureMap:
    if isinstance(feature_map, str):
        return feature_maps.by_name(feature_map, width, heads, **where)
    if not callable(feature_map):
        raise TypeError(f"feature_map must be a name or a function of (head_dim, num_heads): got {feature_map!r}")
    try:
        made = feature_map(width, heads)
    except (TypeError, AttributeError) as problem:  # the map itself, say, instead of what makes one
        raise TypeError(
            "feature_map must be a name or a function (head_dim, num_heads) -> torch_la.feature_maps.FeatureMap: "
            f"got {feature_map!r}"
        ) from problem
    if not isinstance(made, FeatureMap):
        raise TypeError(f"feature_map must return a torch_la.feature_maps.FeatureMap: got {type(made).__name__}")
    if (made.width, made.heads) != (width, heads):
        raise ValueError(
            f"feature_map must return a map of width {width} and {heads} heads: got {made.width=}, {made.heads=}"
        )
    return made.to(**where)


def _fixed_decay(name: str | Tensor | None, heads: int, layer: int | None, layers: int | None) -> Tensor | None:
    """The log-decays [HV] on the CPU in float32, or None where they are not fixed. Uses every argument or raises."""
    by_layer = isinstance(name, str) and name in BY_LAYER
    if not by_layer and (layer is not None or layers is not None):
        raise ValueError(
            f"layer and layers are for decay in {', '.join(BY_LAYER)}: got decay={name!r}, {layer=}, {layers=}"
        )
    if name is None:
        return None
    if isinstance(name, Tensor):
        if name.shape != (heads,) or not name.dtype.is_floating_point:
            raise ValueError(f"decay must be floating [HV] = ({heads},): got {tuple(name.shape)}, {name.dtype}")
        return name.detach().to("cpu", torch.float32)
    if name not in DECAYS:
        raise ValueError(f"decay must be None, a tensor, or one of {', '.join(DECAYS)}: got decay={name!r}")
    if by_layer:
        if layer is None or layers is None:
            raise ValueError(f"decay={name!r} depends on the layer: give layer and layers: got {layer=}, {layers=}")
        return BY_LAYER[name](heads, layer, layers, device="cpu")
    return BY_HEAD[name](heads, device="cpu") if name in BY_HEAD else None

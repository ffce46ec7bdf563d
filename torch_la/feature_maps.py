"""Feature maps: what stands in for the softmax in linear attention, o_t = sum over s of (phi(q_t) . phi(k_s)) v_s.

A map is a module from `[..., H, width]` to `[..., H, features]`, in the dtype of its input. Where rounding or range
would hurt in bfloat16 and float16, it computes in float32 and rounds once, at the end::

    name           phi(x)                                             features               from
    identity       x                                                  d
    elu            elu(x) + 1                                         d                      arXiv:2006.16236
    relu           max(x, 0)                                          d                      cosFormer, arXiv:2202.08791
    squared_relu   max(x, 0)^2                                        d                      Primer, arXiv:2109.08668
    dpfp           products of r = [relu(x), relu(-x)], rolled        2 nu d                 arXiv:2102.11174
    hedgehog       [exp(W x + b), exp(-W x - b)], W and b learned     2 d                    arXiv:2402.04347
    t2r            relu(W x + b), W and b learned                     any                    arXiv:2103.13076
    taylor         those of 1 + x.y + (x.y)^2 / 2                     1 + d + d (d + 1) / 2  Based, arXiv:2402.18668

The operators take at most 256 features on CUDA: `taylor` reaches that with d = 21, `dpfp` (nu = 1) and `hedgehog` with
d = 128. The functions `identity`, `elu_plus_one`, `squared_relu`, `dpfp` and `taylor` are maps without parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def _wide(x: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


# ------------------------------------------------------------------------------------------------------------ functions


def identity(x: Tensor) -> Tensor:
    """x itself: attention weights q.k, of either sign. Not for a normaliser."""
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1 (https://arxiv.org/abs/2006.16236, equation 7), as x + 1 above 0 and exp(x) below.

    Written as the sum it says, it cancels: in bfloat16 every x below -6.2 would give 0, where exp(x) is 2e-3 with all
    its digits.
    """
    y = _wide(x)
    # the clamp keeps exp from overflowing where it is not used: inf there would turn the gradient into NaN
    return torch.where(y > 0, y + 1, y.clamp(max=0).exp()).to(x.dtype)


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, https://arxiv.org/abs/2109.08668). float16 overflows from x = 256 on."""
    r = x.relu()
    return r * r  # square() is a power, which autocast on CUDA would run in float32


def dpfp(x: Tensor, nu: int = 1) -> Tensor:
    """Deterministic parameter-free projection (https://arxiv.org/abs/2102.11174, section 5.3): 2 nu d features.

    With r = [relu(x), relu(-x)], feature 2 d (i - 1) + j is r_j r_{j + i}, indices modulo 2 d, for i = 1 to nu. Sparse,
    and never negative.
    """
    r = torch.cat([x.relu(), (-x).relu()], -1)
    return torch.cat([r * r.roll(-i, -1) for i in range(1, nu + 1)], -1)


def taylor(x: Tensor) -> Tensor:
    """Second-order Taylor features of exp (Based, https://arxiv.org/abs/2402.18668).

    taylor(x) . taylor(y) = 1 + s + s^2 / 2 with s = x . y / sqrt(d), which approximates exp(s) and is at least 1 / 2.

    The paper's features are 1, x and all d^2 products x_i x_j, each pair twice. Here each pair stands once, with the
    weight of both: the same inner products from 1 + d + d (d + 1) / 2 features, 153 in place of 273 for d = 16.
    """
    d = x.shape[-1]
    y = _wide(x) * d**-0.25
    # Pairs by their distance s around the circle of indices: every s below d / 2 has d of them, s = d / 2 only half.
    pairs = [y.square() * math.sqrt(0.5), *(y * y.roll(-s, -1) for s in range(1, (d + 1) // 2))]
    if d % 2 == 0:
        pairs.append(y[..., : d // 2] * y[..., d // 2 :])
    return torch.cat([torch.ones_like(y[..., :1]), y, *pairs], -1).to(x.dtype)


# -------------------------------------------------------------------------------------------------------------- modules


class FeatureMap(nn.Module):
    """A map from `[..., heads, width]` to `[..., heads, features]`.

    Attributes:
        width, heads: of the input.
        features: width of the output.
        positive: no inner product of two outputs is negative, so that a normaliser can divide by their sums.
    """

    def __init__(self, width: int, heads: int, features: int, positive: bool) -> None:
        super().__init__()
        for name, size in (("width", width), ("heads", heads), ("features", features)):
            if size < 1:
                raise ValueError(f"{name} of a feature map must be at least 1: got {name}={size}")
        self.width, self.heads, self.features, self.positive = width, heads, features, positive

    def extra_repr(self) -> str:
        return f"{self.width} -> {self.features}, heads={self.heads}"


class Plain(FeatureMap):
    """A map without parameters."""

    def __init__(
        self, name: str, function: Callable[[Tensor], Tensor], width: int, heads: int, features: int, positive: bool
    ) -> None:
        super().__init__(width, heads, features, positive)
        self.name, self.function = name, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

    def extra_repr(self) -> str:
        return f"{self.name}, {super().extra_repr()}"


class Dpfp(FeatureMap):
    """`dpfp` with a `nu` of choice: 2 nu width features."""

    def __init__(self, width: int, heads: int, nu: int = 1) -> None:
        if not 1 <= nu < 2 * width:
            raise ValueError(f"nu must be at least 1 and below 2 * width = {2 * width}: got nu={nu}")
        super().__init__(width, heads, 2 * nu * width, positive=True)
        self.nu = nu

    def forward(self, x: Tensor) -> Tensor:
        return dpfp(x, self.nu)


class _Learned(FeatureMap):
    """A linear map of every head: weight [heads, out, width] and bias [heads, out]."""

    def __init__(
        self,
        width: int,
        heads: int,
        out: int,
        features: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(width, heads, features, positive=True)
        self.weight = nn.Parameter(torch.empty(heads, out, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(heads, out, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        raise NotImplementedError


class Hedgehog(_Learned):
    """[exp(W x + b), exp(-W x - b)] (https://arxiv.org/abs/2402.04347): 2 width features.

    One W and b for each head, which start as the identity and zero, as in the paper. Computed in float32 up to the end,
    the product with W included: an error in an exponent is a relative error of the feature.

    Args:
        softmax: divide each half by its sum, as LoLCATs does (https://arxiv.org/abs/2410.10254). Then no feature
            exceeds 1; without it float16 overflows where an entry of W x + b exceeds 11.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        softmax: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, heads, width, 2 * width, device, dtype)
        self.softmax = softmax

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.width, device=self.weight.device).expand_as(self.weight))
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = torch.einsum("...hd,hfd->...hf", _wide(x), _wide(self.weight)) + _wide(self.bias)
            halves = (y.softmax(-1), (-y).softmax(-1)) if self.softmax else (y.exp(), (-y).exp())
            return torch.cat(halves, -1).to(x.dtype)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", softmax=True" if self.softmax else "")


class T2R(_Learned):
    """relu(W x + b) (https://arxiv.org/abs/2103.13076), W and b learned for each head.

    They start like those of `torch.nn.Linear`, uniform within width ** -0.5.

    Args:
        features: width of the output; default the width of the input.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        features = width if features is None else features
        super().__init__(width, heads, features, features, device, dtype)

    def reset_parameters(self) -> None:
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("...hd,hfd->...hf", x, self.weight)
        return (y + self.bias.to(y.dtype)).relu()


NAMES = ("identity", "elu", "relu", "squared_relu", "dpfp", "hedgehog", "t2r", "taylor")


def by_name(
    name: str,
    width: int,
    heads: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> FeatureMap:
    """The map of this name, with its defaults; other options by the classes `Dpfp`, `Hedgehog` and `T2R`.

    Args:
        name: one of `NAMES`.
        width: of a head, before the map.
        heads: how many; the learned maps have weights for each.
        device, dtype: of the weights.

    Raises:
        ValueError: no map has this name, or a size is below 1.
    """
    if name == "dpfp":
        return Dpfp(width, heads)
    if name == "hedgehog":
        return Hedgehog(width, heads, device=device, dtype=dtype)
    if name == "t2r":
        return T2R(width, heads, device=device, dtype=dtype)
    plain: dict[str, tuple[Callable[[Tensor], Tensor], int, bool]] = {
        "identity": (identity, width, False),
        "elu": (elu_plus_one, width, True),
        "relu": (torch.relu, width, True),
        "squared_relu": (squared_relu, width, True),
        "taylor": (taylor, 1 + width + width * (width + 1) // 2, True),
    }
    if name not in plain:
        raise ValueError(f"feature_map must be one of {', '.join(NAMES)}: got feature_map={name!r}")
    function, features, positive = plain[name]
    return Plain(name, function, width, heads, features, positive)

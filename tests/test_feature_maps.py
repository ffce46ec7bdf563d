"""Every feature map against its paper's formula in float64, in every dtype; gradients; learned weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_la import feature_maps
from torch_la.feature_maps import NAMES, T2R, Dpfp, FeatureMap, Hedgehog

WIDTH, HEADS = 6, 3


def paper_elu(x: Tensor, map: Any) -> Tensor:
    return torch.where(x > 0, x, torch.expm1(x)) + 1


def paper_dpfp(x: Tensor, map: Any) -> Tensor:
    """phi_{i nu}(k) = r_i r_{i + nu}, one feature at a time."""
    d, nu = x.shape[-1], getattr(map, "nu", 1)
    r = [x[..., j].clamp(min=0) for j in range(d)] + [(-x[..., j]).clamp(min=0) for j in range(d)]
    return torch.stack([r[j] * r[(j + i) % (2 * d)] for i in range(1, nu + 1) for j in range(2 * d)], -1)


def linear(x: Tensor, map: Any) -> Tensor:
    """W x + b of each head, one output at a time."""
    W, b = map.weight.double(), map.bias.double()
    rows = [[(W[h, f] * x[..., h, :]).sum(-1) + b[h, f] for f in range(W.shape[1])] for h in range(W.shape[0])]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def paper_hedgehog(x: Tensor, map: Any) -> Tensor:
    y = linear(x, map)
    halves = [y.exp(), (-y).exp()]
    if map.softmax:
        halves = [h / h.sum(-1, keepdim=True) for h in halves]
    return torch.cat(halves, -1)


def paper_taylor(x: Tensor, map: Any) -> Tensor:
    """Based's [1, x, vec(x x^T) / sqrt 2], with the two entries of a pair i < j put together: same inner products."""
    d = x.shape[-1]
    x = x / d**0.25
    # the order in which `taylor` lists the pairs
    pairs = [(i, (i + s) % d) for s in range(d // 2 + 1) for i in range(d if 2 * s < d else d // 2)]
    assert len({frozenset(p) for p in pairs}) == d * (d + 1) // 2
    products = [x[..., i] * x[..., j] * (1 if i != j else math.sqrt(0.5)) for i, j in pairs]
    return torch.stack([torch.ones_like(x[..., 0]), *x.unbind(-1), *products], -1)


PAPER: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "identity": lambda x, map: x,
    "elu": paper_elu,
    "relu": lambda x, map: x * (x > 0),
    "squared_relu": lambda x, map: x * x * (x > 0),
    "dpfp": paper_dpfp,
    "hedgehog": paper_hedgehog,
    "t2r": lambda x, map: linear(x, map).clamp(min=0),
    "taylor": paper_taylor,
}


def make(name: str, dtype: torch.dtype, device: str = "cpu") -> FeatureMap:
    """The map with random weights of this dtype."""
    map = feature_maps.by_name(name, WIDTH, HEADS, device=device, dtype=dtype)
    for parameter in map.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return map


def inputs(dtype: torch.dtype, device: str) -> Tensor:
    """Both signs, from 1e-3 to 10."""
    x = torch.randn(2, 40, HEADS, WIDTH, dtype=torch.float64).sign() * torch.logspace(-3, 1, WIDTH).double()
    return (x * torch.empty_like(x).uniform_(0.5, 1.0)).to(device, dtype)


# The relative error of every single feature. In 16 bits one rounding of the exact value, and the float32 before it.
EXACT = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1.01 * 2.0**-8, torch.float16: 1.01 * 2.0**-11}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_formula(name: str, dtype: torch.dtype, device: str) -> None:
    map, x = make(name, dtype, device), inputs(dtype, device)
    if dtype == torch.float16:
        x = x.clamp(-2, 2)  # exp(W x) stays below 65,504
    got, want = map(x), PAPER[name](x.double(), map)
    assert got.dtype == dtype
    assert got.shape == want.shape == (*x.shape[:-1], map.features)
    error = (got.double() - want).abs()
    if name == "t2r":  # a sum may cancel, like that of any linear layer: its terms are the measure
        terms = torch.einsum("...hd,hfd->...hf", x.double().abs(), map.weight.double().abs()) + map.bias.double().abs()
        assert (error <= 2 * EXACT[dtype] * terms).all()
    else:
        tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # float16 has no smaller number
        assert (error <= EXACT[dtype] * want.abs() + tiny).all(), (error / want.abs()).max()
    assert got.isfinite().all()
    assert (want != 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str) -> None:
    map, x = make(name, torch.float64), inputs(torch.float64, "cpu").clamp(-3, 3).requires_grad_()
    leaves = [x, *map.parameters()]
    weights = torch.randn(*x.shape[:-1], map.features, dtype=torch.float64)
    got = torch.autograd.grad((map(x) * weights).sum(), leaves)
    want = torch.autograd.grad((PAPER[name](x, map) * weights).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-10 * b.norm()
        assert b.norm() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_stay_finite(name: str, dtype: torch.dtype) -> None:
    """exp(100) is beyond float32: it must not reach a gradient that does not need it."""
    x = torch.tensor([-100.0, -80.0, -1e-20, 0.0, 80.0, 100.0]).to(dtype).expand(1, HEADS, WIDTH).requires_grad_()
    map = feature_maps.Hedgehog(WIDTH, HEADS, softmax=True) if name == "hedgehog" else make(name, dtype)
    map(x).float().square().mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_taylor_is_the_papers_kernel() -> None:
    """1 + s + s^2 / 2, s = x.y / sqrt(d), for odd and even widths, and the features of the paper's full form."""
    for d in (1, 2, 3, 4, 7, 16):
        x, y = torch.randn(2, 50, d, dtype=torch.float64)
        s = (x * y).sum(-1) / math.sqrt(d)
        torch.testing.assert_close((feature_maps.taylor(x) * feature_maps.taylor(y)).sum(-1), 1 + s + s * s / 2)
        assert feature_maps.taylor(x).shape[-1] == feature_maps.by_name("taylor", d, 1).features

        def full(x: Tensor) -> Tensor:
            z = x / x.shape[-1] ** 0.25
            return torch.cat(
                [torch.ones_like(z[..., :1]), z, (z[..., :, None] * z[..., None, :]).flatten(-2) / 2**0.5], -1
            )

        torch.testing.assert_close(feature_maps.taylor(x) @ feature_maps.taylor(y).mT, full(x) @ full(y).mT)


@pytest.mark.parametrize("nu", [1, 2, 5])
def test_dpfp_of_any_order(nu: int) -> None:
    map, x = Dpfp(WIDTH, HEADS, nu), inputs(torch.float64, "cpu")
    torch.testing.assert_close(map(x), paper_dpfp(x, map))
    assert map(x).shape[-1] == map.features == 2 * nu * WIDTH


def test_hedgehog_with_softmax() -> None:
    map, x = Hedgehog(WIDTH, HEADS, softmax=True, dtype=torch.float64), inputs(torch.float64, "cpu")
    torch.testing.assert_close(map(x), paper_hedgehog(x, map))
    torch.testing.assert_close(map(x).sum(-1), torch.full(x.shape[:-1], 2.0, dtype=torch.float64))


def test_hedgehog_starts_as_the_identity() -> None:
    x = inputs(torch.float64, "cpu")
    torch.testing.assert_close(Hedgehog(WIDTH, HEADS, dtype=torch.float64)(x), torch.cat([x.exp(), (-x).exp()], -1))


def test_hedgehog_keeps_float32_under_autocast(device: str) -> None:
    """W x is an exponent: rounded to bfloat16 it would cost each feature its third digit."""
    map, x = make("hedgehog", torch.float32, device), inputs(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        got = map(x)
    want = paper_hedgehog(x.double(), map)
    assert ((got.double() - want).abs() <= 1e-4 * want).all()


def test_t2r_of_any_width() -> None:
    map, x = T2R(WIDTH, HEADS, features=4, dtype=torch.float64), inputs(torch.float64, "cpu")
    torch.testing.assert_close(map(x), linear(x, map).clamp(min=0))
    assert map.features == 4
    assert map.weight.abs().max() <= WIDTH**-0.5


@pytest.mark.parametrize("name", NAMES)
def test_positive_maps_have_no_negative_weights(name: str) -> None:
    map, x = make(name, torch.float64), inputs(torch.float64, "cpu")
    weights = torch.einsum("bthf,bshf->bhts", map(x), map(x))
    assert map.positive == bool((weights >= 0).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_maps.by_name("softmax", 4, 1), r"one of identity, .*: got feature_map='softmax'"),
        (lambda: feature_maps.by_name("elu", 0, 1), "width of a feature map must be at least 1: got width=0"),
        (lambda: feature_maps.by_name("t2r", 4, 0), "got heads=0"),
        (lambda: T2R(4, 1, features=0), "got features=0"),
        (lambda: Dpfp(4, 1, nu=8), r"below 2 \* width = 8: got nu=8"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_repr() -> None:
    assert repr(feature_maps.by_name("taylor", 4, 2)) == "Plain(taylor, 4 -> 15, heads=2)"
    assert repr(Hedgehog(4, 2, softmax=True)) == "Hedgehog(4 -> 8, heads=2, softmax=True)"

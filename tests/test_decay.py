"""The named decays against their formulas, written again from what their sources run, for any number of heads."""

import math
from decimal import Decimal, getcontext

import pytest
import torch

from torch_la import decay

HEADS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 31, 32, 33, 48, 64, 80, 100]


def press(n: int) -> list[float]:
    """The slopes as in the published ALiBi code (`get_slopes` of attention_with_linear_biases), recursion and all."""

    def power_of_two(n: int) -> list[float]:
        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
        return [start * start**i for i in range(n)]

    if math.log2(n).is_integer():
        return power_of_two(n)
    closest = 2 ** math.floor(math.log2(n))
    return power_of_two(closest) + press(2 * closest)[0::2][: n - closest]


def agree(got: torch.Tensor, want: list[float]) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64).float(), rtol=1e-6, atol=0)
    assert (got <= 0).all()


@pytest.mark.parametrize("heads", HEADS)
def test_alibi(heads: int) -> None:
    agree(decay.alibi(heads), [-s for s in press(heads)])


@pytest.mark.parametrize("heads", HEADS)
def test_retnet(heads: int) -> None:
    getcontext().prec = 60
    agree(decay.retnet(heads), [float((1 - Decimal(2) ** (-5 - h)).ln()) for h in range(heads)])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("layer", "layers"), [(0, 80), (1, 80), (40, 80), (79, 80), (0, 2), (1, 2)])
def test_by_layer(heads: int, layer: int, layers: int) -> None:
    slopes = press(heads)
    minimax = 1 - layer / (layers - 1) + 1e-5
    agree(decay.minimax(heads, layer, layers), [-s * minimax for s in slopes])
    bailing = 1 - (layer - 1) / (layers - 1) + 1e-5
    agree(decay.bailing(heads, layer, layers), [-s * bailing for s in slopes])
    base, factor = 1 / 2 ** (8 / heads), 1 - layer / (layers - 1 + 1e-5) + 1e-5
    agree(decay.minimax_transformers(heads, layer, layers), [-(base ** (h + 1)) * factor for h in range(heads)])


def test_one_layer() -> None:
    for name in ("minimax", "minimax_transformers", "bailing"):
        assert torch.isfinite(getattr(decay, name)(4, 0, 1)).all()
    agree(decay.minimax(4, 0, 1), [-s * (1 + 1e-5) for s in press(4)])


def test_known_values() -> None:
    agree(decay.alibi(8), [-1 / 2, -1 / 4, -1 / 8, -1 / 16, -1 / 32, -1 / 64, -1 / 128, -1 / 256])
    agree(decay.alibi(3), [-1 / 16, -1 / 256, -1 / 4])
    agree(decay.retnet(1), [math.log(31 / 32)])


def test_device(device: str) -> None:
    for made in (decay.alibi(3, device=device), decay.retnet(3, device=device), decay.minimax(3, 0, 2, device=device)):
        assert made.device.type == device

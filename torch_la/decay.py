"""The fixed log-decays of real checkpoints, by name, for `g_gamma`.

Each function returns [heads] float32 log-decays, natural logarithm, at most 0. They build from ALiBi slopes (or
RetNet's own), each with the layer factor that its checkpoints were trained with; the factors differ, so use the right
name.

Heads count globally: under tensor parallelism build for all heads and take your shard. `layer` counts from 0. A number
of heads below 1, or a layer that is not in [0, layers), raises ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _alibi(heads: int) -> list[float]:
    """ALiBi's slopes, 2^(-8 (h + 1) / heads) for a power of two.

    For any other count: those of the power of two below, then every second one of the power of two above, as the
    reference code of Press et al. 2022 (https://arxiv.org/abs/2108.12409) does.
    """
    if heads < 1:
        raise ValueError(f"heads must be at least 1: got {heads=}")
    below = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * (h + 1) / below) for h in range(below)]
    if below == heads:
        return slopes
    above = [2 ** (-8 * (h + 1) / (2 * below)) for h in range(2 * below)]
    return slopes + above[0::2][: heads - below]


def _tensor(slopes: list[float], factor: float, device: torch.device | str | None) -> Tensor:
    return torch.tensor([-factor * slope for slope in slopes], dtype=torch.float32, device=device)


def _check_layer(layer: int, layers: int) -> None:
    if not 0 <= layer < layers:
        raise ValueError(f"layer must be in [0, layers): got {layer=}, {layers=}")


def alibi(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's slopes without a layer factor: MiniCPM-SALA, and the base of the others."""
    return _tensor(_alibi(heads), 1.0, device)


def minimax(heads: int, layer: int, layers: int, *, device: torch.device | str | None = None) -> Tensor:
    """MiniMax as its authors serve it (MiniMax-01, SGLang): ALiBi slopes times 1 - layer / (layers - 1) + 1e-5."""
    _check_layer(layer, layers)
    return _tensor(_alibi(heads), 1 - layer / max(layers - 1, 1) + 1e-5, device)


def minimax_transformers(heads: int, layer: int, layers: int, *, device: torch.device | str | None = None) -> Tensor:
    """MiniMax as Hugging Face transformers runs it: 2^(-8 (h + 1) / heads) for any number of heads, without ALiBi's
    interleaving, times 1 - layer / (layers - 1 + 1e-5) + 1e-5."""
    _check_layer(layer, layers)
    if heads < 1:
        raise ValueError(f"heads must be at least 1: got {heads=}")
    slopes = [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    return _tensor(slopes, 1 - layer / (layers - 1 + 1e-5) + 1e-5, device)


def bailing(heads: int, layer: int, layers: int, *, device: torch.device | str | None = None) -> Tensor:
    """Ling and Ring (Bailing-linear, transformers): ALiBi slopes times 1 - (layer - 1) / (layers - 1) + 1e-5.

    Their layers count from 0 too, so the factor of layer 0 exceeds 1; the checkpoints were trained with it."""
    _check_layer(layer, layers)
    return _tensor(_alibi(heads), 1 - (layer - 1) / max(layers - 1, 1) + 1e-5, device)


def retnet(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """RetNet: log(1 - 2^(-5 - h)) (https://arxiv.org/abs/2307.08621, section 3.1)."""
    if heads < 1:
        raise ValueError(f"heads must be at least 1: got {heads=}")
    return torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(heads)], dtype=torch.float32, device=device)

"""The model of these examples: blocks of linear attention and an MLP over bytes, in 20 lines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import torch_la


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=1e-5) for _ in range(2))
        self.attention = torch_la.nn.LinearAttention(width, heads, decay="data", output_norm=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, **options) -> Tensor:
        x = x + self.attention(self.norms[0](x), **options)
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    """tokens [B, T] -> logits [B, T, 256]. The cache and the options of LinearAttention go to every layer."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor, cache: torch_la.generation.Cache | None = None, **options) -> Tensor:
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, cache=None if cache is None else cache[i], **options)
        return self.head(x)


def text() -> Tensor:
    """Some bytes to learn: this file."""
    with open(__file__, "rb") as file:
        return torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()

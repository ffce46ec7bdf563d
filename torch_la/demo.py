"""A small language model on linear attention, trained and then run token by token: `python -m torch_la demo`.

- `Attention`, `Model`: the model, about 60 lines, an example to copy from
- `train`: one compiled graph, without graph breaks or recompilations
- `generate`: one byte at a time through `recurrent_step`; the memory does not grow with the text
- `run`: all of it with its promises checked; returns an exit code

Bytes are the tokens, so any file is a text. By default the text is the Python standard library's own source.

    B batch   T time   H heads   K width of a head   D width of the model
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_la

BYTES = 256
BATCH, LENGTH = 16, 256  # sequences in a step, bytes in a sequence
LEARNING_RATE, WARMUP = 4e-3, 20
# The promises. The loss: on held-out text, as a part of the byte-frequency baseline. The logits: token by token against
# the parallel form, largest absolute difference; both compute in float32, in another order.
LOSS_PART = 0.6
LOGITS_TOLERANCE = 1e-3


# ----------------------------------------------------------------------------------------------------------------- model


class Attention(nn.Module):
    """Gated linear attention: S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = scale * q_t S_t, with g computed from the input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.gate = nn.Linear(width, heads)
        self.norm = nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [..., D] -> q, k, v [..., H, K] and the log-decay g [..., H]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        # Features of length 1 keep the state bounded. Divided by 16 the gate starts near 0: memory starts out long.
        return F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1), v, F.logsigmoid(self.gate(x)) / 16

    def forward(self, x: Tensor) -> Tensor:
        """All tokens at once: x [B, T, D]. For training."""
        q, k, v, g = self.inputs(x)
        o, _ = torch_la.chunk(q, k, v, g, scale=1.0)
        return self.out(self.norm(o).flatten(-2))

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One token: x [B, D]. `state` [B, H, K, K] is all that is kept of those before, and is updated in place."""
        q, k, v, g = self.inputs(x)
        o = torch_la.recurrent_step(q, k, v, state, g, scale=1.0)
        return self.out(self.norm(o).flatten(-2))


class Model(nn.Module):
    """Embedding, then layers of attention and a short MLP, each after an RMSNorm, then the logits of the next byte."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.state_shape = (heads, width // heads, width // heads)
        self.embedding = nn.Embedding(BYTES, width)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, 256], in parallel over time."""
        return self._layers(tokens, [attention for attention in self.attention])

    def step(self, tokens: Tensor, states: list[Tensor]) -> Tensor:
        """tokens [B] -> logits [B, 256], from the states alone."""

        def bound(attention: Any, state: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: attention.step(x, state)

        return self._layers(tokens, [bound(*pair) for pair in zip(self.attention, states, strict=True)])

    def _layers(self, tokens: Tensor, mixers: list[Any]) -> Tensor:
        x = self.embedding(tokens)
        for i, (mix, mlp) in enumerate(zip(mixers, self.mlp, strict=True)):
            x = x + mix(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        logits: Tensor = self.head(self.norms[-1](x))
        return logits

    def states(self, batch: int, device: torch.device) -> list[Tensor]:
        """The memory of generation: one zero state for each layer, float32."""
        return [torch.zeros(batch, *self.state_shape, device=device) for _ in self.attention]

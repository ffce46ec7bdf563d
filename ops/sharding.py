"""How DTensor may split the operators: by batch and by heads.

Loaded when `torch.distributed.tensor` is imported. An input sharded along time (or in any way not listed here) is
redistributed by DTensor first. A gradient that is a sum over what is split comes back as a partial sum.

Heads are split only where every rank gets whole groups: value head h reads key head h // (HV / H), so a rank must hold
the key heads of its value heads. That is so for equal head counts, and where the mesh divides H.

`recurrent_step_` has no rule, so DTensor refuses it: DTensor takes every operator whose name ends in an underscore to
write and return its first argument, and would hand back q. Decode with the local tensors (`DTensor.to_local`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.distributed.tensor.placement_types import Placement

Strategies = list[tuple[list[Placement | None], list[Placement | None]]]


def _heads_divide(q: Any, v: Any) -> bool:
    H, HV = q.shape[2], v.shape[2]
    return bool(H == HV or H % math.prod(q.mesh.shape) == 0)


def _where(given: list[tuple[Any, Placement]]) -> list[Placement | None]:
    """A placement for each tensor, None for each None and for each argument that is no tensor."""
    return [None if x is None else placement for x, placement in given]


def register(forward: torch._ops.OpOverload, backward: torch._ops.OpOverload) -> None:
    """The rules of one operator and of its backward."""
    R, batch, heads, state_heads = Replicate(), Shard(0), Shard(2), Shard(1)

    def choices(q: Any, v: Any, cu_seqlens: Any) -> list[tuple[Placement, Placement, Placement, Placement]]:
        """(q, k, v, g and their kind; states; g_gamma; the gradient of g_gamma) for each way to split."""
        found: list[tuple[Placement, Placement, Placement, Placement]] = [(R, R, R, R)]
        if _heads_divide(q, v):
            found.append((heads, state_heads, batch, batch))
        if cu_seqlens is None:
            found.append((batch, batch, R, Partial()))
        return found

    @register_sharding(forward)
    def _(
        q: Any, k: Any, v: Any, g: Any, g_gamma: Any, S0: Any, state: bool, cu: Any, scale: Any, norm: Any, rev: Any
    ) -> Strategies:
        return [
            (
                [x, s if state else None],
                [x, x, x, *_where([(g, x), (g_gamma, gamma), (S0, s)]), None, *_where([(cu, R)]), None, None, None],
            )
            for x, s, gamma, _ in choices(q, v, cu)
        ]

    @register_sharding(backward)
    def _(
        q: Any,
        k: Any,
        v: Any,
        g: Any,
        g_gamma: Any,
        S0: Any,
        cu: Any,
        scale: Any,
        norm: Any,
        rev: Any,
        o: Any,
        do: Any,
        dS1: Any,
        gate_grad: bool,
    ) -> Strategies:
        return [
            (
                [x, x, x, *_where([(g if gate_grad else None, x), (g_gamma if gate_grad else None, dgamma), (S0, s)])],
                [
                    *(x, x, x, *_where([(g, x), (g_gamma, gamma), (S0, s), (cu, R)]), None, None, None),
                    *_where([(o, x), (do, x), (dS1, s)]),
                    None,
                ],
            )
            for x, s, gamma, dgamma in choices(q, v, cu)
        ]

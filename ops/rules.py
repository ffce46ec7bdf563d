"""The rules of an operator that PyTorch asks for one at a time: vmap (both kinds), autocast, FLOPs.

`operator.py` registers them. None of them knows a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import private

Kernel = Callable[..., Any]

# ----------------------------------------------------------------------------------------------------------------- vmap

# Where each tensor has its batch and its heads. g_gamma has no batch.
_AXES: dict[str, tuple[int | None, int]] = dict.fromkeys(("q", "k", "v", "g", "o", "do"), (0, 2))
_AXES |= {"g_gamma": (None, 0), "initial_state": (0, 1), "dfinal_state": (0, 1)}
FORWARD_AXES = (_AXES["o"], _AXES["initial_state"])
BACKWARD_AXES = tuple(_AXES[name] for name in ("q", "k", "v", "g", "g_gamma", "initial_state"))


def _arguments(op: torch._ops.OpOverload) -> list[str]:
    return [argument.name for argument in op._schema.arguments]


def vmap(op: torch._ops.OpOverload, output_axes: Sequence[tuple[int | None, int]]) -> Kernel:
    """The new dimension joins the batch, which costs no copy; or the heads, where the batch cannot take it.

    That is so when sequences are packed (the batch is 1), and when g_gamma has a value, or a gradient, per sample.
    """
    names = _arguments(op)

    def rule(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        given = dict(zip(names, inputs, strict=True))
        dims = dict(zip(names, in_dims, strict=True))
        size = info.batch_size
        if dims["cu_seqlens"] is not None:  # other offsets in every sample: nothing to share
            samples = [
                op(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)))
                for i in range(size)
            ]
            stacked = [None if x[0] is None else torch.stack(x) for x in zip(*samples, strict=True)]
            return tuple(stacked), tuple(None if x is None else 0 for x in stacked)

        own_decay = given["g_gamma"] is not None and (dims["g_gamma"] is not None or given.get("gate_grad", False))
        which = 1 if given["cu_seqlens"] is not None or own_decay else 0

        def fold(name: str) -> Any:
            x = given[name]
            axis = _AXES[name][which] if name in _AXES else None
            if not isinstance(x, Tensor) or axis is None:
                return x
            x = x.expand(size, *x.shape) if dims[name] is None else x.movedim(dims[name] or 0, 0)
            return x.movedim(0, axis).flatten(axis, axis + 1)

        outputs, out_dims = [], []
        for x, axes in zip(op(*map(fold, names)), output_axes, strict=True):
            axis = axes[which]
            if x is not None:
                assert axis is not None
                x = x.unflatten(axis, (size, x.shape[axis] // size))
            outputs.append(x)
            out_dims.append(None if x is None else axis)
        return tuple(outputs), tuple(out_dims)

    return rule


def legacy_vmap(rule: Kernel) -> Kernel:
    """The same rule for the vmap behind `torch.autograd.grad(is_grads_batched=True)`, which is not that of torch.func.

    Its batched tensors carry their dimension inside, under a level that counts the open vmaps.
    """

    def kernel(*inputs: Any) -> Any:
        level = private.vmap_level()
        # A batched tensor comes back with its dimension in front; any other, with one of size 1.
        tensors = [private.remove_batch_dim(x, level, 1, 0) if isinstance(x, Tensor) else None for x in inputs]
        size = max(x.shape[0] for x in tensors if x is not None)
        mapped = [x is not None and x.shape[0] == size for x in tensors]
        unwrapped = [x if y is None else y if m else y[0] for x, y, m in zip(inputs, tensors, mapped, strict=True)]
        outputs, dims = rule(SimpleNamespace(batch_size=size), tuple(0 if m else None for m in mapped), *unwrapped)
        # in front and contiguous: forward mode restrides its tensors
        return tuple(
            x if d is None else private.add_batch_dim(x.movedim(d, 0).contiguous(), 0, level)
            for x, d in zip(outputs, dims, strict=True)
        )

    return kernel


# ------------------------------------------------------------------------------------------------------------- autocast

_uncast = ContextVar("_uncast", default=False)


@contextmanager
def uncast(device: str) -> Iterator[None]:
    """No autocast in here, so that derivatives keep float32 inside.

    Within a torch.func level `torch.autocast(enabled=False)` does not reach the levels below: a note of our own does.
    """
    token = _uncast.set(True)
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        _uncast.reset(token)


_CAST = ("q", "k", "v", "o", "do")
_LOW = (torch.float32, torch.bfloat16, torch.float16)  # autocast leaves float64 alone


def autocast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.dtype in _LOW else x


def autocast_kernel(op: torch._ops.OpOverload, device: str, forward: bool) -> Kernel:
    """q, k, v in the autocast dtype. The backward runs in the dtypes of its forward: only o and do follow v."""
    key = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}[device]
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    names = _arguments(op)
    cast = [i for i, name in enumerate(names) if name in _CAST and (forward or name in ("o", "do"))]
    like = names.index("v")

    def kernel(*inputs: Any) -> Any:
        changed = list(inputs)
        dtype = torch.get_autocast_dtype(device) if forward else inputs[like].dtype
        for i in () if _uncast.get() else cast:
            if changed[i] is not None:
                changed[i] = autocast(changed[i], dtype)
        with private.exclude_keys(keys):
            return op(*changed)

    return kernel


# ---------------------------------------------------------------------------------------------------------------- flops

FLOP_CHUNK = 64


def flops(q: Sequence[int], v: Sequence[int], chunk: int, passes: int) -> int:
    """Floating-point operations of `passes` linear-attention passes with shapes q [B, T, H, K] and v [B, T, HV, V].

    Per token and value head: 2 C (K + V) for the scores and their product with the values inside a chunk of C tokens,
    4 K V for reading and writing the state. The forward is one pass, the backward three (dq, dk, dv).
    """
    (B, T, _, K), (HV, V) = q, v[2:]
    return passes * B * T * HV * (2 * chunk * (K + V) + 4 * K * V)

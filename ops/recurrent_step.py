"""la::recurrent_step_: one token, the state updated in place.

    la::recurrent_step_(q, k, v, state!, g?, g_gamma?, state_indices?, scale?, normalize) -> o

For generation. `state` is a pool of S slots and `state_indices` names the slot of each row; rows whose slot lies
outside the pool are skipped: no state is touched, and their output is zero. An operator that writes its input has no
derivative, so a call that would need one raises and names `la::recurrent`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import checks
from . import cuda, late, private
from .operator import NAMESPACE, Kernel, define, library, plain, scale_of
from .rules import autocast_kernel, flops

op = define(
    "recurrent_step_",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor? g, Tensor? g_gamma, Tensor? state_indices, "
    "float? scale, bool normalize) -> Tensor",
)


def _checked(kernel: Kernel) -> Kernel:
    def step(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: Tensor,
        g: Tensor | None,
        g_gamma: Tensor | None,
        state_indices: Tensor | None,
        scale: float | None,
        normalize: bool,
    ) -> Tensor:
        checks.step(q, k, v, state, g, g_gamma, state_indices, normalize)
        scale = scale_of(q, scale)
        return kernel(q, k, v, state, g, g_gamma, state_indices, scale, normalize)

    return step


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    state_indices: Tensor | None,
    scale: float | None,
    normalize: bool,
) -> Tensor:
    checks.step(q, k, v, state, g, g_gamma, state_indices, normalize)
    return v.new_empty(v.shape)


def _refuse_derivatives(*inputs: Any) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    transformed = private.forward_mode() or private.transforms_active()
    wanted = wanted or (transformed and private.any_tangent(*tensors))
    if wanted:
        raise RuntimeError(
            f"{NAMESPACE}::recurrent_step_ writes its state in place and has no derivative: an input requires a "
            f"gradient or carries a tangent. Use {NAMESPACE}::recurrent, or call it under torch.no_grad()"
        )


def _autograd(*inputs: Any) -> Tensor:
    _refuse_derivatives(*inputs)
    with private.below_autograd():
        out: Tensor = op(*inputs)
    torch.autograd.graph.increment_version(inputs[3])  # a tensor saved for a backward must notice the write
    return out


def _vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
    """Sample by sample: only a view of the state can be written in place."""
    if in_dims[3] is None:
        raise ValueError(
            "state must have the dimension that vmap maps over, since every sample writes its own: "
            f"got state.shape={tuple(inputs[3].shape)} unmapped"
        )
    samples = (
        op(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)))
        for i in range(info.batch_size)
    )
    return torch.stack(list(samples)), 0


_kernels = {device: _checked(kernel) for device, kernel in cuda.step_().items()}
for _device, _kernel in _kernels.items():
    library.impl("recurrent_step_", _kernel, _device.upper())
    if private.exclude_keys is not None:
        library.impl("recurrent_step_", autocast_kernel(op, _device, True), f"Autocast{_device.upper()}")
torch.library.register_fake(f"{NAMESPACE}::recurrent_step_", _fake, lib=library)
torch.library.register_vmap(f"{NAMESPACE}::recurrent_step_", _vmap, lib=library)
library.impl("recurrent_step_", _autograd, "Autograd")


def _count() -> None:
    from torch.utils.flop_counter import register_flop_formula

    def formula(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return flops((q[0], 1, *q[1:]), (v[0], 1, *v[1:]), 0, 1)

    register_flop_formula(op.overloadpacket)(formula)


late.when_imported("torch.utils.flop_counter", _count)


def operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    state_indices: Tensor | None,
    scale: float | None,
    normalize: bool,
) -> Tensor:
    """The step through the dispatcher, or in plain eager calls around it."""
    checks.options(scale, normalize=normalize)
    inputs = (q, k, v, state, g, g_gamma, state_indices, scale, normalize)
    given = q is not None and k is not None and v is not None and state is not None
    eager = given and private.AVAILABLE and not torch.compiler.is_compiling()
    if eager and plain(q, k, v, state, g, g_gamma, state_indices) and q.device.type in _kernels:
        if torch.is_grad_enabled():
            _refuse_derivatives(*inputs)
        out: Tensor = _kernels[q.device.type](*inputs)
        if not state.is_inference():
            torch.autograd.graph.increment_version(state)
        return out
    optional = {"g_or_None": g, "g_gamma_or_None": g_gamma, "state_indices_or_None": state_indices}
    checks.tensors(q=q, k=k, v=v, state=state, **optional)
    return op(*inputs)

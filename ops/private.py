"""The private names of PyTorch that the operators use, tested for at import.

`torch.library.register_autograd` gives an operator reverse mode only: `torch.func.grad` raises, and `torch.func.jvp`
returns a zero tangent without a word. An "Autograd" kernel of our own, on `_SingleLevelFunction`, gives both. That
is tested on 2.13. Where one of these names is gone, `AVAILABLE` is False and the operators fall back to
`register_autograd`; forward mode then raises instead of returning zeros.
"""

from __future__ import annotations

from typing import Any

import torch

MISSING: list[str] = []


def _find(path: str) -> Any:
    """The object at a dotted path below torch, or None with its name noted in MISSING."""
    where: Any = torch
    for name in path.split("."):
        if not hasattr(where, name):
            MISSING.append(f"torch.{path}")
            return None
        where = getattr(where, name)
    return where


try:
    from torch._functorch.utils import enable_single_level_autograd_function as _single_level
except ImportError:  # pragma: no cover - depends on the release of torch
    MISSING.append("torch._functorch.utils.enable_single_level_autograd_function")
else:
    single_level: Any = _single_level

# The base class of torch.autograd.Function: it runs at one functorch level, and so may sit inside a dispatcher key.
SingleLevelFunction: Any = _find("autograd.function._SingleLevelFunction")
# What compiled autograd tells two such functions apart by; torch.autograd.Function has it, its base class does not.
compiled_autograd_key: Any = _find("autograd.Function._compiled_autograd_key")
# Guards that send a call to the kernels below the autograd, or the autocast, key.
below_autograd: Any = _find("_C._AutoDispatchBelowAutograd")
exclude_keys: Any = _find("_C._ExcludeDispatchKeyGuard")
# Is a torch.func transform running? Does any of these arguments require a gradient?
transforms_active: Any = _find("_C._are_functorch_transforms_active")
_transform_stack: Any = _find("_C._functorch.get_interpreter_stack")
any_requires_grad: Any = _find("_C._any_requires_grad")
# Is this a tensor inside a torch.func transform?
_wrapped: Any = _find("_C._functorch.is_functorch_wrapped_tensor")
# The older vmap: is this one of its tensors, and their two ends.
legacy_batched: Any = _find("_C._functorch.is_legacy_batchedtensor")
add_batch_dim: Any = _find("_add_batch_dim")
remove_batch_dim: Any = _find("_remove_batch_dim")
# Turns forward mode back on inside a Function's forward.
forward_grad: Any = _find("autograd.forward_ad._set_fwd_grad_enabled")
# Modes that would have to see the call: the length of each stack.
dispatch_modes: Any = _find("_C._len_torch_dispatch_stack")
function_modes: Any = _find("_C._len_torch_function_stack")
any_autocast: Any = _find("_C._is_any_autocast_enabled")
profiling: Any = _find("autograd._profiler_enabled")

AVAILABLE = not MISSING


def forward_mode() -> bool:
    """Is a forward-mode level open (`torch.autograd.forward_ad.dual_level`, `torch.func.jvp`)?"""
    return torch.autograd.forward_ad._current_level >= 0


def inside_transform(x: torch.Tensor) -> bool:
    """Does a transform wrap this tensor? It may do so where none is running: in autograd's own thread, or in a graph
    that is walked after the transform returned."""
    return _wrapped(x) or legacy_batched(x)


def transforms_nested() -> bool:
    """Do torch.func transforms run inside one another?"""
    stack = _transform_stack()
    return stack is not None and len(stack) > 1


def vmap_level() -> int:
    """The level of the innermost vmap of the older kind, which has no name of its own to ask for.

    The count belongs to a thread. Autograd runs the backward on a GPU in a thread of its own, where it is 0: the level
    is then taken to be the first.
    """
    level = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    return max(level - 1, 1)


def any_tangent(*inputs: Any) -> bool:
    """Does any of these arguments carry a tangent?

    Level 0 is the only one there is. It is named because a compiled graph opens it without `forward_ad` taking note.
    """
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(isinstance(x, torch.Tensor) and unpack(x, level=0).tangent is not None for x in inputs)


def without_tangent(x: Any) -> Any:
    """The same value without the tangent it carries."""
    return torch.autograd.forward_ad.unpack_dual(x, level=0).primal if isinstance(x, torch.Tensor) else x

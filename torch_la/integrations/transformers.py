"""Hugging Face models with the operators of this library in the place of their Python loops.

    from torch_la.integrations.transformers import accelerate

    handle = accelerate(model)  # MiniMax, Mamba-2, Bamba, Zamba2, Nemotron-H, Granite 4
    ...
    handle.restore()            # or: with accelerate(model): ...

The model keeps its parameters, its cache and its `generate`; only the `forward` of its linear attention modules
changes, to those of `torch_la.layers`. Every difference is on the page docs/transformers.
"""

from __future__ import annotations

import inspect
import sys
from types import MethodType, TracebackType

from torch import nn

from .. import layers

# Where transformers defines a module, and the layer whose forward replaces its own.
LAYERS: dict[str, type[nn.Module]] = {
    "minimax.modeling_minimax.MiniMaxLightningAttention": layers.MiniMaxLightningAttention,
    "mamba2.modeling_mamba2.Mamba2Mixer": layers.Mamba2Mixer,
    "bamba.modeling_bamba.BambaMixer": layers.Mamba2Mixer,
    "zamba2.modeling_zamba2.Zamba2MambaMixer": layers.Mamba2Mixer,
    "nemotron_h.modeling_nemotron_h.NemotronHMamba2Mixer": layers.Mamba2Mixer,
    "granitemoehybrid.modeling_granitemoehybrid.GraniteMoeHybridMambaLayer": layers.Mamba2Mixer,
}

# What `layers.Mamba2Mixer` asks of a cache.
CACHE_METHODS = ("get_recurrent_state", "update_recurrent_state", "update_conv_state")


class Accelerated:
    """What `accelerate` did to a model. `restore` undoes it, and so does the end of a `with` block.

    Attributes:
        modules: the modules of the model whose forward was replaced, by name.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self._bound = {name: module.forward for name, module in modules.items()}

    def restore(self) -> None:
        """Gives every module its own forward back. A second call does nothing.

        Raises:
            RuntimeError: something else has replaced a forward since; nothing is changed then.
        """
        for name in self._bound:
            if self.modules[name].__dict__.get("forward") is not self._bound[name]:
                raise RuntimeError(f"{name}.forward was replaced again after accelerate(); undo that first")
        for name in self._bound:
            del self.modules[name].__dict__["forward"]
        self._bound = {}

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        return f"Accelerated({', '.join(self._bound) or 'restored'})"


def _check_cache() -> None:
    """The caches of transformers got their method for reading a state late."""
    transformers = sys.modules["transformers"]  # there: a module of it was met
    missing = [name for name in CACHE_METHODS if not hasattr(transformers.Cache, name)]
    if missing:
        raise RuntimeError(f"the caches of transformers {transformers.__version__} have no {', '.join(missing)}")


def accelerate(model: nn.Module) -> Accelerated:
    """Gives the linear attention modules of a transformers model the forward of `torch_la.layers`, in place.

    Args:
        model: a model of Hugging Face transformers, or any module that contains one. Parameters, buffers, names and
            `state_dict` stay as they are. Call it before `torch.compile`.

    Returns:
        a handle with `restore()`, which is also a context manager. `copy.deepcopy` of the model keeps the replaced
        forwards; pickle does not: accelerate the copy again.

    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: model has no module that this library knows.
        RuntimeError: a module's forward has been replaced already (by this function, by the kernels hub, by hooks of
            accelerate), or this release of transformers calls it with other arguments, or has caches without a method
            that it needs. Nothing is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}")
    found: dict[str, tuple[nn.Module, type[nn.Module]]] = {}
    for name, module in model.named_modules():
        layer = LAYERS.get(
            f"{type(module).__module__}.{type(module).__qualname__}".removeprefix("transformers.models.")
        )
        if layer is None:
            continue
        # (a copy by pickle binds a replaced forward anew by its name: to the module's own)
        replaced = module.__dict__.get("forward")
        if replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward:
            raise RuntimeError(f"the forward of {name or 'the model'} has been replaced already: {module.forward!r}")
        theirs, ours = (list(inspect.signature(cls.forward).parameters) for cls in (type(module), layer))
        if theirs != ours:
            raise RuntimeError(
                f"this release of transformers calls {type(module).__name__} with {theirs}, torch_la with {ours}"
            )
        if layer is layers.Mamba2Mixer:
            _check_cache()
        found[name] = module, layer
    if not found:
        known = ", ".join(path.rpartition(".")[2] for path in LAYERS)
        raise ValueError(f"model has no module that torch_la knows ({known}): got {type(model).__name__}")
    for module, layer in found.values():
        module.forward = MethodType(layer.forward, module)
    return Accelerated({name: module for name, (module, _) in found.items()})

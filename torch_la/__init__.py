"""Causal linear attention as a first-class PyTorch operator.

Importing this package registers the operators `torch.ops.la.chunk`, `fused_chunk`, `recurrent`, their backward
operators, and `recurrent_step_`. It touches no GPU and imports no Triton. What is marked * is imported at first use.

- `linear_attention`: picks an operator from the shapes
- `chunk`, `fused_chunk`, `recurrent`: the operators by name
- `recurrent_step`: one token, the state in place
- `normalize_output`: the normaliser as a function of its own
- `nn`*: the layer; `feature_maps`*: what stands in for the softmax; `generation`*: states of fixed size for it
- `layers`*: layers of Hugging Face models with these operators, for `integrations.transformers` and the kernels hub
- `compat`*, `integrations`*: other libraries' functions and models
- `explain`*: what a call would run, without running it
- `decay`: the fixed decays of real checkpoints, by name
- `reference`: the definition in plain PyTorch
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import decay
from .functions import chunk, fused_chunk, linear_attention, normalize_output, recurrent, recurrent_step
from .ops import reference

if TYPE_CHECKING:
    from . import compat, feature_maps, generation, integrations, layers, nn
    from .explanation import explain

__version__ = "0.1.0"
__all__ = [
    "chunk",
    "compat",
    "decay",
    "explain",
    "feature_maps",
    "fused_chunk",
    "generation",
    "integrations",
    "layers",
    "linear_attention",
    "nn",
    "normalize_output",
    "recurrent",
    "recurrent_step",
    "reference",
]


def __getattr__(name: str) -> Any:
    """Imports what most programs do not need when it is first asked for."""
    if name == "explain":
        value = import_module(".explanation", __name__).explain
    elif name in ("compat", "feature_maps", "generation", "integrations", "layers", "nn"):
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

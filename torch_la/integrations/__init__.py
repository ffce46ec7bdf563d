"""Models of other libraries with the operators of this one. Nothing here imports those libraries.

- `transformers`: the linear attention layers of Hugging Face models
"""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Imports a module when it is first asked for."""
    if name not in ("transformers",):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)

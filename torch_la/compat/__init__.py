"""The functions of other libraries by their own names, computed by the operators of this one.

- `fla`: linear attention, simple GLA, retention and lightning attention of flash-linear-attention
- `mamba`: the state-space scan and the one-token update of mamba_ssm

Same arguments, defaults and results; docs/moving lists every difference. Neither library needs to be installed.
"""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    """Imports a module when it is first asked for."""
    if name not in ("fla", "mamba"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f".{name}", __name__)

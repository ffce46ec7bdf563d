"""Registrations that wait for the PyTorch module they extend.

FLOP formulas and DTensor sharding rules belong to modules that take 0.2 s and 0.6 s to import, and that most programs
never load. `when_imported` runs a function right after such a module is imported, at once if it already is: the rule is
there whenever it can be asked for, and `import torch_la` pays nothing for it.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_waiting: dict[str, list[Callable[[], None]]] = {}
_looking = threading.local()  # the module that this thread asks the other finders for


class _Finder(MetaPathFinder):
    """Finds nothing itself: lets the others find the module, and wraps the loader they return."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _waiting or getattr(_looking, "name", None) == fullname:
            return None
        _looking.name = fullname
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            _looking.name = None
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, fullname)
        return spec


class _Then(Loader):
    def __init__(self, loader: Loader, name: str) -> None:
        self.loader, self.name = loader, name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self.loader  # what the module sees of itself is as it always was
        self.loader.exec_module(module)
        # Here and no earlier: a spec may be looked up and never executed, and a first import may fail.
        for function in _waiting.pop(self.name, ()):
            function()


def when_imported(module: str, function: Callable[[], None]) -> None:
    """Call `function` as soon as `module` is imported; now if it is."""
    if module in sys.modules:
        function()
        return
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _waiting.setdefault(module, []).append(function)

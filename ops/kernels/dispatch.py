"""`kernel[grid](...)` with less work on the host.

Triton looks at each argument of each launch to find the code that it compiled for such arguments. With the fifty
arguments of a kernel here, that takes longer than a small kernel runs. `Kernel` looks at what matters, all together,
and hands the launch to the `CompiledKernel` that Triton returned for an earlier call like it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from triton.runtime.jit import JITFunction

MOST = 4096  # calls that a kernel remembers: the key has all strides, so each length is a call of its own


class Kernel:
    """A Triton kernel whose run-time parameters come first and are passed by position; its constants by name."""

    def __init__(self, fn: JITFunction) -> None:
        self.fn, self.arg_names = fn, fn.arg_names
        self.constants = [p.name for p in fn.params if p.is_constexpr]
        self.compiled: dict[Any, Any] = {}
        # they pick from the arguments of a call: the tensors, the integers on which Triton specialises, and the others
        self.tensors: Callable[..., Any] | None = None
        self.special: Callable[..., Any]
        self.plain: Callable[..., Any]

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return functools.partial(self.run, grid)

    def learn(self, args: tuple[Any, ...]) -> None:
        """Every call passes the same kinds of arguments: a number that is a float once is a float always."""
        # (`tensors` last: another thread takes it as the sign that all are there)
        kinds: dict[str, list[int]] = {"special": [], "plain": [], "tensors": []}
        for i, (x, p) in enumerate(zip(args, self.fn.params, strict=False)):
            if isinstance(x, torch.Tensor):
                kinds["tensors"].append(i)
            elif isinstance(x, int):
                kinds["plain" if p.do_not_specialize else "special"].append(i)
        for name, kind in kinds.items():  # (of one item, itemgetter would not return a tuple)
            setattr(self, name, itemgetter(*kind, *kind[:1]) if kind else lambda _: (0,))

    def run(self, grid: tuple[int], *args: Any, **options: Any) -> None:
        if self.tensors is None:
            self.learn(args)
        addresses = 0
        dtypes = []
        for x in self.tensors(args):  # type: ignore[misc]
            addresses |= x.data_ptr()
            dtypes.append(x.dtype)
        if addresses & 15 or max(self.plain(args)) >= 1 << 31:  # other code, and rare: leave it to Triton
            self.fn[grid](*args, **options)
            return
        key = (args[0].device.index, self.special(args), *dtypes, *options.values())
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[(*grid, 1, 1)](*args, *[options[name] for name in self.constants])
            return
        compiled = self.fn[grid](*args, **options)
        if hasattr(compiled, "function"):  # (a dry run returns nothing of the kind)
            if len(self.compiled) >= MOST:
                self.compiled.clear()
            self.compiled[key] = compiled


def dispatch(fn: Any) -> Any:
    """The kernel of a function of `triton.jit`; under Triton's interpreter, the function itself."""
    return Kernel(fn) if isinstance(fn, JITFunction) else fn

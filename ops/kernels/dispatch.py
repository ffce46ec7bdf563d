"""A launch with less work on the host.

Triton looks at each argument of each launch to find the code that it compiled for such arguments. With the fifty
arguments of a kernel here, that takes longer than a small kernel runs. Here the caller decides once for a whole call
whether it is like an earlier one (`form`), and then remembers its launches.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any

import torch
from triton import AsyncCompileMode, knobs
from triton.runtime import driver

_waiting: ContextVar[list[Any] | None] = ContextVar("waiting", default=None)


def form(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """What Triton chooses code by, but for the alignment of pointers, and all that grids and constants depend on."""
    return tuple([None if x is None else (x.dtype, x.shape, x.stride()) for x in tensors])


class Launch:
    """A launch of one kernel, whose grid and constants are known.

    Called with the kernel and its run-time arguments, which come first, by position. Every call passes integers of
    equal value and tensors of equal dtype on one device: only pointers and floats may differ. So the code that Triton
    compiled for the first call serves all others, if their pointers are multiples of 16 too.
    """

    def __init__(self, programs: int, **constants: Any) -> None:
        self.grid, self.constants = (programs,), constants
        self.known: tuple[Any, ...] | None = None

    def __call__(self, kernel: Any, *args: Any) -> None:
        if self.known is None or kernel is not self.known[0] or _watched():
            self.learn(kernel, args)
            return
        _, device, run, function, metadata, tensors, constants = self.known
        values = [*args, *constants]
        addresses = 0
        for i in tensors:  # as numbers (Triton 3.6 to 3.9 take them): it would ask the driver about each tensor
            values[i] = address = values[i].data_ptr()
            addresses |= address
        if addresses & 15:  # other code, and rare
            self.learn(kernel, args)
            return
        stream = driver.active.get_current_stream(device)
        run(*self.grid, 1, 1, stream, function, metadata, None, None, None, *values)

    def learn(self, kernel: Any, args: tuple[Any, ...]) -> None:
        """Launches by way of Triton, and remembers what it launched; or waits."""
        queue = _waiting.get()
        if queue is not None:
            queue.append((self, kernel, args))
            return
        compiled = kernel[self.grid](*args, **self.constants)
        tensors = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
        if not hasattr(compiled, "packed_metadata") or any(args[i].data_ptr() & 15 for i in tensors):
            return  # (the interpreter and dry runs return nothing of the kind)
        constants = [self.constants[p.name] for p in kernel.params if p.is_constexpr]
        code = compiled.run, compiled.function, compiled.packed_metadata
        self.known = kernel, driver.active.get_current_device(), *code, tensors, constants


def _watched() -> bool:
    """Do launches wait, or does a profiler want to see them? Triton has a chain of hooks, which may be empty."""
    if _waiting.get() is not None:
        return True
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@contextlib.contextmanager
def compiled_at_once() -> Iterator[None]:
    """Launches in here wait for its end. The code that they need is then compiled in threads, several kernels at once.

    A backward with the normaliser has ten kernels. One after the other they take twice as long to compile.
    """
    queue: list[tuple[Launch, Any, tuple[Any, ...]]] = []
    token = _waiting.set(queue)
    try:
        yield
    finally:
        _waiting.reset(token)

    def compile_all() -> None:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads, AsyncCompileMode(threads):
            for launch, kernel, args in queue:
                kernel.warmup(*args, grid=launch.grid, **launch.constants)

    copy_context().run(compile_all)  # where a kernel does not compile, Triton stays in its mode: not here
    for launch, kernel, args in queue:
        launch(kernel, *args)

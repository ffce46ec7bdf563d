"""A launch with less work on the host.

Triton looks at each argument of each launch to find the code that it compiled for such arguments. With the fifty
arguments of a kernel here, that takes longer than a small kernel runs. Here the caller decides once for a whole call
whether it is like an earlier one (`form`), and then remembers its launches.
"""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs
from triton.runtime import driver


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
        for i in tensors:  # as numbers: Triton would ask the driver about each tensor
            values[i] = address = values[i].data_ptr()
            addresses |= address
        if addresses & 15:  # other code, and rare
            self.learn(kernel, args)
            return
        stream = driver.active.get_current_stream(device)
        run(*self.grid, 1, 1, stream, function, metadata, None, None, None, *values)

    def learn(self, kernel: Any, args: tuple[Any, ...]) -> None:
        """Launches by way of Triton, and remembers what it launched."""
        compiled = kernel[self.grid](*args, **self.constants)
        tensors = [i for i, x in enumerate(args) if isinstance(x, torch.Tensor)]
        if not hasattr(compiled, "packed_metadata") or any(args[i].data_ptr() & 15 for i in tensors):
            return  # (the interpreter and dry runs return nothing of the kind)
        constants = [self.constants[p.name] for p in kernel.params if p.is_constexpr]
        code = compiled.run, compiled.function, compiled.packed_metadata
        self.known = kernel, driver.active.get_current_device(), *code, tensors, constants


def _watched() -> bool:
    """Does a profiler want to see launches? Triton has a chain of hooks, which may be empty."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))

"""The Triton kernels, imported when the first CUDA tensor arrives.

With TRITON_INTERPRET=1 in the environment, Triton's interpreter runs them on CPU tensors too: the CI of a machine
without a GPU tests the very kernels that a GPU runs. float64 stays with the ATen kernels.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from . import cpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _launcher() -> Any:
    from .kernels import launch

    return launch


def _triton(function: str, *first: str) -> Any:
    def kernel(*inputs: Any) -> Any:
        return getattr(_launcher(), function)(*first, *inputs)

    return kernel


def kernels(function: str, *first: str, cpu_kernel: Any) -> dict[str, Any]:
    """The kernel for each device type: `launch.function(*first, ...)` on CUDA, `cpu_kernel` on the CPU."""
    triton = _triton(function, *first)
    if not INTERPRETED:
        return {"cpu": cpu_kernel, "cuda": triton}

    def interpreted(q: torch.Tensor, *rest: Any) -> Any:
        return (cpu_kernel if q.dtype == torch.float64 else triton)(q, *rest)

    return {"cpu": interpreted, "cuda": triton}


def forward(op: str, cpu_kernel: Any) -> dict[str, Any]:
    return kernels("forward", op, cpu_kernel=cpu_kernel)


def backward(op: str, cpu_kernel: Any) -> dict[str, Any]:
    return kernels("backward", op, cpu_kernel=cpu_kernel)


def step_() -> dict[str, Any]:
    return kernels("step_", cpu_kernel=cpu.step_)

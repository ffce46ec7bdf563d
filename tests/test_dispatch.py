"""`Kernel` hands a launch to compiled code only where Triton would have chosen the same code."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from torch_la.ops.kernels.dispatch import Kernel


class Compiled:
    """In the place of Triton's CompiledKernel."""

    function = 0

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.log.append(("compiled", grid, args))


class Function:
    """In the place of Triton's JITFunction: (x, n, m, free, scale, A, B)."""

    __name__ = "function"
    arg_names = ("x", "y", "n", "free", "scale", "A", "B")
    params = tuple(
        SimpleNamespace(name=name, is_constexpr=name in ("A", "B"), do_not_specialize=name == "free")
        for name in arg_names
    )

    def __init__(self) -> None:
        self.log: list[Any] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, **options: Any) -> Compiled:
            self.log.append(("triton", grid, args, options))
            return Compiled(self.log)

        return launch


X = torch.zeros(8)
CALL: dict[str, Any] = {"x": X, "y": X, "n": 16, "free": 3, "scale": 0.5, "B": 1, "A": 2, "num_warps": 4}


def call(kernel: Kernel, **changes: Any) -> str:
    """Which way the call went."""
    options = CALL | changes
    args = [options.pop(name) for name in ("x", "y", "n", "free", "scale")]
    kernel[(7,)](*args, **options)
    return kernel.fn.log[-1][0]


def test_the_second_call_goes_to_compiled_code() -> None:
    kernel = Kernel(Function())
    assert call(kernel) == "triton"
    assert call(kernel, free=4, scale=0.25) == "compiled"
    assert kernel.fn.log[-1] == ("compiled", (7, 1, 1), (X, X, 16, 4, 0.25, 2, 1))  # constants in the kernel's order


@pytest.mark.parametrize(
    "change", [{"n": 1}, {"n": 17}, {"y": X.half()}, {"A": 3}, {"B": 2}, {"num_warps": 8}], ids=str
)
def test_what_triton_compiles_anew(change: dict[str, Any]) -> None:
    kernel = Kernel(Function())
    call(kernel)
    assert call(kernel, **change) == "triton"
    assert call(kernel, **change) == "compiled"
    assert call(kernel) == "compiled"


@pytest.mark.parametrize("change", [{"y": X[1:]}, {"free": 1 << 31}], ids=["not aligned", "64 bits"])
def test_what_is_always_left_to_triton(change: dict[str, Any]) -> None:
    kernel = Kernel(Function())
    call(kernel)
    assert call(kernel, **change) == "triton"
    assert call(kernel, **change) == "triton"
    assert call(kernel) == "compiled"

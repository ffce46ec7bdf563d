"""The code that Inductor writes around the operators: q, k and v are not copied, nor is the state of a decode step.

`docs/measure_layout.py` compares the layout tags by the same code.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import torch_la
from cases import NAMES, OPERATORS

pytestmark = pytest.mark.usefixtures("fresh_compiler")
B, T, HEADS, WIDTH = 2, 40, 4, 8
SIZE = HEADS * WIDTH


class Layer(nn.Module):
    def __init__(self, op: Callable[..., Any]) -> None:
        super().__init__()
        self.op, self.qkv, self.gate, self.out = (
            op,
            nn.Linear(SIZE, 3 * SIZE),
            nn.Linear(SIZE, HEADS),
            nn.Linear(SIZE, 8),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(-3)
        return self.out(self.op(q, k, v, F.logsigmoid(self.gate(x)))[0].flatten(-2))


def generated(run: Callable[[], Any]) -> list[str]:
    """The `call` functions that Inductor wrote: the forward, and the backward where there is one."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        codes = run_and_get_code(run)[1]
    return [code[code.index("def call(") :] for code in codes]


def allocated(code: str) -> list[int]:
    """The numbers of elements of the buffers that the code allocates."""
    sizes = re.findall(r"empty_strided_\w+\(\((.*?)\)", code)
    return [math.prod(int(n) for n in size.split(",") if n.strip()) for size in sizes]


@pytest.mark.parametrize("name", NAMES)
def test_slices_of_a_packed_projection_are_not_copied(name: str, device: str) -> None:
    layer, x = Layer(OPERATORS[name]).to(device), torch.randn(B, T, SIZE, device=device)
    run = torch.compile(layer, fullgraph=True)
    forward, backward = generated(lambda: run(x).square().sum().backward())

    before, call = re.split(rf"torch\.ops\.la\.{name}\.default\(", forward)
    views = re.findall(r"reinterpret_tensor\((\w+), \((.*?)\), \((.*?)\), (\d+)\)", call)[:3]
    assert len({buffer for buffer, *_ in views}) == 1  # all three read the projection where it lies
    assert [view[1:] for view in views] == [
        (f"{B}, {T}, {HEADS}, {WIDTH}", f"{T * 3 * SIZE}, {3 * SIZE}, {WIDTH}, 1", str(i * SIZE)) for i in range(3)
    ]
    # the projection; the gate, before and after its nonlinearity
    assert sorted(allocated(before)) == [B * T * HEADS] * 2 + [B * T * 3 * SIZE]

    # The backward reads the same slices, kept from the forward, and writes dq, dk and dv. Inductor's one kernel after
    # it packs them for the product with x.
    before, after = re.split(rf"torch\.ops\.la\.{name}_backward\.default\(", backward)
    assert B * T * 3 * SIZE not in allocated(before)
    assert sum(size >= B * T * SIZE for size in allocated(before)) == 1  # do
    assert sum(size == B * T * 3 * SIZE for size in allocated(after)) == 1


@pytest.mark.parametrize("pool", [False, True])
def test_the_compiled_step_writes_the_state_itself(pool: bool, device: str) -> None:
    """The state as a buffer of the module: no copy in, no copy back."""
    slots = 9 if pool else B

    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("state", torch.zeros(slots, HEADS, WIDTH, WIDTH))
            self.qkv = nn.Linear(SIZE, 3 * SIZE)

        def forward(self, x: Tensor, slot: Tensor | None) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(-3)
            return torch_la.recurrent_step(q, k, v, self.state, state_indices=slot).flatten(-2) + x

    model, x = Step().to(device), torch.randn(B, SIZE, device=device)
    slot = torch.tensor([7, 2], device=device) if pool else None
    run = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        (code,) = generated(lambda: run(x, slot))
    assert model.state.abs().sum() > 0
    assert slots * HEADS * WIDTH * WIDTH not in allocated(code)
    assert not re.findall(r"copy_\b|copy__|clone", code)
    (call,) = re.findall(r"torch\.ops\.la\.recurrent_step_\.default\((.*)", code)
    view = rf"\({B}, {HEADS}, {WIDTH}\), [^)]*\), \d+\), "
    views = rf"reinterpret_tensor\((buf\d+), {view}" + rf"reinterpret_tensor\(\1, {view}" * 2
    assert re.match(views + r"arg\d+_1, ", call), call  # q, k, v of one product, and the buffer itself

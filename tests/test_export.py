"""torch.export with a dynamic length: one node for each call, saved, loaded and run; and AOTInductor packages.

A package holds the name of an operator, not its kernel: the process that loads it imports torch_la.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_la
from cases import NAMES, OPERATORS, Case, close

pytestmark = pytest.mark.usefixtures("fresh_compiler")
CASE = Case(T=70, groups=2, K=4, V=6, dtype=torch.float32)
TIME = torch.export.Dim("time", min=2, max=4096)
TENSORS = ("q", "k", "v", "g", "initial_state")


class Call(nn.Module):
    """One call, with a state in and a state out."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.name, self.options = name, options

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return getattr(torch_la, self.name)(**x, output_final_state=True, **self.options)


def inputs(T: int, device: str, **changes: Any) -> dict[str, Tensor]:
    x = CASE.but(T=T, **changes).arguments(device)
    return {n: x[n] for n in (*TENSORS, "cu_seqlens") if x[n] is not None}


def la_nodes(program: torch.export.ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if str(node.target).startswith("la.")]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "linear_attention"])
def test_export_save_load_run(name: str, strict: bool, device: str, tmp_path: Path) -> None:
    options = {"normalize": True, "reverse": True} if strict else {}
    module = Call(name, **options)
    example, other = (inputs(T, device, normalize=strict) for T in (70, 99))
    shapes = {n: {1: TIME} if n in "qkvg" else {} for n in example}
    program = torch.export.export(module, (example,), dynamic_shapes=(shapes,), strict=strict)
    assert la_nodes(program) == [f"la.{'chunk' if name == 'linear_attention' else name}.default"]
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    assert la_nodes(loaded) == la_nodes(program)
    for a, b in zip(loaded.module()(other), module(other), strict=True):
        close(a, b, 1e-6)


def test_packed_sequences_of_any_number(device: str) -> None:
    example = inputs(70, device, B=1, cu=(0, 10, 66))
    other = inputs(41, device, B=1, cu=(0, 3, 3, 30, 40))
    rows = torch.export.Dim("rows", min=1, max=4096)
    shapes = {n: {1: TIME} if n in "qkvg" else {} for n in example}
    shapes |= {"cu_seqlens": {0: rows + 1}, "initial_state": {0: rows}}
    program = torch.export.export(Call("chunk"), (example,), dynamic_shapes=(shapes,))
    for a, b in zip(program.module()(other), Call("chunk")(other), strict=True):
        close(a, b, 1e-6)


class Generator(nn.Module):
    """Every operator in one module: three layers over all tokens, and a step whose state is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(2, 4, 4, 6))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        outputs = [op(q.sin(), k, v, g)[0].cos() for op in OPERATORS.values()]
        step = torch_la.recurrent_step(q[:, 0], k[:, 0], v[:, 0], self.state, g[:, 0])
        return *outputs, step * 2


RUN = """
import sys, torch, torch_la
model = torch._inductor.aoti_load_package(sys.argv[1])
inputs, want = torch.load(sys.argv[2])
for row in want:
    for a, b in zip(model(*inputs), row, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
print("equal")
"""


def test_a_package_runs_in_another_process(tmp_path: Path) -> None:
    """Twice, so that the state in the package's buffer is seen to go on. On CUDA: tests/gpu/contract.py."""
    model = Generator()
    example, other = (tuple(inputs(T, "cpu")[n] for n in ("q", "k", "v", "g")) for T in (70, 99))
    program = torch.export.export(model, example, dynamic_shapes=tuple({1: TIME} for _ in example))
    assert la_nodes(program) == [*(f"la.{name}.default" for name in NAMES), "la.recurrent_step_.default"]
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    want = [model(*other), model(*other)]
    assert not torch.equal(want[0][-1], want[1][-1])
    torch.save((other, want), tmp_path / "inputs.pt")
    command = [sys.executable, "-c", RUN, package, str(tmp_path / "inputs.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "equal\n", done.stderr

    without = RUN.replace(", torch_la", "")
    done = subprocess.run([command[0], "-c", without, *command[3:]], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0  # when this passes, a package carries its operators: say so in docs/compile.md
    assert "la::chunk" in done.stderr

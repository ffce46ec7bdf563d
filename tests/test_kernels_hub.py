"""The rules of Hugging Face's kernels hub (https://huggingface.co/docs/kernels/kernel-requirements).

A kernel of the hub is loaded under a name of its own, several versions beside each other. So the package imports itself
relatively, imports nothing but the standard library, torch and Triton, spells the namespace of its operators once, and
its layers are nothing but a `forward`.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

import torch_la
from torch_la import layers, ops

PACKAGE, OPS = Path(torch_la.__file__).parent, Path(ops.__file__).parent
FILES = sorted({*PACKAGE.rglob("*.py"), *OPS.rglob("*.py")})
ALLOWED = {*sys.stdlib_module_names, "torch", "triton"}
# Tools of the command line, which no kernel needs: imported inside the functions that run them.
TOOLS = {"demo.py": {"tqdm"}, "bench.py": {"matplotlib"}}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for file in FILES:
        yield file, ast.parse(file.read_text())


def absolute_imports(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def test_imports() -> None:
    assert len(FILES) > 30
    for file, tree in trees():
        extra = absolute_imports(tree) - ALLOWED
        assert extra <= TOOLS.get(file.name, set()), f"{file} imports {extra}"
        top = {
            name
            for node in tree.body
            for name in absolute_imports(node)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        assert top <= ALLOWED, f"{file} imports {top - ALLOWED} when it is imported"


def test_one_namespace() -> None:
    """The string stands in one constant, and nobody goes to the operators by torch.ops.la."""
    spelled = []
    for file, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value == ops.operator.NAMESPACE or node.value.startswith(f"{ops.operator.NAMESPACE}::"):
                    spelled.append((file.name, node.lineno, ast.unparse(node)))
            elif isinstance(node, ast.Attribute) and node.attr == ops.operator.NAMESPACE:
                spelled.append((file.name, node.lineno, ast.unparse(node)))
    docstrings = {
        (file.name, node.body[0].lineno)
        for file, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    left = [place for place in spelled if place[:2] not in docstrings]
    assert [(name, text) for name, _, text in left] == [("operator.py", repr(ops.operator.NAMESPACE))]


RENAMED = """
import sys

sys.path.insert(0, sys.argv[1])
import torch
import torch_la
import other_name

assert other_name.ops.operator.NAMESPACE == "other_name_1f3a"
q, k, v = torch.randn(3, 1, 20, 2, 4)
one, two = torch_la.chunk(q, k, v)[0], other_name.chunk(q, k, v)[0]
assert torch.equal(one, two)
assert torch.equal(torch.ops.other_name_1f3a.recurrent(q, k, v, *[None] * 3, False, None, None, False, False)[0],
                   torch_la.recurrent(q, k, v)[0])
from other_name.compat.fla import chunk_simple_gla
from other_name.integrations.transformers import accelerate
assert accelerate.__module__ == "other_name.integrations.transformers"
assert chunk_simple_gla(q, k, v)[0].shape == v.shape
print("ok")
"""


def test_under_another_name(tmp_path: Path) -> None:
    """The package, copied and renamed with its namespace, works beside itself in one process."""
    other = tmp_path / "other_name"
    shutil.copytree(PACKAGE, other, ignore=shutil.ignore_patterns("__pycache__", "ops"))
    shutil.copytree(OPS, other / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    constant = other / "ops" / "operator.py"
    text = constant.read_text()
    constant.write_text(text.replace(f'NAMESPACE = "{ops.operator.NAMESPACE}"', 'NAMESPACE = "other_name_1f3a"'))
    done = subprocess.run([sys.executable, "-c", RENAMED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


LAYERS = [x for x in vars(layers).values() if inspect.isclass(x) and issubclass(x, nn.Module)]


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_are_pure(layer: type[nn.Module]) -> None:
    """As `kernels` validates them: no constructor, no member but `forward` and the two flags."""
    assert layer.__init__ is nn.Module.__init__
    assert {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)} == {
        "can_torch_compile",
        "has_backward",
    }
    assert layer.has_backward is True
    assert layer.can_torch_compile is True
    assert "forward" in vars(layer)


def test_layers_are_exported() -> None:
    assert len(LAYERS) == 2
    assert torch_la.layers is layers

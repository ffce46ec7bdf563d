"""The compile cache on disk: another process finds the graph again, and never with another formula than its own.

Each process compiles the same layer with one shared cache and prints a gradient, which of PyTorch's caches answered,
and the tag that is part of their keys.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import torch_la
from torch_la import ops

PROGRAM = """
import json, os, torch, torch_la
from torch._dynamo.utils import counters

if os.environ.get("TAG"):
    torch.compiler.config.cache_key_tag = os.environ["TAG"]
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 5, 2, 4).unbind()
q.requires_grad_()
run = torch.compile(lambda q, k, v: torch_la.chunk(q * 1.5, k, v)[0].sin(), fullgraph=True)
run(q, k, v).sum().backward()
hits = {key: n for key, n in counters["aot_autograd"].items() if "cache" in key}
hits["fxgraph_cache_hit"] = counters["inductor"]["fxgraph_cache_hit"]
print(json.dumps([q.grad.tolist(), hits, torch.compiler.config.cache_key_tag]))
"""


def run(cache: Path, **environment: str) -> tuple[torch.Tensor, dict[str, int], str]:
    alone = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **alone, **environment}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    gradient, hits, tag = json.loads(done.stdout.splitlines()[-1])
    return torch.tensor(gradient), hits, tag


def changed(folder: Path, file: str, old: str, new: str) -> str:
    """A copy of the package in which one thing is different."""
    ignore: Any = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(torch_la.__file__).parent, folder / "torch_la", ignore=ignore)
    shutil.copytree(Path(ops.__file__).parent, folder / "torch_la/ops", ignore=ignore, dirs_exist_ok=True)
    source = folder / "torch_la/ops" / file
    assert old in source.read_text()
    source.write_text(source.read_text().replace(old, new))
    return str(folder)


def test_another_process_finds_the_graph_and_never_a_stale_formula(tmp_path: Path) -> None:
    """Both changes multiply the gradient of q by 3."""
    cache = tmp_path / "cache"
    formula = changed(
        tmp_path / "formula", "operator.py", "return dq, dk, dv, dg, dg_gamma", "return 3 * dq, dk, dv, dg, dg_gamma"
    )
    kernel = changed(tmp_path / "kernel", "cpu.py", "    return dq, dk, dv", "    return 3 * dq, dk, dv")
    first, hits, tag = run(cache)
    assert first.norm() > 0
    assert hits.get("autograd_cache_miss") == 1

    # The second process compiles nothing. What is behind an operator's name may change: no graph holds it.
    found, hits, same_tag = run(cache, PYTHONPATH=kernel)
    assert (hits.get("autograd_cache_hit"), hits.get("autograd_cache_miss")) == (1, None)
    assert hits["fxgraph_cache_hit"] >= 1
    assert same_tag == tag
    torch.testing.assert_close(found, 3 * first)

    # Another formula is another key.
    found, hits, other_tag = run(cache, PYTHONPATH=formula)
    assert other_tag != tag
    assert hits.get("autograd_cache_miss") == 1
    torch.testing.assert_close(found, 3 * first)

    # Without the tag PyTorch serves the old gradient. When this fails, PyTorch's keys see the formula by themselves:
    # `ops/cache_key.py` has done its work, and docs/compile.md wants a new paragraph.
    stale, hits, _ = run(cache, PYTHONPATH=formula, TAG=tag)
    assert hits.get("autograd_cache_hit") == 1
    assert torch.equal(stale, first)


def test_the_tag_keeps_what_the_user_set() -> None:
    code = """
import importlib, torch
torch.compiler.config.cache_key_tag = "mine"
import torch_la
from torch_la.ops import cache_key
cache_key.mark("la")
print(torch.compiler.config.cache_key_tag)
"""
    tag = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    mine, ours = tag.split()
    assert mine == "mine"
    assert ours.startswith("la=")
    assert len(ours) == len("la=") + 16

"""Every example runs as a program of its own and says what it showed; the quick start shows every example."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAYS = {
    "train": "loss: ",
    "pack": "every sequence as it is alone",
    "generate": "as from the whole sequence",
    "compile": "no breaks",
    "export": "right for 2, 9 and 300 tokens",
    "shard": "outputs and gradients as on one",
}


@pytest.mark.parametrize("name", SAYS)
def test_example(name: str) -> None:
    file = ROOT / "examples" / f"{name}.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert SAYS[name] in done.stdout


def test_the_quick_start_shows_them_all() -> None:
    there = {file.stem for file in (ROOT / "examples").glob("*.py")}
    assert there == {*SAYS, "model"}
    page = (ROOT / "docs" / "quickstart.md").read_text()
    assert all(f"../examples/{name}.py" in page for name in there)

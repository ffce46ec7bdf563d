"""The doctor names what is there and what is known to go wrong, on machines that this one is not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_la import doctor
from torch_la.__main__ import main


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Makes this process look like a machine with a GPU."""

    def pretend(triton: str | None, capability: tuple[int, int]) -> None:
        monkeypatch.setattr(doctor, "installed", lambda package: triton)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A GPU")
        monkeypatch.setattr(doctor.cuda, "INTERPRETED", False)

    return pretend


def test_this_machine() -> None:
    """In a process of its own: it imports no Triton, and leaves CUDA alone where there is no GPU."""
    code = """if 1:
        import sys, torch
        from torch_la.__main__ import main
        rc = main(["doctor"])
        assert "triton" not in sys.modules, "doctor imported Triton"
        assert torch.cuda.is_available() or not torch.cuda.is_initialized(), "doctor initialised CUDA"
        sys.exit(rc)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch     {torch.__version__}" in done.stdout
    assert "kernels: " in done.stdout


@pytest.mark.parametrize(
    ("triton", "capability", "bad"),
    [
        ("3.3.1", (9, 0), False),
        ("3.4.0", (9, 0), True),
        ("3.6.0", (9, 0), True),
        ("3.7.0", (9, 0), True),
        ("3.7.0+git1234", (9, 0), True),
        ("3.7.1", (9, 0), False),
        ("3.6.0", (8, 0), False),
        ("3.6.0", (8, 9), False),
        ("3.5.0", (10, 0), False),
        ("3.6.0", (10, 0), True),
        ("3.7.0", (12, 0), True),
        ("3.7.1", (10, 0), False),
        ("3.10.0", (9, 0), False),
    ],
)
def test_hazards(triton: str, capability: tuple[int, int], bad: bool) -> None:
    found = list(doctor.hazards(triton, capability))
    assert len(found) == bad
    assert all("What runs: the same kernels" in line for line in found)


def test_hopper(machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine("3.6.0", (9, 0))
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "cuda:0    A GPU, sm_90, kernels: Triton" in out
    assert "note: cuda:0: Hopper with Triton 3.4.0 to below 3.7.1: tl.dot(tl.trans(x), y) gives wrong numbers" in out
    assert "What runs: the same kernels as everywhere, since none of them transposes the result of a product" in out
    assert "read the notes" in out


@pytest.mark.parametrize(
    ("triton", "capability", "problem"),
    [
        (None, (9, 0), r"need Triton: .* Calls there raise\. Instead: `torch_la\.reference`"),
        ("3.5.1", (9, 0), r"older than 3\.6"),
        ("3.6.0", (7, 5), r"need Ampere or newer, .* Instead: `torch_la\.reference`"),
    ],
)
def test_what_cannot_run(
    machine, triton: str | None, capability: tuple[int, int], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(triton, capability)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(f"PROBLEM: .*{problem}", out), out


def test_private_names_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.private, "MISSING", ["torch._C.something"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor"]) == 0
    assert "lacks torch._C.something: the operators fall back" in capsys.readouterr().out


def test_an_old_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert main(["doctor"]) == 1
    assert "older than 2.11" in capsys.readouterr().out


def test_the_interpreter(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.cuda, "INTERPRETED", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    assert main(["doctor"]) == 1
    assert "Triton is not installed" in capsys.readouterr().out
    versions = {"triton": "3.6.0", "numpy": "2.3.5"}
    monkeypatch.setattr(doctor, "installed", versions.get)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "kernels: Triton's interpreter" in out
    assert "products of bfloat16 wrongly" in out
    versions["numpy"] = "2.4.0"
    assert main(["doctor"]) == 1
    assert "fails with NumPy 2.4.0: pip install 'numpy<2.4'" in capsys.readouterr().out


def test_an_installed_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explosive.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor.installed("explosive") == "unknown version"
    assert doctor.installed("no_such_package") is None

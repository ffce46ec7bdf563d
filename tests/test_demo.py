"""The demo, small: every promise kept on a text that repeats, and every promise able to break."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_la import demo, functions
from torch_la.__main__ import main

TEXT = b"the state is all that is kept of what was read; " * 200
RUN = ["demo", "--steps", "80", "--bytes", "32", "--device", "cpu", "--backend", "eager"]


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    path = tmp_path / "text"
    path.write_bytes(TEXT)
    return ["--text", str(path)]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences, and a small model."""
    monkeypatch.setattr(demo, "LENGTH", 48)
    monkeypatch.setattr(demo, "BATCH", 8)
    monkeypatch.setattr(demo.Model.__init__, "__defaults__", (32, 2, 2))
    torch.compiler.reset()


def test_every_promise_is_kept(text: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(RUN + text) == 0
    out = capsys.readouterr().out
    assert out.count("kept:") == 3
    assert "1 graph, 0 graph breaks, 0 recompilations" in out
    assert "BROKEN" not in out


def test_a_wrong_step_is_noticed(
    text: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = functions.recurrent_step
    monkeypatch.setattr(functions, "recurrent_step", lambda *x, **y: 1.01 * right(*x, **y) + 1e-2)
    assert main(RUN + text) == 1
    assert "BROKEN: logits" in capsys.readouterr().out


def test_a_state_that_is_not_updated_is_noticed(text: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = functions.recurrent_step
    monkeypatch.setattr(
        functions, "recurrent_step", lambda q, k, v, state, g, **y: right(q, k, v, state.clone(), g, **y)
    )
    assert main(RUN + text) == 1


def test_a_model_that_does_not_learn_is_noticed(
    text: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "LEARNING_RATE", 0.0)
    assert main(RUN + text) == 1
    assert "bits per held-out byte" in capsys.readouterr().out.split("BROKEN: ")[1]


def test_a_recompilation_is_noticed(
    text: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = demo.windows
    lengths = iter(range(1, 1000))

    def shrinking(*x: object) -> tuple[torch.Tensor, ...]:
        cut = next(lengths) % 3
        return tuple(y[:, cut:] for y in right(*x))

    monkeypatch.setattr(demo, "windows", shrinking)
    assert main(RUN + text) == 1
    assert re.search("BROKEN: 1 graph, 0 graph breaks, [1-9] recompilations", capsys.readouterr().out)


def test_a_graph_break_is_an_error(text: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = demo.Attention.inputs

    def broken(self: demo.Attention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        torch._dynamo.graph_break()
        return right(self, x)

    monkeypatch.setattr(demo.Attention, "inputs", broken)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        main(RUN + text)


def test_generation_equals_the_parallel_form_in_float64() -> None:
    """Without the training: the two forms of the model agree to rounding, and the states are updated in place."""
    torch.manual_seed(0)
    model = demo.Model().double()
    tokens = torch.randint(256, (3, 70))
    states = [torch.zeros(3, *model.state_shape, dtype=torch.float64) for _ in model.attention]
    with torch.no_grad():
        steps = torch.stack([model.step(tokens[:, t], states) for t in range(70)], 1)
        torch.testing.assert_close(steps, model(tokens), rtol=1e-10, atol=1e-10)
    assert all(state.abs().max() > 0 for state in states)


def test_the_baseline_is_the_entropy() -> None:
    """Four bytes, equally often: two bits each. The counts start at 1, which the length of the text drowns."""
    data = torch.arange(4, dtype=torch.uint8).repeat(100_000)
    assert demo.baseline(data, data) == pytest.approx(2, abs=1e-2)


def test_the_standard_library_is_found() -> None:
    text = demo.standard_library()
    assert len(text) > 1_000_000
    assert b"class ArgumentParser" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no such file"], "no such file"),
        (["--text", __file__, "--steps", "0"], "must be above 0"),
        (["--text", str(Path(__file__).with_name("no"))], "cannot use"),
    ],
)
def test_what_cannot_start(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_short_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"short")
    assert main(["demo", "--text", str(path)]) == 2
    assert "too short" in capsys.readouterr().err


def test_tqdm_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    original = builtins.__import__

    def without(name: str, *rest: object) -> object:
        if name == "tqdm":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["demo"]) == 2
    assert "pip install tqdm" in capsys.readouterr().err


def test_the_command_line() -> None:
    """As a user types it, in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "torch_la", "demo", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--text" in done.stdout
    done = subprocess.run([sys.executable, "-m", "torch_la"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "required: command" in done.stderr

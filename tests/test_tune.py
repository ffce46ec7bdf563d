"""The tile tuner: what it would refuse, and which calls it makes for which row. Speed takes a GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torch_la import tune
from torch_la.__main__ import main
from torch_la.ops.kernels import tiles


def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "CUDA" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["forward", "backward", "tokens", "step"])
def test_tune_refuses_a_kernel_that_is_wrong(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, on CPU kernels: right ones are within the limits, and one with one wrong number is not."""
    from torch_la import functions, ops

    monkeypatch.setattr(tune, "DEVICE", "cpu")
    limit = tune.LIMITS["ieee"][torch.float32]
    assert tune._worst(kernel, torch.float32, 16, tune.CASES) < limit
    if kernel == "step":
        right = functions.recurrent_step
        monkeypatch.setattr(functions, "recurrent_step", lambda *a, **k: 1.001 * right(*a, **k))
    else:
        operator = getattr(ops, "recurrent" if kernel == "tokens" else "fused_chunk").operator
        run = operator._eager["cpu"]

        def wrong(*inputs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
            o, state = run(*inputs)
            return 1.001 * o, state

        monkeypatch.setitem(operator._eager, "cpu", wrong)
    assert tune._worst(kernel, torch.float32, 16, tune.CASES[:1]) > limit


def test_tune_counts_what_is_not_finite_as_wrong() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    assert tune._error(torch.tensor([1, 1, float("nan")]), ones) == float("inf")
    assert tune._error(torch.tensor([1, 1, float("inf")]), ones) == float("inf")
    assert tune._error(ones, ones) == 0


def test_the_table_survives_being_written() -> None:
    table = json.loads(tiles.TABLE.read_text())
    assert json.loads(tune._text(table)) == table
    # the states between blocks are kept for the chunks of the backward
    for precision, rows in table["states"].items():
        for width, row in rows.items():
            assert row[0] == table["backward"][precision + "+blocks"][width][0]


def test_the_options_parse() -> None:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    options = parser.parse_args(["--kernel", "forward", "--precision", "half+blocks", "--width", "64", "--dry-run"])
    assert (options.kernel, options.precision, options.width) == (["forward"], ["half+blocks"], [64])
    assert options.dry_run


# ------------------------------------------------------------------------------------------------- rows and their calls


def test_every_row_of_the_table_can_be_tuned() -> None:
    for kernel, rows in tiles.table().items():
        for name, row in rows.items():
            assert set(row) <= {str(width) for width in tune.WIDTHS}
            assert tune.candidates(kernel, name), (kernel, name)
            assert tune.reading(kernel, name, rows), (kernel, name)
    own = tune.CANDIDATES["backward"]
    assert tune.candidates("backward", "half+gates") is own["half"]
    assert tune.candidates("backward", "half+blocks+norm") is own["half+blocks"]
    assert tune.candidates("forward", "half+norm+gates") is tune.CANDIDATES["forward"]["half"]


class Here:
    """In the place of the pool of workers: what `measure` says, here."""

    def __init__(self, measure: Any) -> None:
        self.measure = measure

    def submit(self, _: Any, *arguments: Any) -> Any:
        self.result = lambda: self.measure(*arguments)
        return self

    def shutdown(self, **_: Any) -> None:
        pass


def test_the_fastest_that_is_right_is_written_and_unknown_rows_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {
        "forward": {"half": {"64": [64, 64, 4, 1]}, "half+odd": {"64": [1, 2, 3, 4]}, "fp8": {"64": [5, 6, 7, 8]}},
        "tokens": {"any": {"64": [1, 32, 2, 1]}},
        "step": {"any": {"64": [1, 8, 1, 1]}},
        "other": {"any": {"64": [9, 9, 9, 9]}},
    }
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(table))

    def measure(kernel: str, name: str, width: int, row: tuple[int, ...], seed: int) -> tuple[float, float]:
        share = 2.0 if row == (128, 128, 8, 3) or kernel == "tokens" else 0.5  # the fastest is wrong, or all are
        return share, 1000.0 - sum(row) if share <= 1 else float("inf")

    monkeypatch.setattr(tiles, "TABLE", path)
    monkeypatch.setattr(tune, "_pool", lambda: Here(measure))
    names = ["half", "half+odd", "fp8", "any"]
    assert tune.tune(list(table), names, [64], tmp_path / "new.json", True) == 1
    assert tune.tune(["step"], names, [64], tmp_path / "step.json", True) == 0
    table["forward"]["half"]["64"], table["step"]["any"]["64"] = [128, 128, 8, 2], [1, 64, 4, 1]
    assert json.loads((tmp_path / "new.json").read_text()) == table
    out = capsys.readouterr().out
    assert "forward half+odd 64: no call that reads it is known; the row stays" in out
    assert "tokens any 64: no candidate is right; the row stays, and must not be used" in out
    assert "forward fp8 64: there are no candidates for it; the row stays" in out
    assert "other any 64: there are no candidates for it; the row stays" in out


def test_which_call_reads_which_row() -> None:
    """As the launcher asks for rows, not as the tuner believes. This file as a script: see `asked_by_the_launcher`."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    rows = [[kernel, name] for kernel, names in tiles.table().items() for name in names]
    assert json.loads(done.stdout) == rows


def asked_by_the_launcher() -> list[tuple[str, str]]:
    """For each row, runs all cases and the call that is timed, on the CPU, with kernels that do nothing."""
    import triton.testing

    from torch_la.ops.kernels import launch

    class Nothing:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **constants: None

    for name, kernel in list(vars(launch).items()):
        if hasattr(kernel, "arg_names"):
            setattr(launch, name, Nothing())
    caches = [f for f in vars(launch).values() if hasattr(f, "cache_clear")]

    # A row is known by its count of registers, whatever the tuner overrides.
    rows = [(kernel, name) for kernel, names in tiles.table().items() for name in names]
    for i, (kernel, name) in enumerate(rows):
        widths = tiles.table()[kernel][name]
        widths |= {width: [*row[:4], i] for width, row in widths.items()}
    asked: set[tuple[str, str]] = set()
    tile = tiles.tile

    def recorded(kernel: str, precision: str, K: int, V: int) -> tiles.Tile:
        index = tiles._tile(kernel, precision, max(K, V)).registers
        assert index is not None
        asked.add(rows[index])
        return tile(kernel, precision, K, V)

    def forget() -> None:
        asked.clear()
        for cache in caches:
            cache.cache_clear()

    tiles.tile = recorded
    tune.DEVICE, tune.TOKENS = "cpu", 1
    done = []

    def worst(kernel: str, dtype: torch.dtype, width: int, cases: list[tune.Case]) -> float:
        for case in tune.CASES:
            forget()
            tune._compute(kernel, tune._draw(kernel, dtype, width, case), case)
            assert (row in asked) == (case in cases), (row, case, asked)
        forget()
        return 0.0

    def do_bench(run: Any, **_: Any) -> float:
        forget()
        run()
        assert row in asked, (row, "is not read by the call that is timed", asked)
        done.append(row)
        return 1.0

    tune._worst, triton.testing.do_bench = worst, do_bench
    for row in rows:  # the functions above look at it
        current = tiles.Tile(*tiles.table()[row[0]][row[1]]["64"])
        tune._measure(*row, 64, (current.chunk, current.block, current.warps, current.stages), 0)
        tiles.override.clear()
    return done


if __name__ == "__main__":
    print(json.dumps(asked_by_the_launcher()))

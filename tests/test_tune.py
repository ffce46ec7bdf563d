"""The tile tuner: what it would refuse, and which calls it makes for which row. Speed takes a GPU."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torch_la import tune
from torch_la.__main__ import main
from torch_la.ops import reference
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
    assert tune._error(torch.tensor([1, 1, float("nan")]), ones, ones) == float("inf")
    assert tune._error(torch.tensor([1, 1, float("inf")]), ones, ones) == float("inf")
    assert tune._error(ones, ones, ones) == 0
    assert tune._error(ones, 2 * ones, ones) == 0.5
    assert tune._error(ones, 2 * ones, 4 * ones) == 0.25


def test_the_form_with_held_denominators_is_the_normaliser() -> None:
    """The same outputs, and the same gradient where none goes through a denominator: of v."""
    r, cu = torch.rand, torch.tensor([0, 40, 40, 70])
    q, k, v = (r(1, 75, h, w, dtype=torch.float64) for h, w in ((2, 3), (2, 3), (4, 5)))
    g, gamma, S0, do = -r(1, 75, 4).double(), -r(4).double(), r(3, 4, 3, 6).double(), r(1, 75, 4, 5).double()
    v.requires_grad_()
    for decay in ((g, None), (None, gamma)):
        for reverse in (False, True):
            arguments = q, k, v, *decay, S0, True, cu, 0.3, True, reverse
            (o, S), (o_held, S_held) = reference.chunk(*arguments), tune.held_denominator(*arguments)
            assert S is not None
            assert S_held is not None
            dv, dv_held = (torch.autograd.grad((x * do).sum(), v)[0] for x in (o, o_held))
            for a, b in ((o, o_held), (S, S_held), (dv, dv_held)):
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_tune_judges_gradients_that_cancel_by_their_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strong decay and the normaliser: rounding of o is no error of the backward, and a wrong denominator is."""
    (case,) = (case for case in tune.CASES if case.cancels)
    saved = {
        "rounded": lambda o: (o * (1 + (torch.rand_like(o) - 0.5) / 128)).bfloat16().double(),  # 2^-8 and bfloat16
        "1% wrong": lambda o: 1.01 * o,
        "missing": torch.zeros_like,
    }
    found = {}
    for what, change in saved.items():

        def form(q: Any, k: Any, v: Any, *rest: Any, change: Any = change) -> tuple[torch.Tensor, torch.Tensor]:
            # Its value is o. Its gradient takes another o, as the kernels take the one that was written.
            o, S = tune.held_denominator(q, k, v, *rest)
            g, gamma, S0, *_, reverse = rest
            one = torch.ones_like(v[..., :1])
            den, _ = reference.chunk(q, k, one, g, gamma, S0[..., -1:], reverse=reverse)
            return o - change(o.detach()) * (den / den.detach() - 1), S

        def compute(kernel: str, x: dict[str, Any], case: tune.Case, form: Any = form) -> list[torch.Tensor]:
            return tune._call(kernel, form, {n: None if t is None else t.double() for n, t in x.items()}, case)

        monkeypatch.setattr(tune, "_compute", compute)
        torch.manual_seed(0)
        monkeypatch.setattr(tune, "DEVICE", "cpu")
        found[what] = tune._worst("backward", torch.bfloat16, 16, [case])
    limit = tune.LIMITS["half"][torch.bfloat16]
    assert found["rounded"] < limit < found["1% wrong"] < 0.1 < found["missing"]


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


def test_the_table_is_as_the_tuner_writes_it() -> None:
    assert tiles.TABLE.read_text() == tune._text(tiles.table())


def test_every_row_of_the_table_can_be_tuned() -> None:
    for kernel, rows in tiles.table().items():
        for name, row in rows.items():
            assert set(row) <= {str(width) for width in tune.WIDTHS}
            assert tune.candidates(kernel, name), (kernel, name)
            for width in map(int, row):
                assert tune.reading(kernel, name, rows, width), (kernel, name, width)
    own = tune.CANDIDATES["backward"]
    assert tune.candidates("backward", "half+gates") is own["half"]
    assert tune.candidates("backward", "half+blocks+norm") is own["half+blocks"]
    assert tune.candidates("forward", "half+norm+gates") is tune.CANDIDATES["forward"]["half"]


class Here:
    """In the place of the pool of workers: what `measure` says of the function and its arguments, here."""

    def __init__(self, measure: Any) -> None:
        self.measure = measure

    def submit(self, function: Any, *arguments: Any) -> Any:
        self.result = lambda: self.measure(function, *arguments)
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

    checked: list[tuple[str, tuple[int, ...]]] = []

    def measure(function: Any, kernel: str, name: str, width: int, row: tuple[int, ...], seed: int) -> float:
        if function is tune._timed:
            if row == (64, 128, 8, 3):
                raise RuntimeError("out of shared memory\nmore")
            if row == (64, 128, 8, 2):
                raise BrokenProcessPool
            return 1000.0 - sum(row)
        checked.append((kernel, row))
        if row == (128, 128, 8, 2):  # it ran where it was timed, and not in every case
            raise ValueError
        return 2.0 if row == (128, 128, 8, 3) or kernel == "tokens" else 0.5  # the fastest is wrong, or all are

    monkeypatch.setattr(tiles, "TABLE", path)
    monkeypatch.setattr(tune, "_pool", lambda: Here(measure))
    names = ["half", "half+odd", "fp8", "any"]
    assert tune.tune(list(table), names, [64], tmp_path / "new.json", True) == 1
    assert tune.tune(["step"], names, [64], tmp_path / "step.json", True) == 0
    table["forward"]["half"]["64"], table["step"]["any"]["64"] = [128, 128, 8, 1], [1, 64, 4, 1]
    assert json.loads((tmp_path / "new.json").read_text()) == table
    # Checked from the fastest on, until one is right; of the rows of which none is, all.
    assert [row for kernel, row in checked if kernel == "forward"] == [(128, 128, 8, n) for n in (3, 2, 1)]
    assert len([row for kernel, row in checked if kernel == "tokens"]) == len(tune.CANDIDATES["tokens"]["any"])
    assert [row for kernel, row in checked if kernel == "step"] == 2 * [(1, 64, 4, 1)]
    out = capsys.readouterr().out
    assert "forward half+odd 64: no call that reads it is known; the row stays" in out
    assert "tokens any 64: no candidate is right; the row stays, and must not be used" in out
    assert "forward fp8 64: there are no candidates for it; the row stays" in out
    assert "other any 64: there are no candidates for it; the row stays" in out
    for row, verdicts in {
        (64, 128, 8, 3): ["REFUSED: out of shared memory"],
        (64, 128, 8, 2): ["REFUSED: the process died"],
        (128, 128, 8, 3): ["733.0000 ms", "REFUSED: 2.00 of the allowed error"],
        (128, 128, 8, 2): ["734.0000 ms", "REFUSED: ValueError"],
        (128, 128, 8, 1): ["735.0000 ms", "735.0000 ms   0.50 of the allowed error: taken"],
        (128, 128, 4, 3): ["737.0000 ms", "737.0000 ms  slower, not checked"],
    }.items():
        assert [line.partition("]  ")[2].strip() for line in out.splitlines() if str(list(row)) in line] == verdicts


def test_a_row_that_this_gpu_does_not_read_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = {"forward": {"half": {"64": [64, 64, 4, 3]}, "half+copied": {"128": [64, 64, 4, 4]}}}
    (tmp_path / "tiles.json").write_text(json.dumps(table))
    monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
    monkeypatch.setattr(tune, "_copies_tiles", lambda: False)
    assert tune.tune(["forward"], ["half+copied"], [128], tmp_path / "new.json", True) == 0
    assert capsys.readouterr().out.startswith(
        "forward half+copied 128: calls on this GPU do not read it; the row stays\n"
    )
    assert json.loads((tmp_path / "new.json").read_text()) == table


def test_a_worker_that_ends_is_replaced() -> None:
    worker = tune._Worker()
    assert worker.run(math.sqrt, 4.0) == 2.0
    assert worker.run(os._exit, 1) == "the process died"
    assert worker.run(math.sqrt, 9.0) == 3.0
    assert worker.run(float, "many") == "could not convert string to float: 'many'"
    assert worker.run(math.sqrt, 16.0) == 4.0
    worker.pool.shutdown()


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
    # (hopper.py is not for the interpreter)
    vars(launch).update(
        _hopper_walk=Nothing(), _hopper_backward=Nothing(), hopper=SimpleNamespace(described=lambda *_: None)
    )
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
        widths = list(tiles.table()[row[0]][row[1]].items())
        # (the other kernels go no other way where heads are wide)
        wide = row[0] in ("backward", "hopper", "hopper_few")
        for width, choice in (widths[0], widths[-1])[: 1 + wide]:
            current = tiles.Tile(*choice)
            choice = (current.chunk, current.block, current.warps, current.stages)
            tune._timed(*row, int(width), choice, 0)
            tune._checked(*row, int(width), choice, 0)
            tiles.override.clear()
    return list(dict.fromkeys(done))


if __name__ == "__main__":
    print(json.dumps(asked_by_the_launcher()))

"""The benchmark and the tile tuner as commands: what they compute, not how fast."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from torch_la import bench, tune
from torch_la.__main__ import main
from torch_la.ops.kernels import tiles


def test_bench_measures_every_provider_that_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.SHAPES, "cpu", [bench.Shape(1, 64, 2, 8, 8, 2), bench.Shape(1, 48, 1, 8, 4, 2, (16, 32))])
    path = tmp_path / "bench.json"
    chosen = ["chunk", "fused_chunk", "softmax", "naive", "fla chunk"]
    options = [word for name in chosen for word in ("--provider", name)]
    assert main(["bench", "--device", "cpu", "--seconds", "0.01", "--json", str(path), *options]) == 0
    record = json.loads(path.read_text())
    assert record["versions"]["torch"] == torch.__version__
    found = {(r["shape"], r["gate"], r["provider"]) for r in record["results"]}
    dense, packed = "B1 T64 H2 D8", "B1 T48 H1/2 K8 V4 in 2 sequences"
    ours = {(shape, gate, op) for shape in (dense, packed) for gate in bench.GATES for op in bench.OURS}
    assert found == ours | {(dense, "none", "softmax"), (dense, "none", "naive")}
    for r in record["results"]:
        assert "error" not in r, r
        assert r["forward_ms"] > 0
        assert r["both_ms"] > r["floor_both_ms"] > r["floor_forward_ms"] > 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found)


def test_the_naive_form_is_the_operator() -> None:
    x = bench.make(bench.Shape(1, 128, 2, 8, 8, 2), "none", "cpu", torch.float32)
    runs = [bench.PROVIDERS[name](x) for name in ("chunk", "naive")]
    assert runs[0] is not None
    assert runs[1] is not None
    torch.testing.assert_close(runs[0](), runs[1](), rtol=1e-4, atol=1e-4)


def test_floors_count_each_tensor_once() -> None:
    x = bench.make(bench.Shape(2, 10, 1, 3, 5, 2), "g", "cpu", torch.bfloat16)
    q, v, g = 2 * 10 * 1 * 3 * 2, 2 * 10 * 2 * 5 * 2, 2 * 10 * 2 * 4
    forward, both = bench.floors(x)
    assert forward == (2 * q + v + g) + v  # reads q, k, v, g; writes o
    assert both == forward + (2 * q + v + g + v) + (2 * q + v + g)  # reads them and do; writes the gradients


def test_a_peer_that_refuses_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(x: bench.Inputs) -> bench.Run:
        raise RuntimeError("not on this GPU\nmore")

    monkeypatch.setitem(bench.PROVIDERS, "softmax", refuse)
    shape = bench.Shape(1, 16, 1, 4, 4, 1)
    (record,) = bench.records([shape], ["none"], ["softmax"], "cpu", torch.float32, 0.01)
    assert record["error"] == "not on this GPU"
    assert "not on this GPU" in bench.line(record)


def test_tune_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 2
    assert "CUDA" in capsys.readouterr().out


@pytest.mark.parametrize("kernel", ["forward", "backward", "tokens", "step"])
def test_tune_refuses_a_kernel_that_is_wrong(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself, on CPU kernels: right ones are within the limits, and one with one wrong number is not."""
    from torch_la import functions, ops

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    limit = tune.LIMITS["ieee"][torch.float32]
    assert tune._worst(kernel, torch.float32, 16) < limit
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
    assert tune._worst(kernel, torch.float32, 16) > limit


def test_tune_counts_what_is_not_finite_as_wrong() -> None:
    ones = torch.ones(3, dtype=torch.float64)
    assert tune._error(torch.tensor([1, 1, float("nan")]), ones) == float("inf")
    assert tune._error(torch.tensor([1, 1, float("inf")]), ones) == float("inf")
    assert tune._error(ones, ones) == 0


def test_the_table_survives_being_written() -> None:
    table = json.loads(tiles.TABLE.read_text())
    assert json.loads(tune._text(table)) == table
    for kernel, rows in tune.CANDIDATES.items():
        for precision in rows:
            for width in tune.WIDTHS:
                assert isinstance(tiles.tile(kernel, precision, width, width), tiles.Tile)
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

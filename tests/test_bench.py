"""The benchmark as a command: what it computes, not how fast."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from torch_la import bench, bench_calls, reference
from torch_la.__main__ import main
from torch_la.bench_calls import GATES, PEERS, SHAPES, Shape, make

SEQUENCE, GROUPED, DECODE = Shape(1, 64, 2, 8, 8, 2), Shape(2, 48, 1, 8, 4, 2), Shape(2, 1, 2, 8, 4, 2, "decode")
VARLEN = Shape(1, 48, 2, 8, 8, 2, lengths=(16, 0, 32))


def row(provider: str, ms: float, shape: str = "A", mode: str = "forward", **more: Any) -> dict[str, Any]:
    about = {"shape": shape, "gate": "none", "provider": provider, "ours": provider not in PEERS, "mode": mode}
    return about | {"ms": ms, "floor_ms": 1.0, "first_s": 0.1} | more


def record(*rows: dict[str, Any], device: str = "H200", missing: dict[str, str] | None = None) -> dict[str, Any]:
    return {"versions": {"device": device, "dtype": "bfloat16"}, "missing": missing or {}, "rows": list(rows)}


def test_the_command_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    shapes = ["B1_T64_H2_D8", "B2_T48_H1_HV2_K8_V4", "decode_B2_H2_D8", "host_B1_T32_H1_D8"]
    options = ["--device", "cpu", "--seconds", "0.001", "--json", str(path), "--shapes", *shapes]
    assert main(["bench", *options, "--peers", "softmax", "naive", "helion"]) == 0
    record = json.loads(path.read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["missing"]) == {"helion"}
    measured = [r for r in record["rows"] if "ms" in r]
    found = [(r["shape"], r["gate"], r["provider"], r["mode"]) for r in measured]
    modes = ("forward", "forward+backward")
    expected = {(s, gate, "chunk", m) for s in (shapes[0], shapes[1], shapes[3]) for gate in GATES for m in modes}
    expected |= {(shapes[2], gate, "recurrent_step", "eager") for gate in GATES}
    expected |= {(s, "none", "softmax", m) for s in (shapes[0], shapes[3]) for m in modes}
    expected |= {(shapes[0], "none", "naive", m) for m in modes}
    assert set(found) == expected
    assert len(found) == len(expected)
    out = capsys.readouterr().out
    for group in {bench.group(r) for r in record["rows"]}:  # peers last: a run that is stopped in them keeps our rows
        ours = [r["ours"] for r in record["rows"] if bench.group(r) == group]
        assert ours == sorted(ours, reverse=True)
    for r in measured:
        compared = r["shape"] == shapes[0] and r["gate"] == "none" and r["ours"]  # (softmax is other mathematics)
        assert r.get("best_peer") == ("naive" if compared else None)
        if compared:
            (naive,) = (p for p in measured if p["provider"] == "naive" and p["mode"] == r["mode"])
            assert r["x_best_peer"] == naive["ms"] / r["ms"]
            assert f"chunk {r['mode']} {r['x_best_peer']:.2f} naive" in out
        assert r["ms"] > 0
        assert r["floor_ms"] > 0 or r["shape"].startswith("host")
        assert r.get("difference", 0) < 1e-5
    assert "helion: not measured: ModuleNotFoundError" in out
    assert out.count("x best peer") == 2  # the head, and a line behind the peers
    assert out.count("recurrent_step *") == len(GATES)
    assert not [r for r in record["rows"] if "error" in r]

    assert (
        main(["bench", str(path), "--plot", str(tmp_path / "bench.svg")] if _matplotlib() else ["bench", str(path)])
        == 0
    )
    assert capsys.readouterr().out.count("recurrent_step *") == len(GATES)
    assert (tmp_path / "bench.svg").exists() == _matplotlib()


def _matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def test_a_stopped_run_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bench.json"
    original = bench.measure

    def stop(call: Any, mode: str, *rest: Any) -> dict[str, Any]:
        if mode == "forward+backward":
            raise KeyboardInterrupt
        return original(call, mode, *rest)

    monkeypatch.setattr(bench, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        main(
            [
                "bench",
                "--device",
                "cpu",
                "--seconds",
                "0.001",
                "--json",
                str(path),
                "--shapes",
                "B1_T8_H1_D4",
                "--peers",
            ]
        )
    assert [r["mode"] for r in json.loads(path.read_text())["rows"]] == ["forward"]


def test_every_operator_and_where_the_rule_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--seconds", "0.001", "--gates", "g", "--ops", "all", "--modes", "forward", "--peers"]
    main(["bench", *options, "--shapes", "B1_T32_H1_D4"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.strip().startswith("forward")] == list(bench_calls.OPS)
    rows = [row("chunk", 1.0, picked=True), row("fused_chunk", 0.92), row("recurrent", 3.0)]
    rows += [row("chunk", 1.0, "B", picked=True), row("fused_chunk", 0.8, "B"), row("fla_chunk", 0.1, "B")]
    rows += [row("chunk", 9.0, "C", picked=True), row("fused_chunk", 1.0, "C", mode="forward+backward")]
    assert bench.wrong_picks(rows) == ["B none forward: chunk 1.000 ms, fused_chunk 0.800 ms, 1.25 times"]


def test_the_shapes_of_the_list() -> None:
    for shapes in SHAPES.values():
        assert len({str(s) for s in shapes}) == len(shapes)
        for shape in shapes:
            assert shape.lengths or bench_calls.parse(str(shape)) == shape
    (packed,) = (s for s in SHAPES["cuda"] if s.lengths)
    assert packed.lengths is not None
    assert (len(packed.lengths), sum(packed.lengths), min(packed.lengths), max(packed.lengths)) == (64, 65536, 64, 8192)
    assert packed.T == 65536
    for name in ("B1_T8_H2", "decode_B1_T8_H2_D4", "B1_H2_D4", "D64", "xB1_T8_H2_D4"):
        assert bench_calls.parse(name) is None


def test_select() -> None:
    assert [s.B for s in bench.select("cuda", ["decode"])] == [1, 64, 256]
    assert bench.select("cuda", None) == SHAPES["cuda"]
    assert bench.select("cuda", ["B1_T256_H4_D64"]) == [Shape(1, 256, 4, 64, 64, 4)]  # not the host's row
    assert bench.select("cpu", ["T512", "D64"])[0] == SHAPES["cpu"][0]
    assert len(bench.select("cpu", ["T512", "D64"])) == len(SHAPES["cpu"])
    with pytest.raises(ValueError, match="'D63'"):
        bench.select("cuda", ["D64", "D63"])
    assert main(["bench", "--shapes", "D63"]) == 2


def test_packed_offsets() -> None:
    x = make(VARLEN, "g", "cpu", torch.float32)
    assert x.cu_seqlens is not None
    assert x.cu_seqlens.tolist() == [0, 16, 16, 48]
    assert x.cu_seqlens.dtype == torch.int32


def test_floors_count_each_tensor_once() -> None:
    x = make(Shape(2, 10, 1, 3, 5, 2), "g", "cpu", torch.bfloat16)
    q, v, g = 2 * 10 * 1 * 3 * 2, 2 * 10 * 2 * 5 * 2, 2 * 10 * 2 * 4
    floor = bench_calls.floors(x)
    forward = (2 * q + v + g) + v  # reads q, k, v, g; writes o
    assert floor["forward"][0] == forward
    assert floor["forward+backward"][0] == forward + (2 * q + v + g + v) + (2 * q + v + g)  # they and do; the gradients
    assert 3 * floor["forward"][1] < floor["forward+backward"][1] < 5 * floor["forward"][1]  # flops
    x = make(Shape(3, 1, 1, 4, 5, 2, "decode"), "normalize", "cpu", torch.bfloat16)
    state, token = 3 * 2 * 4 * 6 * 4, 2 * (3 * 4 * 2) + 2 * (3 * 2 * 5 * 2)
    assert bench_calls.floors(x)["graph"][0] == 2 * state + token


def test_the_best_peer() -> None:
    rows = [row("fla_chunk", 4.0), row("mamba2", 3.0), row("softmax", 1.0), row("chunk", 2.0, picked=True)]
    rows += [row("mlstm", 0.1, "B"), row("mlstm", 0.1, mode="forward+backward"), row("helion", 0.1) | {"gate": "g"}]
    best = bench.best_peer(rows[3], rows)
    assert best is rows[1]
    assert bench.cells(rows[3], rows)[:5] == ["forward", "chunk *", "2.000", "2.00", "1.50 mamba2"]
    assert bench.best_peer(rows[3], [rows[2], rows[3]]) is None


def test_records_merge_by_whole_groups() -> None:
    both = "forward+backward"
    refused = {"shape": "A", "gate": "none", "provider": "mlstm", "ours": False, "error": "not here"}
    old = record(
        refused, row("chunk", 1.0), row("mamba2", 1.0), row("chunk", 1.0, mode=both), row("chunk", 1.0, "B"),
        missing={"mlstm": "no module"},
    )  # fmt: skip
    new = record(row("chunk", 2.0), row("chunk", 2.0, "C"))
    merged = bench.merge([old, new])
    assert [(r["shape"], r["mode"], r["provider"], r["ms"]) for r in merged["rows"]] == [
        ("A", "forward", "chunk", 2.0),  # without the peer of the old run: times of two runs are not compared
        ("A", both, "chunk", 1.0),
        ("B", "forward", "chunk", 1.0),
        ("C", "forward", "chunk", 2.0),
    ]
    assert merged["missing"] == {"mlstm": "no module"}
    with pytest.raises(ValueError, match="CPU"):
        bench.merge([old, record(device="CPU")])


def test_a_peer_that_refuses_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(x: bench_calls.Inputs) -> bench_calls.Call:
        raise RuntimeError("not on this GPU\nmore")

    monkeypatch.setitem(PEERS, "mamba2", ("torch", refuse))
    x = make(SEQUENCE, "none", "cpu", torch.float32)
    rows = list(bench.rows_of(x, ["mamba2", "picked"], "cpu", 0.001))
    assert rows[0]["error"] == "not on this GPU"
    assert [r["provider"] for r in rows[1:]] == ["chunk", "chunk"]
    assert bench.tail(rows) == ["  not measured: mamba2 (not on this GPU)"]


# -------------------------------------------------------------------------------- do the peers compute what we compute?


def _fla(q: Any, k: Any, v: Any, g: Any = None, g_gamma: Any = None, normalize: bool = False, **options: Any) -> Any:
    """flash-linear-attention's signatures. Its state is not written in place."""
    return reference.recurrent(q, k, v, g, g_gamma, normalize=normalize, **options)


def _decays(dt: Any, A: Any, sequence: Any) -> Any:
    g = dt * A
    if sequence is not None:  # a new sequence forgets everything
        g[:, 1:] = g[:, 1:].masked_fill((sequence.diff(dim=1) > 0).unsqueeze(-1), -1000.0)
    return g


def _ssd(x: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: int, seq_idx: Any) -> Any:
    """Mamba-2: h = exp(dt A) h + dt B x, y = C h."""
    return reference.recurrent(C, B, x * dt.unsqueeze(-1), _decays(dt, A, seq_idx), scale=1.0)[0]


def _state_update(state: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, D: Any, dt_bias: Any) -> Any:
    dt = dt + dt_bias
    group = x.shape[1] // B.shape[1]
    B, C = (y.repeat_interleave(group, 1).unsqueeze(2) for y in (B, C))  # [B, heads, 1, K]
    state.copy_(state * (dt.unsqueeze(-1) * A).exp() + dt.unsqueeze(-1) * B * x.unsqueeze(-1))
    return (state * C).sum(-1) + x * D


def _mlstm(q: Any, k: Any, v: Any, i: Any, f: Any, normalize: bool) -> Any:
    """mLSTM with sigmoid gates, unnormalised: C = sigmoid(f) C + sigmoid(i) k v, h = q C / sqrt(K)."""
    assert not normalize
    q, k, v, i, f = (x.transpose(1, 2) for x in (q, k, v, i, f))
    decay = torch.nn.functional.logsigmoid(f)
    return reference.recurrent(q, k, v * i.sigmoid().unsqueeze(-1), decay)[0].transpose(1, 2)


def _helion(variant: str) -> Any:
    def op(q: Any, k: Any, v: Any, g: Any, C: int, scale: float) -> Any:
        q, k, v, g = (x.transpose(1, 2) for x in (q, k, v, g))
        return reference.recurrent(q, k, v, None if variant == "plain" else g, scale=scale)[0].transpose(1, 2)

    return op


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each peer's functions by their published definitions, so that the arguments they get can be checked."""
    forms = ("chunk", "fused_chunk", "fused_recurrent")
    modules: dict[str, dict[str, Any]] = {
        "fla.ops.simple_gla": {f"{form}_simple_gla": _fla for form in forms},
        "fla.ops.linear_attn": {f"{form}_linear_attn": _fla for form in forms},
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": _ssd},
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": _state_update},
        "mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging": {"mlstm_siging_chunkwise__xl_chunk": _mlstm},
        "examples.linear.linear_attention_engine": {
            "get_helion_fwd_kernel": _helion,
            "LinearAttentionVariant": SimpleNamespace(VANILLA="plain", SIMPLE_GLA="gated", RETENTION="fixed"),
        },
    }
    for name, content in modules.items():
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:i]))
            module.__path__ = []  # a package
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(content)


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shape", [SEQUENCE, GROUPED, VARLEN, DECODE], ids=str)
def test_the_peers_get_the_same_problem(shape: Shape, gate: str) -> None:
    x = make(shape, gate, "cpu", torch.float32)
    ran = set()
    for name, (_, build) in PEERS.items():
        if name in ("softmax", "naive_compiled"):
            continue
        try:
            call = build(x)
        except bench_calls.Unsupported:
            continue
        ran.add(name)
        state = None if x.state is None else x.state.clone()
        o = call.run()
        if state is not None and x.state is not None:
            x.state.copy_(state)
        right = bench_calls.ours(bench_calls.picked(x), x).run()
        if state is not None and x.state is not None:
            x.state.copy_(state)
        torch.testing.assert_close(o.transpose(1, 2) if call.head_first else o, right, rtol=1e-4, atol=1e-4)
        if call.leaves:
            o.backward(call.do)
            assert all(leaf.grad is not None for leaf in call.leaves)
    fla, gated = {"fla_chunk", "fla_fused_chunk", "fla_recurrent"}, {"mamba2", "mlstm", "helion"}
    expected = {
        SEQUENCE: fla | (set() if gate == "normalize" else gated) | ({"naive"} if gate == "none" else set()),
        GROUPED: set() if gate == "normalize" else {"mamba2"},
        VARLEN: fla | (set() if gate == "normalize" else {"mamba2"}),
        DECODE: set() if gate == "normalize" else {"fla_recurrent", "mamba2"},
    }
    assert ran == expected[shape]


def test_the_compiled_form_is_the_operator() -> None:
    x = make(SEQUENCE, "none", "cpu", torch.float32)
    call = PEERS["naive_compiled"][1](x)
    assert bench_calls.difference(call, bench_calls.ours("chunk", x).run().detach()) < 1e-5

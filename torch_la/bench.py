"""`python -m torch_la bench`: this library and its peers, in one process and one run.

For every shape, kind of decay and mode (forward, forward and backward; for one token: under a CUDA graph and eager) it
times the operator that `linear_attention` picks, then every peer that imports, and prints a line for each, and at last
the ratios to the best peer. With `--ops all` it times each operator, and prints where the rule of `linear_attention` is
wrong by more than 10%. The record is written after every line, so a run that is stopped keeps its lines: peers autotune
for minutes. With record files as arguments nothing is measured: they are merged, printed and drawn.

Times on shared machines are noisy: compare within one run, as ratios. The columns are explained in docs/performance.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from .bench_calls import GATES, OPS, PEERS, SHAPES, Call, Inputs, Shape, Unsupported, difference, floors, make, parse
from .bench_calls import ours as our_call
from .bench_calls import picked as our_pick

Row = dict[str, Any]
DEFAULT_PEERS = {
    "cuda": [name for name in PEERS if not name.startswith("naive")],
    "cpu": ["softmax", "naive", "naive_compiled"],
}
OTHER_MATHEMATICS = ("softmax",)  # shown for scale; never "the best peer"
CALLS_IN_A_GRAPH = 10
WRONG = 1.1  # from here on the rule of `linear_attention` counts as wrong


# ---------------------------------------------------------------------------------------------------------- measurement


def median_ms(run: Callable[[], Any], device: str, seconds: float) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=25, rep=int(seconds * 1000), return_mode="median"))
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def host_ms(run: Callable[[], Any], device: str, seconds: float) -> float:
    """What the host does for a call, while the device is never waited for."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(20):
            run()
        times.append((time.perf_counter() - start) / 20)
    return sorted(times)[len(times) // 2] * 1e3


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _graph(run: Callable[[], Any]) -> Callable[[], None]:
    """Ten calls in one CUDA graph, as the layers of a model are; a graph of one call would time its own launch."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS_IN_A_GRAPH):
            run()
    return graph.replay


def rates(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does, now: bytes per second of a copy (read and written), FLOPs per second of a product."""
    x = torch.empty(1 << (31 if device == "cuda" else 27), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    bandwidth = 2 * x.numel() / median_ms(lambda: y.copy_(x), device, 0.2) * 1e3
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return {"bandwidth": bandwidth, "flops": 2 * n**3 / median_ms(lambda: a @ a, device, 0.2) * 1e3}


def measure(call: Call, mode: str, shape: Shape, device: str, seconds: float) -> Row:
    """One row: median, first call, peak extra memory (on a GPU)."""

    def both() -> None:
        for leaf in call.leaves:
            leaf.grad = None
        call.run().backward(call.do)

    run = both if mode == "forward+backward" else call.run
    with torch.set_grad_enabled(mode == "forward+backward"):
        start = time.perf_counter()
        run()
        _synchronize(device)
        row: Row = {"first_s": time.perf_counter() - start}
        if device == "cuda":
            for leaf in call.leaves:
                leaf.grad = None
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            row["memory_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        if mode == "graph":
            row["ms"] = median_ms(_graph(run), device, seconds) / CALLS_IN_A_GRAPH
        else:
            row["ms"] = (host_ms if shape.kind == "host" else median_ms)(run, device, seconds)
    return row


def rows_of(x: Inputs, names: Iterable[str], device: str, seconds: float, modes: Iterable[str] = ()) -> Iterator[Row]:
    """Rows of one shape and gate. A provider that lacks the case or raises gives one row, with the reason."""
    pick = our_pick(x)
    wanted = [m for m in x.shape.modes if (not modes or m in modes) and (m != "graph" or device == "cuda")]
    right = None
    for name in (pick if n == "picked" else n for n in names):
        about: Row = {"shape": str(x.shape), "gate": x.gate, "provider": name, "ours": name not in PEERS}
        if about["ours"]:
            about["picked"] = name == pick
        try:
            call = PEERS[name][1](x) if name in PEERS else our_call(name, x)
            first = 0.0
            for mode in wanted:
                row = about | {"mode": mode} | measure(call, mode, x.shape, device, seconds)
                first = row["first_s"] = first + row["first_s"]  # both: the forward was compiled in its own row
                if mode == wanted[0] and name not in (*OTHER_MATHEMATICS, pick) and x.state is None:
                    if right is None:
                        with torch.no_grad():
                            right = our_call(pick, x).run()
                    row["difference"] = difference(call, right)
                yield row
        except Unsupported as reason:
            yield about | {"unsupported": str(reason)}
        except Exception as problem:  # a peer that refuses is a result too
            yield about | {"error": (str(problem).splitlines() or [""])[0][:200] or type(problem).__name__}
            _synchronize(device)  # raises where the GPU is lost: every later row would be an error of this one
        for leaf in (x.q, x.k, x.v, x.g):
            if leaf is not None:
                leaf.grad = None  # what a peer left is not memory of the next one


def missing(names: Iterable[str]) -> dict[str, str]:
    """The peers that do not import, and why."""
    reasons = {}
    for name in names:
        try:
            importlib.import_module(PEERS[name][0])
        except Exception as problem:  # whatever it does when imported
            reasons[name] = f"{type(problem).__name__}: {problem}".splitlines()[0]
    return reasons


def versions(device: str, dtype: torch.dtype) -> dict[str, str]:
    found = {"date": str(datetime.date.today()), "python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "flash-linear-attention", "mamba-ssm", "mlstm-kernels", "helion"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    found["dtype"] = str(dtype).removeprefix("torch.")
    return found


# --------------------------------------------------------------------------------------------------- records and tables


def write(record: Row, path: Path) -> None:
    """Whole or not at all: a run may be stopped at any time."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(part, path)


def group(row: Row) -> tuple[str, str]:
    return row["shape"], row["gate"]


def merge(records: list[Row]) -> Row:
    """One record from several of one device. A shape, gate and mode that several have comes from the last, as a whole.

    Rows are compared only with rows of the same mode and run, so none of these groups is ever put together from two.

    Raises:
        ValueError: the records are of different devices or dtypes.
    """
    kinds = sorted({f"{r['versions']['device']}, {r['versions']['dtype']}" for r in records})
    if len(kinds) != 1:
        raise ValueError(f"records of one device and dtype can be merged, got {kinds}")
    groups: dict[tuple[str, str], dict[str | None, list[Row]]] = {}
    for record in records:
        new: dict[tuple[str, str], dict[str | None, list[Row]]] = {}
        for row in record["rows"]:
            new.setdefault(group(row), {}).setdefault(row.get("mode"), []).append(row)
        for name, modes in new.items():
            known = groups.setdefault(name, {})
            known.pop(None, None)  # what could not be measured then has no mode
            known |= modes
    absent = {name: reason for r in records for name, reason in r["missing"].items()}
    rows = [row for modes in groups.values() for rows in modes.values() for row in rows]
    return {**records[-1], "missing": absent, "rows": rows}


def best_peer(row: Row, rows: Iterable[Row]) -> Row | None:
    """The fastest peer that computed the same."""
    rivals = [r for r in rows if "ms" in r and not r["ours"] and r["provider"] not in OTHER_MATHEMATICS]
    rivals = [r for r in rivals if group(r) == group(row) and r["mode"] == row["mode"]]
    return min(rivals, key=lambda r: r["ms"], default=None)


def compare(rows: list[Row]) -> list[str]:
    """Writes into our rows, of one shape and gate, how they compare with the best peer; returns that as a line."""
    ratios = []
    for row in rows:
        rival = best_peer(row, rows) if row["ours"] and "ms" in row else None
        if rival:
            row["best_peer"], row["x_best_peer"] = rival["provider"], rival["ms"] / row["ms"]
            ratios.append(f"{row['provider']} {row['mode']} {row['x_best_peer']:.2f} {rival['provider']}")
    return [f"  x best peer: {', '.join(ratios)}"] if ratios else []


def wrong_picks(rows: list[Row]) -> list[str]:
    """Where another operator is faster than the one that `linear_attention` picks, by more than 10%."""
    found = []
    for row in rows:
        if not row.get("picked") or "ms" not in row:
            continue
        others = [r for r in rows if "ms" in r and r["ours"] and group(r) == group(row) and r["mode"] == row["mode"]]
        best = min(others, key=lambda r: r["ms"])
        if row["ms"] > WRONG * best["ms"]:
            numbers = f"{row['provider']} {row['ms']:.3f} ms, {best['provider']} {best['ms']:.3f} ms"
            found.append(f"{row['shape']} {row['gate']} {row['mode']}: {numbers}, {row['ms'] / best['ms']:.2f} times")
    return found


COLUMNS = ("mode", "provider", "ms", "x floor", "x best peer", "MiB", "first s", "difference")


def cells(row: Row, rows: Iterable[Row]) -> list[str]:
    """The columns of a row that was measured. "x best peer" above 1: that many times as fast as it."""
    rival = best_peer(row, rows) if row["ours"] else None
    return [
        row["mode"],
        row["provider"] + (" *" if row.get("picked") else ""),
        f"{row['ms']:.4f}" if row["ms"] < 1 else f"{row['ms']:.3f}",
        f"{row['ms'] / row['floor_ms']:.2f}" if row["floor_ms"] else "",
        f"{rival['ms'] / row['ms']:.2f} {rival['provider']}" if rival else "",
        f"{row['memory_mib']:.0f}" if "memory_mib" in row else "",
        f"{row['first_s']:.1f}",
        f"{row['difference']:.0e}" if "difference" in row else "",
    ]


def line(columns: Iterable[str]) -> str:
    widths = (">16", "<16", ">9", ">7", "<22", ">6", ">7", ">10")
    return " ".join(f"{c:{w}}" for c, w in zip(columns, widths, strict=True)).rstrip()


def tail(rows: list[Row]) -> list[str]:
    """What could not be measured, of one shape and gate."""
    reasons = [f"{r['provider']} ({r.get('unsupported') or r['error']})" for r in rows if "ms" not in r]
    return [f"  not measured: {', '.join(reasons)}"] if reasons else []


def show(record: Row) -> None:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in record["rows"]:
        groups.setdefault(group(row), []).append(row)
    for (shape, gate), rows in groups.items():
        print(f"{shape} {gate}")
        print("\n".join([*(line(cells(r, rows)) for r in rows if "ms" in r), *tail(rows)]))


def plot(record: Row, path: Path) -> None:
    """Bars of times over the memory floor, one panel for each mode of whole sequences. 1 is the floor.

    A bar of more than four times this library's longest is cut, with its number in it.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    modes = ("forward", "forward+backward")
    good = [r for r in record["rows"] if r.get("mode") in modes and r["floor_ms"]]
    good = [r for r in good if (r["picked"] if r["ours"] else r["provider"] not in OTHER_MATHEMATICS)]
    names = sorted({_label(r) for r in good}, key=lambda n: (n != "torch_la", n))
    groups = list(dict.fromkeys(group(r) for r in good))
    height = 1.2 + 0.15 * (len(names) + 1) * len(groups)
    figure, panels = plt.subplots(1, 2, figsize=(13, height), sharey=True, squeeze=False)
    for panel, mode in zip(panels[0], modes, strict=True):
        times = {(_label(r), groups.index(group(r))): r["ms"] / r["floor_ms"] for r in good if r["mode"] == mode}
        limit = 4 * max((x for (name, _), x in times.items() if name == "torch_la"), default=4)
        for j, name in enumerate(names):
            bars = {i + 0.8 * (j + 0.5) / len(names) - 0.4: x for (label, i), x in times.items() if label == name}
            panel.barh(list(bars), [min(x, limit) for x in bars.values()], height=0.8 / len(names), label=name)
            for y, x in bars.items():
                if x > limit:
                    panel.text(limit, y, f"{x:.0f} ", ha="right", va="center", fontsize=6)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set_xlabel(f"{mode}, times the memory floor")
    panels[0][0].set_yticks(range(len(groups)), [", ".join(g) for g in groups], fontsize=8)
    panels[0][0].invert_yaxis()
    panels[0][1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _label(row: Row) -> str:
    return "torch_la" if row["ours"] else str(row["provider"])


# -------------------------------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("records", nargs="*", type=Path, help="measure nothing: merge these records, print and draw them")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add(
        "--shapes",
        nargs="+",
        metavar="PART",
        help="shapes whose name contains one of these (see --list), or any B1_T256_H4_D64",
    )
    add("--gates", nargs="+", choices=GATES, default=list(GATES))
    add("--modes", nargs="+", choices=("forward", "forward+backward", "graph", "eager"), default=[])
    add("--ops", nargs="+", choices=("picked", "all", *OPS), default=["picked"], help="of this library")
    add("--peers", nargs="*", choices=tuple(PEERS), help="default: every one for the device that imports")
    add("--seconds", type=float, default=0.2, help="of measuring, for each number")
    add("--empty-cache", action="store_true", help="compile anew: the first calls are those of a new machine")
    add("--list", action="store_true", help="print the names of the shapes and peers")
    add("--json", type=Path, help="write the record here, after every row")
    add("--plot", type=Path, help="draw the record here (extra: bench)")


def select(device: str, parts: list[str] | None) -> list[Shape]:
    """The shapes whose names contain a part, all for None. A whole name need not be one of the list.

    Raises:
        ValueError: a part that is no name and that no name contains.
    """
    chosen: dict[Shape, None] = {}
    for part in [""] if parts is None else parts:
        named = [s for s in SHAPES[device] if str(s) == part] or [s for s in (parse(part),) if s]
        named = named or [s for s in SHAPES[device] if part in str(s)]
        if not named:
            raise ValueError(f"--shapes: no shape contains {part!r}: {', '.join(map(str, SHAPES[device]))}")
        chosen |= dict.fromkeys(named)
    return list(chosen)


def bench(options: argparse.Namespace, shapes: list[Shape]) -> Row:
    """Measures, prints and writes; returns the record."""
    device, dtype = options.device, torch.bfloat16 if options.device == "cuda" else torch.float32
    peers = DEFAULT_PEERS[device] if options.peers is None else options.peers
    absent = missing(peers)
    machine = rates(device, dtype)
    record: Row = {"versions": versions(device, dtype), "rates": machine, "missing": absent, "rows": []}
    print(", ".join(f"{name} {version}" for name, version in record["versions"].items()))
    print(f"copy {machine['bandwidth'] / 1e9:.0f} GB/s, products {machine['flops'] / 1e12:.3g} TFLOP/s")
    for name, reason in absent.items():
        print(f"{name}: not measured: {reason}")
    print(line(COLUMNS))
    for shape in shapes:
        ops = ["picked"] if shape.kind == "decode" else list(OPS) if "all" in options.ops else options.ops
        for gate in options.gates:
            x = make(shape, gate, device, dtype)
            floor = floors(x)
            text = (
                f"{mode} {b / machine['bandwidth'] * 1e3:.4f} and {f / machine['flops'] * 1e3:.4f}"
                for mode, (b, f) in floor.items()
            )
            print(f"{shape} {gate}   floors of memory and products, ms: {'; '.join(text)}")
            rows: list[Row] = []
            names = [*ops, *(p for p in peers if p not in absent)]  # peers last: they take minutes
            for row in rows_of(x, names, device, options.seconds, options.modes):
                if "mode" in row:
                    row["floor_ms"] = 0.0
                    if shape.kind != "host":  # there the host counts
                        row["floor_ms"] = floor[row["mode"]][0] / machine["bandwidth"] * 1e3
                rows.append(row)
                record["rows"].append(row)
                if options.json:
                    write(record, options.json)
                if "ms" in row:
                    print(line(cells(row, rows)), flush=True)
            print("".join(f"{text}\n" for text in compare(rows) + tail(rows)), end="", flush=True)
            if options.json:
                write(record, options.json)
            del x
            if device == "cuda":
                torch.cuda.empty_cache()
    return record


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if options.list:
        print("\n".join([*(f"{d}: {s}" for d, shapes in SHAPES.items() for s in shapes), *PEERS]))
        return 0
    try:
        if options.records:
            record = merge([json.loads(path.read_text()) for path in options.records])
            show(record)
            if options.json:
                write(record, options.json)
        else:
            shapes = select(options.device, options.shapes)
            with tempfile.TemporaryDirectory() as empty:
                if options.empty_cache:
                    os.environ.update(
                        {"TRITON_CACHE_DIR": f"{empty}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{empty}/torch"}
                    )
                record = bench(options, shapes)
    except ValueError as problem:
        print(problem)
        return 2
    for wrong in wrong_picks(record["rows"]):
        print(f"the rule of linear_attention is wrong: {wrong}")
    if options.plot:
        plot(record, options.plot)
    return 0 if any("ms" in row for row in record["rows"]) else 1

"""Sphinx: `sphinx-build -W -n docs docs/_build`. MyST Markdown, the furo theme, docstrings by autodoc."""

import json
import re
from pathlib import Path

import torch_la
from torch_la import bench

project = "torch_la"
author = "the torch_la authors"
version = release = torch_la.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "substitution"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "records"]

html_theme = "furo"
html_title = "torch_la"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Types of other projects, which have no page here.
_elsewhere = ("Tensor", "torch", "argparse", "Any", "collections.abc")
nitpick_ignore_regex = [("py:.*", re.escape(name) + ".*") for name in _elsewhere]

# Numbers come from the records, so that no page can quote an older one.


_RECORDS = Path(__file__).parent / "records"


def _record(name: str) -> dict:
    return json.loads((_RECORDS / f"{name}.json").read_text())


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _worst(cases: dict) -> str:
    """The largest error of each quantity, for each dtype."""
    names = {"bf16": "bfloat16", "fp16": "float16", "tf32": "TF32", "ieee": "IEEE float32"}
    quantities = {"o": "o", "S": "final state", "dq": "dq", "dk": "dk", "dv": "dv", "dg": "dg", "dgamma": "dg_gamma"}
    quantities["dS0"] = "d initial state"
    rows = []
    for dtype, name in names.items():
        these = [case for case in cases["cases"] if case["case"].split()[1] == dtype]
        limit = min(case["limit"] for case in these if "limit" in case)
        worst = (max(case.get("errors", {}).get(q, 0) for case in these) for q in quantities)
        rows.append([f"{name} (at most {limit:.0e})", str(len(these)), *(f"{x:.1e}" for x in worst)])
    return _table(["", "cases", *quantities.values()], rows)


def _timing(record: dict) -> str:
    rows = []
    for r in record["timing"]:
        forward, backward, both = "", "", ""
        if "forward" in r:
            forward = f"{r['forward']:.3f} ({r['forward_floor']:.2f} x floor)"
        if "backward" in r:
            backward = f"{r['backward']:.3f}"
        if "both_floor" in r:
            both = f"{r['forward'] + r['backward']:.3f} ({r['both_floor']:.2f} x floor)"
        kernels = ", ".join(f"{name} {ms:.3f}" for name, ms in r.get("kernels", {}).items())
        rows.append([r["shape"], r["gate"], forward, backward, both, kernels])
    return _table(["shape", "gate", "forward", "backward", "both", "kernels"], rows)


def _findings(record: dict) -> str:
    tools = ["memcheck", "initcheck", "racecheck"]
    rows = []
    for r in record["findings"]:
        what = f"{r['width']}, {r['kernels']}" if "kernels" in r else str(r["width"] or "the control")
        known = [f"{r[kind]} {kind}" for kind in ("passed", "handed") if kind in r]
        rows.append([what, *(str(r[t]) for t in tools), ", ".join(known)])
    return _table(["width", *tools, "set aside"], rows)


def _layout(record: dict) -> str:
    names = list(record["table"]["no tag"])
    rows = [
        [f"`{tag}`" if "_" in tag else tag, *(f"{found[n]['inductor']:.0f} + {found[n]['kernel']}" for n in names)]
        for tag, found in record["table"].items()
    ]
    return _table(["tag", *names], rows)


def _releases(record: dict) -> str:
    releases = list(record["releases"].values())
    parts = list(releases[0]["rows"])
    rows = [[f"`test_{p}.py`", *("{passed} of {of}".format(**r["rows"][p]) for r in releases)] for p in parts]
    return _table(["", *(f"{r['torch']}, Python {r['python']}, {r['date']}" for r in releases)], rows)


def _contract(record: dict, *parts: str) -> str:
    """One line for each check. What a check could not do stands in its message."""
    rows = []
    for r in record["rows"]:
        if r["part"] in parts and "forward" not in r:
            skipped = ("part", "what", "ok", "took", "problem", "call", "reasons")
            shown = {k: v for k, v in r.items() if k not in skipped and v is not None}
            numbers = [f"{k} {v:.1e}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()]
            reasons = [
                line.replace("|", " ") for line in (r.get("problem", "").splitlines() or r.get("reasons", []))[:1]
            ]
            rows.append([f"{r['part']}: {r['what']}", "yes" if r["ok"] else "no", "; ".join([*numbers, *reasons])])
    return _table(["", "as promised", ""], rows)


def _host(record: dict) -> str:
    columns = ("forward", "forward_recorded", "both")
    rows = [
        [r["what"], *(f"{r[c]['issued_us']:.0f}" if c in r else "" for c in columns)]
        for r in record["rows"]
        if "forward" in r
    ]
    return _table(["", "forward", "forward, recorded for a gradient", "forward and backward"], rows)


def _training(record: dict) -> str:
    rows = []
    for r in record["results"]:
        if "problem" in r:
            rows.append([r["run"], r["problem"].splitlines()[0], *[""] * 5])
            continue
        cells = [f"{r['step_ms']:.1f}", f"{r['tokens_per_second'] / 1000:.0f}k", f"{r['first_step_s']:.1f}"]
        rows.append([r["run"], *cells, str(r["graph_breaks"]), f"{r['peak_gib']:.1f}", f"{r['final_loss']:.3f}"])
    head = ["", "step, ms", "tokens/s", "first step, s", "graph breaks", "peak memory, GiB", "loss, bits per byte"]
    config = record["config"]
    what = (
        f"{record['device']}, torch {record['torch']}, {record['date']}; {config['steps']} steps of {config['batch']} x"
    )
    what += f" {config['length']} tokens. The loss curves, averaged over 10 steps, are never further apart than"
    what += f" {record['curves_apart']:.4f} bits per byte."
    image = "![loss curves and step times](_static/training.svg)"
    return "\n\n".join([what, _table(head, rows), image])


def _compile() -> dict:
    """The tables of the page `compile`. Records of runs on a GPU may be missing from a checkout."""
    layout, versions = _record("compile_layout"), _record("compile_versions")
    found = {"layout": _layout(layout), "layout_torch": layout["torch"]}
    found |= {"versions": _releases(versions)}
    found |= dict.fromkeys(("gpu_machine", "gpu", "host", "peer", "training"), "*Not run yet.*")
    if (_RECORDS / "compile_gpu.json").exists():
        gpu = _record("compile_gpu")
        found["gpu_machine"] = (
            f"{gpu['device']}, torch {gpu['torch']}, {gpu['date']}. Again: `python tests/gpu/contract.py`."
        )
        found["gpu"] = _contract(gpu, "modes", "packed", "decode", "batched", "aoti", "code")
        found["host"], found["peer"] = _host(gpu), _contract(gpu, "peer")
    if (_RECORDS / "training.json").exists():
        found["training"] = _training(_record("training"))
    return found


def _benchmark(where: str) -> dict | None:
    """The records `bench_gpu*.json` or `bench_cpu*.json` as one, the last name wins. None: there are none."""
    paths = sorted(_RECORDS.glob(f"bench_{where}*.json"))
    return bench.merge([json.loads(path.read_text()) for path in paths]) if paths else None


def _benchmark_table(where: str) -> str:
    record = _benchmark(where)
    if record is None:
        return "*Not run yet.*"
    rows = [[r["shape"], r["gate"], *bench.cells(r, record["rows"])] for r in record["rows"] if "ms" in r]
    rows = [[cell.replace("*", r"\*") for cell in row] for row in rows]
    abouts = []
    for path in sorted(_RECORDS.glob(f"bench_{where}*.json")):
        one = json.loads(path.read_text())
        about = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
        rates = "copy {:.0f} GB/s, products {:.3g} TFLOP/s".format(
            one["rates"]["bandwidth"] / 1e9, one["rates"]["flops"] / 1e12
        )
        abouts.append(f"`{path.name}`: {about}; {rates}.")
    parts = [" ".join(abouts), _table(["shape", "gate", *bench.COLUMNS], rows)]
    image = f"bench_{where}.svg"
    if (_RECORDS / image).exists():
        parts.append(f"![times over the memory floor](records/{image})")
    absent = [f"{name} ({reason})" for name, reason in record["missing"].items()]
    refused = [
        "- {provider}, {shape} {gate}: `{error}`".format(**{**r, "error": r["error"].replace("`", "'")})
        for r in record["rows"]
        if "error" in r
    ]
    return "\n\n".join([*parts, *(f"Not there: {text}." for text in absent), "\n".join(refused)])


def _aims() -> dict[str, str]:
    """Where the records stand against each aim of the page `performance`; bold: missed."""
    rows, older = (record["rows"] if record else [] for record in (_benchmark("gpu"), _benchmark("peer_gpu")))
    runs = [json.loads(path.read_text())["rows"] for path in sorted(_RECORDS.glob("bench_gpu*.json"))]
    shapes = {"D 128": "B8_T4096_H16_D128", "D 64": "B32_T2048_H8_D64", "D 256": "B8_T2048_H32_D256"}
    both = "forward+backward"

    def judged(x: float, met: bool, form: str = ".2f", unit: str = "") -> str:
        text = f"{x:{form}}{unit}"
        return text if met else f"**{text}**"

    def row(shape: str, gate: str = "none", mode: str = "forward", run: list[dict] = rows) -> dict:
        wanted = (shapes.get(shape, shape), gate, mode)
        return next(r for r in run if r.get("picked") and (r["shape"], r["gate"], r.get("mode")) == wanted)

    def ratio(a: dict, b: dict) -> float:
        return a["ms"] / b["ms"]

    def to_peer(name: str, mode: str, goal: float) -> str:
        ours = row(name, mode=mode)
        for run, note in ((rows, ""), (older, " (of two runs)")):
            if rival := bench.best_peer(ours, run):
                x = ratio(rival, ours)
                return f"{name} {judged(x, x >= goal)}{note}"
        return f"{name}: no peer"

    def floor(r: dict, goal: float) -> str:
        x = round(r["ms"] / r["floor_ms"], 2)
        return judged(x, x <= goal)

    def cost(gate: str, goal: float, mode: str = "forward") -> str:
        costs, note = [], ""
        for name in ("D 128", "D 64"):  # the last record that has both
            wanted = {(shapes[name], gate, mode), (shapes[name], "none", mode)}
            have = [run for run in runs if wanted <= {(*bench.group(r), r.get("mode")) for r in run}]
            run = have[-1] if have else rows
            note = note if have else " (of two runs)"
            x = ratio(row(name, gate, mode, run), row(name, mode=mode, run=run)) - 1
            costs.append(judged(x, x <= goal, ".0%"))
        return " and ".join(costs) + note

    def packing(mode: str) -> str:
        more = []
        for gate in ("none", "g"):  # the last record that has both
            whole, packed = "B1_T65536_H16_D128", "B1_T65536_H16_D128_packed64"
            groups = {(whole, gate, mode), (packed, gate, mode)}
            run = next(run for run in reversed(runs) if groups <= {(*bench.group(r), r.get("mode")) for r in run})
            more.append(ratio(row(packed, gate, mode, run), row(whole, gate, mode, run)) - 1)
        return " and ".join(judged(x, x <= 0.15, "+.0%") for x in more)

    def memory(name: str) -> str:
        ours = row(name, mode=both)
        known = [r for r in rows + older if not r["ours"] and "memory_mib" in r]
        theirs = [r for r in known if bench.group(r) == bench.group(ours)]
        least = min((r["memory_mib"] for r in theirs if r["mode"] == both), default=0.0)
        return f"{name} {judged(ours['memory_mib'], ours['memory_mib'] <= least / 2, '.0f')} of {least:.0f} MiB"

    def plain(r: dict) -> bool:
        width = re.search(r"_D(\d+)", r["shape"])
        known = r.get("picked") and (r["gate"], r.get("mode")) == ("none", "forward") and r["floor_ms"]
        return bool(known and width and int(width[1]) <= 128 and r["shape"] not in shapes.values())

    def share(r: dict) -> str:
        x = r["floor_ms"] / r["ms"]
        return judged(x, x >= 0.9, ".0%")

    steps = [row(f"decode_B{B}_H32_D128", "g", "graph") for B in (1, 64, 256)]
    rivals = [bench.best_peer(r, rows) for r in steps]
    first = max(_record("gpu_first")["rows"], key=lambda r: r["first_s"])
    (host,) = (r for r in _record("compile_gpu")["rows"] if (r["part"], r["what"]) == ("host", "chunk"))
    us = {way: host[way]["issued_us"] for way in ("forward", "both")}
    return {
        "forward_peer": ", ".join(to_peer(d, "forward", 1 if d == "D 64" else 2) for d in shapes),
        "both_peer": ", ".join([to_peer("D 128", both, 2.2), *(to_peer(d, both, 1.5) for d in ("D 64", "D 256"))]),
        "forward_floor": ", ".join(f"{d} {floor(row(d), 1.3)}" for d in ("D 128", "D 64")),
        "forward_elsewhere": ", ".join(f"{r['shape'].replace('_', ' ')} {floor(r, 1.9)}" for r in rows if plain(r)),
        "both_floor": floor(row("D 128", mode=both), 2),
        "gates": f"`g` {cost('g', 0.15)}, `g_gamma` {cost('g_gamma', 0.05)}, the normaliser {cost('normalize', 0.15)}",
        "gates_both": f"`g` {cost('g', 0.15, both)}, `g_gamma` {cost('g_gamma', 0.05, both)}, "
        f"the normaliser {cost('normalize', 0.15, both)}",
        "packed": f"forward {packing('forward')}, forward and backward {packing(both)}",
        "memory": ", ".join(map(memory, ("D 128", "D 64"))),
        "decode": ", ".join(
            [judged(steps[0]["ms"] * 1e3, steps[0]["ms"] <= 5e-3, ".1f", " us"), *map(share, steps[1:])]
        ),
        "decode_peer": ", ".join(f"{ratio(p, r):.2f}" for r, p in zip(steps, rivals, strict=True) if p),
        "first": judged(first["first_s"], first["first_s"] <= 10, ".1f", " s")
        + f" ({first['shape']}, {first['gate']})",
        "eager": " and ".join(
            judged(us[way], us[way] <= goal, ".0f") for way, goal in (("forward", 60), ("both", 200))
        ),
    }


def _wrong_picks() -> str:
    """From the records of `bench --ops all`: `ops_gpu.json`, `ops_cpu.json`."""
    parts = []
    for where, name in (("GPU", "ops_gpu"), ("CPU", "ops_cpu")):
        path = _RECORDS / f"{name}.json"
        if not path.exists():
            parts.append(f"On a {where}: not measured with all operators.")
            continue
        record = json.loads(path.read_text())
        found = [f"- {text}" for text in bench.wrong_picks(record["rows"])]
        parts.append(f"On a {where} (`docs/records/{name}.json`): " + ("" if found else "nowhere."))
        parts += found
    return "\n".join(parts)


def _few() -> str:
    rows = _record("gpu_few")["rows"]
    names = ["B", "T", "gate", "recurrent", "chunk"]
    return _table(names, [[str(r[n]) for n in names] for r in rows])


_overhead = _record("overhead")
_calls = ["call", "forward", "forward, recorded for a gradient", "forward and backward"]
_columns = ["forward", "forward_recorded", "forward_and_backward"]
_overhead_rows = [[row["call"], *(f"{row[column]:.1f}" for column in _columns)] for row in _overhead["table"]]


def _models(where: str) -> dict:
    record = _record(f"transformers_{where}")
    numbers = ("upstream_ms", "torch_la_ms", "ratio")
    rows = [[r["what"], *(f"{r[n]:.2f}" if r.get(n) else "" for n in numbers)] for r in record["rows"]]
    for row, r in zip(rows, record["rows"], strict=True):
        row[-1] = row[-1] or r.get("problem", "")
    return {**record, "table": _table(["", "upstream, ms", "torch_la, ms", "ratio"], rows)}


_gpu = {name: _record(f"gpu_{name}") for name in ("cases", "contract", "timing", "sanitizer", "pytest")}
_normaliser = _record("gpu_normaliser")["cases"]
_gpu["normaliser"] = {
    "count": len(_normaliser),
    "worst": f"{max(e for c in _normaliser for e in c['errors'].values()):.1e}",
}
_copied = [c for c in _gpu["cases"]["cases"] if " copied" in c["case"]]
_gpu["copied"] = {
    "asked": len(_copied),
    "had": sum(bool(c.get("copied")) for c in _copied),
    "half": sum(bool(c.get("copied")) for c in _copied if " fp16 " in c["case"]),
    "hopper": sum("on Hopper" in c.get("copied", "") for c in _copied),
}
_gpu["cases"] |= {"count": len(_gpu["cases"]["cases"]), "wrong": sum(not c["ok"] for c in _gpu["cases"]["cases"])}
_gpu["pytest"] |= {
    "passed": sum(f["passed"] for f in _gpu["pytest"]["files"]),
    "wrong": sum(f.get("failure", 0) + f.get("error", 0) for f in _gpu["pytest"]["files"]),
}
_stack = _record("stack")
_most = sorted(_stack["stack_bytes"].items(), key=lambda it: -it[1])[:10]
_spills = [[*name.rsplit(" ", 1), str(size)] for name, size in _most]
_tables = {"cases": _worst, "timing": _timing, "sanitizer": _findings}
myst_substitutions = {
    "bench": {where: _benchmark_table(where) for where in ("gpu", "peer_gpu", "cpu")} | {"wrong": _wrong_picks()},
    "aim": _aims(),
    "few": _few(),
    "compile": _compile(),
    "overhead": {**_overhead, "table": _table(_calls, _overhead_rows)},
    "models": {where: _models(where) for where in ("cpu", "gpu")},
    "stack": {**_stack, "table": _table(["case", "kernel", "stack, bytes"], _spills)},
    "gpu": {name: {**r, "table": _tables[name](r) if name in _tables else ""} for name, r in _gpu.items()},
}

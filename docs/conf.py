"""Sphinx: `sphinx-build -W -n docs docs/_build`. MyST Markdown, the furo theme, docstrings by autodoc."""

import json
import re
from pathlib import Path

import torch_la

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
nitpick_ignore_regex = [("py:.*", re.escape(name) + ".*") for name in ("Tensor", "torch", "argparse", "Any")]

# Numbers come from the records, so that no page can quote an older one.


def _record(name: str) -> dict:
    return json.loads((Path(__file__).parent / "records" / f"{name}.json").read_text())


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
        # float16 with every gate at -20: see the page
        kept = [case for case in these if not (dtype == "fp16" and " strong" in case["case"])]
        limit = min(case["limit"] for case in these)
        worst = (max(case["errors"].get(q, 0) for case in kept) for q in quantities)
        rows.append([f"{name} (at most {limit:.0e})", str(len(these)), *(f"{x:.1e}" for x in worst)])
    return _table(["", "cases", *quantities.values()], rows)


def _timing(record: dict) -> str:
    rows = []
    for r in record["timing"]:
        _, _, B, T, H, _, K, _, gate = r["case"].split()
        kernels = sum(r["kernels"].values())
        forward, backward, first = r["forward"], r["backward"], r["first"]
        both = f"{forward + backward:.3f} ({r['both_floor']:.2f} x floor; {kernels:.3f})"
        cells = [f"{B} {T} {H} D{K[1:]}", gate, f"{forward:.3f} ({r['forward_floor']:.2f} x floor)", f"{backward:.3f}"]
        rows.append([*cells, both, f"{first:.1f} s"])
    return _table(["shape", "gate", "forward", "backward", "both", "first call"], rows)


def _findings(record: dict) -> str:
    tools = ["memcheck", "initcheck", "racecheck"]
    return _table(["width", *tools], [[str(r["width"]), *(str(r[t]) for t in tools)] for r in record["findings"]])


_overhead = _record("overhead")
_calls = ["call", "forward", "forward, recorded for a gradient", "forward and backward"]
_columns = ["forward", "forward_recorded", "forward_and_backward"]
_overhead_rows = [[row["call"], *(f"{row[column]:.1f}" for column in _columns)] for row in _overhead["table"]]
_gpu = {name: _record(f"gpu_{name}") for name in ("cases", "contract", "timing", "sanitizer")}
_stack = _record("stack")
_spills = [[*name.rsplit(" ", 1), str(size)] for name, size in _stack["stack_bytes"].items() if size]
_tables = {"cases": _worst, "timing": _timing, "sanitizer": _findings}
myst_substitutions = {
    "overhead": {**_overhead, "table": _table(_calls, _overhead_rows)},
    "stack": {**_stack, "table": _table(["case", "kernel", "stack, bytes"], _spills)},
    "gpu": {name: {**r, "table": _tables[name](r) if name in _tables else ""} for name, r in _gpu.items()},
}

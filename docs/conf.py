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
_overhead = json.loads((Path(__file__).parent / "records" / "overhead.json").read_text())
_rows = [
    "| call | forward | forward, recorded for a gradient | forward and backward |",
    "|---|---|---|---|",
    *(
        f"| {row['call']} | {row['forward']:.1f} | {row['forward_recorded']:.1f} | {row['forward_and_backward']:.1f} |"
        for row in _overhead["table"]
    ),
]
myst_substitutions = {"overhead": {**_overhead, "table": "\n".join(_rows)}}

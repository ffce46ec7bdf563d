"""The signatures of the functions that torch_la.compat offers, as their libraries define them.

    python tests/compat_signatures.py [--from DIRECTORY ...]     writes tests/compat_signatures.json and prints it

DIRECTORY holds `fla` or `mamba_ssm`, installed or unpacked; without it, the packages of this Python. The sources are
parsed, not imported: neither library needs a GPU, or to be installable, for this. Annotations are left out.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_suffix(".json")

# Which file of the library defines a function.
FILES = {
    "fla": {
        "fla/ops/linear_attn/chunk.py": ["chunk_linear_attn"],
        "fla/ops/linear_attn/fused_chunk.py": ["fused_chunk_linear_attn"],
        "fla/ops/linear_attn/fused_recurrent.py": ["fused_recurrent_linear_attn"],
        "fla/ops/linear_attn/naive.py": ["naive_recurrent_linear_attn", "naive_chunk_linear_attn"],
        "fla/ops/simple_gla/chunk.py": ["chunk_simple_gla"],
        "fla/ops/simple_gla/fused_chunk.py": ["fused_chunk_simple_gla"],
        "fla/ops/simple_gla/fused_recurrent.py": ["fused_recurrent_simple_gla"],
        "fla/ops/simple_gla/parallel.py": ["parallel_simple_gla"],
        "fla/ops/simple_gla/naive.py": [
            "naive_chunk_simple_gla",
            "naive_recurrent_simple_gla",
            "naive_parallel_simple_gla",
        ],
        "fla/ops/retention/chunk.py": ["chunk_retention"],
        "fla/ops/retention/fused_chunk.py": ["fused_chunk_retention"],
        "fla/ops/retention/fused_recurrent.py": ["fused_recurrent_retention"],
        "fla/ops/retention/parallel.py": ["parallel_retention"],
        "fla/ops/retention/naive.py": ["naive_retention"],
        "fla/ops/lightning_attn/chunk.py": ["chunk_lightning_attn"],
        "fla/ops/lightning_attn/fused_recurrent.py": ["fused_recurrent_lightning_attn"],
    },
    "mamba": {
        "mamba_ssm/ops/triton/ssd_combined.py": ["mamba_chunk_scan_combined"],
        "mamba_ssm/ops/triton/selective_state_update.py": ["selective_state_update"],
    },
}


def of_function(function: Callable[..., Any]) -> str:
    """A function's signature without annotations."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in inspect.signature(function).parameters.values()]
    return str(inspect.Signature(bare))


def in_source(path: Path, name: str) -> str:
    """The same of a function that a file defines."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            bare = ast.FunctionDef(name, node.args, [ast.Pass()], [], lineno=1, col_offset=0, type_params=[])
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg):
                    argument.annotation = None
            scope: dict[str, Any] = {"float": float, "inf": math.inf}
            exec(compile(ast.fix_missing_locations(ast.Module([bare], [])), str(path), "exec"), scope)
            return of_function(scope[name])
    raise ValueError(f"{path} defines no function {name}")


def version(roots: list[Path], package: str) -> str:
    for root in roots:
        file = root / package / "__init__.py"
        if file.is_file():
            found = re.search(r"""__version__ = ["'](.+)["']""", file.read_text())
            return found.group(1) if found else "unknown"
    raise FileNotFoundError(f"no {package} in {[str(root) for root in roots]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--from", dest="roots", type=Path, nargs="+", default=[Path(sysconfig.get_path("purelib"))])
    roots = parser.parse_args().roots
    record: dict[str, Any] = {}
    for module, package in (("fla", "fla"), ("mamba", "mamba_ssm")):
        record[module] = {"package": package, "version": version(roots, package), "signatures": {}}
        for file, names in FILES[module].items():
            path = next(root / file for root in roots if (root / file).is_file())
            record[module]["signatures"].update({name: in_source(path, name) for name in names})
    text = json.dumps(record, indent=1)
    RECORD.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()

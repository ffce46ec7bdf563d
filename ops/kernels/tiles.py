"""The tile table: which chunk, block, warps and stages a kernel runs with. `tiles.json` holds the choices.

Rows are [chunk, block, warps, stages], keyed by kernel, by how products are computed ("half" for bfloat16 and float16,
"tf32" and "ieee" for float32) and by the larger of the two widths, rounded up to 64, 128 or 256.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Tile:
    chunk: int  # tokens of a chunk
    block: int  # columns of the state that one program holds
    warps: int
    stages: int  # depth of the software pipeline


override: dict[str, Tile] = {}  # kernel -> tile: how `python -m torch_la tune` and the tests measure a row
segment: int | None = None  # likewise the length of a segment


@functools.cache
def table() -> dict:
    return json.loads(TABLE.read_text())


def tile(kernel: str, precision: str, K: int, V: int) -> Tile:
    """The row for `kernel` in {"forward", "backward", "tokens", "step"}."""
    if kernel in override:
        return override[kernel]
    return _tile(kernel, precision, 64 if max(K, V) <= 64 else 128 if max(K, V) <= 128 else 256)


@functools.cache
def _tile(kernel: str, precision: str, width: int) -> Tile:
    rows = table()[kernel]
    return Tile(*(rows.get(precision) or rows["any"])[str(width)])

"""The tile table: which chunk, block, warps and stages a kernel runs with. `tiles.json` holds the choices.

Rows are [chunk, block, warps, stages], keyed by kernel, by how products are computed ("half" for bfloat16 and float16,
"tf32" and "ieee" for float32; with "+g" a row for gated calls alone) and by the larger of the two widths, rounded up to
64, 128 or 256. A chunk of 1 means token by token, in exact float32, without matrix units.
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
def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(TABLE.read_text())


def tile(kernel: str, precision: str, K: int, V: int, gated: bool) -> Tile:
    """The row for `kernel` in {"forward", "backward", "tokens", "step"}."""
    if kernel in override:
        return override[kernel]
    return _tile(kernel, precision, gated, 64 if max(K, V) <= 64 else 128 if max(K, V) <= 128 else 256)


@functools.cache
def _tile(kernel: str, precision: str, gated: bool, width: int) -> Tile:
    rows = table()[kernel]
    for key in (precision + "+g" * gated, precision, "any"):
        row = rows.get(key, {}).get(str(width))
        if row is not None:
            return Tile(*row)
    raise KeyError(f"tiles.json has no row for {kernel=} {precision=} {gated=} {width=}")

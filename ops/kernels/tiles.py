"""The tile table: which chunk, block, warps and stages a kernel runs with. `tiles.json` holds the choices.

Rows are [chunk, block, warps, stages] or [chunk, block, warps, stages, registers], keyed by kernel, by how products
are computed ("half" for bfloat16 and float16, "tf32" and "ieee" for float32; "+blocks": a backward in blocks,
"+norm": with the normaliser; "+gates": with gates of any kind) and by the largest width that a row is for. What has no
row of its own takes the one that is named with less. A chunk of 1 means token by token, in exact float32, without
matrix units. The chunk of "states" is that of the kernel they serve: the row says for which its stages are meant. A
backward in blocks whose block holds all columns of K and of V takes one program for dq, dk and dv.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class Tile:
    chunk: int  # tokens of a chunk
    block: int  # columns of the state that one program holds
    warps: int
    stages: int  # depth of the software pipeline
    registers: int | None = None  # of a thread, at most: fewer let more programs run on a multiprocessor


override: dict[str, Tile] = {}  # kernel -> tile: how `python -m torch_la tune` and the tests measure a row
segment: int | None = None  # likewise the length of a segment
in_blocks = False  # likewise: a backward without gradients of gates works in blocks too


def settings() -> tuple[Any, ...]:
    """What the first two say now: a plan made under other settings is not for this call."""
    return segment, *override.items()


@functools.cache
def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(TABLE.read_text())


def tile(kernel: str, precision: str, K: int, V: int) -> Tile:
    """The row for `kernel` in {"forward", "backward", "states", "tokens", "step"}."""
    return override.get(kernel) or _tile(kernel, precision, max(K, V))


@functools.cache
def _tile(kernel: str, precision: str, width: int) -> Tile:
    rows, key = table()[kernel], precision
    while key and key not in rows:
        key = key.rpartition("+")[0]
    for bound, row in rows[key or "any"].items():  # in rising order
        if width <= int(bound):
            return Tile(*row)
    raise KeyError(f"tiles.json has no row for {kernel=} {precision=} {width=}")

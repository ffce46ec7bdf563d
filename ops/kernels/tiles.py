"""The tile table: which chunk, block, warps and stages a kernel runs with. `tiles.json` holds the choices.

Rows are [chunk, block, warps, stages] or [chunk, block, warps, stages, registers], keyed by kernel, by how products
are computed ("half" for bfloat16 and float16, "tf32" and "ieee" for float32; "+blocks": a backward in blocks, or
"+copied": a walk whose tiles the hardware copies, by descriptors, at the widths that have such a row; "+norm": with the
normaliser; "+gates": with gates of any kind, "+gamma": with those of g_gamma) and by the largest width that a row is
for. What has no row of its own takes the one that is named with less. A chunk of 1 means token by token, in exact
float32, without matrix units. The chunk of "states" is that of the kernel they serve: the row says for which its
stages are meant. A backward in blocks whose block holds all columns of K and of V takes one program for dq, dk and dv.
"hopper" and "hopper_few" are for hopper.py, the second where programs would not fill the GPU, and for the normaliser
above a width of 128; their registers are those of a consumer's threads.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Container
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


# How `python -m torch_la tune` and the tests measure a row:
override: dict[str, Tile] = {}  # kernel -> tile
segment: int | None = None  # the length of a segment
described = 1 << 26  # B T HV (K + V) from which on calls read by descriptors: the host needs time to make them
in_blocks = False  # a backward without gradients of gates works in blocks too
hopper = True  # hopper.py where it can

NEVER = 1 << 62  # for `described`


def settings() -> tuple[Any, ...]:
    """What stands above, but for `in_blocks`: a plan made under other settings is not for this call."""
    return segment, described, hopper, *override.items()


def name(kind: str, blocks: bool, copied: bool, norm: bool, gate: int) -> str:
    """Of the row that a call asks for; gate as in plan.py: 0 none, 1 g, 2 g_gamma."""
    way = "+blocks" if blocks else "+copied" * copied
    return kind + way + "+norm" * norm + "+gates" * (gate > 0) + "+gamma" * (gate == 2)


@functools.cache
def table() -> dict[str, dict[str, dict[str, list[int]]]]:
    return json.loads(TABLE.read_text())


def tile(kernel: str, precision: str, K: int, V: int) -> Tile:
    """The row for `kernel` in {"forward", "backward", "states", "tokens", "step", "hopper", "hopper_few"}."""
    return override.get(kernel) or _tile(kernel, precision, max(K, V))


def copies(kernel: str, precision: str, K: int, V: int) -> bool:
    """Whether the table has a row of copied tiles for this; where it has none, pointers are as fast."""
    return kernel in override or _copies(kernel, precision, max(K, V))


def nearest(name: str, names: Container[str]) -> str:
    """`name`, or what is left of it without its last words, as it stands in `names`; "" where nothing does."""
    while name and name not in names:
        name = name.rpartition("+")[0]
    return name


def _key(kernel: str, precision: str) -> str:
    return nearest(precision, table()[kernel]) or "any"


@functools.cache
def _copies(kernel: str, precision: str, width: int) -> bool:
    key = _key(kernel, precision)
    bound = next((b for b in table()[kernel]["half"] if width <= int(b)), "")
    return "+copied" in key and bound in table()[kernel][key]


@functools.cache
def _tile(kernel: str, precision: str, width: int) -> Tile:
    for bound, row in table()[kernel][_key(kernel, precision)].items():  # in rising order
        if width <= int(bound):
            return Tile(*row)
    raise KeyError(f"tiles.json has no row for {kernel=} {precision=} {width=}")

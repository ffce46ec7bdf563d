"""What a call needs: kernels, tiles and segments, chosen from shapes, strides and alignment alone, and remembered.

launch.py makes the plan of a call (`planned`) and the launches that it asks for.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles

BLOCK = 64  # tokens of a block, token by token
SHORTEST = 1024  # tokens of a segment: shorter ones move more bytes of states than of tokens
DENSE, PACKED, PACKED_CUT = 0, 1, 2  # the layouts of chunk.py

remembered = functools.lru_cache(maxsize=1024)


def ceil(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` takes 2 us of the host for each call, and there are many.)"""
    return -(-a // b)


def power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def power(n: int) -> int:
    return max(16, power_of_2(n))


View = tuple[list[int], list[int]]  # shape and strides


@dataclass(eq=False)
class Plan:
    """What the kernels of one call share. Calls share a plan if only addresses and the scale differ between them."""

    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int
    W: int  # columns of a state
    N: int  # sequences
    gate: int  # 0 none, 1 g, 2 g_gamma
    normalize: bool
    reverse: bool
    tokens: bool  # token by token, in exact float32
    in_blocks: bool  # the backward: blocks of one chunk, whose states are kept in memory
    gate_grad: bool  # the backward: with gradients of gates
    dtype: torch.dtype  # of q, k and v
    precision: str  # of products
    kind: str  # of the rows of the tile table
    tile: tiles.Tile
    layout: int
    cuts: int  # segments of a dense sequence
    length: int  # tokens of a segment
    slots: int
    strides: tuple[tuple[int, ...], ...]  # of q, k, v and in the backward do, without the last
    views: tuple[View, ...] | None  # q, k, v and do as descriptors show them, if the pass reads them by descriptors
    hopper: str  # the pass is that of hopper.py: the row of the tile table that it takes, or ""
    code: tuple[Any, ...]  # the device, and what tells one kind of call from others whose kernels differ
    begun: bool = False
    block_slots: int = 0  # those of the blocks, where the backward works in blocks or needs denominators
    blocks: int = 0  # and those of a dense sequence

    @property
    def on_hopper(self) -> bool:
        return bool(self.hopper)

    @functools.cached_property
    def cut(self) -> bool:
        return self.layout == PACKED_CUT or self.cuts > 1

    def columns(self, width: int, tile: tiles.Tile | None = None) -> int:
        """Columns of the state that a program holds."""
        return min((tile or self.tile).block, max(power(width), 32 if self.tokens else 16))

    def rows(self, width: int) -> int:
        """And rows. Token by token, smaller tiles than 64 x 32 leave several lanes that hold, and write, the same."""
        return max(power(width), 64 if self.tokens else 16)

    def described(self, x: Tensor, index: int, columns: int) -> Any:
        """x, which is the tensor `index` of q, k, v, do: a descriptor of tiles of so many columns, or as it is."""
        if self.views is None:
            return x
        shape, strides = self.views[index]
        return TensorDescriptor(x, shape, strides, [1] * (len(shape) - 2) + [self.C, columns])

    @property
    def states_tile(self) -> tiles.Tile:
        """For the kernels that only move the state."""
        if self.tokens or self.precision == "ieee":
            return self.tile
        tile = tiles.tile("states", self.kind, self.K, self.V)
        return replace(tile, stages=max(1, tile.stages * tile.chunk // self.C))  # longer chunks, the same memory

    @functools.cached_property
    def output_tiles(self) -> tuple[int, int]:
        """Of the backward: how many share the columns of dq, and of dk; and of dv."""
        BN = self.columns(max(self.K, self.V))
        return ceil(self.K, BN), ceil(self.V, BN)

    @functools.cached_property
    def dg_parts(self) -> tuple[int, int, int, int]:
        """How many parts of dg there are, as gate_gradient counts them: READ, INSIDE, WROTE and ACROSS."""
        TK, TV = self.output_tiles
        if not self.on_hopper:
            return TK, TK, TK, TV
        warps = 4 * TK * self.tile.block // 64  # each has its own part, and the scores of each program one more
        return warps + TK, 4 * TK, warps, warps

    @functools.cached_property
    def C(self) -> int:
        """Tokens of a block."""
        return BLOCK if self.tokens else self.tile.chunk

    @functools.cached_property
    def sums(self) -> torch.dtype:
        """Of the sums of gates."""
        # R of a strong decay is in the thousands: in float32 its differences would lose what float16 still shows
        exact = self.precision == "ieee" or self.tokens or self.dtype == torch.float16
        return torch.float64 if exact else torch.float32


def view_of(shape: tuple[int, ...], stride: tuple[int, ...], packed: bool) -> View | None:
    """[B, T, H, width] as [B, H, T, width], if descriptors take its strides: multiples of 16 bytes, none 0.

    Packed sequences end inside the tensor. There, two more dimensions let the caller say where (the trick of
    triton.tools.ragged_tma): token t of rows that end before `end` has the address t s = 2^30 (2^34 - s) + end s +
    (2^30 - end + t) s, in the 64 bits of an address, and lies outside the dimension of 2^30 tokens from `end` on.
    """
    B, T, H, width = shape
    strides = [s if n > 1 else 8 for n, s in ((B, stride[0]), (H, stride[2]), (T, stride[1]))]
    if any(s <= 0 or s % 8 for s in strides):
        return None
    b, h, t = strides
    if packed:
        most = 0x7FFF0000
        return ([most, most, H, 1 << 30, width], [(1 << 34) - t, t, h, t, 1]) if T <= 1 << 30 else None
    return [B, H, T, width], [b, h, t, 1]


@remembered
def planned(
    op: str, kernel: str, normalize: bool, reverse: bool, in_blocks: bool, gate_grad: bool, exact: bool,
    device: int | None, processors: int, describable: int, gluon: bool, settings: tuple[Any, ...],
    inputs: tuple[Any, ...],
) -> Plan:  # fmt: skip
    """The plan of calls of one form. `inputs`: the `form` of all tensors, in the order of launch.py.

    describable: the capability, if descriptors of these tensors can be made, or 0. gluon: hopper.py is there.
    """
    # (the device and the settings of the table only tell plans apart: each device compiles, the table reads its own)
    (dtype, (B, T, H, K), _), _, (_, (_, _, HV, V), _), g, g_gamma, cu, *_ = inputs
    gate = 2 if g_gamma is not None else int(g is not None)
    packed = None if cu is None else cu[1][0] - 1
    precision = "tf32"
    kind = "half"
    if dtype == torch.float32:
        kind = precision = "ieee" if exact else "tf32"
    read = (*inputs[:3], *inputs[8:9])
    views: tuple[View, ...] | None = None
    large = tiles.described <= B * T * HV * (K + V)
    width = max(K, V)
    gluon = (
        gluon and tiles.hopper and describable == 9 and kernel not in tiles.override and packed is None
        and width > 64 and K % 8 == V % 8 == 0 and not in_blocks
        and not (gate_grad and (dtype, K, V) != (torch.bfloat16, 128, 128))  # what has been through the proof
        and not (normalize and (kernel == "backward" or dtype != torch.bfloat16))
    )  # fmt: skip
    known = (
        in_blocks or gate_grad or gluon or tiles.copies(kernel, tiles.name(kind, False, True, normalize, gate), K, V)
    )
    if describable and large and known and op != "recurrent" and kind == "half":
        seen = [view_of(x[1], x[2], packed is not None) for x in read]
        views = tuple(x for x in seen if x) if all(seen) else None
    on = ""
    gluon &= views is not None
    in_blocks |= gate_grad and not gluon
    if gluon:
        # Two consumers of a program read a and b once for both. But half of the processors must not stand idle for
        # that, no sequence be cut; and wide states gain only where all processors have work, and not with the
        # normaliser, for whose sums two of them leave no registers.
        pairs = B * HV * ceil(V if kernel == "forward" else min(K, V), 128)
        cuts_below = 1.1 if gate_grad or (op == "chunk" and kernel == "forward") else 2
        few = pairs * (1 if width > 128 else cuts_below) < processors or (normalize and width > 128)
        on = "hopper_few" if few else "hopper"
        tile = tiles.tile(on, kind, K, V)
    else:
        row = tiles.name(kind, in_blocks, views is not None, normalize, gate)
        tile = tiles.tile("tokens" if op == "recurrent" else kernel, row, K, V)
    tokens = tile.chunk == 1
    N = B if packed is None else packed
    # cut so that about eight warps run on every multiprocessor
    in_blocks |= kernel == "backward" and tokens
    walks = tile
    if in_blocks and not tokens and precision != "ieee":  # `boundaries` walks, and the blocks need no cut
        walks = tiles.tile("states", kind, K, V)
    programs = HV * ceil(V, walks.block)
    if in_blocks:
        programs *= 1 if normalize else 2
    elif kernel == "backward" and on and (width > 128 or gate_grad):  # one launch for each role, or for dq
        programs = min(programs, HV * ceil(K, walks.block))
    elif kernel == "backward":
        programs += 2 * HV * ceil(K, walks.block)
    length = T
    if kernel == "backward" or op == "chunk":
        wanted = max(1, 8 // walks.warps) * processors
        if 1.1 * B * programs < wanted:
            length = max(SHORTEST, -(-T * B * programs // wanted))
        if tiles.segment is not None:
            length = tiles.segment
    unit = max(tile.chunk, BLOCK if tokens else 16)
    length = min(-(-length // unit) * unit, -(-max(T, 1) // unit) * unit)
    cuts = ceil(T, length) if packed is None else 1
    if packed is None:
        layout, slots = DENSE, B * cuts
    elif length >= T:
        layout, slots = PACKED, N
    else:
        layout, slots = PACKED_CUT, T // length + N
    if in_blocks and max(power(K), power(V)) <= tile.block:
        views = None  # one program does a whole block then: more of it goes through registers
    plan = Plan(
        B, T, H, HV, K, V, V + normalize, N, gate, normalize, reverse, tokens, in_blocks, gate_grad, dtype, precision,
        kind, tile, layout, cuts, length, slots, tuple(x[2][:3] for x in read), views, on,
        (
            device, views is None, on, op, kernel, normalize, reverse, in_blocks, gate_grad, precision, dtype, H < HV,
            K, V, layout, cuts > 1, *(x is None for x in inputs),
        ),
    )  # fmt: skip
    if in_blocks or gate_grad or (normalize and kernel == "backward"):
        plan.blocks = ceil(T, plan.C)
        plan.block_slots = B * plan.blocks if packed is None else T // plan.C + N
    return plan

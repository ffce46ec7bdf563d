"""What racecheck says of partitions that do nothing wrong: a control for its reports on hopper.py.

    compute-sanitizer --tool racecheck python tests/gpu/handover.py

One partition writes shared memory and arrives at mbarriers; two others wait there, read, and hand the place back, as
`scores` and `consumer` of hopper.py do, and a lone warp waits along. The result shows that the order is kept. All the
same racecheck reports two things: numbers that several warps store and read, although mbarriers stand between; and what
`warp_specialize` itself passes to the partitions, between barriers of the whole program.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

N = gl.constexpr(64)
FLAT = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))  # every warp holds all 64 numbers


@gluon.jit
def give(box, full, empty, rounds):
    i = gl.arange(0, N, layout=FLAT)
    for step in range(rounds):
        place = step % 2
        mbarrier.wait(empty.index(place), ((step // 2) & 1) ^ 1)
        box.index(place).store(i + step)
        mbarrier.arrive(full.index(place), count=1)


@gluon.jit
def take(out, box, full, empty, rounds):
    i = gl.arange(0, N, layout=FLAT)
    for step in range(rounds):
        place = step % 2
        mbarrier.wait(full.index(place), (step // 2) & 1)
        gl.store(out + step * N + N - 1 - i, box.index(place).load(FLAT))
        mbarrier.arrive(empty.index(place), count=1)


@gluon.jit
def watch(full, rounds):
    for step in range(rounds):
        mbarrier.wait(full.index(step % 2), (step // 2) & 1)


@gluon.jit
def partitions(out, rounds):
    box = gl.allocate_shared_memory(gl.int32, [2, N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(2):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=2)
    first = out + gl.program_id(0) * 2 * rounds * N
    gl.warp_specialize([
        (give, (box, full, empty, rounds)),
        (take, (first, box, full, empty, rounds)),
        (take, (first + rounds * N, box, full, empty, rounds)),
        (watch, (full, rounds)),
    ], [4, 4, 1], [64, 64, 24])  # fmt: skip


if __name__ == "__main__":
    x = torch.empty(16, 2, 50, 64, dtype=torch.int32, device="cuda")
    for _ in range(3):
        partitions[(16,)](x, 50, num_warps=4)
    i, step = torch.arange(64, device="cuda"), torch.arange(50, device="cuda")
    assert torch.equal(x, (63 - i + step[:, None]).int().expand_as(x))
    print("sanitize 0 done")

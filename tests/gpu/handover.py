"""What racecheck says of partitions that do nothing wrong: a control for its reports on hopper.py.

    compute-sanitizer --tool racecheck python tests/gpu/handover.py

One partition writes shared memory and arrives at an mbarrier; the other waits at it and reads, and back again for the
next round, as `scores` and `consumer` of hopper.py do. The result shows that the order is kept; what the tool reports
all the same, it reports because it does not follow such barriers.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

LAYOUT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def give(box, full, empty, rounds):
    i = gl.arange(0, 128, layout=LAYOUT)
    for step in range(rounds):
        mbarrier.wait(empty, (step & 1) ^ 1)
        box.store(i + step)
        mbarrier.arrive(full, count=1)


@gluon.jit
def take(box, full, empty, out, rounds):
    i = gl.arange(0, 128, layout=LAYOUT)
    for step in range(rounds):
        mbarrier.wait(full, step & 1)
        gl.store(out + step * 128 + 127 - i, box.load(LAYOUT))
        mbarrier.arrive(empty, count=1)


@gluon.jit
def two_partitions(out, rounds):
    box = gl.allocate_shared_memory(gl.int32, [128], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    mbarrier.init(empty, count=1)
    gl.warp_specialize([(give, (box, full, empty, rounds)), (take, (box, full, empty, out, rounds))], [4], [64])


if __name__ == "__main__":
    x = torch.empty(50, 128, dtype=torch.int32, device="cuda")
    two_partitions[(1,)](x, 50, num_warps=4)
    i, step = torch.arange(128, device="cuda"), torch.arange(50, device="cuda")
    assert torch.equal(x, (127 - i + step[:, None]).int())
    print("sanitize 0 done")

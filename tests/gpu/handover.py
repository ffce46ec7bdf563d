"""Two partitions that share nothing: what racecheck says of Triton's `warp_specialize` itself.

    compute-sanitizer --tool racecheck python tests/gpu/handover.py

The default warps of a program hand its arguments to the others through shared memory, behind a barrier of the hardware
that the tool does not follow. It reports such a hand-over in every kernel that has one; this one has nothing else.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def write(out, place: gl.constexpr):
    i = gl.arange(0, 128, layout=gl.BlockedLayout([1], [32], [4], [0]))
    gl.store(out + place * 128 + i, i)


@gluon.jit
def two_partitions(out):
    gl.warp_specialize([(write, (out, 0)), (write, (out, 1))], [4], [64])


if __name__ == "__main__":
    x = torch.empty(256, dtype=torch.int32, device="cuda")
    two_partitions[(4,)](x, num_warps=4)
    assert torch.equal(x, torch.arange(128, dtype=torch.int32, device="cuda").repeat(2))
    print("sanitize 0 done")

"""la::chunk: the sequence in segments, all at once.

    la::chunk(q, k, v, g?, g_gamma?, initial_state?, output_final_state, cu_seqlens?, scale?, normalize, reverse)
        -> (o, final_state?)

The local state of each segment, a scan over the segments, then the pass in every segment at once: parallel over time,
so it fills a GPU when heads are few and sequences long. It reads k and v once more than `la::fused_chunk`.
"""

from . import cpu, cuda
from .operator import Operator
from .rules import FLOP_CHUNK

operator = Operator(
    "chunk",
    forward=cuda.forward("chunk", cpu.chunk_forward),
    backward=cuda.backward("chunk", cpu.chunk_backward),
    chunk=FLOP_CHUNK,
)

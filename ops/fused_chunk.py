"""la::fused_chunk: one kernel walks the chunks with the state in registers.

    la::fused_chunk(q, k, v, g?, g_gamma?, initial_state?, output_final_state, cu_seqlens?, scale?, normalize, reverse)
        -> (o, final_state?)

Every input is read once and every output written once: the fewest bytes, where batch x heads fill the GPU. On a CPU,
whose cores are few, it is the same kernel as `la::chunk`.
"""

from . import cpu, cuda
from .operator import Operator
from .rules import FLOP_CHUNK

operator = Operator(
    "fused_chunk",
    forward=cuda.forward("fused_chunk", cpu.chunk_forward),
    backward=cuda.backward("fused_chunk", cpu.chunk_backward),
    chunk=FLOP_CHUNK,
)

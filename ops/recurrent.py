"""la::recurrent: token by token, in float32.

    la::recurrent(q, k, v, g?, g_gamma?, initial_state?, output_final_state, cu_seqlens?, scale?, normalize, reverse)
        -> (o, final_state?)

The recurrence as it is defined, without matrix products: for a few tokens, and for checking the others.
"""

from . import cpu, cuda
from .operator import Operator

operator = Operator(
    "recurrent",
    forward=cuda.forward("recurrent", cpu.recurrent_forward),
    backward=cuda.backward("recurrent", cpu.recurrent_backward),
    chunk=0,
)

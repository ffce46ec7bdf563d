"""Causal linear attention as a first-class PyTorch operator.

Importing this package registers the operators `torch.ops.la.chunk`, `fused_chunk`, `recurrent`, their backward
operators, and `recurrent_step_`. It touches no GPU and imports no Triton.

- `linear_attention`: picks an operator from the shapes
- `chunk`, `fused_chunk`, `recurrent`: the operators by name
- `recurrent_step`: one token, the state in place
- `normalize_output`: the normaliser as a function of its own
- `decay`: the fixed decays of real checkpoints, by name
- `reference`: the definition in plain PyTorch
"""

from . import decay
from .functions import chunk, fused_chunk, linear_attention, normalize_output, recurrent, recurrent_step
from .ops import reference

__version__ = "0.1.0"
__all__ = [
    "chunk",
    "decay",
    "fused_chunk",
    "linear_attention",
    "normalize_output",
    "recurrent",
    "recurrent_step",
    "reference",
]

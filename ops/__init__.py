"""What PyTorch sees and the device runs. Importing this package registers the operators.

- `chunk`, `fused_chunk`, `recurrent`, `recurrent_step`: one file per operator
- `operator`: what PyTorch is told about each (schema, kernels, fake, autograd); `rules`: vmap, autocast, FLOPs
- `derivatives`: the derivatives as calls of the operators; `sharding`: the DTensor rules
- `reference`: the definition in plain PyTorch; `cpu`: the ATen kernels; `kernels`: the Triton kernels
- `private`, `late`, `cache_key`: the private names of PyTorch in use; registrations that wait for an import; what
  keeps PyTorch's compile caches from serving old formulas
"""

from . import chunk, fused_chunk, recurrent, recurrent_step, reference

__all__ = ["chunk", "fused_chunk", "recurrent", "recurrent_step", "reference"]

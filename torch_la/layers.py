"""Layers of Hugging Face transformers with the operators of this library, in the form that its kernels hub asks for.

- `MiniMaxLightningAttention`: lightning attention of MiniMax
- `Mamba2Mixer`: the mixer of Mamba-2, which Bamba, Zamba2, Nemotron-H and Granite 4 share

A layer of the hub is its `forward` alone, bound to a module of the model, whose parameters and buffers it reads: it has
no constructor, no other method and no state, and says in `has_backward` and `can_torch_compile` what it can do
(https://huggingface.co/docs/kernels/kernel-requirements). `torch_la.integrations.transformers` binds them without the
hub. Nothing here imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, functions
from .compat import mamba


class MiniMaxLightningAttention(nn.Module):
    """MiniMax's attention with a fixed decay per head (https://arxiv.org/abs/2501.08313), scale 1.

    Returns the output and the state [B, H, D, D], float32, as the module that it stands in for does.
    """

    has_backward = True
    can_torch_compile = True

    # what the module brings
    layer_idx: int
    head_dim: int
    num_attention_heads: int
    slope_rate: Tensor  # [H, 1, 1]
    act_fn: nn.Module
    norm: nn.Module
    qkv_proj: nn.Linear
    out_proj: nn.Linear
    output_gate: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, width]
        position_embeddings: tuple[Tensor, Tensor],  # for the softmax layers: lightning attention has no positions
        attention_mask: Tensor | None,  # [B, T], 0 for padding
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        qkv = _mask(self.act_fn(self.qkv_proj(hidden_states)), attention_mask)
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, 3 * self.head_dim)).split(self.head_dim, -1)
        state = None if past_key_values is None else past_key_values.get_linear_cache(self.layer_idx)
        o, state = functions.linear_attention(
            *(q, k, v),
            g_gamma=-self.slope_rate.flatten(),
            initial_state=None if state is None else state.to(checks.state_dtype(q)),
            output_final_state=True,
            scale=1.0,
        )
        if past_key_values is not None:
            past_key_values.set_linear_cache(self.layer_idx, state)
        o = self.norm(o.flatten(-2))
        return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * o), state


class Mamba2Mixer(nn.Module):
    """The mixer of Mamba-2 (https://arxiv.org/abs/2405.21060, section 7): projection, short convolution, scan, norm."""

    has_backward = True
    can_torch_compile = True

    # what the module brings
    layer_idx: int
    num_heads: int
    head_dim: int
    n_groups: int
    ssm_state_size: int
    intermediate_size: int
    conv_dim: int
    conv_kernel_size: int
    time_step_limit: tuple[float, float]
    A_log: Tensor  # [H]
    D: Tensor  # [H]
    dt_bias: Tensor  # [H]
    act: nn.Module
    in_proj: nn.Linear
    conv1d: nn.Conv1d
    norm: nn.Module
    out_proj: nn.Linear

    def forward(
        self,
        hidden_states: Tensor,  # [B, T, width]
        cache_params: Any = None,
        attention_mask: Tensor | None = None,  # [B, T], 0 for padding
        **kwargs: Any,
    ) -> Tensor:
        for name in ("seq_idx", "cu_seqlens"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported: the short convolution would mix packed sequences")
        T = hidden_states.shape[1]
        projected = self.in_proj(_mask(hidden_states, attention_mask))
        gate, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], -1)

        # The convolution sees what the cache holds of the tokens before, zeros if there are none.
        xBC = xBC.mT
        state = None
        if cache_params is not None:
            state = cache_params.get_recurrent_state(self.layer_idx, state_idx=0)
            xBC = cache_params.update_conv_state(xBC, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        seen = T + self.conv_kernel_size - 1
        xBC = F.pad(xBC, (seen - xBC.shape[-1], 0))  # a negative width cuts
        xBC = self.act(F.conv1d(xBC, self.conv1d.weight, self.conv1d.bias, groups=self.conv_dim))
        xBC = _mask(xBC.mT, attention_mask)

        x, B, C = xBC.split([self.intermediate_size, *2 * [self.n_groups * self.ssm_state_size]], -1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        B, C = (y.unflatten(-1, (self.n_groups, self.ssm_state_size)) for y in (B, C))
        A = -torch.exp(self.A_log.float())
        v, g = mamba.discretize(x, dt, A, self.dt_bias, True, self.time_step_limit)
        dtype = checks.state_dtype(x)
        if T == 1 and state is not None and state.dtype == dtype and not torch.is_grad_enabled():
            y = functions.recurrent_step(C[:, 0], B[:, 0], v[:, 0], state.mT, g[:, 0], scale=1.0)[:, None]
        else:
            state = None if state is None else state.to(dtype).mT
            keep = cache_params is not None
            y, state = functions.linear_attention(C, B, v, g, initial_state=state, output_final_state=keep, scale=1.0)
            if keep:
                cache_params.update_recurrent_state(state.mT, layer_idx=self.layer_idx)
        y = mamba.skip_and_gate(y, x, self.D[:, None], None).flatten(-2)
        return self.out_proj(self.norm(y, gate).to(hidden_states.dtype))


def _mask(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Zeros for padding: [B, T, width] by [B, T]."""
    return x if attention_mask is None else (x * attention_mask[..., None]).to(x.dtype)

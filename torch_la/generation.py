"""The memory of generation: states of fixed size at fixed addresses, for `torch.compile` and CUDA graphs.

- `StateCache`: the states of one layer, one slot for each sequence in flight
- `Cache`: those of all layers of a model, for what is done to all of them at once

    prefill, extend   attend(q, k, v, ...)           any number of tokens; `linear_attention` picks the operator
    one token         attend with T = 1              `recurrent_step`, the state updated in place
    batching          slots=[B]                      row b continues the sequence in slot slots[b]
    speculation       verify(...), accept(counts)    read k drafted tokens, then keep the first counts[b] of them
    beams, forks      reorder(sources, targets)      slots take over the states of others
    a new sequence    reset(slots)

Nothing is allocated after construction but the results, nothing is copied to the host, and no tensor of the cache ever
moves. Slots outside 0 to S - 1 (-1, say) mark the padding rows of a batch of fixed size: no state changes, the output
is zero. No row has a gradient: call these under `torch.no_grad()` or `torch.inference_mode()`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .functions import _surely, linear_attention, recurrent, recurrent_step
from .ops import rules


class StateCache(nn.Module):
    """The states of one layer, in buffers that never move.

        state     [S + 1, HV, K, V]        float32; one column wider with `normalize`, for z
        draft_k   [S + 1, draft, H, K]     float32; what `verify` read, until `accept`
        draft_v   [S + 1, draft, HV, V]
        draft_g   [S + 1, draft, HV]

    S slots; the row after the last is where padding rows write. For each slot that is 4 HV K (V + normalize) bytes, and
    4 draft (H K + HV V + HV) for speculation, however long the sequence grows; `nbytes` is the sum.

    Args:
        slots: S, how many sequences can be in flight.
        heads: H, key heads.
        key_width: K, after the feature map.
        value_width: V.
        value_heads: HV, a multiple of H; default H.
        normalize: as in the operators.
        draft: how many tokens `verify` takes at most. 0: it is not used.
        dtype: of the states: float32, or float64 for float64 inputs.
        device: of the states.

    Raises:
        ValueError, TypeError: a size or dtype that no operator takes; the message shows what came.
    """

    state: Tensor
    draft_k: Tensor
    draft_v: Tensor
    draft_g: Tensor

    def __init__(
        self,
        slots: int,
        heads: int,
        key_width: int,
        value_width: int,
        *,
        value_heads: int | None = None,
        normalize: bool = False,
        draft: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        HV = heads if value_heads is None else value_heads
        checks.sizes(slots=slots, heads=heads, key_width=key_width, value_width=value_width, value_heads=HV)
        checks.sizes(0, draft=draft)
        if HV % heads:
            raise ValueError(f"value_heads must be a multiple of heads: got value_heads={HV}, {heads=}")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype of a state must be float32, or float64 for float64 inputs: got {dtype=}")
        self.slots, self.draft, self.normalize = slots, draft, normalize
        shapes = {
            "state": (HV, key_width, value_width + normalize),
            "draft_k": (draft, heads, key_width),
            "draft_v": (draft, HV, value_width),
            "draft_g": (draft, HV),
        }
        for name, shape in shapes.items():
            zeros = torch.zeros(slots + 1, *shape, dtype=dtype, device=device)
            self.register_buffer(name, zeros, persistent=False)

    @property
    def nbytes(self) -> int:
        """What the buffers take in bytes, which is all that generation keeps for this layer."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        HV, K = self.state.shape[1:3]
        H, V = self.draft_k.shape[2], self.draft_v.shape[3]
        return (
            f"slots={self.slots}, heads={H}, key_width={K}, value_width={V}, value_heads={HV}, "
            f"normalize={self.normalize}, draft={self.draft}, dtype={self.state.dtype}, nbytes={self.nbytes}"
        )

    # ------------------------------------------------------------------------------------------------------- attention

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        g_gamma: Tensor | None = None,
        *,
        slots: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Continues the sequences by T tokens each: prefill, extension, or one step. Returns o [B, T, HV, V].

        Args:
            q, k, v, g, g_gamma, cu_seqlens, scale: as in `torch_la.linear_attention`.
            slots: [B] int32 or int64, the slot of each row (with cu_seqlens [N], of each packed sequence). No two rows
                may name the same. None: row b is slot b, and there are as many rows as slots. A packed sequence
                without a slot must be empty: its output would have no meaning.

        Raises:
            ValueError, TypeError: as in the operators, and where the shapes are not those of this cache.
            RuntimeError: an input requires a gradient.
        """
        q, k, v = self._autocast(q, k, v)
        rows = self._check(q, k, v, g, g_gamma, slots, cu_seqlens)
        if cu_seqlens is None and _surely(q.shape[1] == 1):
            # the pool without its last row: a slot outside of it is skipped
            o = recurrent_step(
                *(q[:, 0], k[:, 0], v[:, 0], self.state[: self.slots]),
                *(None if g is None else g[:, 0], g_gamma),
                state_indices=slots,
                scale=scale,
                normalize=self.normalize,
            )
            return o.unsqueeze(1)
        o, final = linear_attention(
            *(q, k, v, g, g_gamma),
            initial_state=self._read(self.state, rows),
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            scale=scale,
            normalize=self.normalize,
        )
        assert final is not None
        self._write(self.state, rows, final)
        return self._clear_padding(o, slots, cu_seqlens)

    def verify(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None = None,
        g_gamma: Tensor | None = None,
        *,
        slots: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """What `attend` returns for T <= draft tokens, without moving the states: o [B, T, HV, V].

        The tokens are remembered until `accept` says how many of them hold. A verify that is not accepted leaves no
        trace: the next one takes its place. Arguments and errors as in `attend`.
        """
        q, k, v = self._autocast(q, k, v)
        rows = self._check(q, k, v, g, g_gamma, slots, None)
        B, tokens, HV = v.shape[:3]
        if tokens > self.draft:
            raise ValueError(f"verify takes at most draft = {self.draft} tokens: got {tuple(q.shape)=}")
        gates = v.new_zeros(B, tokens, HV) if g is None else g
        if g_gamma is not None:
            gates = g_gamma.expand(B, tokens, HV)
        for buffer, x in ((self.draft_k, k), (self.draft_v, v), (self.draft_g, gates)):
            if tokens < self.draft:  # what is not read adds nothing, however many tokens are accepted
                x = torch.cat([x, x.new_zeros(B, self.draft - tokens, *x.shape[2:])], 1)
            self._write(buffer, rows, x)
        o, _ = linear_attention(
            *(q, k, v, g, g_gamma),
            initial_state=self._read(self.state, rows),
            scale=scale,
            normalize=self.normalize,
        )
        return self._clear_padding(o, slots, None)

    def accept(self, counts: Tensor, *, slots: Tensor | None = None) -> None:
        """The states move on by the first counts[b] tokens that the last `verify` read; the others are forgotten.

        Call it once for each `verify`, before the next `attend`, with the same slots. Exact: the kept tokens are read
        again from the state before them, in float32, so no error stays of those that are dropped.

        Args:
            counts: [B] int32 or int64, from 0 to the tokens of the `verify`; more than that is the same as all.
            slots: as in `verify`.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or device.
        """
        checks.tensors(slots_or_None=slots)
        B = self.slots if slots is None else slots.shape[0]
        self._check_slots(slots, B)
        _check_indices("counts", counts, B, self.state.device)
        rows = self._rows(slots)
        k, v, g = (self._read(buffer, rows) for buffer in (self.draft_k, self.draft_v, self.draft_g))
        dropped = torch.arange(self.draft, device=counts.device) >= counts[:, None]
        k, v = (x.masked_fill(dropped[..., None, None], 0) for x in (k, v))  # v too: 0 times inf is not 0
        g = g.masked_fill(dropped[..., None], 0)
        with torch.autocast(self.state.device.type, enabled=False):
            # k in the place of q: the outputs are not wanted
            _, final = recurrent(
                *(k, k, v, g),
                initial_state=self._read(self.state, rows),
                output_final_state=True,
                normalize=self.normalize,
            )
        assert final is not None
        self._write(self.state, rows, final)
        for buffer in (self.draft_k, self.draft_v, self.draft_g):  # accepted once is enough
            self._write(buffer, rows, torch.zeros_like(self._read(buffer, rows)))

    # ----------------------------------------------------------------------------------------------------------- slots

    def reorder(self, sources: Tensor, targets: Tensor | None = None) -> None:
        """Slot targets[i] takes over what slot sources[i] holds, for all i at once: beams, or a prompt shared by many.

        Args:
            sources: [n] int32 or int64, slots from 0 to S - 1. Any may be named more than once.
            targets: [n], all different. None: slots 0 to n - 1.

        Raises:
            ValueError, TypeError: a wrong shape, dtype or device.
        """
        _check_indices("sources", sources, None, self.state.device)
        n = sources.shape[0]
        if n > self.slots:
            raise ValueError(
                f"sources can name at most S = {self.slots} slots: got sources.shape={tuple(sources.shape)}"
            )
        if targets is not None:
            _check_indices("targets", targets, n, self.state.device)
        for buffer in self.buffers():
            pool = buffer[: self.slots]  # without the last row, which is nobody's
            moved = pool.index_select(0, sources)
            if targets is None:
                pool[:n].copy_(moved)
            else:
                pool.index_copy_(0, targets.long(), moved)

    def reset(self, slots: Tensor | None = None) -> None:
        """Empties slots [n], or all of them: the next token there is the first of a sequence."""
        if slots is not None:
            _check_indices("slots", slots, None, self.state.device)
        rows = self._rows(slots)
        for buffer in self.buffers():
            if rows is None:
                buffer.zero_()
            else:
                buffer.index_fill_(0, rows, 0)

    # --------------------------------------------------------------------------------------------------------- private

    def _autocast(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """In an autocast region, what the operators would make of q, k and v: here it must also be what is kept."""
        device = self.state.device.type
        if not all(isinstance(x, Tensor) for x in inputs) or not torch.is_autocast_enabled(device):
            return inputs
        return tuple(rules.autocast(x, torch.get_autocast_dtype(device)) for x in inputs)

    def _rows(self, slots: Tensor | None) -> Tensor | None:
        """The row of each slot; the last row for slots outside the pool."""
        if slots is None:
            return None
        return torch.where((slots >= 0) & (slots < self.slots), slots, self.slots).long()

    def _read(self, buffer: Tensor, rows: Tensor | None) -> Tensor:
        return buffer[: self.slots] if rows is None else buffer.index_select(0, rows)

    def _write(self, buffer: Tensor, rows: Tensor | None, x: Tensor) -> None:
        if rows is None:
            buffer[: self.slots].copy_(x)
        else:
            buffer.index_copy_(0, rows, x.to(buffer.dtype))

    def _clear_padding(self, o: Tensor, slots: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Zeros in the rows whose slot is outside the pool. Packed sequences have no padding rows to clear."""
        if slots is None or cu_seqlens is not None:
            return o
        padding = (slots < 0) | (slots >= self.slots)
        return o.masked_fill(padding[:, None, None, None], 0)

    def _check(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        g_gamma: Tensor | None,
        slots: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor | None:
        """Everything that the operator would only find after some work is done. Returns the rows."""
        checks.tensors(q=q, k=k, v=v, g_or_None=g, g_gamma_or_None=g_gamma, cu_seqlens_or_None=cu_seqlens)
        checks.attention(q, k, v, g, g_gamma, None, cu_seqlens, self.normalize)
        given = [x for x in (q, k, v, g, g_gamma) if x is not None]
        if torch.is_grad_enabled() and any(x.requires_grad for x in given):
            raise RuntimeError(
                "a state cache is written in place and has no derivative: an input requires a gradient. Generate under "
                "torch.no_grad() or torch.inference_mode()"
            )
        wanted = (self.draft_k.shape[2], self.state.shape[1], self.state.shape[2], self.draft_v.shape[3])
        if (q.shape[2], v.shape[2], q.shape[3], v.shape[3]) != wanted:
            raise ValueError(
                f"this cache is for H, HV, K, V = {wanted}: got q.shape={tuple(q.shape)}, v.shape={tuple(v.shape)}"
            )
        if checks.state_dtype(q) != self.state.dtype:
            raise TypeError(f"this cache holds {self.state.dtype} states, not for {q.dtype} inputs: got {q.dtype=}")
        if q.device != self.state.device:
            raise TypeError(f"this cache is on {self.state.device}: got {q.device=}")
        rows = checks.states(q, cu_seqlens)
        self._check_slots(slots, rows)
        return self._rows(slots)

    def _check_slots(self, slots: Tensor | None, rows: Any) -> None:
        if slots is not None:
            _check_indices("slots", slots, rows, self.state.device)
        elif rows != self.slots:
            raise ValueError(f"slots must name the slot of each row unless there are S = {self.slots}: got {rows} rows")


def _check_indices(name: str, x: Any, rows: Any, device: torch.device) -> None:
    checks.tensors(**{name: x})
    if x.ndim != 1 or (rows is not None and x.shape[0] != rows):
        raise ValueError(f"{name} must be [{'n' if rows is None else rows}]: got {name}.shape={tuple(x.shape)}")
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64: got {name}.dtype={x.dtype}")
    if x.device != device:
        raise TypeError(f"{name} must be on the device of the cache, {device}: got {name}.device={x.device}")


class Cache(nn.ModuleList):
    """The state caches of a model's layers, in their order. Index it for the cache of one layer."""

    def __init__(self, layers: Iterable[StateCache]) -> None:
        super().__init__(layers)

    @classmethod
    def of(cls, model: nn.Module, slots: int, *, draft: int = 0) -> Cache:
        """One for each `torch_la.nn.LinearAttention` in the model, in the order of `model.modules()`.

        Raises:
            ValueError: the model has no such layer.
        """
        from .nn import LinearAttention

        layers = [module for module in model.modules() if isinstance(module, LinearAttention)]
        if not layers:
            raise ValueError(f"the model has no torch_la.nn.LinearAttention: got {type(model).__name__}")
        return cls(layer.make_cache(slots, draft=draft) for layer in layers)

    @property
    def nbytes(self) -> int:
        """What all layers take, in bytes."""
        return sum(layer.nbytes for layer in self._layers())

    def accept(self, counts: Tensor, *, slots: Tensor | None = None) -> None:
        """`StateCache.accept` in every layer."""
        for layer in self._layers():
            layer.accept(counts, slots=slots)

    def reorder(self, sources: Tensor, targets: Tensor | None = None) -> None:
        """`StateCache.reorder` in every layer."""
        for layer in self._layers():
            layer.reorder(sources, targets)

    def reset(self, slots: Tensor | None = None) -> None:
        """`StateCache.reset` in every layer."""
        for layer in self._layers():
            layer.reset(slots)

    def _layers(self) -> list[StateCache]:
        layers: Any = list(self)
        return layers

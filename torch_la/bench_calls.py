"""What `python -m torch_la bench` measures: shapes, inputs, and the calls of this library and of its peers.

- `Shape`, `SHAPES`: a size has a name without spaces, such as B8_T4096_H16_D128, which options can select
- `Inputs`, `make`, `floors`: random inputs, and the bytes and FLOPs that they cost
- `PEERS`, `ours`: a builder takes `Inputs` and returns a `Call`, or raises `Unsupported` with the reason

Every call computes the same function of the same inputs; softmax attention alone is other mathematics, for scale. A
peer gets its arguments in the layout it asks for, prepared outside the measurement.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import explanation, functions, ops


class Unsupported(Exception):
    """This peer does not compute this case; the message says what it lacks."""


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    K: int
    V: int
    HV: int
    kind: str = "sequence"  # "host": so small that only the host counts; "decode": one token, the state in float32
    lengths: tuple[int, ...] | None = None  # of packed sequences; then B = 1

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.H == self.HV else f"H{self.H}_HV{self.HV}"
        width = f"D{self.K}" if self.K == self.V else f"K{self.K}_V{self.V}"
        packed = f"_packed{len(self.lengths)}" if self.lengths else ""
        if self.kind == "decode":
            return f"decode_B{self.B}_{heads}_{width}"
        return f"{'host_' if self.kind == 'host' else ''}B{self.B}_T{self.T}_{heads}_{width}{packed}"

    @property
    def modes(self) -> tuple[str, ...]:
        return ("graph", "eager") if self.kind == "decode" else ("forward", "forward+backward")


def _square(B: int, T: int, H: int, D: int, kind: str = "sequence") -> Shape:
    return Shape(B, T, H, D, D, H, kind)


# 64 sequences of 64 to 8192 tokens in 65,536: most are short, and most of the tokens are in a few long ones
PACKED = (64,) * 28 + (512,) * 28 + (8192, 8192, 8192, 8192, 6144, 4096, 4096, 2304)

SHAPES = {
    "cuda": [
        _square(8, 4096, 16, 128),
        _square(32, 2048, 8, 64),
        _square(1, 32768, 32, 128),
        _square(1, 131072, 4, 128),
        _square(4, 4096, 8, 256),
        _square(8, 2048, 32, 256),
        _square(1, 8192, 96, 128),
        _square(4, 2048, 16, 128),
        _square(8, 1024, 8, 64),
        Shape(1, sum(PACKED), 16, 128, 128, 16, lengths=PACKED),
        _square(1, sum(PACKED), 16, 128),  # the same tokens as one sequence
        Shape(8, 4096, 8, 128, 256, 8),
        Shape(8, 4096, 4, 128, 128, 32),
        *(_square(B, 1, 32, 128, "decode") for B in (1, 64, 256)),
        _square(1, 256, 4, 64, "host"),
    ],
    "cpu": [*(_square(1, T, 8, 64) for T in (512, 4096, 16384)), _square(1, 1, 8, 64, "decode")],
}
GATES = ("none", "g", "g_gamma", "normalize")


def parse(name: str) -> Shape | None:
    """The shape of that name, listed or not; None for what is no name. Of packed shapes only the listed one has one."""
    heads, width = r"_H(?P<H>\d+)(_HV(?P<HV>\d+))?", r"_(D(?P<D>\d+)|K(?P<K>\d+)_V(?P<V>\d+))"
    pattern = rf"(?P<kind>host_|decode_)?B(?P<B>\d+)(_T(?P<T>\d+))?{heads}{width}"
    found = re.fullmatch(pattern, name)
    if found is None or (found["kind"] == "decode_") == bool(found["T"]):
        return None
    B, T, H, K, V, HV = (int(found[a] or found[b] or 1) for a, b in ("BB", "TT", "HH", "KD", "VD", ("HV", "H")))
    return Shape(B, T, H, K, V, HV, (found["kind"] or "sequence_")[:-1])


@dataclass
class Inputs:
    """Arguments as in `torch_la.linear_attention`. q, k, v and g want gradients; g_gamma is fixed, as in RetNet."""

    shape: Shape
    gate: str
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    g: Tensor | None = None
    g_gamma: Tensor | None = None
    cu_seqlens: Tensor | None = None
    state: Tensor | None = None  # for decode

    @property
    def normalize(self) -> bool:
        return self.gate == "normalize"

    def decay(self) -> Tensor:
        """g, or g_gamma at every token."""
        if self.g_gamma is None:
            return torch.zeros_like(self.v[..., 0], dtype=torch.float32) if self.g is None else self.g.detach()
        return self.g_gamma.expand(self.v.shape[:3]).contiguous()


@dataclass
class Call:
    run: Callable[[], Tensor]  # the forward
    leaves: list[Tensor]  # what gets gradients
    do: Tensor  # the gradient of what `run` returns
    head_first: bool = False  # [B, H, T, V] instead of [B, T, H, V]


def make(shape: Shape, gate: str, device: str, dtype: torch.dtype) -> Inputs:
    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    B, T, HV = shape.B, shape.T, shape.HV
    q, k = draw(B, T, shape.H, shape.K), draw(B, T, shape.H, shape.K)
    x = Inputs(shape, gate, q, k, draw(B, T, HV, shape.V), draw(B, T, HV, shape.V))
    if gate == "normalize":  # the weights must be positive
        x.q, x.k = q.abs(), k.abs()
    if gate == "g":
        x.g = torch.nn.functional.logsigmoid(torch.randn(B, T, HV, device=device)) / 16
    if gate == "g_gamma":
        x.g_gamma = -torch.rand(HV, device=device) / 16
    if shape.lengths:
        x.cu_seqlens = torch.tensor([0, *shape.lengths], device=device).cumsum(0).to(torch.int32)
    if shape.kind == "decode":
        x.state = torch.rand(B, HV, shape.K, shape.V + x.normalize, device=device)
        return x
    for leaf in (x.q, x.k, x.v, *(() if x.g is None else (x.g,))):
        leaf.requires_grad_()
    return x


def floors(x: Inputs) -> dict[str, tuple[int, int]]:
    """For each mode the bytes that must move, and the FLOPs of the chunked form.

    forward: q, k, v and the decay are read, o is written. backward: they and do are read, their gradients written; with
    the normaliser o is read too. decode: the state is read and written.
    """
    if x.state is not None:
        tensors = (x.q, x.k, x.v, x.do, x.g, x.g_gamma, x.state, x.state)
        return dict.fromkeys(x.shape.modes, (sum(t.nbytes for t in tensors if t is not None), 4 * x.state.numel()))
    # device: the count is the same on every one, and on the CPU no launcher is asked
    options: dict[str, Any] = {"cu_seqlens": x.cu_seqlens, "normalize": x.normalize, "op": "chunk", "device": "cpu"}
    plan = explanation.explain(x.q, x.k, x.v, x.g, x.g_gamma, **options)
    f, b = plan.forward, plan.backward
    return {"forward": (f.floor, f.flops), "forward+backward": (f.floor + b.floor, f.flops + b.flops)}


def _leaves(x: Inputs) -> list[Tensor]:
    return [t for t in (x.q, x.k, x.v, x.g) if t is not None and t.requires_grad]


def _head_first(x: Inputs, *others: Tensor) -> tuple[list[Tensor], Tensor]:
    """q, k, v and others as [B, H, T, ...] leaves, and do."""
    if x.shape.lengths or x.shape.kind == "decode":
        raise Unsupported("no packed sequences" if x.shape.lengths else "no decode step")
    if x.shape.H != x.shape.HV:
        raise Unsupported("no grouped heads")
    leaves = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in (x.q, x.k, x.v, *others)]
    return leaves, x.do.transpose(1, 2).contiguous()


# ------------------------------------------------------------------------------------------------------- this library

OPS = ("chunk", "fused_chunk", "recurrent")


def picked(x: Inputs) -> str:
    """The operator that `linear_attention` calls."""
    if x.shape.kind == "decode":
        return "recurrent_step"
    operator = functions.select(x.q, x.v, None, x.cu_seqlens)
    return next(name for name in OPS if getattr(ops, name).operator is operator)


def ours(name: str, x: Inputs) -> Call:
    if x.state is not None:
        q, k, v, g = x.q[:, 0], x.k[:, 0], x.v[:, 0], None if x.g is None else x.g[:, 0]
        step, state, gamma = functions.recurrent_step, x.state, x.g_gamma
        return Call(lambda: step(q, k, v, state, g, gamma, normalize=x.normalize).unsqueeze(1), [], x.do)
    op = functions.linear_attention if name == picked(x) else getattr(functions, name)
    options: dict[str, Any] = {"cu_seqlens": x.cu_seqlens, "normalize": x.normalize}
    return Call(lambda: op(x.q, x.k, x.v, x.g, x.g_gamma, **options)[0], _leaves(x), x.do)


# -------------------------------------------------------------------------------------------------------------- peers


def _fla(name: str) -> Callable[[Inputs], Call]:
    """flash-linear-attention. With the normaliser its linear_attn functions, else simple_gla, which has the gates."""

    def build(x: Inputs) -> Call:
        if x.shape.H != x.shape.HV:
            raise Unsupported("no grouped heads")
        options: dict[str, Any] = {} if x.cu_seqlens is None else {"cu_seqlens": x.cu_seqlens.long()}
        if x.state is not None:
            if name != "fused_recurrent" or x.normalize:
                raise Unsupported("no decode step")
            options = {"initial_state": x.state, "output_final_state": True}
        if x.normalize:
            linear = getattr(importlib.import_module("fla.ops.linear_attn"), f"{name}_linear_attn")
            return Call(lambda: linear(x.q, x.k, x.v, normalize=True, **options)[0], _leaves(x), x.do)
        simple = getattr(importlib.import_module("fla.ops.simple_gla"), f"{name}_simple_gla")
        return Call(lambda: simple(x.q, x.k, x.v, g=x.g, g_gamma=x.g_gamma, **options)[0], _leaves(x), x.do)

    return build


def _mamba(x: Inputs) -> Call:
    """Mamba-2's SSD: C = scale q, B = k, x = v / dt, exp(dt A) = exp(g), with dt = 1 where nothing varies by token."""
    if x.normalize:
        raise Unsupported("no normaliser")
    A = torch.zeros(x.shape.HV, device=x.q.device) if x.g_gamma is None else x.g_gamma
    dt = torch.ones(x.v.shape[:3], device=x.q.device)
    if x.g is not None:
        A, dt = -torch.ones_like(A), -x.g.detach()
    C, v = x.q.detach() * x.shape.K**-0.5, (x.v.detach() / dt.unsqueeze(-1)).to(x.v.dtype)
    if x.state is not None:
        step = importlib.import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
        state = x.state.mT.contiguous()  # [B, HV, V, K]
        wide = dt[:, 0].unsqueeze(-1).expand(-1, -1, x.shape.V)
        A = A.view(-1, 1, 1).expand(-1, x.shape.V, x.shape.K)
        none = torch.zeros_like(A[:, :1, :1]).squeeze(2).expand(-1, x.shape.V)  # for D and dt_bias: 2.3 needs them
        options = {"D": none, "dt_bias": none}
        return Call(lambda: step(state, v[:, 0], wide, A, x.k[:, 0], C[:, 0], **options).unsqueeze(1), [], x.do)
    sequence = None
    if x.shape.lengths:
        lengths = torch.tensor(x.shape.lengths, device=v.device)
        index = torch.arange(len(lengths), dtype=torch.int32, device=v.device)
        sequence = index.repeat_interleave(lengths).unsqueeze(0)
    leaves = [C.requires_grad_(), x.k, v.requires_grad_(), *([] if x.g is None else [dt.requires_grad_()])]
    ssd = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    return Call(lambda: ssd(v, dt, A, x.k, C, chunk_size=256, seq_idx=sequence), leaves, x.do)


def _mlstm(x: Inputs) -> Call:
    """mLSTM with sigmoid gates: an input gate that is open, a forget gate of logsigmoid(f) = g."""
    if x.normalize:
        raise Unsupported("another normaliser")
    g = x.decay()
    f = torch.where(g < 0, g - (-torch.expm1(g)).log(), 20.0)
    (q, k, v, f), do = _head_first(x, f.to(x.q.dtype))
    i = torch.full_like(f, 20.0)  # sigmoid is 1
    op = importlib.import_module(
        "mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging"
    ).mlstm_siging_chunkwise__xl_chunk
    return Call(lambda: op(q, k, v, i, f, normalize=False), [q, k, v, f], do, True)


def _helion(x: Inputs) -> Call:
    """The example of Helion, which is in its repository and not in its package: PYTHONPATH names a checkout."""
    if x.normalize:
        raise Unsupported("no normaliser")
    engine = importlib.import_module("examples.linear.linear_attention_engine")
    names = {"none": "VANILLA", "g": "SIMPLE_GLA", "g_gamma": "RETENTION"}
    op = engine.get_helion_fwd_kernel(getattr(engine.LinearAttentionVariant, names[x.gate]))
    (q, k, v, g), do = _head_first(x, x.decay())
    if x.g is None:
        g = g.detach()
    leaves = [q, k, v] if x.g is None else [q, k, v, g]
    return Call(lambda: op(q, k, v, g, C=64, scale=x.shape.K**-0.5), leaves, do, True)


def _softmax(x: Inputs) -> Call:
    if x.gate != "none":
        raise Unsupported("no decay, and always normalised")
    if x.shape.T > 32768:
        raise Unsupported("quadratic in T")
    (q, k, v), do = _head_first(x)
    attend = torch.nn.functional.scaled_dot_product_attention
    return Call(lambda: attend(q, k, v, is_causal=True), [q, k, v], do, True)


def naive_form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The chunked form over the whole sequence at once, as one writes it first."""
    B, T, H, K = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B, H, T // 64, 64, -1) for x in (q * K**-0.5, k, v))
    local = k.mT @ v
    before = local.cumsum(2) - local
    return ((q @ k.mT).tril() @ v + q @ before).reshape(B, H, T, -1).transpose(1, 2)


def _naive(compiled: bool) -> Callable[[Inputs], Call]:
    def build(x: Inputs) -> Call:
        if x.gate != "none":
            raise Unsupported("no gates")
        if x.shape.lengths or x.shape.H != x.shape.HV or x.shape.T % 64:
            raise Unsupported("no packed sequences, grouped heads, or chunks that are not whole")
        form: Callable[..., Tensor] = torch.compile(naive_form, dynamic=False) if compiled else naive_form
        return Call(lambda: form(x.q, x.k, x.v), _leaves(x), x.do)

    return build


# name: (what must import, the builder)
PEERS: dict[str, tuple[str, Callable[[Inputs], Call]]] = {
    "fla_chunk": ("fla.ops.simple_gla", _fla("chunk")),
    "fla_fused_chunk": ("fla.ops.simple_gla", _fla("fused_chunk")),
    "fla_recurrent": ("fla.ops.simple_gla", _fla("fused_recurrent")),
    "mamba2": ("mamba_ssm.ops.triton.ssd_combined", _mamba),
    "mlstm": ("mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging", _mlstm),
    "helion": ("examples.linear.linear_attention_engine", _helion),
    "softmax": ("torch", _softmax),
    "naive": ("torch", _naive(False)),
    "naive_compiled": ("torch", _naive(True)),
}


def difference(call: Call, right: Tensor) -> float:
    """Relative error of the forward, in the norm, against a right result [B, T, HV, V]."""
    with torch.no_grad():
        o = call.run()
        o = (o.transpose(1, 2) if call.head_first else o).float()
        error = float((o - right.float()).norm() / right.float().norm())
    return error if math.isfinite(error) else math.inf

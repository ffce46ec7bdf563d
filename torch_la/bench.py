"""`python -m torch_la bench`: this library and its peers, in one process and one run.

For every shape and kind of gate it times the forward, and the forward with its backward, of each provider that
imports: the operators of this library, flash-linear-attention, Mamba-2's SSD, softmax attention, and the chunked form
in plain PyTorch, eager and compiled. It prints a line for each: median milliseconds, times the memory floor, peak extra
memory, and the first call, which compiles and tunes. Times on shared machines are noisy: compare within one run, as
ratios.

The floor is the time that the bytes which must move take at the copy bandwidth measured in the same run. Forward: q, k,
v and the gates are read, o is written. With the backward: q, k, v, the gates and do are read again, and dq, dk, dv and
the gradients of the gates written.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import functions

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    K: int
    V: int
    HV: int
    lengths: tuple[int, ...] | None = None  # of packed sequences; then B = 1

    def __str__(self) -> str:
        heads = f"H{self.H}" if self.H == self.HV else f"H{self.H}/{self.HV}"
        width = f"D{self.K}" if self.K == self.V else f"K{self.K} V{self.V}"
        packed = f" in {len(self.lengths)} sequences" if self.lengths else ""
        return f"B{self.B} T{self.T} {heads} {width}{packed}"


def _square(B: int, T: int, H: int, D: int) -> Shape:
    return Shape(B, T, H, D, D, H)


# 64 sequences of 64 to 8192 tokens in 65,536: 56 short ones, 8 long ones
_LENGTHS = tuple([64] * 28 + [512] * 28 + [8192, 8192, 8192, 8192, 6144, 4096, 4096, 2304])

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
        Shape(1, sum(_LENGTHS), 16, 128, 128, 16, _LENGTHS),
        Shape(8, 4096, 8, 128, 256, 8),
        Shape(8, 4096, 4, 128, 128, 32),
    ],
    "cpu": [_square(1, 512, 8, 64), _square(1, 4096, 8, 64), _square(1, 16384, 8, 64)],
}
GATES = ("none", "g", "gamma", "normalize")


@dataclass
class Inputs:
    shape: Shape
    gate: str
    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    g: Tensor | None
    g_gamma: Tensor | None
    cu_seqlens: Tensor | None

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.g) if x is not None]


def make(shape: Shape, gate: str, device: str, dtype: torch.dtype) -> Inputs:
    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    B, T = shape.B, shape.T
    q, k = draw(B, T, shape.H, shape.K), draw(B, T, shape.H, shape.K)
    if gate == "normalize":
        q, k = q.abs(), k.abs()
    g = g_gamma = cu = None
    if gate == "g":
        g = torch.nn.functional.logsigmoid(torch.randn(B, T, shape.HV, device=device)) / 16
    if gate == "gamma":
        g_gamma = -torch.rand(shape.HV, device=device) / 16
    if shape.lengths:
        cu = torch.tensor([0, *shape.lengths], device=device).cumsum(0).to(torch.int32)
    v, do = draw(B, T, shape.HV, shape.V), draw(B, T, shape.HV, shape.V)
    inputs = Inputs(shape, gate, q, k, v, do, g, g_gamma, cu)
    for x in inputs.leaves():
        x.requires_grad_()
    return inputs


# ------------------------------------------------------------------------------------------------------------ providers


def _ours(name: str) -> Callable[[Inputs], Run]:
    def build(x: Inputs) -> Run:
        op = getattr(functions, name)
        options = {"cu_seqlens": x.cu_seqlens, "normalize": x.gate == "normalize"}
        return lambda: op(x.q, x.k, x.v, x.g, x.g_gamma, **options)[0]

    return build


def _fla(name: str) -> Callable[[Inputs], Run | None]:
    """flash-linear-attention. With the normaliser its linear_attn functions, else simple_gla, which has the gates."""

    def build(x: Inputs) -> Run | None:
        if x.shape.H != x.shape.HV:
            return None  # no grouped heads
        if x.gate == "normalize":
            linear = getattr(importlib.import_module("fla.ops.linear_attn"), f"{name}_linear_attn")
            return lambda: linear(x.q, x.k, x.v, normalize=True, cu_seqlens=x.cu_seqlens)[0]
        simple = getattr(importlib.import_module("fla.ops.simple_gla"), f"{name}_simple_gla")
        return lambda: simple(x.q, x.k, x.v, g=x.g, g_gamma=x.g_gamma, cu_seqlens=x.cu_seqlens)[0]

    return build


def _mamba(x: Inputs) -> Run | None:
    """Mamba-2: q = C, k = B, v = dt x, g = dt A, with dt = 1 where nothing varies by token."""
    if x.gate == "normalize" or x.shape.lengths:
        return None
    ssd = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    A = torch.zeros(x.shape.HV, device=x.q.device) if x.g_gamma is None else x.g_gamma
    dt = torch.ones(x.v.shape[:3], device=x.q.device, dtype=x.q.dtype)
    if x.g is not None:  # a decay that varies by token comes in through dt; v would be divided by it beforehand
        A, dt = -torch.ones(x.shape.HV, device=x.q.device), (-x.g.detach()).to(x.q.dtype).requires_grad_()
    return lambda: ssd(x.v, dt, A, x.k, x.q, chunk_size=256)


def _sdpa(x: Inputs) -> Run | None:
    """Softmax attention: other mathematics, for scale."""
    if x.gate != "none" or x.shape.lengths or x.shape.H != x.shape.HV or x.shape.T > 32768:
        return None
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (y.transpose(1, 2) for y in (x.q, x.k, x.v))
    return lambda: attend(q, k, v, is_causal=True).transpose(1, 2)


def _naive_form(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The chunked form over the whole sequence at once, as one writes it first."""
    B, T, H, K = q.shape
    q, k, v = (x.transpose(1, 2).reshape(B, H, T // 64, 64, -1) for x in (q * K**-0.5, k, v))
    local = k.mT @ v
    before = local.cumsum(2) - local
    return ((q @ k.mT).tril() @ v + q @ before).reshape(B, H, T, -1).transpose(1, 2)


def _naive(form: Callable[..., Tensor]) -> Callable[[Inputs], Run | None]:
    def build(x: Inputs) -> Run | None:
        if x.gate != "none" or x.shape.lengths or x.shape.H != x.shape.HV or x.shape.T % 64 or x.shape.T > 32768:
            return None
        return lambda: form(x.q, x.k, x.v)

    return build


PROVIDERS: dict[str, Callable[[Inputs], Run | None]] = {
    "chunk": _ours("chunk"),
    "fused_chunk": _ours("fused_chunk"),
    "fla chunk": _fla("chunk"),
    "fla fused_chunk": _fla("fused_chunk"),
    "mamba2": _mamba,
    "softmax": _sdpa,
    "naive": _naive(_naive_form),
    "naive compiled": _naive(torch.compile(_naive_form, dynamic=False)),
}
OURS = ("chunk", "fused_chunk")


# ---------------------------------------------------------------------------------------------------------- measurement


def _median(run: Callable[[], Any], device: str, seconds: float) -> float:
    """Milliseconds."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=25, rep=int(seconds * 1000), return_mode="median"))
    run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2] * 1e3


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy, counting bytes read and bytes written."""
    x = torch.empty(1 << (31 if device == "cuda" else 27), dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() / (_median(lambda: y.copy_(x), device, 0.2) * 1e-3)


def floors(x: Inputs) -> tuple[int, int]:
    """Bytes that must move: forward, and forward with backward."""

    def size(*tensors: Tensor | None) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    inputs = size(x.q, x.k, x.v, x.g, x.g_gamma)
    forward = inputs + size(x.do)
    return forward, forward + inputs + size(x.do) + inputs


def measure(run: Run, x: Inputs, device: str, seconds: float) -> dict[str, float]:
    leaves = x.leaves()

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        run().backward(x.do)

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    both()
    synchronize()
    first = time.perf_counter() - start
    memory = 0.0
    if device == "cuda":
        for leaf in leaves:
            leaf.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        both()
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        forward = _median(run, device, seconds)
    return {"forward_ms": forward, "both_ms": _median(both, device, seconds), "memory_mib": memory, "first_s": first}


def records(
    shapes: list[Shape], gates: list[str], providers: list[str], device: str, dtype: torch.dtype, seconds: float
) -> Iterator[dict[str, Any]]:
    bandwidth = copy_bandwidth(device)
    for shape in shapes:
        for gate in gates:
            x = make(shape, gate, device, dtype)
            floor = [bytes_ / bandwidth * 1e3 for bytes_ in floors(x)]
            for provider in providers:
                record = {"shape": str(shape), "gate": gate, "provider": provider, "bandwidth": bandwidth}
                record |= {"floor_forward_ms": floor[0], "floor_both_ms": floor[1]}
                try:
                    run = PROVIDERS[provider](x)
                    if run is None:
                        continue
                    record |= measure(run, x, device, seconds)
                except ImportError:
                    continue
                except Exception as problem:  # a peer that refuses is a result too
                    record["error"] = str(problem).splitlines()[0][:200]
                yield record
            del x


def line(r: dict[str, Any]) -> str:
    start = f"{r['shape']:32s} {r['gate']:9s} {r['provider']:16s}"
    if "error" in r:
        return f"{start} {r['error'][:70]}"
    return (
        f"{start} {r['forward_ms']:9.3f} ({r['forward_ms'] / r['floor_forward_ms']:5.2f}) "
        f"{r['both_ms']:9.3f} ({r['both_ms'] / r['floor_both_ms']:5.2f}) {r['memory_mib']:8.0f} {r['first_s']:7.1f}"
    )


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Bars: forward with backward, in times of the memory floor. Shorter is better, 1 is the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    good = [r for r in results if "error" not in r and r["provider"] not in ("softmax", "naive", "naive compiled")]
    groups = list(dict.fromkeys((r["shape"], r["gate"]) for r in good))
    names = list(dict.fromkeys(r["provider"] for r in good))
    figure, axes = plt.subplots(figsize=(9, 0.9 + 0.16 * (len(names) + 1) * len(groups)))
    for j, name in enumerate(names):
        rows = [(groups.index((r["shape"], r["gate"])), r) for r in good if r["provider"] == name]
        axes.barh(
            [i + 0.8 * (j + 0.5) / len(names) - 0.4 for i, _ in rows],
            [r["both_ms"] / r["floor_both_ms"] for _, r in rows],
            height=0.8 / len(names),
            label=f"torch_la {name}" if name in OURS else name,
        )
    axes.set_yticks(range(len(groups)), [f"{shape}, {gate}" for shape, gate in groups], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("forward + backward, times the memory floor")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def versions(device: str) -> dict[str, str]:
    found = {"torch": torch.__version__, "python": platform.python_version(), "date": str(datetime.date.today())}
    for module in ("triton", "fla", "mamba_ssm"):
        try:
            found[module] = str(importlib.import_module(module).__version__)
        except (ImportError, AttributeError):
            continue
    found["device"] = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", action="append", default=[], help="only shapes whose name contains this")
    parser.add_argument("--gate", action="append", choices=GATES, help="default: all")
    parser.add_argument("--provider", action="append", choices=list(PROVIDERS), help="default: every one that imports")
    parser.add_argument("--seconds", type=float, default=0.2, help="of measuring, for each number")
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--plot", type=Path, help="draw the records here (extra: bench)")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    device = options.device
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shapes = [s for s in SHAPES[device] if not options.shape or any(name in str(s) for name in options.shape)]
    results = []
    head = "shape, gate, provider".ljust(59)
    print(f"{head} {'forward ms (floors)':>17s} {'with backward':>17s} {'MiB':>8s} {'first s':>7s}")
    chosen = options.provider or list(PROVIDERS)
    for record in records(shapes, options.gate or list(GATES), chosen, device, dtype, options.seconds):
        results.append(record)
        print(line(record), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(device), "results": results}, indent=1) + "\n")
    if options.plot:
        plot(results, options.plot)
    return 0 if results else 1

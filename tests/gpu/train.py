"""A 12-layer language model trained end to end: this library and flash-linear-attention in the same model.

    python tests/gpu/train.py --json docs/records/training.json [--steps 200] [--runs torch_la:eager fla:compiled ...]
    python tests/gpu/train.py --plot docs/records/training.json docs/_static/training.svg

93 million parameters: gated linear attention (qkv projection, a decay from the input, output norm and gate) and a
SwiGLU MLP, each after an RMSNorm; float32 weights under bfloat16 autocast, AdamW. Bytes are the tokens; the text is the
source of the Python standard library. Every run starts from the same weights and sees the same batches, so the loss
curves may differ by rounding alone.

Each run reports the median step, the first step (compilation, and for the peer its tuning), graph breaks, peak memory
and the loss at every step. `eager` comes first for each library, so that the kernels of either are compiled and tuned
by the time `compiled` starts.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_la
from torch_la.demo import standard_library

BYTES = 256
RUNS = ["torch_la:eager", "torch_la:compiled", "torch_la:cudagraphs", "fla:eager", "fla:compiled"]
CONFIGS = {
    "100M": {"layers": 12, "size": 768, "width": 128, "batch": 8, "length": 2048},
    "tiny": {"layers": 2, "size": 32, "width": 8, "batch": 2, "length": 64},  # to try every line on a CPU
}

# ---------------------------------------------------------------------------------------------------------------- model


class Attention(nn.Module):
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = q_t S_t, the output normalised and gated as in RetNet and GLA."""

    def __init__(self, op: Callable[..., Any], size: int, width: int) -> None:
        super().__init__()
        self.op, self.width = op, width
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.decay = nn.Linear(size, size // width)
        self.gate = nn.Linear(size, size, bias=False)
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.out = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.width)).unbind(-3)
        q, k = (F.normalize(F.silu(y), dim=-1).to(v.dtype) for y in (q, k))
        o = self.op(q, k, v, F.logsigmoid(self.decay(x).float()) / 16)
        return self.out(self.norm(o).flatten(-2) * F.silu(self.gate(x)))


class MLP(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        hidden = 8 * size // 3
        self.up, self.down = nn.Linear(size, 2 * hidden, bias=False), nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.up(x).chunk(2, -1)
        return self.down(x * F.silu(gate))


class Model(nn.Module):
    def __init__(self, op: Callable[..., Any], layers: int, size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, size)
        self.mixers = nn.ModuleList(Attention(op, size, width) for _ in range(layers))
        self.mlps = nn.ModuleList(MLP(size) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(size) for _ in range(2 * layers + 1))
        self.head = nn.Linear(size, BYTES, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                depth = math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(p, std=0.02 / depth)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss in bits per byte of `targets` [B, T] after `tokens` [B, T]."""
        x = self.embedding(tokens)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        logits = self.head(self.norms[-1](x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()) / math.log(2)


def operator(library: str, device: str) -> Callable[..., Tensor]:
    if library == "torch_la":
        return lambda q, k, v, g: torch_la.linear_attention(q, k, v, g, scale=1.0)[0]
    if device == "cpu":  # the peer has no CPU kernels: a stand-in, to try every line
        return lambda q, k, v, g: torch_la.reference.recurrent(q, k, v, g, scale=1.0)[0].to(v.dtype)
    from fla.ops.simple_gla import fused_chunk_simple_gla  # its chunk form refuses to train with a gate on Hopper

    return lambda q, k, v, g: fused_chunk_simple_gla(q, k, v, g=g, scale=1.0)[0]


# ------------------------------------------------------------------------------------------------------------- training


def batches(steps: int, batch: int, length: int, device: str) -> Callable[[int], tuple[Tensor, Tensor]]:
    data = torch.frombuffer(bytearray(standard_library()), dtype=torch.uint8).to(device)
    starts = torch.randint(len(data) - length - 1, (steps, batch), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    window = torch.arange(length + 1, device=device)

    def get(step: int) -> tuple[Tensor, Tensor]:
        rows = data[starts[step][:, None] + window].long()
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return get


def train(run: str, config: dict[str, int], steps: int, device: str) -> dict[str, Any]:
    library, how = run.split(":")
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    gc.collect()
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with torch.device(device):
        model = Model(operator(library, device), config["layers"], config["size"], config["width"])
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=cuda)
    get = batches(steps, config["batch"], config["length"], device)
    loss_of: Any = model
    if how != "eager":
        # the peer cannot be compiled in one graph
        mode = "reduce-overhead" if how == "cudagraphs" else None
        loss_of = torch.compile(model, fullgraph=library == "torch_la", mode=mode)

    losses, times = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min((step + 1) / 20, 0.1 + 0.9 * (1 - step / steps))
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(*get(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)

    steady = statistics.median(times[len(times) // 2 :])
    curve = torch.stack(losses).tolist()
    return {
        "run": run,
        "parameters": sum(p.numel() for p in parameters),
        "step_ms": steady * 1e3,
        "tokens_per_second": config["batch"] * config["length"] / steady,
        "first_step_s": times[0],
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "break_reasons": [str(reason).splitlines()[0][:200] for reason in counters["graph_break"]],
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        "final_loss": statistics.mean(curve[-10:]),
        "loss": [round(x, 4) for x in curve],
    }


def compare(results: list[dict[str, Any]]) -> float:
    """The largest distance between two loss curves, each averaged over windows of 10 steps."""
    curves = [[statistics.mean(r["loss"][i : i + 10]) for i in range(0, len(r["loss"]), 10)] for r in results]
    return max((max(column) - min(column) for column in zip(*curves, strict=True)), default=0.0)


def write(record: dict[str, Any], path: Path) -> None:
    """One line for each run."""
    head = json.dumps({**record, "results": None}, indent=1)
    rows = ",\n  ".join(json.dumps(r) for r in record["results"])
    path.write_text(head.replace('"results": null', f'"results": [\n  {rows}\n ]') + "\n")


def plot(record: dict[str, Any], path: Path) -> None:
    """Left: the loss curves, on top of each other. Right: milliseconds of a step."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "training"  # the same record draws the same file
    import matplotlib.pyplot as plt

    results = [r for r in record["results"] if "loss" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    for i, r in enumerate(results):  # thick ones below, thin ones on top: curves that coincide all stay visible
        left.plot(r["loss"], label=r["run"], linewidth=1.2 * (len(results) - i), alpha=0.8)
    left.set(xlabel="step", ylabel="loss, bits per byte")
    left.legend(fontsize=8)
    bars = right.barh([r["run"] for r in results], [r["step_ms"] for r in results], color="tab:gray")
    right.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    right.margins(x=0.15)
    right.invert_yaxis()
    right.set(xlabel="milliseconds of a training step")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--config", choices=CONFIGS, default="100M")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "SVG"), help="draw a record, and nothing else")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.plot[0].read_text()), options.plot[1])
        return
    config, device = CONFIGS[options.config], options.device
    torch.set_float32_matmul_precision("high")
    record: dict[str, Any] = {
        "what": "training of one model with either operator; loss in bits per byte",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "config": {**config, "steps": options.steps},
        "results": [],
    }
    for run in options.runs:
        start = time.perf_counter()
        try:
            found = train(run, config, options.steps, device)
        except Exception as problem:  # a peer that refuses is a result too
            found = {"run": run, "problem": f"{type(problem).__name__}: {str(problem)[:400]}"}
        found["took_s"] = time.perf_counter() - start
        record["results"].append(found)
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items() if k != "loss"}
        print("  ".join(f"{k}={v}" for k, v in shown.items()), flush=True)
        record["curves_apart"] = compare([r for r in record["results"] if "loss" in r])
        if options.json:
            write(record, options.json)
    print(f"loss curves apart by at most {record['curves_apart']:.4f} bits per byte")


if __name__ == "__main__":
    main()

"""Speed of Hugging Face models beside themselves: upstream, and with torch_la.integrations.transformers.

    python tests/gpu/integrations.py [--device cpu|cuda] [--json OUT] [--match SUBSTRING] [--repeats 9]

One module of each kind (lightning attention of MiniMax, the mixer of Mamba-2) and a small model around it, with random
weights: a prompt without gradients, a training step (forward and backward), one token with the cache; eager, and the
module compiled. Both sides run in turn in one process; a time is the best of the repeats. Before anything is timed the
outputs of both are compared. float32 on the CPU, bfloat16 on CUDA. On CUDA also the peak of memory beyond what was
allocated. Where upstream raises, or a side has no memory, the row has the problem and the other side's time.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from torch_la.integrations.transformers import accelerate

SIZES: dict[str, dict[str, int]] = {
    "cpu": {"width": 256, "layers": 2, "heads": 4, "batch": 1, "T": 2048},
    "cuda": {"width": 2048, "layers": 4, "heads": 16, "batch": 2, "T": 8192},
}
# Upstream's Mamba-2 without its CUDA kernels forms [batch, T, 256, heads, state] in float32: 128 GiB at the size above.
SHORTER = {("cuda", "mamba2"): {"T": 2048}}
LIMIT = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # how far the two may differ, in the Euclidean norm


def minimax(width: int, layers: int, heads: int, **_: int) -> tuple[nn.Module, str]:
    config = transformers.MiniMaxConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_local_experts=2,
        layer_types=["full_attention"] + ["linear_attention"] * (layers - 1),
    )
    return transformers.MiniMaxForCausalLM(config), "model.layers.1.self_attn"


def mamba2(width: int, layers: int, heads: int, **_: int) -> tuple[nn.Module, str]:
    config = transformers.Mamba2Config(
        vocab_size=512,
        hidden_size=width,
        num_hidden_layers=layers,
        num_heads=2 * width // 64,
        head_dim=64,
        n_groups=1,
        state_size=128,
    )
    return transformers.Mamba2ForCausalLM(config), "backbone.layers.0.mixer"


class Bench:
    def __init__(self, device: str, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.rows: list[dict[str, Any]] = []

    def once(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def extra(self, run: Callable[[], Any]) -> float | None:
        """MiB that one call allocates at most."""
        if self.device == "cpu":
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)

    def compare(self, what: str, upstream: Callable[[], Tensor], ours: Callable[[], Tensor]) -> None:
        """Times both, in turn. Each first runs once: that compiles, and gives the outputs to compare."""
        runs = {"upstream": upstream, "torch_la": ours}
        row: dict[str, Any] = {"what": what, "upstream_ms": None, "torch_la_ms": None, "ratio": None}
        outputs: dict[str, Tensor] = {}
        for name, run in list(runs.items()):
            try:
                row[f"first_{name}_s"] = round(self.once(run) / 1e3, 2)
                outputs[name] = run().detach().double()
            except Exception as problem:
                if name == "torch_la" and not isinstance(problem, torch.OutOfMemoryError):
                    raise
                text = f"{name}: {type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"
                row["problem"] = "; ".join([row["problem"], text] if "problem" in row else [text])
                row[f"first_{name}_s"] = None
                del runs[name]
            if name not in runs:  # here, where the exception no longer holds what was allocated
                self.forget()
        if len(runs) == 2:
            want, got = outputs["upstream"], outputs["torch_la"]
            error = ((got - want).norm() / want.norm()).item()
            if not error <= LIMIT[self.dtype]:
                raise AssertionError(f"{what}: outputs differ by {error:.1e} of their norm")
            row["difference"] = float(f"{error:.1e}")
            del want, got
        outputs.clear()
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repeats):
            for name, run in runs.items():
                times[name].append(self.once(run))
        best = {name: min(taken) for name, taken in times.items()}
        for name, run in runs.items():
            row[f"{name}_ms"] = round(best[name], 3)
            memory = self.extra(run)
            if memory is not None:
                row[f"extra_{name}_mib"] = memory
        if len(runs) == 2:
            row["ratio"] = round(best["upstream"] / best["torch_la"], 2)
        self.rows.append(row)
        shown = "   ".join(f"{ms:9.2f} ms {name} (first {row[f'first_{name}_s']} s)" for name, ms in best.items())
        rest = row.get("problem") or f"{row['ratio']:6.2f}x   difference {row['difference']:.0e}"
        print(f"{what:44s} {shown}   {rest}", flush=True)

    def forget(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def pair(
    build: Callable[..., tuple[nn.Module, str]], bench: Bench, size: dict[str, int]
) -> tuple[list[nn.Module], str]:
    """The same model twice, the second accelerated."""
    torch.manual_seed(0)
    upstream, path = build(**size)
    ours, _ = build(**size)
    ours.load_state_dict(upstream.state_dict())
    models = [m.to(bench.device, bench.dtype).eval() for m in (upstream, ours)]
    accelerate(models[1])
    return models, path


def module_passes(name: str, modules: list[nn.Module], bench: Bench, size: dict[str, int]) -> None:
    shape = (size["batch"], size["T"], size["width"])
    x = torch.randn(shape, device=bench.device, dtype=bench.dtype)

    def call(module: Callable[..., Any], x: Tensor) -> Tensor:
        out = module(x, None, None) if "minimax" in name else module(x)
        return out[0] if isinstance(out, tuple) else out

    def prompt(module: Callable[..., Any]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return call(module, x)

        return run

    def training(module: Callable[..., Any]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            leaf = x.detach().requires_grad_()
            call(module, leaf).float().square().mean().backward()
            assert leaf.grad is not None
            return leaf.grad

        return run

    for compiled in (False, True):
        pieces = [torch.compile(m, fullgraph=True) for m in modules] if compiled else modules
        how = "compiled" if compiled else "eager"
        bench.compare(f"{name} module, prompt, {how}", *(prompt(m) for m in pieces))
        bench.compare(f"{name} module, training step, {how}", *(training(m) for m in pieces))


def model_passes(name: str, models: list[nn.Module], bench: Bench, size: dict[str, int]) -> None:
    ids = torch.randint(0, 512, (size["batch"], size["T"]), device=bench.device)

    def prompt(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                return model(ids, use_cache=False).logits

        return run

    def training(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            model.zero_grad()
            logits = model(ids, use_cache=False).logits
            logits.float().square().mean().backward()
            return logits

        return run

    def token(model: nn.Module) -> Callable[[], Tensor]:
        """One more token each time, after a prompt of 64; a fresh cache for each comparison of outputs."""
        with torch.no_grad():
            out = model(ids[:, :64], use_cache=True)
        cache = {key: out[key] for key in ("past_key_values", "cache_params") if key in out}

        def run() -> Tensor:
            with torch.no_grad():
                return model(ids[:, 64:65], use_cache=True, **cache).logits

        return run

    bench.compare(f"{name} model, prompt", *map(prompt, models))
    bench.compare(f"{name} model, training step", *map(training, models))
    bench.compare(f"{name} model, one token", *map(token, models))


def write(record: dict[str, Any], path: Path | None) -> None:
    """After each part: a run that is stopped keeps what it has."""
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=SIZES)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--match", default="", help="only what has this in its name, such as minimax")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--machine", help="how the record names the machine")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.backends.cuda.matmul.allow_tf32 = True
    size = SIZES[options.device]
    if options.device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(options.device, options.repeats)
    record = {
        "what": "milliseconds, best of the repeats; ratio is upstream over torch_la",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": options.machine
        or (torch.cuda.get_device_name() if options.device == "cuda" else "x86 CPU, one thread"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "repeats": options.repeats,
        **size,
        "rows": bench.rows,
    }
    for build in (minimax, mamba2):
        if options.match not in build.__name__:
            continue
        shorter = SHORTER.get((options.device, build.__name__), {})
        name = " ".join([build.__name__, *(f"({key} {value})" for key, value in shorter.items())])
        models, path = pair(build, bench, size | shorter)
        module_passes(name, [m.get_submodule(path) for m in models], bench, size | shorter)
        write(record, options.json)
        model_passes(name, models, bench, size | shorter)
        write(record, options.json)
        del models
        bench.forget()
    if not options.json:
        print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

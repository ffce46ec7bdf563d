"""A small language model on linear attention, trained and then run token by token: `python -m torch_la demo`.

- `Attention`, `Model`: the model, about 70 lines, an example to copy from
- `train`: one compiled graph, without graph breaks or recompilations
- `generate`: one byte at a time through `recurrent_step`; the memory does not grow with the text
- `run`: all of it with its promises checked; returns an exit code

Bytes are the tokens, so any file is a text. By default the text is the Python standard library's own source.

    B batch   T time   H heads   K width of a head   D width of the model
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functions

BYTES = 256
BATCH, LENGTH = 16, 256  # sequences in a step, bytes in a sequence
LEARNING_RATE, WARMUP = 4e-3, 20
# The promises. The loss: on held-out text, as a part of the byte-frequency baseline. The logits: token by token against
# the parallel form, largest absolute difference; both compute in float32, in another order.
LOSS_PART = 0.6
LOGITS_TOLERANCE = 1e-3


# ---------------------------------------------------------------------------------------------------------------- model


class Attention(nn.Module):
    """Gated linear attention: S_t = exp(g_t) S_{t-1} + k_t v_t^T and o_t = q_t S_t, with g computed from the input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.gate = nn.Linear(width, heads)
        self.norm = nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width, bias=False)

    def inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [..., D] -> q, k, v [..., H, K] and the log-decay g [..., H]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        # Features of length 1 keep the state bounded. Divided by 16 the gate starts near 0: memory starts out long.
        return F.normalize(F.silu(q), dim=-1), F.normalize(F.silu(k), dim=-1), v, F.logsigmoid(self.gate(x)) / 16

    def forward(self, x: Tensor) -> Tensor:
        """All tokens at once: x [B, T, D]. For training."""
        q, k, v, g = self.inputs(x)
        o, _ = functions.chunk(q, k, v, g, scale=1.0)
        return self.out(self.norm(o).flatten(-2))

    def step(self, x: Tensor, state: Tensor) -> Tensor:
        """One token: x [B, D]. `state` [B, H, K, K] is all that is kept of those before, and is updated in place."""
        q, k, v, g = self.inputs(x)
        o = functions.recurrent_step(q, k, v, state, g, scale=1.0)
        return self.out(self.norm(o).flatten(-2))


class Model(nn.Module):
    """Embedding, then layers of attention and a short MLP, each after an RMSNorm, then the logits of the next byte."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.state_shape = (heads, width // heads, width // heads)
        self.embedding = nn.Embedding(BYTES, width)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, 256], in parallel over time."""
        return self._layers(tokens, list(self.attention))

    def step(self, tokens: Tensor, states: list[Tensor]) -> Tensor:
        """tokens [B] -> logits [B, 256], from the states alone."""

        def bound(attention: Any, state: Tensor) -> Callable[[Tensor], Tensor]:
            return lambda x: attention.step(x, state)

        return self._layers(tokens, [bound(*pair) for pair in zip(self.attention, states, strict=True)])

    def _layers(self, tokens: Tensor, mixers: list[Any]) -> Tensor:
        x = self.embedding(tokens)
        for i, (mix, mlp) in enumerate(zip(mixers, self.mlp, strict=True)):
            x = x + mix(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        logits: Tensor = self.head(self.norms[-1](x))
        return logits

    def states(self, batch: int, device: torch.device) -> list[Tensor]:
        """The memory of generation: one zero state for each layer, float32."""
        return [torch.zeros(batch, *self.state_shape, device=device) for _ in self.attention]


# ----------------------------------------------------------------------------------------------------------------- text


def standard_library() -> bytes:
    """The Python sources of the standard library without its tests, in the order of their paths."""
    root = Path(sysconfig.get_path("stdlib") or Path(os.__file__).parent)
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    files = sorted(path for path in root.rglob("*.py") if not left_out.intersection(path.relative_to(root).parts))
    return b"".join(path.read_bytes() for path in files)


def split(text: bytes) -> tuple[Tensor, Tensor]:
    """The text as uint8 tensors: the first 95% to learn from, the rest held out."""
    shortest = 20 * (LENGTH + 1)
    if len(text) < shortest:
        raise ValueError(f"the text is too short to learn from: {len(text)} bytes, at least {shortest} are needed")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    cut = len(text) * 19 // 20
    return data[:cut], data[cut:]


def windows(data: Tensor, starts: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """LENGTH bytes from each start, and the byte that follows each of them: two [B, T] tensors."""
    tokens = data[starts[:, None] + torch.arange(LENGTH + 1)].to(device, torch.int64)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def baseline(train: Tensor, held_out: Tensor) -> float:
    """Bits per held-out byte for a model that knows only how often each byte occurs."""
    counts = torch.bincount(train, minlength=BYTES).double() + 1
    return -(counts / counts.sum()).log2()[held_out.long()].mean().item()


# ------------------------------------------------------------------------------------------------------------- training


def backend(device: torch.device) -> str:
    """inductor where it can build: on a CPU it needs a C++ compiler and Python's headers, on CUDA Triton."""
    if device.type == "cuda":
        from importlib.util import find_spec

        return "inductor" if find_spec("triton") else "aot_eager"
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return "inductor" if shutil.which(compiler) and headers.exists() else "aot_eager"


def compiled_graphs() -> tuple[int, int]:
    """How many graphs torch.compile has made in this process, and how many breaks it met."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def train(
    model: Model, data: Tensor, steps: int, seconds: float, backend: str, seed: int, progress: Any
) -> tuple[int, int, int]:
    """Returns the number of graphs the first step made, the graph breaks, and the recompilations of later steps."""
    device = model.head.weight.device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)

    @torch.compile(fullgraph=True, backend=backend)
    def loss_of(tokens: Tensor, following: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), following.flatten())

    graphs, breaks = compiled_graphs()
    first, start = graphs, time.perf_counter()
    for step in range(steps):
        done = max(step / steps, (time.perf_counter() - start) / seconds)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 - 0.95 * done)
        starts = torch.randint(len(data) - LENGTH, (BATCH,), generator=generator)
        loss = loss_of(*windows(data, starts, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            first = compiled_graphs()[0]
        progress.set_postfix_str(f"{loss.item() / math.log(2):.2f} bits per byte")
        progress.update()
    now, broken = compiled_graphs()
    return first - graphs, broken - breaks, now - first


@torch.no_grad()
def bits_per_byte(model: Model, data: Tensor) -> float:
    """The loss on windows spread evenly over the data."""
    starts = torch.linspace(0, len(data) - LENGTH - 1, 8 * BATCH).long()
    total = 0.0
    for part in starts.split(BATCH):
        tokens, following = windows(data, part, model.head.weight.device)
        total += F.cross_entropy(model(tokens).flatten(0, 1), following.flatten()).item()
    return total * BATCH / len(starts) / math.log(2)


# ----------------------------------------------------------------------------------------------------------- generation


@torch.inference_mode()
def generate(model: Model, prompt: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Reads the prompt [P], then writes `count` bytes. Returns all bytes, the logits after each, and the states.

    What the model remembers is the states, allocated once. The bytes and logits are kept for the check that follows.
    """
    device = model.head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.cat([prompt.to(device, torch.int64), torch.zeros(count, dtype=torch.int64, device=device)])
    logits = torch.empty(len(tokens), BYTES, device=device)
    states = model.states(1, device)
    for t in range(len(tokens)):
        if t >= len(prompt):
            tokens[t] = torch.multinomial((logits[t - 1] / 0.8).softmax(-1), 1, generator=generator)[0]
        logits[t] = model.step(tokens[t : t + 1], states)[0]
    return tokens, logits, states


@torch.inference_mode()
def largest_difference(model: Model, tokens: Tensor, logits: Tensor) -> float:
    """Between the logits made token by token and those of the parallel form over the whole text."""
    return (model(tokens[None])[0] - logits).abs().max().item()


# -------------------------------------------------------------------------------------------------------------- command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, help="a file to learn from (default: the standard library's sources)")
    parser.add_argument("--steps", type=int, default=400, help="training steps (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop training after so long (default: never)")
    parser.add_argument("--bytes", type=int, default=400, help="bytes to generate (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--backend", help="of torch.compile (default: inductor where it can build, else aot_eager)")
    parser.add_argument("--seed", type=int, default=0)


def printable(text: bytes) -> str:
    """The text as the terminal can show it."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text.decode(errors="replace"))
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "replace").decode(encoding)


def run(options: argparse.Namespace) -> int:
    """Trains, generates and checks. 0: every promise held; 1: one did not; 2: it could not start."""
    try:
        from tqdm import tqdm
    except ImportError:
        print("the demo needs tqdm for its progress bar: pip install tqdm, or torch-la[demo]", file=sys.stderr)
        return 2
    try:
        text = options.text.read_bytes() if options.text else standard_library()
        data, held_out = split(text)
    except (OSError, ValueError) as error:
        print(f"cannot use {options.text or 'the standard library'}: {error}", file=sys.stderr)
        return 2
    if options.steps < 1 or options.bytes < 1 or options.seconds <= 0:
        print("--steps, --bytes and --seconds must be above 0", file=sys.stderr)
        return 2

    torch.manual_seed(options.seed)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = Model().to(device)
    how = options.backend or backend(device)
    known = baseline(data, held_out)
    print(f"text: {len(text):,} bytes of {options.text or 'the Python standard library'}, 5% of them held out")
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters on {device}, torch.compile({how})")
    print(f"baseline, byte frequencies: {known:.2f} bits per held-out byte")
    print(f"promise, after training: below {LOSS_PART * known:.2f}", flush=True)

    failures = []

    def promise(kept: bool, line: str) -> None:
        print(("kept:   " if kept else "BROKEN: ") + line, flush=True)
        if not kept:
            failures.append(line)

    start = time.perf_counter()
    with tqdm(total=options.steps, unit="step") as progress:
        graphs, breaks, again = train(model, data, options.steps, options.seconds, how, options.seed, progress)
    print(f"trained in {time.perf_counter() - start:.0f} s, compilation included")
    promise((graphs, breaks, again) == (1, 0, 0), f"{graphs} graph, {breaks} graph breaks, {again} recompilations")
    loss = bits_per_byte(model, held_out)
    promise(loss < LOSS_PART * known, f"{loss:.2f} bits per held-out byte, baseline {known:.2f}")

    start = time.perf_counter()
    prompt = held_out[:64]
    tokens, logits, states = generate(model, prompt, options.bytes, options.seed)
    rate = len(tokens) / (time.perf_counter() - start)
    size = sum(state.numel() * state.element_size() for state in states)
    print(f"\n{printable(bytes(tokens.tolist()))}\n")
    print(
        f"read {len(prompt)} bytes, wrote {options.bytes}, {rate:.0f} per second, memory {size // 1024} KiB throughout"
    )
    difference = largest_difference(model, tokens, logits)
    promise(
        difference < LOGITS_TOLERANCE,
        f"logits token by token equal the parallel form's within {difference:.1e} (allowed: {LOGITS_TOLERANCE:.0e})",
    )
    return 1 if failures else 0

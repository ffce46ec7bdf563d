"""A compiled layer meets many shapes: how often it is compiled, and that it stays right.

`test_compile.py` has the operators by themselves; here a layer with its projections, as a model has it.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch._dynamo.testing import CompileCounterWithBackend

import torch_la
from cases import NAMES, OPERATORS, close, norm
from torch_la.compat import fla, mamba
from torch_la.generation import StateCache

pytestmark = pytest.mark.usefixtures("fresh_compiler")
FUNCTIONS = {**OPERATORS, "linear_attention": torch_la.linear_attention}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
HEADS, WIDTH = 3, 4


class Layer(nn.Module):
    def __init__(self, op: Callable[..., Any]) -> None:
        super().__init__()
        self.op, size = op, HEADS * WIDTH
        self.qkv, self.gate = nn.Linear(size, 3 * size), nn.Linear(size, HEADS)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).unbind(-3)
        g = -F.softplus(-self.gate(x))  # logsigmoid; the backward of PyTorch's own asks whether a size is 0
        o, S = self.op(q, k, v, g, cu_seqlens=cu_seqlens, output_final_state=True)
        return o.flatten(-2) * x, S


def dense(seed: int = 0) -> Iterator[tuple[Tensor, None]]:
    """20 batches of other sizes, none of them 1: that size is special to PyTorch."""
    draw = random.Random(seed)
    for _ in range(20):
        yield torch.randn(draw.randint(2, 7), draw.randint(2, 150), HEADS * WIDTH), None


def packed(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """20 packings: another number of tokens and of sequences each, some of them empty, some tokens in none."""
    draw = random.Random(seed)
    for i in range(20):
        T = draw.randint(20, 150)
        offsets = sorted(draw.randint(0, T) for _ in range(3 + i % 6))
        yield torch.randn(1, T, HEADS * WIDTH), torch.tensor(offsets)


def check(run: Callable[..., Any], layer: Layer, x: Tensor, cu_seqlens: Tensor | None) -> None:
    parameters = list(layer.parameters())
    results = []
    for function in (run, layer):
        outputs = function(x, cu_seqlens)
        results.append([*outputs, *torch.autograd.grad(sum(y.sin().sum() for y in outputs), parameters)])
    # The gate of a single token has a gradient of 0, and float32 leaves rounding of the others there.
    largest = max(norm(want) for want in results[1])
    for got, want in zip(*results, strict=True):
        assert got.shape == want.shape
        assert norm(got - want) <= 1e-5 * norm(want) + 1e-6 * largest


@pytest.mark.parametrize("batches", [dense, packed])
@every_function
def test_twenty_batches_compile_twice(name: str, batches: Callable[..., Any], device: str) -> None:
    """Once for the first shape, once with dynamic sizes. (Sizes that first change one after another each cost one.)"""
    layer = Layer(FUNCTIONS[name]).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(layer, fullgraph=True, backend=counter)
    for x, cu_seqlens in batches():
        check(run, layer, x.to(device), cu_seqlens if cu_seqlens is None else cu_seqlens.to(device))
    assert counter.frame_count == 2


@every_function
def test_one_graph_for_every_size(name: str, device: str) -> None:
    """Sizes marked as unbacked: the graph knows nothing of them, so 1 is a size like any other."""
    layer = Layer(FUNCTIONS[name]).to(device)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for i, (B, T) in enumerate([(2, 5), (1, 1), (3, 70), (1, 9), (2, 64), (5, 1)]):
        x = torch.randn(B, T, HEADS * WIDTH, device=device)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        torch._dynamo.decorators.mark_unbacked(x, 1)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            check(run, layer, x, None)


@every_function
def test_one_graph_for_every_packing(name: str, device: str) -> None:
    """One sequence, many, none; one token, many."""
    layer = Layer(FUNCTIONS[name]).to(device)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    packings = [(10, (0, 3, 10)), (5, (0, 5)), (1, (0, 0, 1)), (30, (0, 4, 4, 9, 30)), (4, (0,)), (70, (5, 69))]
    for i, (T, offsets) in enumerate(packings):
        x, cu_seqlens = torch.randn(1, T, HEADS * WIDTH, device=device), torch.tensor(offsets, device=device)
        torch._dynamo.decorators.mark_unbacked(x, 1)
        torch._dynamo.decorators.mark_unbacked(cu_seqlens, 0)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            check(run, layer, x, cu_seqlens)


@pytest.mark.parametrize("name", NAMES)
def test_sizes_that_the_data_tells(name: str, device: str) -> None:
    """Padding is dropped inside the graph: the number of tokens is known only when it runs."""
    layer = Layer(OPERATORS[name]).to(device)

    def drop(x: Tensor, keep: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x[keep][None], cu_seqlens)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = torch.compile(drop, fullgraph=True, backend="aot_eager")
        for i, lengths in enumerate([(3, 7), (8, 1), (5, 5)]):
            x = torch.randn(2, 8, HEADS * WIDTH, device=device)
            keep = torch.arange(8, device=device) < torch.tensor(lengths, device=device)[:, None]
            cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0))
            with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"), torch.no_grad():
                got = run(x, keep, cu_seqlens)
            for a, b in zip(got, drop(x, keep, cu_seqlens), strict=True):
                close(a, b, 1e-5)


@pytest.mark.parametrize("function", ["scan", "naive", "attend"])
def test_every_size_may_be_symbolic_around_the_operators(function: str) -> None:
    """The Python code of `compat` and of the caches checks sizes while Dynamo traces it."""

    def scan(x: Tensor, B: Tensor) -> Tensor:
        return mamba.mamba_chunk_scan_combined(x, x[..., 0].abs(), -x[0, 0, :, 0].abs(), B, B, 8)

    def naive(x: Tensor, _: Tensor) -> Tensor:
        return fla.naive_recurrent_linear_attn(x, x, x)[0]

    def attend(x: Tensor, _: Tensor) -> Tensor:
        return StateCache(2, x.shape[2], x.shape[3], x.shape[3]).attend(x, x, x)

    run = {"scan": scan, "naive": naive, "attend": attend}[function]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True if function != "attend" else None)
    torch.manual_seed(0)
    for H, P, N in ((4, 3, 5), (6, 7, 4)):
        inputs = torch.randn(2, 10, H, P), torch.randn(2, 10, 2, N)
        close(compiled(*inputs), run(*inputs), 1e-5)
    if function == "scan":
        with pytest.raises(Exception, match=r"(B must be|Observed exception)"):
            compiled(torch.randn(2, 10, 4, 3), torch.randn(2, 9, 2, 5))


@pytest.mark.parametrize("function", ["mask", "cache", "scan"])
def test_unbacked_lengths_around_the_operators(function: str) -> None:
    layer = torch_la.nn.LinearAttention(8, 2)
    x, mask, B = torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.long), torch.randn(2, 9, 2, 4)
    mask[0, :3] = 0
    cache = layer.make_cache(2)

    def run(x: Tensor, mask: Tensor, B: Tensor) -> Tensor:
        if function == "mask":
            return layer(x, mask)
        if function == "cache":
            return layer(x, cache=cache)
        heads = x.unflatten(-1, (2, 4))
        return mamba.mamba_chunk_scan_combined(heads, heads[..., 0].abs(), -torch.ones(2), B, B, 8)

    with torch.no_grad():
        want = run(x, mask, B)
        cache.reset()
        for y in (x, mask, B):
            mark_unbacked(y, 1)
        close(torch.compile(run, backend="aot_eager", fullgraph=True)(x, mask, B), want, 1e-5)

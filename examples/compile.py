"""Compile: forward and backward in one graph without breaks, for all lengths; and a step of generation."""

import torch
from torch._dynamo.utils import counters

import torch_la

torch.manual_seed(0)
layer = torch_la.nn.LinearAttention(32, 2, feature_map="relu", normalize=False, decay="data")
compiled = torch.compile(layer, fullgraph=True, dynamic=True)

for length in (40, 70, 23):
    x = torch.randn(2, length, 32)
    y, want = compiled(x), layer(x)
    gradients = [torch.autograd.grad(z.square().sum(), list(layer.parameters())) for z in (y, want)]
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
assert counters["stats"]["unique_graphs"] == 1
print("three lengths, one graph, forward and backward")

with torch.no_grad():
    caches = [layer.make_cache(slots=2) for _ in range(2)]
    for _ in range(4):
        x = torch.randn(2, 1, 32)
        torch.testing.assert_close(compiled(x, cache=caches[0]), layer(x, cache=caches[1]))
    torch.testing.assert_close(caches[0].state, caches[1].state)  # written in place, where it was
assert counters["stats"]["unique_graphs"] == 2
assert not counters["graph_break"]
print("four steps with a cache, one more graph, no breaks")

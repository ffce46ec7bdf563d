"""Export: a program for any length, saved to a file and loaded where there is no model."""

import tempfile
from pathlib import Path

import torch
from model import Model, text

torch.manual_seed(0)
model, data = Model(), text()
time = torch.export.Dim("time", min=2, max=4096)
program = torch.export.export(model, (data[None, :64],), dynamic_shapes=({1: time},))
operators = [node.target for node in program.graph.nodes if "la." in str(node.target)]
assert operators == [torch.ops.la.chunk.default] * 2  # one for each layer

with tempfile.TemporaryDirectory() as directory:
    file = Path(directory, "model.pt2")
    torch.export.save(program, file)
    loaded = torch.export.load(file).module()  # where torch_la is imported: it brings the operators
for length in (2, 9, 300):
    tokens = data[None, :length]
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=1e-4, atol=1e-4)
print(f"exported with {operators[0]}; loaded, and right for 2, 9 and 300 tokens")

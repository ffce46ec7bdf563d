"""Train: a model of linear attention learns to write a file, byte by byte."""

import torch
import torch.nn.functional as F
from model import Model, text

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model, data = Model().to(device), text().to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

losses = []
for _ in range(60):
    starts = torch.randint(len(data) - 65, (16, 1), device=device)
    tokens = data[starts + torch.arange(65, device=device)]  # [B, T + 1]
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

print(f"loss: {losses[0]:.2f} at first, {losses[-1]:.2f} after {len(losses)} steps")
assert losses[-1] < 0.4 * losses[0]

"""Pack: sequences of different lengths without padding, end to end in one row. The outputs are those of each alone."""

import torch
from model import Model, text

torch.manual_seed(0)
model, data = Model(), text()
sequences = [data[i : i + n] for i, n in enumerate((50, 3, 21, 90))]

# packed: [1, 164], and where each sequence starts
packed = torch.cat(sequences)[None]
cu_seqlens = torch.tensor([0, *(len(s) for s in sequences)]).cumsum(0)
together = model(packed, cu_seqlens=cu_seqlens)[0].split([len(s) for s in sequences])

# padded on the left: [4, 90], and a mask that keeps padding out of the state
longest = max(len(s) for s in sequences)
padded = torch.stack([torch.cat([s.new_zeros(longest - len(s)), s]) for s in sequences])
mask = torch.stack([torch.arange(longest) >= longest - len(s) for s in sequences])
rows = model(padded, attention_mask=mask)

for sequence, ours, row in zip(sequences, together, rows, strict=True):
    alone = model(sequence[None])[0]
    torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(row[-len(sequence) :], alone, rtol=1e-4, atol=1e-4)
print(f"{packed.numel()} tokens packed, {padded.numel()} padded; every sequence as it is alone")

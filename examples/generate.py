"""Generate from a cache of fixed size: prompts of any lengths, steps, a draft that is verified, a fork."""

import torch
from model import Model, text

import torch_la

torch.manual_seed(0)
model, data = Model(), text()


@torch.inference_mode()
def main() -> None:
    cache = torch_la.generation.Cache.of(model, slots=4, draft=4)
    size = cache.nbytes

    # Prefill two prompts of 40 and 7 tokens, packed, into slots 2 and 0.
    prompts = [data[:40], data[100:107]]
    slots = torch.tensor([2, 0])
    logits = model(torch.cat(prompts)[None], cache=cache, slots=slots, cu_seqlens=torch.tensor([0, 40, 47]))
    tokens = logits[0, [39, 46]].argmax(-1)

    # Ten steps of both, a token at a time.
    written = []
    for _ in range(10):
        written.append(tokens)
        tokens = model(tokens[:, None], cache=cache, slots=slots)[:, 0].argmax(-1)

    # A draft of four tokens: the next one, and three guesses. Here they come from the model itself, on a fork of both
    # sequences in slots 1 and 3; the last guess is spoilt.
    fork = torch.tensor([1, 3])
    cache.reorder(slots, targets=fork)
    draft = [tokens]
    for _ in range(3):
        draft.append(model(draft[-1][:, None], cache=cache, slots=fork)[:, 0].argmax(-1))
    draft[-1] = (draft[-1] + 1) % 256
    draft = torch.stack(draft, 1)  # [2, 4]

    # Read the draft at once, and keep it up to where the model would have gone on otherwise.
    logits = model(draft, cache=cache, slots=slots, verify=True)
    agrees = (logits[:, :-1].argmax(-1) == draft[:, 1:]).cumprod(1).sum(1)
    assert agrees.tolist() == [2, 2]
    cache.accept(1 + agrees, slots=slots)

    # One more token; the whole sequence of slot 2, read at once, says the same.
    last = model(data[:1].expand(2, 1), cache=cache, slots=slots)[:, 0]
    whole = torch.cat([prompts[0], torch.stack(written)[:, 0], draft[0, :3], data[:1]])
    torch.testing.assert_close(last[0], model(whole[None])[0, -1], rtol=1e-3, atol=1e-3)
    assert cache.nbytes == size
    print(f"{len(whole)} tokens from {size // 1024} KiB of states, as from the whole sequence")


main()

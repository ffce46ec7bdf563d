"""What linear attention promises whatever the numbers are: cutting, packing, flipping, linearity, causality, symmetry.

Both sides of each law run in the working precision of the device: float64 on the CPU, float32 on CUDA.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torch_la
from cases import NAMES, OPERATORS, Case, cases, close, norm

SMALL = [0, 1, 2, 5, 17, 64, 70, 130]
# (a - a for a gate of -inf is no number: the laws that shift or add up gates leave it out)
every_op = pytest.mark.parametrize("name", NAMES)


def working(device: str) -> tuple[torch.dtype, float]:
    return (torch.float64, 1e-10) if device == "cpu" else (torch.float32, 1e-4)


def draw(data: st.DataObject, device: str, **fixed: Any) -> tuple[Case, dict[str, Any], float]:
    dtype, limit = working(device)
    fixed = {"lengths": SMALL, "final": True, **fixed}
    case = data.draw(cases(device, dtype, **fixed))
    return case, case.arguments(device), limit


def part(arguments: dict[str, Any], tokens: slice) -> dict[str, Any]:
    """The same call on some of the tokens."""
    return {n: x[:, tokens] if n in ("q", "k", "v", "g") and x is not None else x for n, x in arguments.items()}


def alike(got: tuple[Tensor, Tensor | None], want: tuple[Tensor, Tensor | None], limit: float) -> None:
    for x, y in zip(got, want, strict=True):
        close(x, y, limit)


@every_op
@given(data=st.data())
def test_a_cut_sequence_resumed_is_the_whole(name: str, device: str, data: st.DataObject) -> None:
    case, arguments, limit = draw(data, device, packed=False)
    cut = data.draw(st.integers(0, case.T))
    op, first, second = OPERATORS[name], part(arguments, slice(cut)), part(arguments, slice(cut, None))
    want = op(**arguments)
    if case.reverse:
        o2, S = op(**second)
        o1, S = op(**{**first, "initial_state": S})
    else:
        o1, S = op(**first)
        o2, S = op(**{**second, "initial_state": S})
    alike((torch.cat([o1, o2], 1), S), want, limit)


@every_op
@given(data=st.data())
def test_packed_sequences_are_each_alone(name: str, device: str, data: st.DataObject) -> None:
    case, arguments, limit = draw(data, device, packed=True)
    op, cuts = OPERATORS[name], case.cu
    o, S = op(**arguments)
    assert cuts is not None
    for n, (start, end) in enumerate(pairwise(cuts)):
        alone = part(arguments, slice(start, end)) | {"cu_seqlens": None}
        if case.state:
            alone["initial_state"] = arguments["initial_state"][n : n + 1]
        alike((o[:, start:end], S[n : n + 1]), op(**alone), limit)
    assert norm(o[:, cuts[-1] :]) == 0


@every_op
@given(data=st.data())
def test_offsets_need_not_start_at_zero(name: str, device: str, data: st.DataObject) -> None:
    _, arguments, limit = draw(data, device, packed=True, T=70, lengths=[50])
    shifted = {**arguments, "cu_seqlens": arguments["cu_seqlens"] + 20}
    o, S = OPERATORS[name](**shifted)
    want = OPERATORS[name](**part(arguments, slice(20, None)))
    alike((o[:, 20:], S), want, limit)
    assert norm(o[:, :20]) == 0


@every_op
@given(data=st.data())
def test_reverse_is_flip_forward_flip(name: str, device: str, data: st.DataObject) -> None:
    _, arguments, limit = draw(data, device, packed=False, reverse=True)
    o, S = OPERATORS[name](**{**part(arguments, slice(None)), **_flipped(arguments), "reverse": False})
    alike(OPERATORS[name](**arguments), (o.flip(1), S), limit)


def _flipped(arguments: dict[str, Any]) -> dict[str, Any]:
    return {n: None if arguments[n] is None else arguments[n].flip(1) for n in ("q", "k", "v", "g")}


@every_op
@given(data=st.data())
def test_linear_in_v_and_its_state(name: str, device: str, data: st.DataObject) -> None:
    _, x, limit = draw(data, device, normalize=False)
    y = {**x, "v": torch.randn_like(x["v"])}
    both = {**x, "v": 2 * x["v"] - 3 * y["v"]}
    if x["initial_state"] is not None:
        y["initial_state"] = torch.randn_like(x["initial_state"])
        both["initial_state"] = 2 * x["initial_state"] - 3 * y["initial_state"]
    results = [OPERATORS[name](**arguments) for arguments in (x, y, both)]
    for a, b, c in zip(*results, strict=True):
        assert norm(2 * a - 3 * b - c) <= limit * (2 * norm(a) + 3 * norm(b))


@every_op
@given(data=st.data())
def test_linear_in_q(name: str, device: str, data: st.DataObject) -> None:
    _, x, limit = draw(data, device, normalize=False)
    other = torch.randn_like(x["q"])
    a, b, c = (OPERATORS[name](**{**x, "q": q})[0] for q in (x["q"], other, 2 * x["q"] - 3 * other))
    assert norm(2 * a - 3 * b - c) <= limit * (2 * norm(a) + 3 * norm(b))


@every_op
@given(data=st.data())
def test_no_token_sees_a_later_one(name: str, device: str, data: st.DataObject) -> None:
    case, x, limit = draw(data, device, packed=False)
    cut = data.draw(st.integers(0, case.T))
    unseen, seen = (slice(cut), slice(cut, None)) if case.reverse else (slice(cut, None), slice(cut))
    changed = {n: None if x[n] is None else x[n].clone() for n in ("q", "k", "v", "g")}
    for n, y in changed.items():
        if y is not None:
            y[:, unseen] = -1.5 if n == "g" else 1e3
    o, other = OPERATORS[name](**x)[0], OPERATORS[name](**{**x, **changed})[0]
    # Whether gates of a sequence are mild decides in which of two forms CUDA kernels walk it: later ones may change how
    # earlier outputs are rounded.
    if device == "cuda" and x["g"] is not None and name != "recurrent":
        assert norm(o[:, seen] - other[:, seen]) <= limit * norm(o[:, seen])
    else:
        assert torch.equal(o[:, seen], other[:, seen])


@every_op
@given(data=st.data())
def test_a_gate_of_zero_is_no_gate(name: str, device: str, data: st.DataObject) -> None:
    case, x, limit = draw(data, device, gates=["none"])
    want = OPERATORS[name](**x)
    alike(OPERATORS[name](**{**x, "g": torch.zeros(x["v"].shape[:3], device=device)}), want, limit)
    alike(OPERATORS[name](**{**x, "g_gamma": torch.zeros(case.HV, device=device)}), want, limit)


@every_op
@given(data=st.data())
def test_a_fixed_decay_is_the_same_gate_everywhere(name: str, device: str, data: st.DataObject) -> None:
    _, x, limit = draw(data, device, gates=["g_gamma"])
    gates = {"g_gamma": None, "g": x["g_gamma"].expand(x["v"].shape[:3])}
    alike(OPERATORS[name](**{**x, **gates}), OPERATORS[name](**x), limit)


@every_op
@given(data=st.data())
def test_normalised_output_scales_with_v(name: str, device: str, data: st.DataObject) -> None:
    _, x, limit = draw(data, device, normalize=True, state=False)
    o, S = OPERATORS[name](**x)
    scaled, S2 = OPERATORS[name](**{**x, "v": 3 * x["v"]})
    close(scaled, 3 * o, limit)
    close(S2[..., :-1], 3 * S[..., :-1], limit)
    close(S2[..., -1], S[..., -1], limit)


@every_op
@given(data=st.data(), factor=st.sampled_from([0.25, 3.0, 40.0]))
def test_normalised_output_ignores_the_size_of_k_and_scale(
    name: str, device: str, factor: float, data: st.DataObject
) -> None:
    case, x, _ = draw(data, device, normalize=True, state=False, gates=["none", "weak", "growing", "g_gamma"])
    # but for the 1e-10 beside the denominator
    limit = 1e-6 if device == "cpu" else 1e-4
    o = OPERATORS[name](**x)[0]
    close(OPERATORS[name](**{**x, "k": factor * x["k"]})[0], o, limit)
    close(OPERATORS[name](**{**x, "scale": factor * (case.scale or case.K**-0.5)})[0], o, limit)


@every_op
@given(data=st.data())
def test_batch_and_head_order_only_permutes(name: str, device: str, data: st.DataObject) -> None:
    case, x, limit = draw(data, device)
    random = torch.Generator().manual_seed(case.seed)
    heads = torch.randperm(case.H, generator=random)
    value_heads = (heads[:, None] * case.groups + torch.arange(case.groups)).flatten().to(device)
    rows = (torch.randperm(case.B, generator=random) if case.cu is None else torch.arange(1)).to(device)
    heads = heads.to(device)
    moved = dict(x)
    for n in ("q", "k", "v", "g"):
        if x[n] is not None:
            moved[n] = x[n][rows][:, :, heads if n in "qk" else value_heads]
    if x["g_gamma"] is not None:
        moved["g_gamma"] = x["g_gamma"][value_heads]
    if x["initial_state"] is not None:
        states = x["initial_state"] if case.cu is not None else x["initial_state"][rows]
        moved["initial_state"] = states[:, value_heads]
    o, S = OPERATORS[name](**x)
    S = S if case.cu is not None else S[rows]
    alike(OPERATORS[name](**moved), (o[rows][:, :, value_heads], S[:, value_heads]), limit)


@every_op
@given(data=st.data())
def test_the_same_call_twice_gives_the_same_bits(name: str, device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device, lengths=SMALL, final=True))
    x = case.arguments(device, grad=True)
    inputs = [y for y in x.values() if isinstance(y, Tensor) and y.requires_grad]
    runs = []
    for _ in range(2):
        outputs = OPERATORS[name](**x)
        runs.append([*outputs, *torch.autograd.grad(outputs, inputs, case.cotangents(*outputs))])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@given(data=st.data())
def test_linear_attention_is_one_of_the_operators(device: str, data: st.DataObject) -> None:
    _, x, limit = draw(data, device)
    alike(torch_la.linear_attention(**x), torch_la.chunk(**x), limit)


@pytest.mark.parametrize(
    ("shape", "chosen"),
    [
        ({"T": 4, "B": 64, "H": 4, "state": True}, {"cpu": "fused_chunk", "cuda": "recurrent"}),
        ({"T": 1, "B": 1, "H": 4, "state": True}, {"cpu": "chunk", "cuda": "recurrent"}),
        ({"T": 1, "B": 64, "H": 4}, "fused_chunk"),
        ({"T": 5, "B": 1, "H": 4, "state": True}, "chunk"),
        ({"T": 9, "B": 1, "H": 4}, "chunk"),
        ({"T": 9, "B": 64, "H": 2, "V": 1}, "fused_chunk"),
        ({"T": 9, "B": 127, "H": 1, "V": 64}, "chunk"),
        ({"T": 9, "B": 64, "H": 1, "V": 65}, "fused_chunk"),
        ({"T": 9, "B": 1, "H": 1, "cu": (0,) + (9,) * 127}, "chunk"),
        ({"T": 9, "B": 1, "H": 1, "cu": (0,) + (9,) * 128}, "fused_chunk"),
    ],
)
def test_linear_attention_chooses_by_the_documented_rule(
    shape: dict[str, Any], chosen: str | dict[str, str], device: str
) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "la":
                self.names.append(func._opname)
            return func(*args, **(kwargs or {}))

    arguments = Case(**{"state": False, "dtype": torch.float32, **shape}).arguments(device)
    with Seen() as seen:
        torch_la.linear_attention(**arguments)
    assert seen.names.pop() == (chosen if isinstance(chosen, str) else chosen[device])


@given(data=st.data())
def test_normalize_output_is_the_flag(device: str, data: st.DataObject) -> None:
    case, x, limit = draw(data, device, normalize=True)
    want, S = torch_la.chunk(**x)
    S0 = x["initial_state"]
    plain = {**x, "normalize": False, "initial_state": None if S0 is None else S0[..., :-1]}
    o, _ = torch_la.chunk(**plain)
    rest = {n: y for n, y in plain.items() if n not in ("v", "normalize", "initial_state")}
    z0 = None if S0 is None else S0[..., -1:]
    got, z = torch_la.normalize_output(o, **rest, initial_state=z0)
    close(got, want, limit)
    close(z, S[..., -1:], limit)
    assert torch_la.normalize_output(o, **{**rest, "output_final_state": False}, initial_state=z0)[1] is None
    assert case.normalize

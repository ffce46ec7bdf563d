"""Every message of the contract: what raises, with which words, in eager calls, by the dispatcher and while tracing.

The table is complete: a test compares it with the messages in the source of `torch_la.checks`.
"""

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_la
from cases import INPUTS, NAMES, OPERATORS, Case, norm
from torch_la import checks, decay, ops
from torch_la.ops import reference

# A right call: B = 2, T = 4, H = 2, HV = 4, K = 3, V = 5 in float32. Each mistake replaces some of its arguments.
SIZES = {"q": (2, 4, 2, 3), "k": (2, 4, 2, 3), "v": (2, 4, 4, 5)}
STEP_SIZES = {"q": (2, 2, 3), "k": (2, 2, 3), "v": (2, 4, 5), "state": (2, 4, 3, 5)}


def zeros(*shape: int, **options: Any) -> Callable[[], Tensor]:
    """Built when the call is, since that may be under a FakeTensorMode."""
    return lambda: torch.zeros(shape, **options)


def build(sizes: dict[str, tuple[int, ...]], changes: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
    out: dict[str, Any] = {n: zeros(*shape, device=device) for n, shape in sizes.items()} | changes
    return {n: x() if callable(x) else x for n, x in out.items()}


half, double, integer = torch.bfloat16, torch.float64, torch.int64
one_row = {n: zeros(1, *shape[1:]) for n, shape in SIZES.items()}
offsets = zeros(3, dtype=integer)

Mistake = tuple[dict[str, Any], type[Exception], str]
ATTENTION: list[Mistake] = [
    # number of dimensions
    ({"q": zeros(4, 2, 3)}, ValueError, "q must have 4 dimensions [B, T, H, K]: got q.shape=(4, 2, 3)"),
    ({"k": zeros(4, 2, 3)}, ValueError, "k must have 4 dimensions [B, T, H, K]: got k.shape=(4, 2, 3)"),
    ({"v": zeros(4)}, ValueError, "v must have 4 dimensions [B, T, HV, V]: got v.shape=(4,)"),
    ({"g": zeros(2, 4, 4, 1)}, ValueError, "g must have 3 dimensions [B, T, HV]: got g.shape=(2, 4, 4, 1)"),
    ({"g_gamma": zeros(1, 4)}, ValueError, "g_gamma must have 1 dimensions [HV]: got g_gamma.shape=(1, 4)"),
    (
        {"initial_state": zeros(4, 3, 5)},
        ValueError,
        "initial_state must have 4 dimensions [N, HV, K, V]: got initial_state.shape=(4, 3, 5)",
    ),
    (
        {"initial_state": zeros(4, 3, 6), "normalize": True},
        ValueError,
        "initial_state must have 4 dimensions [N, HV, K, V + 1]: got initial_state.shape=(4, 3, 6)",
    ),
    (
        {**one_row, "cu_seqlens": zeros(1, 3, dtype=integer)},
        ValueError,
        "cu_seqlens must have 1 dimensions [N + 1]: got cu_seqlens.shape=(1, 3)",
    ),
    # shapes
    ({"k": zeros(2, 4, 2, 4)}, ValueError, "k must be [B, T, H, K] = (2, 4, 2, 3): got k.shape=(2, 4, 2, 4)"),
    ({"k": zeros(2, 4, 4, 3)}, ValueError, "k must be [B, T, H, K] = (2, 4, 2, 3): got k.shape=(2, 4, 4, 3)"),
    ({"v": zeros(2, 5, 4, 5)}, ValueError, "v must be [B, T, HV, V] = (2, 4, 4, 5): got v.shape=(2, 5, 4, 5)"),
    ({"v": zeros(1, 4, 4, 5)}, ValueError, "v must be [B, T, HV, V] = (2, 4, 4, 5): got v.shape=(1, 4, 4, 5)"),
    ({"g": zeros(2, 4, 2)}, ValueError, "g must be [B, T, HV] = (2, 4, 4): got g.shape=(2, 4, 2)"),
    ({"g_gamma": zeros(2)}, ValueError, "g_gamma must be [HV] = (4,): got g_gamma.shape=(2,)"),
    (
        {"initial_state": zeros(2, 4, 5, 3)},
        ValueError,
        "initial_state must be [N, HV, K, V] = (2, 4, 3, 5): got initial_state.shape=(2, 4, 5, 3)",
    ),
    (
        {"initial_state": zeros(3, 4, 3, 5)},
        ValueError,
        "initial_state must be [N, HV, K, V] = (2, 4, 3, 5): got initial_state.shape=(3, 4, 3, 5)",
    ),
    (
        {**one_row, "initial_state": zeros(1, 4, 3, 5), "cu_seqlens": offsets},
        ValueError,
        "initial_state must be [N, HV, K, V] = (2, 4, 3, 5): got initial_state.shape=(1, 4, 3, 5)",
    ),
    (
        {"initial_state": zeros(2, 4, 3, 7), "normalize": True},
        ValueError,
        "initial_state must be [N, HV, K, V + 1] = (2, 4, 3, 6): got initial_state.shape=(2, 4, 3, 7)",
    ),
    (
        {"initial_state": zeros(2, 4, 3, 5), "normalize": True},
        ValueError,
        "initial_state lacks z: with normalize=True it has V + 1 = 6 columns, z the last: "
        "got initial_state.shape=(2, 4, 3, 5)",
    ),
    (
        {"initial_state": zeros(2, 4, 3, 6)},
        ValueError,
        "initial_state must be [N, HV, K, V] = (2, 4, 3, 5): got initial_state.shape=(2, 4, 3, 6)",
    ),
    # heads and widths
    (
        {"q": zeros(2, 4, 0, 3), "k": zeros(2, 4, 0, 3)},
        ValueError,
        "q must have at least one head: got q.shape=(2, 4, 0, 3)",
    ),
    ({"v": zeros(2, 4, 0, 5)}, ValueError, "v must have at least one head: got v.shape=(2, 4, 0, 5)"),
    (
        {"v": zeros(2, 4, 3, 5)},
        ValueError,
        "v must have a multiple of the heads of q: got v.shape=(2, 4, 3, 5), q.shape=(2, 4, 2, 3)",
    ),
    ({"q": zeros(2, 4, 2, 0), "k": zeros(2, 4, 2, 0)}, ValueError, "q has width 0: got q.shape=(2, 4, 2, 0)"),
    ({"v": zeros(2, 4, 4, 0)}, ValueError, "v has width 0: got v.shape=(2, 4, 4, 0)"),
    # dtypes
    (
        {n: zeros(*shape, dtype=integer) for n, shape in SIZES.items()},
        TypeError,
        "q must be float32, bfloat16, float16 or (on the CPU) float64: got q.dtype=torch.int64",
    ),
    ({"k": zeros(*SIZES["k"], dtype=half)}, TypeError, "k must be torch.float32 like q: got k.dtype=torch.bfloat16"),
    ({"v": zeros(*SIZES["v"], dtype=half)}, TypeError, "v must be torch.float32 like q: got v.dtype=torch.bfloat16"),
    ({"g": zeros(2, 4, 4, dtype=integer)}, TypeError, "g must have a floating-point dtype: got g.dtype=torch.int64"),
    (
        {"g_gamma": zeros(4, dtype=integer)},
        TypeError,
        "g_gamma must have a floating-point dtype: got g_gamma.dtype=torch.int64",
    ),
    (
        {"initial_state": zeros(2, 4, 3, 5, dtype=half)},
        TypeError,
        "initial_state must be torch.float32 (for torch.float32 inputs): got initial_state.dtype=torch.bfloat16",
    ),
    (
        {
            **{n: zeros(*shape, dtype=double) for n, shape in SIZES.items()},
            "initial_state": zeros(2, 4, 3, 5),
        },
        TypeError,
        "initial_state must be torch.float64 (for torch.float64 inputs): got initial_state.dtype=torch.float32",
    ),
    (
        {**one_row, "cu_seqlens": zeros(3)},
        TypeError,
        "cu_seqlens must be int32 or int64: got cu_seqlens.dtype=torch.float32",
    ),
    # combinations
    (
        {"g": zeros(2, 4, 4), "g_gamma": zeros(4)},
        ValueError,
        "g and g_gamma exclude each other: got g.shape=(2, 4, 4) and g_gamma.shape=(4,)",
    ),
    (
        {**one_row, "cu_seqlens": zeros(0, dtype=integer)},
        ValueError,
        "cu_seqlens must hold at least one offset: got cu_seqlens.shape=(0,)",
    ),
    (
        {"cu_seqlens": offsets},
        ValueError,
        "cu_seqlens packs the sequences into one batch row, so q must have B = 1: got tuple(q.shape)=(2, 4, 2, 3)",
    ),
]
# What only tensors on another device can get wrong. Fake ones need no such device.
DEVICES: list[Mistake] = [
    ({"k": zeros(*SIZES["k"])}, TypeError, "k must be on the device of q: got k.device=cpu, q.device=cuda:0"),
    ({"v": zeros(*SIZES["v"])}, TypeError, "v must be on the device of q: got v.device=cpu, q.device=cuda:0"),
    ({"g": zeros(2, 4, 4)}, TypeError, "g must be on the device of q: got g.device=cpu, q.device=cuda:0"),
    ({"g_gamma": zeros(4)}, TypeError, "g_gamma must be on the device of q: got g_gamma.device=cpu, q.device=cuda:0"),
    (
        {"initial_state": zeros(2, 4, 3, 5)},
        TypeError,
        "initial_state must be on the device of q: got initial_state.device=cpu, q.device=cuda:0",
    ),
    (
        {**{n: zeros(1, *s[1:], device="cuda") for n, s in SIZES.items()}, "cu_seqlens": offsets},
        TypeError,
        "cu_seqlens must be on the device of q: got cu_seqlens.device=cpu, q.device=cuda:0",
    ),
    (
        {n: zeros(2, 4, 2, 257, device="cuda") for n in "qk"},
        ValueError,
        "q may be at most 256 wide on CUDA: got q.shape=(2, 4, 2, 257)",
    ),
    (
        {"v": zeros(2, 4, 4, 257, device="cuda")},
        ValueError,
        "v may be at most 256 wide on CUDA: got v.shape=(2, 4, 4, 257)",
    ),
    (
        {n: zeros(*s, dtype=double, device="cuda") for n, s in SIZES.items()},
        TypeError,
        "q may be float64 only on the CPU: got q.dtype=torch.float64, q.device=cuda:0",
    ),
]
# Python types: the public functions say it; torch itself answers for torch.ops.
TYPES: list[Mistake] = [
    ({"q": 1.5}, TypeError, "q must be a torch.Tensor: got q=1.5 (float)"),
    ({"k": None}, TypeError, "k must be a torch.Tensor: got k=None (NoneType)"),
    ({"v": [1]}, TypeError, "v must be a torch.Tensor: got v=[1] (list)"),
    ({"q": None}, TypeError, "q must be a torch.Tensor: got q=None (NoneType)"),
    ({"g": 0.5}, TypeError, "g must be a torch.Tensor: got g=0.5 (float)"),
    ({"g_gamma": 2}, TypeError, "g_gamma must be a torch.Tensor: got g_gamma=2 (int)"),
    ({"initial_state": "zeros"}, TypeError, "initial_state must be a torch.Tensor: got initial_state='zeros' (str)"),
    ({"cu_seqlens": [0, 4]}, TypeError, "cu_seqlens must be a torch.Tensor: got cu_seqlens=[0, 4] (list)"),
    ({"scale": "auto"}, TypeError, "scale must be a number or None: got scale='auto' (str)"),
    ({"scale": True}, TypeError, "scale must be a number or None: got scale=True (bool)"),
    ({"normalize": 1}, TypeError, "normalize must be a bool: got normalize=1 (int)"),
    ({"reverse": None}, TypeError, "reverse must be a bool: got reverse=None (NoneType)"),
    ({"output_final_state": 0}, TypeError, "output_final_state must be a bool: got output_final_state=0 (int)"),
]
# What only the data tell. On CUDA nobody reads the offsets.
OFFSETS: list[Mistake] = [
    (
        {**one_row, "cu_seqlens": lambda values=values: torch.tensor(values)},
        ValueError,
        f"cu_seqlens must rise from 0 or more to at most T = 4: got cu_seqlens={values}",
    )
    for values in ([0, 5], [-1, 4], [0, 3, 2, 4], [4, 0])
]
# The backward operators' own arguments; the rest of their contract is that of the forward.
GRADIENTS: list[Mistake] = [
    ({"normalize": True}, ValueError, "o must be given exactly when normalize is set: got o=NoneType, normalize=True"),
    (
        {"o": zeros(2, 4, 4, 5)},
        ValueError,
        "o must be given exactly when normalize is set: got o=Tensor, normalize=False",
    ),
    ({"do": zeros(2, 4, 4)}, ValueError, "do must have 4 dimensions [B, T, HV, V]: got do.shape=(2, 4, 4)"),
    ({"do": zeros(2, 4, 4, 6)}, ValueError, "do must be [B, T, HV, V] = (2, 4, 4, 5): got do.shape=(2, 4, 4, 6)"),
    ({"do": zeros(2, 4, 4, 5, dtype=half)}, TypeError, "do must be torch.float32 like v: got do.dtype=torch.bfloat16"),
    (
        {"o": zeros(2, 4, 4, 5, dtype=half), "normalize": True},
        TypeError,
        "o must be torch.float32 like v: got o.dtype=torch.bfloat16",
    ),
    (
        {"dfinal_state": zeros(2, 4, 3, 4)},
        ValueError,
        "dfinal_state must be [N, HV, K, V] = (2, 4, 3, 5): got dfinal_state.shape=(2, 4, 3, 4)",
    ),
    (
        {"dfinal_state": zeros(2, 4, 3, 5), "o": zeros(2, 4, 4, 5), "normalize": True},
        ValueError,
        "dfinal_state lacks z: with normalize=True it has V + 1 = 6 columns, z the last: "
        "got dfinal_state.shape=(2, 4, 3, 5)",
    ),
]
STEP: list[Mistake] = [
    ({"q": zeros(2, 1, 2, 3)}, ValueError, "q must have 3 dimensions [B, H, K]: got q.shape=(2, 1, 2, 3)"),
    ({"k": zeros(2, 2, 4)}, ValueError, "k must be [B, H, K] = (2, 2, 3): got k.shape=(2, 2, 4)"),
    ({"v": zeros(2, 4)}, ValueError, "v must have 3 dimensions [B, HV, V]: got v.shape=(2, 4)"),
    ({"v": zeros(3, 4, 5)}, ValueError, "v must be [B, HV, V] = (2, 4, 5): got v.shape=(3, 4, 5)"),
    (
        {"v": zeros(2, 3, 5)},
        ValueError,
        "v must have a multiple of the heads of q: got v.shape=(2, 3, 5), q.shape=(2, 2, 3)",
    ),
    ({"v": zeros(2, 4, 5, dtype=half)}, TypeError, "v must be torch.float32 like q: got v.dtype=torch.bfloat16"),
    ({"g": zeros(2, 1, 4)}, ValueError, "g must have 2 dimensions [B, HV]: got g.shape=(2, 1, 4)"),
    ({"g": zeros(2, 2)}, ValueError, "g must be [B, HV] = (2, 4): got g.shape=(2, 2)"),
    ({"g_gamma": zeros(2)}, ValueError, "g_gamma must be [HV] = (4,): got g_gamma.shape=(2,)"),
    (
        {"g": zeros(2, 4), "g_gamma": zeros(4)},
        ValueError,
        "g and g_gamma exclude each other: got g.shape=(2, 4) and g_gamma.shape=(4,)",
    ),
    (
        {"state": zeros(4, 3, 5)},
        ValueError,
        "state must have 4 dimensions [B, HV, K, V]: got state.shape=(4, 3, 5)",
    ),
    (
        {"state": zeros(3, 4, 3, 5)},
        ValueError,
        "state must be [B, HV, K, V] = (2, 4, 3, 5): got state.shape=(3, 4, 3, 5)",
    ),
    (
        {"state": zeros(2, 4, 3, 5), "normalize": True},
        ValueError,
        "state lacks z: with normalize=True it has V + 1 = 6 columns, z the last: got state.shape=(2, 4, 3, 5)",
    ),
    (
        {"state": zeros(2, 4, 3, 5, dtype=half)},
        TypeError,
        "state must be torch.float32 (for torch.float32 inputs): got state.dtype=torch.bfloat16",
    ),
    (
        {"state": zeros(4, 3, 5), "state_indices": zeros(2, dtype=integer)},
        ValueError,
        "state must have 4 dimensions [S, HV, K, V]: got state.shape=(4, 3, 5)",
    ),
    (
        {"state": zeros(9, 4, 3, 6), "state_indices": zeros(2, dtype=integer)},
        ValueError,
        "state must be [S, HV, K, V] = (9, 4, 3, 5): got state.shape=(9, 4, 3, 6)",
    ),
    (
        {"state_indices": zeros(3, dtype=integer)},
        ValueError,
        "state_indices must be [B] = (2,): got state_indices.shape=(3,)",
    ),
    (
        {"state_indices": zeros(2, 1, dtype=integer)},
        ValueError,
        "state_indices must have 1 dimensions [B]: got state_indices.shape=(2, 1)",
    ),
    (
        {"state_indices": zeros(2)},
        TypeError,
        "state_indices must be int32 or int64: got state_indices.dtype=torch.float32",
    ),
]
STEP_DEVICES: list[Mistake] = [
    (
        {"state": zeros(2, 4, 3, 5)},
        TypeError,
        "state must be on the device of q: got state.device=cpu, q.device=cuda:0",
    ),
    (
        {"state_indices": zeros(2, dtype=integer)},
        TypeError,
        "state_indices must be on the device of q: got state_indices.device=cpu, q.device=cuda:0",
    ),
]
STEP_TYPES: list[Mistake] = [
    ({"state": None}, TypeError, "state must be a torch.Tensor: got state=None (NoneType)"),
    ({"state_indices": [0, 1]}, TypeError, "state_indices must be a torch.Tensor: got state_indices=[0, 1] (list)"),
    ({"normalize": 0}, TypeError, "normalize must be a bool: got normalize=0 (int)"),
    ({"scale": [1]}, TypeError, "scale must be a number or None: got scale=[1] (list)"),
]
CACHE: list[Mistake] = [
    ({"slots": "3"}, TypeError, "slots must be an int: got slots='3' (str)"),
    ({"heads": 2.0}, TypeError, "heads must be an int: got heads=2.0 (float)"),
    ({"key_width": True}, TypeError, "key_width must be an int: got key_width=True (bool)"),
    ({"draft": -1}, ValueError, "draft must be at least 0: got draft=-1"),
]
EVERY = [*CACHE, *ATTENTION, *DEVICES, *TYPES, *OFFSETS, *GRADIENTS, *STEP, *STEP_DEVICES, *STEP_TYPES]


def table(mistakes: list[Mistake]) -> Any:
    return pytest.mark.parametrize("mistake", mistakes, ids=[message.split(":")[0] for _, _, message in mistakes])


def says(mistake: Mistake) -> Any:
    """This very type, this very text."""
    _, error, message = mistake
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def forward(name: str, x: dict[str, Any]) -> Any:
    """Through torch.ops, past the public function."""
    defaults = dict.fromkeys([*INPUTS, "cu_seqlens", "scale"]) | dict.fromkeys(
        ["output_final_state", "normalize", "reverse"], False
    )
    return getattr(torch.ops.la, name)(**{**defaults, **x})


def backward(name: str, x: dict[str, Any], device: str = "cpu") -> Any:
    x = (
        dict.fromkeys([*INPUTS, "cu_seqlens", "scale", "o", "dfinal_state"])
        | {"normalize": False, "reverse": False}
        | x
    )
    if "do" not in x:
        shape = tuple(x["v"].shape) if isinstance(x["v"], Tensor) else ()
        x["do"] = torch.zeros(shape, dtype=x["v"].dtype, device=device)
        x["o"] = torch.zeros_like(x["do"]) if x["normalize"] and x["o"] is None else x["o"]
    return getattr(torch.ops.la, f"{name}_backward")(**x, gate_grad=True)


def step(x: dict[str, Any]) -> Any:
    defaults = dict.fromkeys(["g", "g_gamma", "state_indices", "scale"]) | {"normalize": False}
    return torch.ops.la.recurrent_step_(**{**defaults, **x})


every_op = pytest.mark.parametrize("name", NAMES)


@table(ATTENTION)
@every_op
def test_mistakes(name: str, mistake: Mistake) -> None:
    with says(mistake):
        OPERATORS[name](**build(SIZES, mistake[0]))
    with says(mistake):
        forward(name, build(SIZES, mistake[0]))
    with says(mistake):
        backward(name, build(SIZES, mistake[0]))
    with FakeTensorMode():
        for call in (lambda x: OPERATORS[name](**x), lambda x: forward(name, x), lambda x: backward(name, x)):
            x = build(SIZES, mistake[0])
            with says(mistake):
                call(x)


@table([*ATTENTION, *TYPES, *OFFSETS])
def test_mistakes_in_linear_attention(mistake: Mistake) -> None:
    with says(mistake):
        torch_la.linear_attention(**build(SIZES, mistake[0]))


@table(ATTENTION)
@every_op
def test_mistakes_with_gradients(name: str, mistake: Mistake) -> None:
    """Where autograd wraps the call."""
    x = build(SIZES, mistake[0])
    x = {n: y.requires_grad_() if isinstance(y, Tensor) and y.is_floating_point() else y for n, y in x.items()}
    with says(mistake):
        OPERATORS[name](**x)


@table(DEVICES)
@every_op
def test_mistakes_of_device(name: str, mistake: Mistake) -> None:
    with FakeTensorMode():
        for call in (lambda x: OPERATORS[name](**x), lambda x: forward(name, x), lambda x: backward(name, x, "cuda")):
            x = build(SIZES, mistake[0], "cuda")
            with says(mistake):
                call(x)


@table(TYPES)
@every_op
def test_mistakes_of_type(name: str, mistake: Mistake) -> None:
    with says(mistake):
        OPERATORS[name](**build(SIZES, mistake[0]))


@table(OFFSETS)
@every_op
def test_mistakes_in_the_offsets(name: str, mistake: Mistake) -> None:
    for call in (lambda x: OPERATORS[name](**x), lambda x: forward(name, x), lambda x: backward(name, x)):
        with says(mistake):
            call(build(SIZES, mistake[0]))


@table(GRADIENTS)
@every_op
def test_mistakes_in_the_backward(name: str, mistake: Mistake) -> None:
    with says(mistake):
        backward(name, build({**SIZES, "do": SIZES["v"]}, mistake[0]))
    with FakeTensorMode():
        x = build({**SIZES, "do": SIZES["v"]}, mistake[0])
        # (the fake tensor's class is named where the eager message says Tensor)
        error, message = mistake[1], mistake[2].replace("o=Tensor", "o=FakeTensor")
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            backward(name, x)


@table(STEP)
def test_mistakes_in_the_step(mistake: Mistake) -> None:
    with says(mistake):
        torch_la.recurrent_step(**build(STEP_SIZES, mistake[0]))
    with says(mistake):
        step(build(STEP_SIZES, mistake[0]))
    with FakeTensorMode():
        x = build(STEP_SIZES, mistake[0])
        with says(mistake):
            torch_la.recurrent_step(**x)
        with says(mistake):
            step(x)


@table(STEP_DEVICES)
def test_mistakes_of_device_in_the_step(mistake: Mistake) -> None:
    with FakeTensorMode():
        x = build(STEP_SIZES, mistake[0], "cuda")
        with says(mistake):
            torch_la.recurrent_step(**x)


@table(STEP_TYPES)
def test_mistakes_of_type_in_the_step(mistake: Mistake) -> None:
    with says(mistake):
        torch_la.recurrent_step(**build(STEP_SIZES, mistake[0]))


def test_a_wrong_call_of_the_step_writes_nothing() -> None:
    state = torch.ones(2, 4, 3, 5)
    with pytest.raises(ValueError, match="k must be"):
        torch_la.recurrent_step(**{**build(STEP_SIZES, {"k": zeros(2, 2, 4)}), "state": state})
    assert torch.equal(state, torch.ones_like(state))


NO_DERIVATIVE = (
    "la::recurrent_step_ writes its state in place and has no derivative: an input requires a gradient "
    "or carries a tangent. Use la::recurrent, or call it under torch.no_grad()"
)


@pytest.mark.parametrize("which", ["q", "k", "v", "state"])
def test_the_step_has_no_derivative(which: str) -> None:
    def call(y: Tensor, run: Callable[[dict[str, Any]], Any]) -> Any:
        return run({**build(STEP_SIZES, {}), which: y})

    refused = pytest.raises(RuntimeError, match=f"^{re.escape(NO_DERIVATIVE)}$")
    for run in (lambda x: torch_la.recurrent_step(**x), step):
        y = torch.rand(STEP_SIZES[which])
        with refused:
            call(y.clone().requires_grad_(), run)
        with refused:
            torch.func.jvp(lambda y: call(y, run), (y,), (y,))  # noqa: B023
        with refused:
            torch.func.grad(lambda y: call(y, run).sum())(y)  # noqa: B023
        with torch.no_grad():
            call(y.clone().requires_grad_(), run)


def test_the_step_marks_its_state_as_changed(device: str) -> None:
    """A backward that still needs the old state must find out."""
    for run in (lambda x: torch_la.recurrent_step(**x), step):
        for indices in (None, zeros(2, dtype=integer, device=device)):
            x = build(STEP_SIZES, {"state_indices": indices}, device)
            w = torch.ones(2, 4, 3, 5, requires_grad=True, device=device)
            loss = (w * x["state"]).sum()
            run(x)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


def test_the_step_marks_its_state_even_if_the_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton kernel writes memory behind the back of autograd. This one does too."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *_: Any) -> Tensor:
        state.data.add_(1)
        return v.clone()

    monkeypatch.setitem(ops.recurrent_step._kernels, "cpu", kernel)
    x = build(STEP_SIZES, {})
    before = x["state"]._version
    torch_la.recurrent_step(**x)
    assert x["state"].sum() > 0
    assert x["state"]._version > before


def test_vmap_of_the_step_maps_the_state() -> None:
    x = build(STEP_SIZES, {})
    message = (
        "state must have the dimension that vmap maps over, since every sample writes its own: "
        "got state.shape=(2, 4, 3, 5) unmapped"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        torch.func.vmap(lambda q: torch_la.recurrent_step(**{**x, "q": q}))(torch.zeros(3, *STEP_SIZES["q"]))


@table(CACHE)
def test_mistakes_in_the_sizes_of_a_cache(mistake: Mistake) -> None:
    with says(mistake):
        torch_la.generation.StateCache(**{"slots": 3, "heads": 2, "key_width": 4, "value_width": 4, **mistake[0]})


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        ([0, 20], TypeError, "cu_seqlens must be a torch.Tensor: got cu_seqlens=[0, 20] (list)"),
        (torch.tensor(3), ValueError, "cu_seqlens must have 1 dimensions [N + 1]: got cu_seqlens.shape=()"),
    ],
)
def test_offsets_that_are_none_where_the_operator_is_picked(cu_seqlens: Any, error: Any, message: str) -> None:
    q = torch.zeros(1, 20, 2, 3)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        torch_la.linear_attention(q, q, q, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize(
    ("o", "error", "message"),
    [
        (torch.zeros(2, 4, 4), ValueError, "o must have 4 dimensions [B, T, HV, V]: got o.shape=(2, 4, 4)"),
        (torch.zeros(2, 5, 4, 5), ValueError, "o must be [B, T, HV, V] = (2, 4, 4, 5): got o.shape=(2, 5, 4, 5)"),
        (torch.zeros(2, 4, 4, 5).half(), TypeError, "o must be torch.float32 like q: got o.dtype=torch.float16"),
    ],
)
def test_normalize_output_names_o(o: Tensor, error: Any, message: str) -> None:
    x = build(SIZES, {})
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        torch_la.normalize_output(o, x["q"], x["k"])


def test_normalize_output_wants_a_tensor() -> None:
    x = build(SIZES, {})
    with pytest.raises(TypeError, match=r"^o must be a torch\.Tensor: got o=None \(NoneType\)$"):
        torch_la.normalize_output(None, x["q"], x["k"])  # type: ignore[arg-type]


@pytest.mark.parametrize("build_decay", [decay.alibi, decay.retnet, lambda h: decay.minimax(h, 0, 2)])
def test_decay_wants_a_head(build_decay: Callable[[int], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"^heads must be at least 1: got heads=0$"):
        build_decay(0)


@pytest.mark.parametrize("build_decay", [decay.minimax, decay.minimax_transformers, decay.bailing])
def test_decay_wants_a_layer_that_exists(build_decay: Callable[[int, int, int], Tensor]) -> None:
    for layer in (2, -1):
        with pytest.raises(ValueError, match=rf"^layer must be in \[0, layers\): got layer={layer}, layers=2$"):
            build_decay(4, layer, 2)
    with pytest.raises(ValueError, match=r"^heads must be at least 1: got heads=0$"):
        build_decay(0, 0, 2)


def test_the_table_is_complete() -> None:
    """Every message in the source of `checks` is some message above."""
    templates = [
        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        for node in ast.walk(ast.parse(inspect.getsource(checks)))
        if isinstance(node, ast.JoinedStr)
    ]
    templates = [template for template in templates if "got " in template]
    assert len(templates) >= 18
    for template in templates:
        pattern = re.escape(template).replace(re.escape("\0"), ".+").replace("\0", ".+")
        assert any(re.fullmatch(pattern, message) for _, _, message in EVERY), f"no test for: {template!r}"


# -------------------------------------------------------------------------------------------------------- what is legal

LEGAL = {
    "log-decay above 0": Case(gate="growing"),
    "T = 0": Case(T=0),
    "empty batch": Case(B=0),
    "T = 0, no state": Case(T=0, state=False, gate="none"),
    "no sequences": Case(B=1, cu=(0,)),
    "only empty sequences": Case(B=1, cu=(0, 0, 0)),
    "packed without tokens": Case(B=1, T=0, cu=(0, 0)),
    "width 1": Case(H=1, K=1, V=1),
    "one token": Case(B=1, T=1, H=1),
    "many value heads": Case(H=1, groups=7),
    "a reset at every token": Case(gate="-inf"),
    "integer scale": Case(scale=2),
    "zero scale": Case(scale=0.0, normalize=True),
    "wide": Case(K=300, V=300, T=2),
}


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("case", LEGAL.values(), ids=LEGAL.keys())
@every_op
def test_legal(name: str, case: Case, normalize: bool) -> None:
    x = case.but(normalize=normalize or case.normalize).arguments()
    want, S = reference.recurrent(**x)
    for call in (lambda: OPERATORS[name](**x), lambda: getattr(ops, name).operator.forward(*x.values())):
        o, final_state = call()
        assert o.shape == want.shape
        assert final_state.shape == S.shape
        assert norm(o - want) <= 1e-10 * norm(want)
        assert norm(final_state - S) <= 1e-10 * norm(S)


def test_legal_steps() -> None:
    for B, indices in ((0, None), (0, []), (2, [-1, 99])):
        state = torch.ones(3 if indices is not None else B, 1, 1, 1)
        slots = None if indices is None else torch.tensor(indices, dtype=torch.int32)
        q, v = torch.ones(B, 1, 1), torch.ones(B, 1, 1)
        o = torch_la.recurrent_step(q, q, v, state, state_indices=slots)
        assert o.shape == (B, 1, 1)
        assert norm(o) == 0
        assert torch.equal(state, torch.ones_like(state))

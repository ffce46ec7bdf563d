"""What else asks the operators: autocast, FLOP counter, activation checkpointing, inference mode, the eager bypass."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torch_la
from cases import INPUTS, NAMES, OPERATORS, Case, close, norm
from torch_la import ops
from torch_la.ops.rules import flops

every_op = pytest.mark.parametrize("name", NAMES)
GATED = Case(T=70, groups=2, dtype=torch.float32)
CASES = {
    "gate": GATED,
    "decay": GATED.but(gate="g_gamma"),
    "normalize": GATED.but(normalize=True),
    "packed": GATED.but(B=1, cu=(0, 9, 9, 70)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


class Seen(TorchDispatchMode):
    """The names of this library's operators that are called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "la":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def gradients(o: Tensor, S: Tensor, x: dict[str, Any]) -> dict[str, Tensor]:
    names = [n for n in INPUTS if x[n] is not None]
    found = torch.autograd.grad(o.float().sin().sum() + S.float().sin().sum(), [x[n] for n in names])
    return dict(zip(names, found, strict=True))


# ------------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@every_case
@every_op
def test_autocast(name: str, case: Case, low: torch.dtype, compiled: bool, device: str, fresh_compiler: None) -> None:
    """q, k, v become `low`; gates and states stay; every gradient has the dtype of its input."""
    op: Callable[..., Any] = OPERATORS[name]
    if compiled:
        op = torch.compile(op, fullgraph=True, backend="aot_eager")
    x = case.arguments(device, grad=True)
    with torch.autocast(device, dtype=low):
        o, S = op(**x)
    assert o.dtype == low
    assert S.dtype == torch.float32
    found = gradients(o, S, x)

    rounded = {n: y.to(low) if n in ("q", "k", "v") else y for n, y in x.items()}
    want_o, want_S = OPERATORS[name](**rounded)
    assert torch.equal(o, want_o)
    assert torch.equal(S, want_S)
    for n, want in gradients(want_o, want_S, x).items():
        assert found[n].dtype == x[n].dtype == torch.float32
        assert norm(want) > 0
        close(found[n], want, 1e-6)


@every_op
def test_autocast_leaves_float64_alone(name: str) -> None:
    x = GATED.but(dtype=torch.float64).arguments(grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, S = OPERATORS[name](**x)
        assert o.dtype == S.dtype == torch.float64
        found = gradients(o, S, x)
    for n, want in gradients(*OPERATORS[name](**x), x).items():
        assert torch.equal(found[n], want)


@every_op
def test_autocast_brings_mixed_dtypes_together(name: str, device: str) -> None:
    """As after a layer norm, which autocast keeps in float32."""
    x = GATED.arguments(device)
    x["v"] = x["v"].bfloat16()
    with pytest.raises(TypeError, match="v must be"):
        OPERATORS[name](**x)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert OPERATORS[name](**x)[0].dtype == torch.bfloat16


@every_op
def test_autocast_and_double_backward(name: str, device: str) -> None:
    """A backward inside the autocast region runs in the dtypes of its forward, and so does its own backward."""
    x = GATED.but(T=5, normalize=True).arguments(device, grad=True)
    leaves = [x[n] for n in ("q", "k", "v", "g", "initial_state")]
    with torch.autocast(device, dtype=torch.bfloat16):
        first = torch.autograd.grad(OPERATORS[name](**x)[0].float().sin().sum(), leaves, create_graph=True)
        inside = torch.autograd.grad(sum(y.sin().sum() for y in first), leaves)
    rounded = {n: y.bfloat16() if n in ("q", "k", "v") else y for n, y in x.items()}
    first = torch.autograd.grad(OPERATORS[name](**rounded)[0].float().sin().sum(), leaves, create_graph=True)
    outside = torch.autograd.grad(sum(y.sin().sum() for y in first), leaves)
    for a, b in zip(inside, outside, strict=True):
        assert norm(b) > 0
        close(a, b, 1e-6)


@every_op
def test_kernels_never_meet_a_wrapped_tensor(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradients of gradients come from `torch.func`, whose tensors have no memory that a kernel could read."""
    operator = getattr(ops, name).operator
    called = []

    def watched(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            called.append(name)
            tensors = [x for x in inputs if isinstance(x, Tensor)]
            assert not any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors)
            return kernel(*inputs)

        return run

    monkeypatch.setitem(operator.backward_kernels, device, watched(operator.backward_kernels[device]))
    x = GATED.but(T=5).arguments(device, grad=True)
    leaves = [x[n] for n in ("q", "k", "v", "g", "initial_state")]
    first = torch.autograd.grad(OPERATORS[name](**x)[0].sin().sum(), leaves)
    assert called
    first = torch.autograd.grad(OPERATORS[name](**x)[0].sin().sum(), leaves, create_graph=True)
    torch.autograd.grad(sum(y.sin().sum() for y in first), leaves)


@every_op
def test_autocast_and_forward_over_reverse(name: str, device: str) -> None:
    x = GATED.but(T=5, normalize=True).arguments(device)

    def second(low: torch.dtype | None) -> Tensor:
        y = x if low is None else {n: z.to(low) if n in ("k", "v") else z for n, z in x.items()}

        def loss(q: Tensor) -> Tensor:
            return OPERATORS[name](**{**y, "q": q if low is None else q.to(low)})[0].float().sin().sum()

        return torch.func.jvp(torch.func.grad(loss), (x["q"],), (x["k"],))[1]

    with torch.autocast(device, dtype=torch.bfloat16):
        inside = second(None)
    outside = second(torch.bfloat16)
    assert norm(outside) > 0
    close(inside, outside, 1e-6)


@every_op
def test_autocast_of_the_backward_operator(name: str, device: str) -> None:
    """Called by itself: it runs in the dtype of v, whatever the region asks for, and the gradient of o follows."""
    for dtype in (torch.bfloat16, torch.float32):
        x = GATED.but(dtype=dtype).arguments(device)
        inputs = [x[n] for n in INPUTS]
        do = torch.randn(x["v"].shape, device=device).to(torch.float16)
        backward = getattr(torch.ops.la, f"{name}_backward")
        with torch.autocast(device, dtype=torch.bfloat16):
            got = backward(*inputs, None, None, False, False, None, do, None, True)
        want = backward(*inputs, None, None, False, False, None, do.to(dtype), None, True)
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_autocast_of_the_step(device: str) -> None:
    x = GATED.but(T=1).arguments(device)
    tokens = {n: x[n][:, 0] for n in ("q", "k", "v", "g")}
    state, other = x["initial_state"].clone(), x["initial_state"].clone()
    with torch.autocast(device, dtype=torch.bfloat16):
        o = torch_la.recurrent_step(**tokens, state=state)
    rounded = {n: y if n == "g" else y.bfloat16() for n, y in tokens.items()}
    want = torch_la.recurrent_step(**rounded, state=other)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, want)
    assert torch.equal(state, other)


# ---------------------------------------------------------------------------------------------------------------- flops


def test_flop_formula_by_hand() -> None:
    # per token and value head: 2 C (K + V) inside the chunk, 4 K V for the state
    assert flops((2, 10, 3, 4), (2, 10, 6, 5), 64, 1) == 2 * 10 * 6 * (2 * 64 * 9 + 4 * 20)
    assert flops((2, 10, 3, 4), (2, 10, 6, 5), 0, 3) == 3 * 2 * 10 * 6 * 4 * 20


@every_op
def test_flop_counter(name: str, device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = GATED.arguments(device, grad=True)
    forward = flops(x["q"].shape, x["v"].shape, 0 if name == "recurrent" else 64, 1)
    assert forward > 0
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), FlopCounterMode(display=False) as counter:
            OPERATORS[name](**x)
        assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        OPERATORS[name](**x)[0].sum().backward()
    counted = counter.get_flop_counts()["Global"]
    la = torch.ops.la
    assert counted == {getattr(la, name): forward, getattr(la, f"{name}_backward"): 3 * forward}


def test_flops_of_the_step(device: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = GATED.but(T=1).arguments(device)
    tokens = {n: x[n][:, 0] for n in ("q", "k", "v", "g")}
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), FlopCounterMode(display=False) as counter:
            torch_la.recurrent_step(**tokens, state=x["initial_state"].clone())
        assert counter.get_total_flops() == flops(x["q"].shape, x["v"].shape, 0, 1) > 0


@pytest.mark.parametrize("imports", ["torch_la, torch.utils.flop_counter", "torch.utils.flop_counter, torch_la"])
def test_flop_counter_in_either_order_of_import(imports: str) -> None:
    code = f"""
import {imports}, torch
x = torch.ones(1, 2, 1, 3)
with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
    torch_la.chunk(x, x, x)
print(counter.get_total_flops())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) == flops((1, 2, 1, 3), (1, 2, 1, 3), 64, 1)


# -------------------------------------------------------------------------------------------------------- checkpointing


@pytest.mark.parametrize("policy", [CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE])
@every_op
def test_selective_checkpointing(name: str, policy: CheckpointPolicy, device: str) -> None:
    """MUST_SAVE keeps the output, so that the operator runs once; else it runs again in the backward."""
    op = getattr(torch.ops.la, name).default
    x = GATED.but(normalize=True).arguments(device, grad=True)

    def layer(q: Tensor, v: Tensor) -> Tensor:
        return OPERATORS[name](**{**x, "q": q.sin(), "v": v.exp()})[0].sigmoid()

    def contexts() -> Any:
        return create_selective_checkpoint_contexts(
            lambda ctx, called, *args, **kwargs: policy if called == op else CheckpointPolicy.PREFER_RECOMPUTE
        )

    want = torch.autograd.grad(layer(x["q"], x["v"]).sum(), (x["q"], x["v"]))
    with Seen() as seen:
        out = checkpoint(layer, x["q"], x["v"], use_reentrant=False, context_fn=contexts)
        got = torch.autograd.grad(out.sum(), (x["q"], x["v"]))
    once = policy == CheckpointPolicy.MUST_SAVE
    assert seen.names == [name] * (1 if once else 2) + [f"{name}_backward"]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
        assert norm(b) > 0


@every_op
def test_checkpointing(name: str, device: str) -> None:
    x = GATED.arguments(device, grad=True)
    q, v = x["q"], x["v"]

    def layer(q: Tensor, v: Tensor) -> Tensor:
        return OPERATORS[name](**{**x, "q": q, "v": v})[0].sin().sum()

    want = torch.autograd.grad(layer(q, v), (q, v))
    for reentrant in (False, True):
        loss = checkpoint(layer, q, v, use_reentrant=reentrant)
        q.grad = v.grad = None
        loss.backward()
        assert torch.equal(q.grad, want[0])
        assert torch.equal(v.grad, want[1])


@every_op
def test_only_the_normaliser_keeps_the_output(name: str) -> None:
    for normalize, kept in ((False, False), (True, True)):
        x = GATED.but(normalize=normalize).arguments(grad=True)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda y, saved=saved: saved.append(y) or y, lambda y: y):
            o, _ = OPERATORS[name](**x)
        assert any(y.data_ptr() == o.data_ptr() for y in saved) == kept


# ------------------------------------------------------------------------------------------------------------ inference


@every_op
def test_inference_mode(name: str, device: str) -> None:
    x = GATED.arguments(device, grad=True)
    want = OPERATORS[name](**x)
    with torch.inference_mode():
        for got in (OPERATORS[name](**x), getattr(ops, name).operator.forward(*x.values())):
            for a, b in zip(got, want, strict=True):
                assert torch.equal(a, b)
                assert a.is_inference()
        inside = GATED.arguments(device)
        assert torch.equal(OPERATORS[name](**inside)[0], want[0])
    assert torch.equal(OPERATORS[name](**inside)[0], want[0])  # inference tensors outside the mode


def test_the_step_in_inference_mode(device: str) -> None:
    x = GATED.but(T=1).arguments(device)
    tokens = {n: x[n][:, 0] for n in ("q", "k", "v", "g")}
    want = torch_la.recurrent_step(**tokens, state=x["initial_state"].clone())
    with torch.inference_mode():
        state = x["initial_state"].clone()
        assert torch.equal(torch_la.recurrent_step(**tokens, state=state), want)
        state = x["initial_state"].clone()
        assert torch.equal(torch_la.recurrent_step(**tokens, state=state), want)
        ordinary = x["initial_state"]
    assert torch.equal(torch_la.recurrent_step(**tokens, state=ordinary), want)


# ----------------------------------------------------------------------------------------------------- the eager bypass


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


class Labelled(Tensor):
    """A subclass that only watches."""

    seen: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def call(name: str, x: dict[str, Any]) -> Any:
    """The public function, of the step as well."""
    if name != "recurrent_step_":
        return OPERATORS[name](**x)[0]
    tokens = {n: x[n][:, 0] for n in ("q", "k", "v", "g")}
    return torch_la.recurrent_step(**tokens, state=x["initial_state"].clone())


all_ops = pytest.mark.parametrize("name", [*NAMES, "recurrent_step_"])


@all_ops
def test_a_dispatch_mode_sees_the_operator(name: str, device: str) -> None:
    with Seen() as seen:
        call(name, GATED.arguments(device))
    assert seen.names == [name]


@all_ops
def test_a_function_mode_sees_the_operator(name: str, device: str) -> None:
    x = GATED.arguments(device)
    with Functions() as functions:
        call(name, x)
    assert any(name in called for called in functions.names)


@all_ops
def test_a_subclass_sees_the_operator(name: str, device: str) -> None:
    x = GATED.arguments(device)
    x["v"] = x["v"].as_subclass(Labelled)
    Labelled.seen.clear()
    out = call(name, x)
    assert any(f"la.{name}" in called or f"la::{name}" in called for called in Labelled.seen), Labelled.seen
    assert type(out) is Labelled


@all_ops
def test_the_profiler_sees_the_operator(name: str, device: str) -> None:
    x = GATED.arguments(device)
    with torch.profiler.profile() as profile:
        call(name, x)
    assert f"la::{name}" in {event.key for event in profile.key_averages()}


@all_ops
def test_plain_calls_go_around_the_dispatcher(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is why they are quick; every test above would pass without it."""
    importlib.import_module("torch.distributed.tensor")  # its rules are registered before the operators are replaced

    def refuse(*_: Any) -> None:
        raise AssertionError("the dispatcher was asked")

    step = name == "recurrent_step_"
    owner, attribute = (ops.recurrent_step, "op") if step else (getattr(ops, name).operator, "forward")
    monkeypatch.setattr(owner, attribute, refuse)
    call(name, GATED.arguments())
    if not step:
        monkeypatch.setattr(owner, "backward", refuse)
        x = GATED.arguments(grad=True)
        call(name, x).sum().backward()
        with pytest.raises(AssertionError, match="the dispatcher was asked"):  # a graph of the backward is wanted
            torch.autograd.grad(call(name, x).sum(), x["q"], create_graph=True)
        loss = call(name, x).sum()
        with pytest.raises(AssertionError, match="the dispatcher was asked"), Seen():  # somebody watches
            loss.backward()
    with pytest.raises(AssertionError, match="the dispatcher was asked"), Seen():
        call(name, GATED.arguments())


@every_case
@every_op
def test_the_bypass_is_the_dispatcher(name: str, case: Case, device: str) -> None:
    """The same bits, gradients too; parameters as well as tensors."""
    x = case.arguments(device, grad=True)
    x["v"] = torch.nn.Parameter(x["v"].detach())
    direct = getattr(ops, name).operator.forward
    (o, S), (want_o, want_S) = OPERATORS[name](**x), direct(*x.values())
    assert torch.equal(o, want_o)
    assert torch.equal(S, want_S)
    got, want = gradients(o, S, x), gradients(want_o, want_S, x)
    for n, y in want.items():
        assert torch.equal(got[n], y)
    quiet = case.arguments(device)
    assert torch.equal(OPERATORS[name](**quiet)[0], direct(*quiet.values())[0])


def test_the_bypass_of_the_step_is_the_dispatcher(device: str) -> None:
    x = GATED.but(T=1, normalize=True).arguments(device)
    tokens = [x[n][:, 0] for n in ("q", "k", "v")]
    for indices in (None, torch.tensor([1, -1], device=device)):
        here, there = x["initial_state"].clone(), x["initial_state"].clone()
        rest = (x["g"][:, 0], None, indices, None, True)
        o = torch_la.recurrent_step(*tokens, here, rest[0], state_indices=indices, normalize=True)
        assert torch.equal(o, torch.ops.la.recurrent_step_(*tokens, there, *rest))
        assert torch.equal(here, there)
        assert norm(here - x["initial_state"]) > 0


@every_op
def test_saved_tensors_hooks_and_graph_tasks(name: str) -> None:
    """Backward twice over one graph, and hooks on what it keeps."""
    x = GATED.arguments(grad=True)
    with torch.autograd.graph.save_on_cpu():
        o, S = OPERATORS[name](**x)
    loss = o.sin().sum() + S.sin().sum()
    first = torch.autograd.grad(loss, x["q"], retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x["q"])[0])
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, x["q"])
    o, _ = OPERATORS[name](**x)
    with torch.no_grad():
        x["k"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()

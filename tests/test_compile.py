"""torch.compile(fullgraph=True): forward, backward, modes, transforms, checkpointing, lengths; equal to eager."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torch_la
from cases import INPUTS, NAMES, OPERATORS, Case, close, norm

pytestmark = pytest.mark.usefixtures("fresh_compiler")
every_op = pytest.mark.parametrize("name", NAMES)

BASE = Case(T=70, groups=2, K=4, V=6, dtype=torch.float32)
OPTIONS = {
    "plain": BASE.but(gate="none", state=False, final=False),
    "gate": BASE,
    "strided decay": BASE.but(gate="g_gamma", strided=True, final=False),
    "normalize reverse": BASE.but(normalize=True, reverse=True, scale=1.0),
    "packed": BASE.but(B=1, cu=(0, 10, 10, 66), state=False),
    "packed normalize": BASE.but(B=1, cu=(0, 10, 66), normalize=True, gate="g_gamma"),
    "bfloat16": BASE.but(dtype=torch.bfloat16, half_gate=True),
}
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def model(op: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator with a little around it, as in a layer."""

    def run(x: dict[str, Any]) -> tuple[Tensor, ...]:
        o, S = op(**{**x, "q": x["q"] * 1.5})
        return (o.sigmoid(),) if S is None else (o.sigmoid(), S * 2)

    return run


def forward_backward(run: Callable[..., Any], x: dict[str, Any]) -> list[Tensor]:
    outputs = run(x)
    inputs = [x[n] for n in INPUTS if x[n] is not None]
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=random).to(y.device, y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, cotangents)]


def equal(got: list[Tensor], want: list[Tensor], limit: float) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        close(a, b, limit)


@pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())
@every_op
def test_forward_and_backward(name: str, case: Case, device: str) -> None:
    x = case.arguments(device, grad=True)
    run = model(OPERATORS[name])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    equal(forward_backward(compiled, x), forward_backward(run, x), LIMIT[case.dtype])


@pytest.mark.parametrize(
    ("name", "option"), [("chunk", "normalize reverse"), ("fused_chunk", "packed"), ("recurrent", "gate")]
)
def test_inductor(name: str, option: str, device: str) -> None:
    x = OPTIONS[option].arguments(device, grad=True)
    run = model(OPERATORS[name])
    equal(forward_backward(torch.compile(run, fullgraph=True), x), forward_backward(run, x), 1e-5)


def test_linear_attention_and_normalize_output(device: str) -> None:
    def run(x: dict[str, Any]) -> tuple[Tensor, ...]:
        o, _ = torch_la.linear_attention(**x)
        rest = {n: x[n] for n in ("q", "k", "g", "g_gamma", "scale", "reverse")}
        o, z = torch_la.normalize_output(o, **rest, output_final_state=True)
        return o, z

    case = BASE.but(normalize=True, state=False, final=False)
    x = case.arguments(device, grad=True) | {"normalize": False}
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    equal(forward_backward(compiled, x), forward_backward(run, x), 1e-5)


@pytest.mark.parametrize("option", ["gate", "strided decay", "normalize reverse"])
@every_op
def test_other_lengths_do_not_recompile(name: str, option: str, device: str) -> None:
    """Time marked as dynamic: one compilation for all lengths, also for 1 token and for whole chunks."""
    run = model(OPERATORS[name])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for i, T in enumerate((70, 33, 128, 5)):
        x = OPTIONS[option].but(T=T, seed=T).arguments(device, grad=True)
        for n in ("q", "k", "v", "g"):
            if x[n] is not None:
                torch._dynamo.mark_dynamic(x[n], 1)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            equal(forward_backward(compiled, x), forward_backward(run, x), 1e-5)


@every_op
def test_lengths_become_dynamic_by_themselves(name: str, device: str) -> None:
    run = model(OPERATORS[name])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for i, T in enumerate((70, 33, 128, 45)):
        x = OPTIONS["gate"].but(T=T).arguments(device, grad=True)
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            equal(forward_backward(compiled, x), forward_backward(run, x), 1e-5)


@every_op
def test_other_packings_do_not_recompile(name: str, device: str) -> None:
    """Another number of sequences, another number of tokens, empty sequences."""
    run = model(OPERATORS[name])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    packings = [(0, 10, 10, 66), (0, 5, 70), (0, 0, 0, 0, 9, 60, 64), (0, 3, 3, 40)]
    for i, (T, cu) in enumerate(zip((70, 75, 64, 41), packings, strict=True)):
        x = OPTIONS["packed"].but(T=T, cu=cu, state=True).arguments(device, grad=True)
        for n, dimension in (("q", 1), ("k", 1), ("v", 1), ("g", 1), ("initial_state", 0), ("cu_seqlens", 0)):
            torch._dynamo.mark_dynamic(x[n], dimension)
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            equal(forward_backward(compiled, x), forward_backward(run, x), 1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("pool", [False, True])
def test_step_writes_in_place(pool: bool, backend: str, device: str) -> None:
    case = Case(B=3, T=1, dtype=torch.float32, normalize=True, groups=2)
    x = case.arguments(device)
    tokens = {n: x[n][:, 0] for n in ("q", "k", "v", "g")}
    states = torch.rand(5 if pool else 3, case.HV, case.K, case.V + 1, device=device)
    indices = torch.tensor([4, -1, 0], device=device) if pool else None

    def run(state: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        o = torch_la.recurrent_step(**{**tokens, "q": q + 1}, state=state, state_indices=indices, normalize=True)
        return o * 2, state.sum()

    eager, compiled = states.clone(), states.clone()
    want = run(eager, tokens["q"])
    got = torch.compile(run, fullgraph=True, backend=backend)(compiled, tokens["q"])
    equal([*got, compiled], [*want, eager], 1e-5)
    assert norm(compiled - states) > 0


def test_step_does_not_recompile_for_another_batch(device: str) -> None:
    step = torch.compile(torch_la.recurrent_step, fullgraph=True, backend="aot_eager")
    for i, B in enumerate((3, 5, 4, 7)):
        case = Case(B=B, T=1, dtype=torch.float32)
        x = case.arguments(device)
        tokens = {n: x[n][:, 0] for n in ("q", "k", "v", "g")}
        want, got = x["initial_state"].clone(), x["initial_state"].clone()
        with torch.compiler.set_stance("default" if i < 2 else "fail_on_recompile"):
            o = step(**tokens, state=got)
        equal([o, got], [torch_la.recurrent_step(**tokens, state=want), want], 1e-5)


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda loss, q: torch.func.grad(loss)(q),
    "jvp": lambda loss, q: torch.func.jvp(loss, (q,), (torch.ones_like(q),))[1],
    "vmap(grad)": lambda loss, q: torch.func.vmap(torch.func.grad(loss))(torch.stack([q, 2 * q])),
    "jvp(grad)": lambda loss, q: torch.func.jvp(torch.func.grad(loss), (q,), (torch.ones_like(q),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_op
def test_transforms(name: str, transform: str, device: str) -> None:
    x = BASE.but(T=5).arguments(device)

    def run(q: Tensor) -> Tensor:
        return TRANSFORMS[transform](lambda q: OPERATORS[name](**{**x, "q": q})[0].sin().sum(), q)

    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(x["q"]), run(x["q"])
    assert norm(want) > 0
    close(got, want, 1e-5)


@every_op
def test_mistakes_surface_while_tracing_with_their_message(name: str, device: str) -> None:
    x = BASE.arguments(device)
    mistake = {**x, "k": x["k"][..., :3]}
    compiled = torch.compile(lambda x: OPERATORS[name](**x)[0] * 2, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"k must be \[B, T, H, K\] = \(2, 70, 2, 4\): got k\.shape=\(2, 70, 2, 3\)"):
        compiled(mistake)


class All(torch.nn.Module):
    """Every operator in one graph; the step writes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(2, BASE.HV, BASE.K, BASE.V))

    def forward(self, x: dict[str, Any]) -> tuple[Tensor, ...]:
        outputs = [y.sigmoid() for op in OPERATORS.values() for y in op(**{**x, "q": x["q"] * 1.5})]
        tokens = {n: x[n][:, 0].detach() for n in ("q", "k", "v", "g")}
        return *outputs, torch_la.recurrent_step(**tokens, state=self.state) * 2


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str, device: str) -> None:
    """Called often enough to record a CUDA graph and to replay it. That it is replayed: tests/gpu/contract.py."""
    eager, other = All().to(device), All().to(device)
    compiled = torch.compile(other, fullgraph=True, mode=mode)
    for i in range(4):
        x = BASE.but(seed=i).arguments(device, grad=True)
        got, want = [], []
        torch.compiler.cudagraph_mark_step_begin()
        for run, found in ((compiled, got), (eager, want)):
            outputs = run(x)
            inputs = [x[n] for n in INPUTS if x[n] is not None]
            gradients = torch.autograd.grad(sum(y.sin().sum() for y in outputs[:-1]), inputs)
            found.extend(y.clone() for y in (*outputs, *gradients))
        equal(got, want, 1e-5)
    close(other.state, eager.state, 1e-5)


@pytest.mark.parametrize(("policy", "again"), [("MUST_SAVE", 0), ("PREFER_RECOMPUTE", 1), (None, 1)])
@every_op
def test_checkpointing(name: str, policy: str | None, again: int, device: str) -> None:
    """Selective and full: the compiled backward holds the forward operator only where it was to be run again."""
    op = getattr(torch.ops.la, name).default
    x = BASE.but(normalize=True).arguments(device, grad=True)

    def layer(q: Tensor, v: Tensor) -> Tensor:
        return OPERATORS[name](**{**x, "q": q.exp(), "v": v.sin()})[0].sigmoid()

    def decide(ctx: Any, called: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return getattr(CheckpointPolicy, policy) if called == op else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, decide)} if policy else {}

    def run(q: Tensor, v: Tensor) -> Tensor:
        return checkpoint(layer, q, v, use_reentrant=False, **contexts)

    backend = AotEagerAndRecordGraphs()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    leaves = (x["q"], x["v"])
    got = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    want = torch.autograd.grad(layer(*leaves).sum(), leaves)
    equal([*got], [*want], 1e-5)
    called = [[node.target for node in graph.graph.nodes] for graph in (backend.fw_graphs[0], backend.bw_graphs[0])]
    assert [targets.count(op) for targets in called] == [1, again]


@every_op
def test_per_sample_gradients(name: str, device: str) -> None:
    """Of the weights of a layer: vmap(grad(functional_call)), compiled."""
    layer = torch.nn.Linear(6, 3 * 2 * 4).to(device)
    xs = torch.randn(5, 1, 7, 6, device=device)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        q, k, v = torch.func.functional_call(layer, weights, (x,)).unflatten(-1, (3, 2, 4)).unbind(-3)
        return OPERATORS[name](q, k, v)[0].sin().sum()

    weights = dict(layer.named_parameters())
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    got = torch.compile(per_sample, fullgraph=True, backend="aot_eager")(weights, xs)
    for i, x in enumerate(xs):
        for n, want in zip(weights, torch.autograd.grad(loss(weights, x), [*weights.values()]), strict=True):
            assert norm(want) > 0
            close(got[n][i], want, 1e-5)


@pytest.mark.parametrize("forward", ["eager", "compiled"])
@every_op
def test_compiled_autograd(name: str, forward: str, device: str) -> None:
    """The whole backward as one graph, whether or not the forward was compiled."""
    x = BASE.but(normalize=True).arguments(device, grad=True)
    run = model(OPERATORS[name])
    if forward == "compiled":
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    compiler = torch.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.compiled_autograd._enable(compiler):
        sum(y.sin().sum() for y in run(x)).backward()
    leaves = [x[n] for n in INPUTS if x[n] is not None]
    got = [y.grad for y in leaves]
    want = torch.autograd.grad(sum(y.sin().sum() for y in model(OPERATORS[name])(x)), leaves)
    equal(got, [*want], 1e-5)

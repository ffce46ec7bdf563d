"""Every derivative of every operator: gradcheck, torch.func, vmap, forward mode, and traps for zeros that go unseen.

The expected values come from the same transform of `reference.recurrent`, and are checked not to be zero themselves.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import torch_la
from cases import INPUTS, NAMES, OPERATORS, Case, close, dtypes, norm
from torch_la import ops
from torch_la.ops import reference

SMALL = Case(B=2, T=3, H=1, groups=2, K=2, V=2)
OPTIONS = {
    "plain": SMALL.but(gate="none", state=False, final=False),
    "gate": SMALL,
    "decay": SMALL.but(gate="g_gamma", reverse=True, H=2, groups=1),
    "normalize": SMALL.but(normalize=True),
    "normalize decay reverse": SMALL.but(normalize=True, gate="g_gamma", reverse=True, groups=1, scale=1.0),
    "packed": SMALL.but(B=1, T=6, cu=(1, 3, 3, 5)),
    "packed normalize reverse": SMALL.but(B=1, T=5, cu=(0, 2, 2, 4), normalize=True, reverse=True, groups=1),
    "packed decay": SMALL.but(B=1, T=5, cu=(0, 2, 5), gate="g_gamma", state=False),
}
every_op = pytest.mark.parametrize("name", NAMES)
every_option = pytest.mark.parametrize("case", OPTIONS.values(), ids=OPTIONS.keys())


def function_of(op: Callable[..., Any], x: dict[str, Any], names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a function of the named inputs. Returns its outputs without the Nones."""

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = op(**{**x, **dict(zip(names, inputs, strict=True))})
        return tuple(y for y in outputs if y is not None)

    return function


def differentiable(x: dict[str, Any]) -> list[str]:
    return [n for n in INPUTS if x[n] is not None]


def loss_of(op: Callable[..., Any], x: dict[str, Any], name: str) -> Callable[[Tensor], Tensor]:
    """A scalar of one input that is curved in the outputs, so that every second derivative is alive."""
    function = function_of(op, x, [name])
    return lambda y: sum(out.sin().sum() for out in function(y))


def same(got: Any, want: Any, limit: float = 1e-9) -> None:
    """Equal, and not because both are nothing."""
    if isinstance(want, tuple):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            same(a, b, limit)
        return
    assert norm(want) > 1e-6, "the expected value is zero: this case proves nothing"
    close(got, want, limit)


# ------------------------------------------------------------------------------------------------------------ gradcheck


@every_option
@every_op
def test_gradcheck(name: str, case: Case) -> None:
    x = case.arguments(grad=True)
    names = differentiable(x)
    assert gradcheck(
        function_of(OPERATORS[name], x, names),
        [x[n] for n in names],
        check_forward_ad=True,
        check_undefined_grad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@every_option
@every_op
def test_gradgradcheck(name: str, case: Case) -> None:
    x = case.arguments(grad=True)
    names = differentiable(x)
    inputs = [x[n] for n in names]
    function = function_of(OPERATORS[name], x, names)
    # The formulas are the same for every operator: entry by entry for one, along random directions for the others.
    fast = name != "chunk"
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_batched_grad=not fast, fast_mode=fast)


@pytest.mark.parametrize("name", ["chunk", "fused_chunk"])
def test_gradchecks_across_chunks(name: str) -> None:
    x = Case(B=1, T=67, H=1, K=1, V=1).arguments(grad=True)
    names = differentiable(x)
    inputs = [x[n] for n in names]
    function = function_of(OPERATORS[name], x, names)
    assert gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@every_op
def test_gradcheck_of_the_backward_operator(name: str) -> None:
    x = SMALL.but(normalize=True).arguments(grad=True)
    names = differentiable(x)
    o, S = OPERATORS[name](**x)
    backward = getattr(ops, name).operator.backward
    cotangents = [torch.randn_like(y).requires_grad_() for y in (o, S)]

    def function(do: Tensor, dS: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        y = {**x, **dict(zip(names, inputs, strict=True))}
        o = OPERATORS[name](**y)[0]
        gradients = backward(*(y[n] for n in INPUTS), None, None, True, False, o, do, dS, True)
        return tuple(z for z in gradients if z is not None)

    # (forward mode of it is what check_fwd_over_rev above goes through)
    assert gradcheck(function, (*cotangents, *(x[n] for n in names)))


# ----------------------------------------------------------------------------------------------------------- torch.func

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev(jacrev)": lambda f: jacrev(jacrev(f)),
    "jacfwd(jacfwd)": lambda f: jacfwd(jacfwd(f)),
    "jacrev(jacfwd)": lambda f: jacrev(jacfwd(f)),
    "jacrev(grad)": lambda f: jacrev(grad(f)),
    "grad(grad)": lambda f: grad(lambda x: grad(f)(x).sin().sum()),
}
FUNC = {n: OPTIONS[n] for n in ("gate", "normalize decay reverse", "packed normalize reverse")}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", FUNC.values(), ids=FUNC.keys())
@every_op
def test_func_transforms_in_every_input(name: str, case: Case, transform: str) -> None:
    x = case.arguments()
    for n in differentiable(x):
        got = TRANSFORMS[transform](loss_of(OPERATORS[name], x, n))(x[n])
        same(got, TRANSFORMS[transform](loss_of(reference.recurrent, x, n))(x[n]))


@pytest.mark.parametrize("case", FUNC.values(), ids=FUNC.keys())
@every_op
def test_vjp_and_jvp(name: str, case: Case) -> None:
    x = case.arguments()
    names = differentiable(x)
    inputs = tuple(x[n] for n in names)
    ours, truth = (function_of(f, x, names) for f in (OPERATORS[name], reference.recurrent))
    tangents = tuple(torch.randn_like(y) for y in inputs)
    for got, want in zip(jvp(ours, inputs, tangents), jvp(truth, inputs, tangents), strict=True):
        same(got, want)
    outputs, pull = vjp(ours, *inputs)
    cotangents = tuple(torch.randn_like(y) for y in outputs)
    same(pull(cotangents), vjp(truth, *inputs)[1](cotangents))


@every_op
def test_mixed_second_derivatives(name: str) -> None:
    """Between inputs, by every nesting: those that need a derivative of the backward in what it saved."""
    x = OPTIONS["normalize"].arguments()
    inputs = tuple(x[n] for n in ("q", "k", "g", "initial_state"))
    every = (0, 1, 2, 3)

    def loss(op: Callable[..., Any]) -> Callable[..., Tensor]:
        function = function_of(op, x, ["q", "k", "g", "initial_state"])
        return lambda *y: sum(out.sin().sum() for out in function(*y))

    for outer, inner in ((jacfwd, jacrev), (jacrev, jacrev), (jacfwd, jacfwd), (jacrev, jacfwd)):
        got, want = (
            outer(inner(loss(f), argnums=every), argnums=every)(*inputs) for f in (OPERATORS[name], reference.recurrent)
        )
        same(got, want)


@every_op
def test_third_derivative(name: str) -> None:
    x = OPTIONS["gate"].but(T=3, B=1).arguments()
    for n in ("q", "g"):
        got, want = (jacrev(jacrev(grad(loss_of(f, x, n))))(x[n]) for f in (OPERATORS[name], reference.recurrent))
        same(got, want)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("form", [reference.recurrent, reference.chunk])
def test_the_definition_gives_zeros_outside_every_sequence(form: Callable[..., Any], normalize: bool) -> None:
    x = OPTIONS["gate"].but(B=1, T=7, cu=(2, 5), normalize=normalize, state=False).arguments()
    want, _ = form(**x)
    for n in ("q", "k", "v", "g"):
        x[n][:, :2] = x[n][:, 5:] = torch.nan
    assert torch.equal(form(**x)[0], want)
    assert want[:, :2].count_nonzero() == 0 < want[:, 2:5].count_nonzero()


@pytest.mark.parametrize("cu", [(0, 5), (2, 7), (1, 3, 3, 6)])
@pytest.mark.parametrize("option", ["gate", "decay", "normalize"])
@every_op
def test_what_stands_outside_every_sequence_is_without_effect(name: str, option: str, cu: tuple[int, ...]) -> None:
    """NaN there, in inputs, tangents and cotangents: values and derivatives are those of zeros in its place."""
    x = OPTIONS[option].but(B=1, T=7, cu=cu).arguments()
    outside = torch.ones(7, dtype=torch.bool)
    for start, end in itertools.pairwise(cu):
        outside[start:end] = False
    names = differentiable(x)

    def filled(value: float) -> list[Tensor]:
        dirty = [x[n].clone() for n in names]
        for n, y in zip(names, dirty, strict=True):
            if n in ("q", "k", "v", "g"):
                y[:, outside] = value
        return dirty

    function = function_of(OPERATORS[name], x, names)

    def loss(*inputs: Tensor) -> Tensor:
        o, *rest = function(*inputs)
        return o[:, ~outside].sin().sum() + sum(y.sin().sum() for y in rest)

    first = grad(loss, argnums=tuple(range(len(names))))

    def curvature(*inputs: Tensor) -> Tensor:
        return sum(y.square().sum() for y in first(*inputs))

    def results(value: float) -> tuple[Any, ...]:
        torch.manual_seed(0)
        inputs, clean = filled(value), tuple(torch.randn_like(y) for y in filled(0.0))
        directions = tuple(y.clone() for y in clean)
        for n, y in zip(names, directions, strict=True):
            if n in ("q", "k", "v", "g"):
                y[:, outside] = value
        second = vjp(first, *inputs)[1](directions)
        third = jvp(grad(curvature, argnums=tuple(range(len(names)))), tuple(inputs), clean)[1]
        tangents = (jvp(f, tuple(inputs), directions)[1] for f in (function, first))
        return first(*inputs), second, third, *tangents

    same(results(torch.nan), results(0.0))


# ----------------------------------------------------------------------------------------------------------------- vmap

BATCHED: dict[str, tuple[Case, dict[str, int]]] = {
    "q": (SMALL, {"q": 0}),
    "all": (SMALL, {"q": 0, "k": 1, "v": 2, "g": 3, "initial_state": 4}),
    "last dimensions": (SMALL, {"q": -1, "v": -2, "g": -1}),
    "state alone": (SMALL, {"initial_state": 2}),
    "g_gamma alone": (OPTIONS["decay"], {"g_gamma": 0}),
    "g_gamma last, with q": (OPTIONS["normalize decay reverse"], {"g_gamma": 1, "q": 3, "k": 0}),
    "q beside one g_gamma": (OPTIONS["decay"], {"q": 1}),
    "packed": (OPTIONS["packed"], {"q": 1, "v": 0, "initial_state": 1}),
    "packed decay": (OPTIONS["packed decay"], {"k": 0, "g_gamma": 0}),
    "no state out": (OPTIONS["plain"], {"v": 2}),
}


def expand(x: dict[str, Any], dims: dict[str, int], size: int) -> dict[str, Any]:
    """Another value for every sample in the named arguments, stacked along their dimensions."""
    out = dict(x)
    for n, d in dims.items():
        samples = [x[n] * (1 + 0.3 * i) for i in range(size)]
        out[n] = torch.stack(samples, d)
    return out


@pytest.mark.parametrize("case", BATCHED, ids=BATCHED.keys())
@every_op
def test_vmap(name: str, case: str) -> None:
    setting, dims = BATCHED[case]
    names = list(dims)
    x = setting.arguments()
    stacked = expand(x, dims, 3)
    inputs = [stacked[n] for n in names]
    got = vmap(function_of(OPERATORS[name], x, names), tuple(dims.values()))(*inputs)
    for i in range(3):
        sample = [stacked[n].select(dims[n], i) for n in names]
        for a, b in zip(got, function_of(reference.recurrent, x, names)(*sample), strict=True):
            same(a[i], b)


@every_op
def test_vmap_over_offsets(name: str) -> None:
    x = OPTIONS["packed"].arguments()
    offsets = torch.tensor([[0, 2, 2, 6], [0, 0, 5, 5], [1, 2, 3, 4]])
    o, S = vmap(lambda cu: OPERATORS[name](**{**x, "cu_seqlens": cu}))(offsets)
    for i, cu in enumerate(offsets):
        want = reference.recurrent(**{**x, "cu_seqlens": cu})
        # (the reference wants the first offset to be 0)
        want = want if cu[0] == 0 else OPERATORS[name](**{**x, "cu_seqlens": cu})
        same((o[i], S[i]), want)


@every_op
def test_vmap_out_dims_and_nesting(name: str) -> None:
    x = SMALL.arguments()
    qs, vs = torch.stack([x["q"], 2 * x["q"]], 1), torch.stack([x["v"], 3 * x["v"], -x["v"]], 2)
    function = function_of(OPERATORS[name], x, ["q", "v"])
    got = vmap(lambda q: vmap(lambda v: function(q, v)[0], in_dims=2, out_dims=1)(vs), in_dims=1, out_dims=2)(qs)
    want = torch.stack(
        [torch.stack([reference.recurrent(**{**x, "q": q, "v": v})[0] for v in vs.unbind(2)], 1) for q in qs.unbind(1)],
        2,
    )
    same(got, want)


PER_SAMPLE = {n: OPTIONS[n] for n in ("gate", "decay", "normalize", "packed", "packed decay")}


@pytest.mark.parametrize("case", PER_SAMPLE.values(), ids=PER_SAMPLE.keys())
@every_op
def test_per_sample_gradients(name: str, case: Case) -> None:
    """vmap(grad) in every input, where that input is shared by the samples and where it is not."""
    x = case.arguments()
    other = torch.stack([x["v"], 2 * x["v"], 0.5 - x["v"]])
    for n in differentiable(x):
        if n == "v":
            continue

        def loss(op: Callable[..., Any], y: Tensor, v: Tensor, n: str = n) -> Tensor:
            return loss_of(op, {**x, "v": v}, n)(y)

        for shared in (True, False):
            y = x[n] if shared else torch.stack([x[n], 0.5 * x[n], 0.9 * x[n]], -1)
            in_dims = (None if shared else y.ndim - 1, 0)
            got = vmap(grad(lambda y, v: loss(OPERATORS[name], y, v)), in_dims)(y, other)
            want = [
                grad(lambda y, v: loss(reference.recurrent, y, v))(y if shared else y[..., i], v)
                for i, v in enumerate(other)
            ]
            same(got, torch.stack(want))


@every_option
@every_op
def test_is_grads_batched(name: str, case: Case) -> None:
    x = case.arguments(grad=True)
    names = differentiable(x)
    found = []
    random = None
    for op in (OPERATORS[name], reference.recurrent):
        outputs = function_of(op, x, names)(*(x[n] for n in names))
        random = random or [torch.randn(3, *y.shape, dtype=y.dtype) for y in outputs]
        found.append(torch.autograd.grad(outputs, [x[n] for n in names], random, is_grads_batched=True))
    same(*found)


# -------------------------------------------------------------------------------------- what comes in from other layers


@every_op
def test_expanded_gradients(name: str, device: str) -> None:
    """The gradient of a sum has stride 0 in every dimension."""
    for dtype in dtypes(device)[:1]:
        x = Case(T=66, dtype=dtype, normalize=True).arguments(device, grad=True)
        inputs = [x[n] for n in differentiable(x)]
        o, S = OPERATORS[name](**x)
        got = torch.autograd.grad((o.sum(), S.sum()), inputs)
        o, S = OPERATORS[name](**x)
        want = torch.autograd.grad((o, S), inputs, (torch.ones_like(o), torch.ones_like(S)))
        for a, b in zip(got, want, strict=True):
            assert norm(b) > 0
            close(a, b, 1e-6)


@pytest.mark.parametrize("used", ["o", "final_state"])
@every_option
@every_op
def test_one_output_without_a_gradient(name: str, case: Case, used: str) -> None:
    x = case.but(final=True).arguments(grad=True)
    names = differentiable(x)
    inputs = [x[n] for n in names]
    which = 0 if used == "o" else 1
    got, want = (
        torch.autograd.grad(op(**x)[which].sin().sum(), inputs, allow_unused=True, materialize_grads=True)
        for op in (OPERATORS[name], reference.recurrent)
    )
    for n, a, b in zip(names, got, want, strict=True):
        if used == "final_state" and n == "q":
            assert norm(a) == norm(b) == 0
        else:
            same(a, b)


@every_op
def test_gradient_of_some_inputs_only(name: str) -> None:
    for n in INPUTS:
        x = OPTIONS["decay" if n == "g_gamma" else "normalize"].arguments()
        x[n].requires_grad_()
        got, want = (
            torch.autograd.grad(op(**x)[0].sin().sum(), x[n])[0] for op in (OPERATORS[name], reference.recurrent)
        )
        same(got, want)


@every_option
@every_op
def test_dual_numbers(name: str, case: Case) -> None:
    """Forward mode, one input at a time and all at once."""
    x = case.arguments()
    names = differentiable(x)
    tangents = {n: torch.randn_like(x[n]) for n in names}
    for chosen in ([n] for n in names), [names]:
        for some in chosen:
            found = []
            for op in (OPERATORS[name], reference.recurrent):
                with forward_ad.dual_level():
                    duals = {n: forward_ad.make_dual(x[n], tangents[n]) for n in some}
                    outputs = [y for y in op(**{**x, **duals}) if y is not None]
                    found.append([forward_ad.unpack_dual(y).tangent for y in outputs])
            for a, b in zip(*found, strict=True):
                if b is None or norm(b) == 0:  # the final state does not see q
                    assert some == ["q"]
                    assert a is None or norm(a) == 0
                else:
                    same(a, b)


@every_op
def test_dual_numbers_in_the_low_precisions(name: str, device: str) -> None:
    for dtype in dtypes(device):
        if dtype == torch.float64:
            continue
        x = Case(T=66, dtype=dtype, normalize=True).arguments(device)
        names = differentiable(x)
        tangents = tuple(torch.randn_like(x[n]) for n in names)
        _, (o, S) = jvp(function_of(OPERATORS[name], x, names), tuple(x[n] for n in names), tangents)
        exact = {n: y.double().cpu() if isinstance(y, Tensor) else y for n, y in x.items()}
        inputs = tuple(exact[n] for n in names)
        _, want = jvp(function_of(reference.recurrent, exact, names), inputs, tuple(t.double().cpu() for t in tangents))
        assert o.dtype == dtype
        assert S.dtype == torch.float32
        limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        same(o.cpu(), want[0], limit)
        same(S.cpu(), want[1], limit if device == "cuda" else 1e-5)


@pytest.mark.parametrize(
    "shape", [{"T": 0}, {"B": 0}, {"B": 1, "cu": (0,)}, {"B": 1, "cu": (3, 3)}, {"B": 1, "T": 0, "cu": (0, 0)}]
)
@pytest.mark.parametrize("gate", ["g", "g_gamma"])
@pytest.mark.parametrize("normalize", [False, True])
@every_op
def test_nothing_to_attend_to(name: str, normalize: bool, gate: str, shape: dict[str, Any]) -> None:
    """T = 0, B = 0, N = 0: gradients and tangents exist, in the right shapes, and the state passes them on."""
    case = Case(T=5, gate=gate, normalize=normalize).but(**shape)
    x = case.arguments(grad=True)
    names = differentiable(x)
    inputs = tuple(x[n] for n in names)
    function = function_of(OPERATORS[name], x, names)
    outputs = function(*inputs)
    cotangents = [torch.ones_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True)
    for n, leaf, gradient in zip(names, inputs, gradients, strict=True):
        assert gradient.shape == leaf.shape
        want = torch.ones_like(leaf) if n == "initial_state" else torch.zeros_like(leaf)
        assert torch.equal(gradient, want)
    double = torch.autograd.grad(sum(y.sum() for y in gradients), inputs, allow_unused=True, materialize_grads=True)
    assert all(norm(y) == 0 for y in double)
    tangents = tuple(torch.ones_like(y) for y in inputs)
    _, moved = jvp(function, tuple(y.detach() for y in inputs), tangents)
    assert norm(moved[0]) == 0
    assert torch.equal(moved[1], torch.ones_like(outputs[1]))


@every_op
def test_no_graph_when_nobody_asks(name: str) -> None:
    x = SMALL.arguments(grad=True)
    with torch.no_grad():
        assert OPERATORS[name](**x)[0].grad_fn is None
    assert OPERATORS[name](**SMALL.arguments())[0].grad_fn is None
    assert OPERATORS[name](**x)[0].grad_fn is not None
    direct = getattr(ops, name).operator.forward
    assert direct(*x.values())[0].grad_fn is not None


def test_normalize_output_is_differentiable() -> None:
    x = SMALL.but(state=False).arguments(grad=True)
    x["q"], x["k"] = (x[n].detach().abs().requires_grad_() for n in "qk")
    inputs = [x[n] for n in ("q", "k", "v", "g")]
    found = []
    for flag in (True, False):
        o, _ = torch_la.chunk(**{**x, "normalize": flag})
        if not flag:
            o, _ = torch_la.normalize_output(o, x["q"], x["k"], x["g"])
        found.append(torch.autograd.grad(o.sin().sum(), inputs))
    same(*found)

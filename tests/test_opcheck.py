"""torch.library.opcheck, with every utility it has, on every operator and any options."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.optests import generate_tests, make_fx_check

import torch_la
from cases import NAMES, Case, cases
from torch_la import ops
from torch_la.ops import operator, recurrent_step

UTILITIES = list(generate_tests.ALL_TEST_UTILS)
SHORT = [0, 1, 2, 5, 66]
EXAMPLES = max(6, settings().max_examples // 4)  # each runs some ten traces


def short_cases(device: str) -> st.SearchStrategy[Case]:
    # opcheck copies its arguments, and asks for a negative size where two dimensions are empty (PyTorch 2.11 to 2.15).
    return cases(device, lengths=SHORT).filter(lambda case: case.B > 0 or case.T > 0)


def forward_arguments(case: Case, device: str, grad: bool) -> tuple[Any, ...]:
    return tuple(case.arguments(device, grad).values())


def backward_arguments(case: Case, device: str, grad: bool, gate_grad: bool) -> tuple[Any, ...]:
    x = case.arguments(device)
    o, S = torch_la.chunk(**x)
    do, dS = case.cotangents(o, S)
    x = case.arguments(device, grad)
    inputs = [x[n] for n in ("q", "k", "v", "g", "g_gamma", "initial_state", "cu_seqlens")]
    if grad:
        do, dS = do.requires_grad_(), None if dS is None else dS.requires_grad_()
    o = o if case.normalize else None
    return (*inputs, case.scale, case.normalize, case.reverse, o, do, dS, gate_grad)


def step_arguments(case: Case, device: str, pool: bool) -> tuple[Any, ...]:
    x = case.arguments(device)
    q, k, v, g = (None if x[n] is None else x[n][:, 0] for n in ("q", "k", "v", "g"))
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    rows = case.B + 2 if pool else case.B
    state = torch.rand(rows, case.HV, case.K, case.V + case.normalize, dtype=dtype, device=device)
    indices = torch.arange(-1, case.B - 1, device=device) if pool else None
    return q, k, v, state, g, x["g_gamma"], indices, case.scale, case.normalize


def opcheck(op: Any, arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    # Compiled and eager gradients are the same calls; only what the tracer folds around them may round differently.
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    results = torch.library.opcheck(op, arguments, test_utils=UTILITIES, rtol=tolerance, atol=tolerance)
    assert set(results) == set(UTILITIES)
    assert set(results.values()) == {"SUCCESS"}


def test_the_utilities_are_those_torch_has() -> None:
    assert {"test_schema", "test_autograd_registration", "test_faketensor"} <= set(UTILITIES)
    assert {"test_aot_dispatch_static", "test_aot_dispatch_dynamic"} <= set(UTILITIES)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=EXAMPLES)
@given(data=st.data(), grad=st.booleans())
def test_forward(name: str, device: str, grad: bool, data: st.DataObject) -> None:
    case = data.draw(short_cases(device))
    opcheck(getattr(ops, name).operator.forward, forward_arguments(case, device, grad), case.dtype)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=EXAMPLES)
@given(data=st.data(), grad=st.booleans(), gate_grad=st.booleans())
def test_backward(name: str, device: str, grad: bool, gate_grad: bool, data: st.DataObject) -> None:
    case = data.draw(short_cases(device))
    arguments = backward_arguments(case, device, grad, gate_grad)
    opcheck(getattr(ops, name).operator.backward, arguments, case.dtype)


@pytest.mark.parametrize("name", NAMES)
def test_backward_of_an_empty_batch_with_the_default_scale(name: str, device: str) -> None:
    """K ** -0.5 as a symbolic float once tripped PyTorch's tracer where nothing else of the width was left."""
    dtype = torch.float64 if device == "cpu" else torch.float32
    case = Case(B=0, T=0, H=1, K=3, V=2, dtype=dtype, gate="none", state=True, normalize=True)
    opcheck(getattr(ops, name).operator.backward, backward_arguments(case, device, True, False), dtype)


@settings(max_examples=2 * EXAMPLES)
@given(data=st.data(), pool=st.booleans())
def test_step(device: str, pool: bool, data: st.DataObject) -> None:
    case = data.draw(cases(device, lengths=[1], packed=False))
    opcheck(ops.recurrent_step.op, step_arguments(case, device, pool), case.dtype)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_make_fx(name: str, mode: str, device: str, data: st.DataObject) -> None:
    """What the tracer records gives the same numbers: forward and backward operators, and the step."""
    case = data.draw(short_cases(device))
    operator = getattr(ops, name).operator
    make_fx_check(operator.forward, forward_arguments(case, device, False), {}, mode)
    make_fx_check(operator.backward, backward_arguments(case, device, False, True), {}, mode)


def test_a_kernel_gets_a_float_for_a_scale() -> None:
    """Eager calls go around the schema, which would turn an integer into one; Triton compiles for a type."""
    scales: list[Any] = []
    q = torch.randn(1, 3, 1, 2)
    rest = (q, q, None, None, None)
    operator._checked_forward(lambda *inputs: scales.append(inputs[8]))(q, *rest, False, None, 2, False, False)
    operator._checked_backward(lambda *inputs: scales.append(inputs[7]))(
        *(q, *rest, None, 2, False, False, None, q, None, False)
    )
    state, x = torch.zeros(1, 1, 2, 2), q[:, 0]
    recurrent_step._checked(lambda *inputs: scales.append(inputs[7]))(x, x, x, state, None, None, None, 2, False)
    assert scales == [2, 2, 2]
    assert all(type(scale) is float for scale in scales)

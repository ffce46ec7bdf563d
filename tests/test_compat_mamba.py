"""torch_la.compat.mamba: the signatures of mamba_ssm, and the results of the state-space recurrence in float64."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compat_signatures
from cases import close
from torch_la.compat import mamba
from torch_la.compat.mamba import mamba_chunk_scan_combined, selective_state_update

RECORD = json.loads(compat_signatures.RECORD.read_text())["mamba"]


def ssm(
    x: Tensor,  # [B, T, H, P]
    dt: Tensor,  # [B, T, H]
    A: Tensor,  # [H]
    B: Tensor,  # [B, T, G, N]
    C: Tensor,  # [B, T, G, N]
    D: Tensor | None = None,  # [H] or [H, P]
    z: Tensor | None = None,  # [B, T, H, P]
    dt_bias: Tensor | None = None,  # [H]
    initial_states: Tensor | None = None,  # [B, H, P, N]
    seq_idx: Tensor | None = None,  # [B, T]
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2 of https://arxiv.org/abs/2405.21060, discretised as in its section 2, token by token."""
    batch, T, H, P = x.shape
    h = torch.zeros(batch, H, P, B.shape[-1], dtype=x.dtype) if initial_states is None else initial_states
    ys = []
    for t in range(T):
        step = dt[:, t] + (0 if dt_bias is None else dt_bias)
        if dt_softplus:
            step = torch.log(1 + torch.exp(step))
        step = step.clamp(*dt_limit)
        b, c = (y[:, t].repeat_interleave(H // B.shape[2], dim=1) for y in (B, C))  # [B, H, N]
        if seq_idx is not None and t > 0:
            h = h * (seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None, None]
        h = torch.exp(step * A)[..., None, None] * h + torch.einsum("bh,bhp,bhn->bhpn", step, x[:, t], b)
        y = torch.einsum("bhpn,bhn->bhp", h, c)
        if D is not None:
            y = y + (D if D.ndim == 2 else D[:, None]) * x[:, t]
        if z is not None:
            y = y * z[:, t] * torch.sigmoid(z[:, t])
        ys.append(y)
    return torch.stack(ys, 1), h


def arguments(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    batch, T, G, P, N = 2, draw(st.sampled_from([1, 6, 70])), draw(st.integers(1, 2)), 3, 5
    H = G * draw(st.integers(1, 3))
    out: dict[str, Any] = {
        "x": randn(batch, T, H, P),
        "dt": randn(batch, T, H),
        "A": -randn(H).abs(),
        "B": randn(batch, T, G, N),
        "C": randn(batch, T, G, N),
        "dt_softplus": draw(st.booleans()),
    }
    if draw(st.booleans()):
        out["D"] = randn(H) if draw(st.booleans()) else randn(H, P)
    if draw(st.booleans()):
        out["z"] = randn(batch, T, H, P)
    if draw(st.booleans()):
        out["dt_bias"] = randn(H)
    if draw(st.booleans()):
        out["dt_limit"] = (0.2, 0.9)
    return out


@st.composite
def scans(draw: st.DrawFn) -> dict[str, Any]:
    out = arguments(draw)
    batch, T, H, P = out["x"].shape
    if draw(st.booleans()):
        out["initial_states"] = torch.randn(batch, H, P, out["B"].shape[-1], dtype=torch.float64)
    if draw(st.booleans()):
        out["seq_idx"] = torch.randint(0, 3, (batch, T), dtype=torch.int32).sort(1).values
    return out


@pytest.mark.parametrize("name", list(RECORD["signatures"]))
def test_signature(name: str) -> None:
    function = getattr(mamba, name)
    assert inspect.isfunction(function)
    assert compat_signatures.of_function(function) == RECORD["signatures"][name]


@settings(max_examples=25)
@given(scans())
def test_scan(call: dict[str, Any]) -> None:
    """Output, final states and every gradient."""
    inputs = [x.requires_grad_() for x in call.values() if isinstance(x, Tensor) and x.is_floating_point()]
    got = mamba_chunk_scan_combined(**call, chunk_size=16, return_final_states=True)
    want = ssm(**call)
    alone = mamba_chunk_scan_combined(**call, chunk_size=16)
    assert isinstance(alone, Tensor)
    close(alone, want[0], 1e-10)
    for x, y in zip(got, want, strict=True):
        assert x.is_contiguous()
        close(x, y, 1e-10)
    cotangents = [torch.rand_like(y) for y in want]
    gradients = [torch.autograd.grad(ys, inputs, cotangents, materialize_grads=True) for ys in (got, want)]
    for x, y in zip(*gradients, strict=True):
        assert (x - y).norm() <= 1e-9 * max(y.norm(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=5)
@given(st.data())
def test_scan_dtypes(dtype: torch.dtype, data: st.DataObject) -> None:
    call = data.draw(st.composite(arguments)(dtype))
    call["A"] = call["A"].float()  # what models keep in float32
    y, state = mamba_chunk_scan_combined(**call, chunk_size=64, return_final_states=True)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}
    want, want_state = ssm(**exact)
    positive = {name: x.abs() if isinstance(x, Tensor) and name in "xBCDz" else x for name, x in exact.items()}
    for got, right, size in zip((y, state), (want, want_state), ssm(**positive), strict=True):
        limit = 1e-5 if dtype == torch.float32 else 1e-2
        assert (got.double() - right).norm() <= limit * size.norm()  # size: every term of the sums made positive


def test_varlen_states() -> None:
    x, dt, A = torch.randn(1, 9, 2, 3).double(), torch.rand(1, 9, 2).double(), -torch.rand(2).double()
    B, C = torch.randn(2, 1, 9, 1, 4).double()
    cu, seq_idx = torch.tensor([0, 4, 5, 9]), torch.tensor([[0] * 4 + [1] + [2] * 4])
    y, states = mamba_chunk_scan_combined(x, dt, A, B, C, 64, seq_idx=seq_idx, cu_seqlens=cu, return_varlen_states=True)
    assert states.shape == (3, 2, 3, 4)
    for s in range(3):
        part = slice(int(cu[s]), int(cu[s + 1]))
        want, state = ssm(x[:, part], dt[:, part], A, B[:, part], C[:, part])
        close(y[:, part], want, 1e-10)
        close(states[s], state[0], 1e-10)


def expanded(call: dict[str, Any], t: int) -> dict[str, Any]:
    """Token t of a scan, as `selective_state_update` takes it: what is one value for each head, expanded."""
    H, P, N = *call["x"].shape[2:], call["B"].shape[-1]
    out = {name: call[name][:, t] for name in ("x", "B", "C", "z") if name in call}
    out["dt"] = call["dt"][:, t, :, None].expand(-1, -1, P)
    out["A"] = call["A"][:, None, None].expand(H, P, N)
    if "D" in call:
        out["D"] = call["D"] if call["D"].ndim == 2 else call["D"][:, None].expand(H, P)
    if "dt_bias" in call:
        out["dt_bias"] = call["dt_bias"][:, None].expand(H, P)
    return {**out, "dt_softplus": call["dt_softplus"]}


@settings(max_examples=20)
@given(st.data())
def test_update(data: st.DataObject) -> None:
    """Token by token equals the scan; the state is written in place, in a pool of slots too."""
    call = data.draw(st.composite(arguments)())
    call.pop("dt_limit", None)
    call["dt"] = call["dt"].abs() if not call["dt_softplus"] and "dt_bias" not in call else call["dt"]
    (batch, T, H, P), N = call["x"].shape, call["B"].shape[-1]
    initial = torch.randn(batch, H, P, N, dtype=torch.float64)
    want, final = ssm(**call, initial_states=initial, dt_limit=(-math.inf, math.inf))
    pool, slots = initial.clone(), None
    if data.draw(st.booleans()):
        pool, slots = torch.randn(5, H, P, N, dtype=torch.float64), torch.tensor([3, 1], dtype=torch.int32)
        pool[slots] = initial
    before = pool.clone()
    ys = [selective_state_update(pool, **expanded(call, t), state_batch_indices=slots) for t in range(T)]
    close(torch.stack(ys, 1), want, 1e-10)
    close(pool if slots is None else pool[slots], final, 1e-10)
    if slots is not None:
        assert torch.equal(pool[[0, 2, 4]], before[[0, 2, 4]])


def step(H: int = 2, P: int = 3, N: int = 4) -> dict[str, Any]:
    call = {"x": torch.randn(2, 1, H, P), "dt": torch.rand(2, 1, H), "A": -torch.rand(H), "dt_softplus": False}
    call |= {"B": torch.randn(2, 1, 1, N), "C": torch.randn(2, 1, 1, N), "D": torch.randn(H, P)}
    return expanded(call, 0)


def test_update_of_padding() -> None:
    """A row whose slot is -1: zeros out, without the skip connection too, and no state touched."""
    pool, call = torch.randn(3, 2, 3, 4), step()
    before = pool.clone()
    y = selective_state_update(pool, **call, state_batch_indices=torch.tensor([-1, 2]))
    assert torch.equal(y[0], torch.zeros(2, 3))
    assert torch.equal(pool[:2], before[:2])
    alone = before[2:].clone()
    one = {name: x[1:] if isinstance(x, Tensor) and name in ("x", "dt", "B", "C") else x for name, x in call.items()}
    close(y[1:], selective_state_update(alone, **one), 1e-6)
    close(pool[2:], alone, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_update_of_a_state_of_another_dtype(dtype: torch.dtype) -> None:
    call = step()
    wide = torch.randn(2, 2, 3, 4).to(dtype).float()
    narrow = wide.to(dtype)
    close(selective_state_update(narrow, **call), selective_state_update(wide, **call), 1e-6)
    assert torch.equal(narrow, wide.to(dtype))


def test_an_update_leaves_slots_that_it_does_not_name() -> None:
    call = {"state": torch.randn(4, 2, 3, 4, dtype=torch.float64), **step()}
    before = call["state"].clone()
    selective_state_update(**{**call, "state_batch_indices": torch.tensor([2, -1])})
    changed = (call["state"] != before).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


def test_update_without_a_dimension_for_heads() -> None:
    call, state = step(H=1), torch.randn(2, 1, 3, 4)
    flat = {name: x.squeeze(0 if name in "AD" else 1) if isinstance(x, Tensor) else x for name, x in call.items()}
    small = state.squeeze(1).clone()
    y = selective_state_update(small, **flat)
    assert y.shape == (2, 3)
    close(y, selective_state_update(state, **call).squeeze(1), 1e-6)
    close(small, state.squeeze(1), 1e-6)


def test_fullgraph() -> None:
    x, dt, A = torch.randn(2, 20, 2, 3, requires_grad=True), torch.rand(2, 20, 2), -torch.rand(2)
    B, C = torch.randn(2, 2, 20, 1, 4)
    scan = torch.compile(mamba_chunk_scan_combined, fullgraph=True, backend="aot_eager")
    options: dict[str, Any] = {"dt_softplus": True, "seq_idx": torch.arange(20).expand(2, -1) // 7}
    got = scan(x, dt, A, B, C, 16, **options)
    want = mamba_chunk_scan_combined(x, dt, A, B, C, 16, **options)
    close(got, want, 1e-6)
    close(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)), 1e-6)
    call, state = step(), torch.randn(2, 2, 3, 4)
    other = state.clone()
    update = torch.compile(selective_state_update, fullgraph=True, backend="aot_eager")
    close(update(state, **call), selective_state_update(other, **call), 1e-6)
    close(state, other, 1e-6)


X, DT, A_, BC = torch.rand(1, 6, 4, 3), torch.rand(1, 6, 4), -torch.rand(4), torch.rand(1, 6, 2, 5)
SCAN: dict[str, Any] = {"x": X, "dt": DT, "A": A_, "B": BC, "C": BC, "chunk_size": 64}
IDX, CU = torch.zeros(1, 6, dtype=torch.int32), torch.tensor([0, 6])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": X[0]}, ValueError, "x must have 4"),
        ({"x": X.long()}, TypeError, "x must be float32"),
        ({"dt": DT[:, :5]}, ValueError, "dt must be"),
        ({"A": A_[:, None].expand(4, 5)}, ValueError, "A must have 1"),
        ({"B": BC[:, :, :1]}, ValueError, "C must be"),
        ({"B": BC.double()}, TypeError, "B must be"),
        ({"C": BC[..., :4]}, ValueError, "C must be"),
        ({"x": X[:, :, :3], "dt": DT[..., :3], "A": A_[:3]}, ValueError, "multiple of the groups"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"D": torch.rand(3)}, ValueError, "D must be"),
        ({"D": torch.rand(4, 2)}, ValueError, "D must be"),
        ({"z": X[..., :2]}, ValueError, "z must be"),
        ({"dt_bias": torch.rand(3)}, ValueError, "dt_bias must be"),
        ({"dt_limit": (1.0, 0.0)}, ValueError, "dt_limit"),
        ({"dt_softplus": 1}, TypeError, "dt_softplus"),
        ({"initial_states": torch.rand(1, 4, 5, 3)}, ValueError, "initial_states must be"),
        ({"seq_idx": IDX.float()}, TypeError, "seq_idx"),
        ({"seq_idx": IDX[:, :5]}, ValueError, "seq_idx must be"),
        ({"cu_seqlens": CU}, ValueError, "cu_seqlens is read only with"),
        ({"cu_seqlens": CU, "return_varlen_states": True}, ValueError, "needs cu_seqlens and seq_idx"),
        (
            {"cu_seqlens": CU, "seq_idx": IDX, "return_varlen_states": True, "return_final_states": True},
            NotImplementedError,
            "return_varlen_states",
        ),
        ({"state_dtype": torch.bfloat16}, NotImplementedError, "state_dtype"),
        ({"x": X.to("meta")}, TypeError, "B must be on the device of x"),
        ({"z": X.to("meta")}, TypeError, "z must be on the device of x"),
        ({"seq_idx": IDX.to("meta")}, TypeError, "seq_idx must be on the device of x"),
        ({"dt_limit": None}, ValueError, r"dt_limit must be \(low, high\), .*: got dt_limit=None"),
        ({"dt_limit": (1, 2, 3)}, ValueError, r"got dt_limit=\(1, 2, 3\)"),
        ({"dt_limit": (0.0, "a")}, ValueError, r"got dt_limit=\(0.0, 'a'\)"),
    ],
)
def test_scan_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    mamba_chunk_scan_combined(**SCAN)
    with pytest.raises(error, match=message):
        mamba_chunk_scan_combined(**{**SCAN, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"A": -torch.rand(2, 3, 4)}, NotImplementedError, "A must be one value for each head"),
        ({"A": -torch.rand(2, 1, 4).expand(2, 3, 4)}, NotImplementedError, "A must be one value for each head"),
        ({"dt": torch.rand(2, 2, 3)}, NotImplementedError, "dt must be one value"),
        ({"dt_bias": torch.rand(2, 3)}, NotImplementedError, "dt_bias must be one value"),
        ({"x": torch.rand(2, 2, 4)}, ValueError, "x must be"),
        ({"dt": torch.rand(2, 2, 1).expand(2, 2, 4)}, ValueError, "dt must be"),
        ({"B": torch.rand(2, 1, 3)}, ValueError, "B must be"),
        ({"C": torch.rand(2, 2, 4)}, ValueError, "C must be"),
        ({"D": torch.rand(2)}, ValueError, "D must be"),
        ({"z": torch.rand(2, 2, 2)}, ValueError, "z must be"),
        ({"state_batch_indices": torch.tensor([0.0, 1.0])}, TypeError, "state_batch_indices"),
        ({"state_batch_indices": torch.tensor([0])}, ValueError, "state_batch_indices must be"),
        ({"state": torch.rand(3, 2, 3, 4)}, ValueError, "state must be"),
        ({"x": torch.rand(2, 2, 3, requires_grad=True)}, RuntimeError, "has no derivative"),
    ],
)
def test_update_errors(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"state": torch.zeros(2, 2, 3, 4), **step()}
    with pytest.raises(error, match=message):
        selective_state_update(**{**call, **changes})
    assert torch.equal(call["state"], torch.zeros(2, 2, 3, 4))

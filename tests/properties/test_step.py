"""recurrent_step, token after token, is `recurrent`; a pool of slots serves any rows."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

import torch_la
from cases import LIMIT, Case, cases, close, norm

TOKENS = [1, 2, 3, 7]


def token(x: dict[str, Any], t: int) -> dict[str, Any]:
    """The arguments of one step."""
    out = {n: None if x[n] is None else x[n][:, t] for n in ("q", "k", "v", "g")}
    return {**out, "g_gamma": x["g_gamma"], "scale": x["scale"], "normalize": x["normalize"]}


def fresh_state(case: Case, x: dict[str, Any]) -> torch.Tensor:
    shape = (case.B, case.HV, case.K, case.V + case.normalize)
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    state = torch.zeros(shape, dtype=dtype, device=x["q"].device)
    if x["initial_state"] is not None:
        state.copy_(x["initial_state"])
    return state.mT.contiguous().mT if case.strided else state


@given(data=st.data())
def test_steps_are_recurrent(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device, packed=False, lengths=TOKENS, reverse=False, final=True))
    x = case.arguments(device)
    want, S = torch_la.recurrent(**x)
    state = fresh_state(case, x)
    strides = state.stride()
    o = [torch_la.recurrent_step(state=state, **token(x, t)) for t in range(case.T)]
    assert all(y.dtype == case.dtype and y.is_contiguous() for y in o)
    limit = LIMIT[case.dtype]
    close(torch.stack(o, 1), want, limit)
    close(state, S, LIMIT[state.dtype])
    assert state.stride() == strides


@given(data=st.data())
def test_a_pool_of_slots(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device, packed=False, lengths=[1], reverse=False, final=True))
    x = case.arguments(device)
    slots = case.B + 3
    order = data.draw(st.permutations(range(slots)))[: case.B]
    # some rows name a slot outside the pool
    outside = data.draw(st.lists(st.sampled_from([None, -1, -7, slots, slots + 5]), min_size=case.B, max_size=case.B))
    named = [a if b is None else b for a, b in zip(order, outside, strict=True)]
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    indices = torch.tensor(named, dtype=dtype, device=device)

    state = fresh_state(case, x)
    pool = torch.full((slots, *state.shape[1:]), 7.0, dtype=state.dtype, device=device)
    for row, slot in enumerate(order):
        pool[slot] = state[row]
    before = pool.clone()
    o = torch_la.recurrent_step(state=pool, state_indices=indices, **token(x, 0))
    want = torch_la.recurrent_step(state=state, **token(x, 0))
    for row, (slot, out) in enumerate(zip(order, outside, strict=True)):
        if out is None:
            close(o[row], want[row], LIMIT[case.dtype])
            close(pool[slot], state[row], LIMIT[state.dtype])
            before[slot] = pool[slot]
        else:
            assert norm(o[row]) == 0
    assert torch.equal(pool, before)  # no other slot was touched
    assert o.shape == x["v"][:, 0].shape
    assert o.dtype == case.dtype

"""chunk = fused_chunk = recurrent = the reference: outputs and every gradient, every dtype, any options."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cases import GATES, NAMES, Case, cases, check, close, dtypes, norm
from torch_la.ops import reference


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
def test_operator_equals_reference(name: str, device: str, data: st.DataObject) -> None:
    check(name, data.draw(cases(device)), device)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_gate_and_dtype(name: str, normalize: bool, gate: str, device: str) -> None:
    """Drawn cases may miss a combination; these are always there, across three chunks."""
    for i, dtype in enumerate(dtypes(device)):
        case = Case(T=130, groups=2, gate=gate, dtype=dtype, normalize=normalize, reverse=i % 2 == 1, seed=i)
        check(name, case, device)


@given(case=cases(dtype=torch.float64, gates=["none", "weak", "growing", "strong", "g_gamma"]))
def test_chunked_reference_equals_definition(case: Case) -> None:
    arguments = case.arguments()
    want, S = reference.recurrent(**arguments)
    for size in (1, 5, 64):
        o, final_state = reference.chunk(**arguments, chunk_size=size)
        assert norm(o - want) <= 1e-10 * max(norm(want), 1e-30)
        close(final_state, S, 1e-10)

"""What releases of PyTorch get wrong or cannot do around the operators: docs/compile.md tells users how to do without.

Each test fails when a release can do it: then the page, and the release named here, are to be changed. More of the
kind stand beside what they limit: the compile cache in `test_compile_cache.py`, packages in `test_export.py`,
`recurrent_step` on a DTensor in `test_dtensor.py`.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.torch_version import TorchVersion

import torch_la
from cases import norm

pytestmark = pytest.mark.usefixtures("fresh_compiler")
RELEASE = TorchVersion(torch.__version__.split("+")[0])


def fork(q: Tensor, k: Tensor, v: Tensor, state: Tensor, copy: str) -> tuple[Tensor, Tensor, Tensor]:
    """The state and a copy of it, each a step further by another token."""
    other = state.clone() if copy == "clone" else state + 0
    o = torch_la.recurrent_step(q, k, v, state)
    return o, torch_la.recurrent_step(k, q, v, other), other


@pytest.mark.parametrize(("copy", "right"), [("clone", RELEASE >= (2, 15)), ("sum", True)])
def test_a_forked_state(copy: str, right: bool) -> None:
    """pytorch#198031: Inductor takes the clone of an argument for the argument, and returns the other's state."""
    q, k, v = torch.rand(3, 2, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    state = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    here, there = state.clone(), state.clone()
    want = [*fork(q, k, v, here, copy), here]
    got = [*torch.compile(fork, fullgraph=True)(q, k, v, there, copy), there]
    errors = [norm(a - b) / norm(b) for a, b in zip(got, want, strict=True)]
    assert max(errors[:2]) < 1e-5
    assert errors[3] < 1e-5
    assert (errors[2] < 1e-5) == right


@pytest.mark.parametrize(("gate", "works"), [("logsigmoid", RELEASE < (2, 12)), ("softplus", True)])
def test_gates_of_unbacked_length(gate: str, works: bool) -> None:
    """The backward of `logsigmoid` asks whether its input is empty, which a graph for every length cannot know.

    Seen on 2.13 and 2.15. 2.11 does not ask; 2.12 was not tried.
    """

    def run(x: Tensor) -> Tensor:
        g = F.logsigmoid(x) if gate == "logsigmoid" else -F.softplus(-x)
        y = x[..., None]
        return torch_la.chunk(y, y, y, g)[0].sum()

    x = torch.randn(2, 5, 3, requires_grad=True)
    torch._dynamo.decorators.mark_unbacked(x, 1)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    if works:
        compiled(x).backward()
        assert norm(x.grad) > 0
    else:
        with pytest.raises(Exception, match="log_sigmoid_backward"):
            compiled(x)

"""What `import torch_la` costs and loads, in fresh processes; and what happens where torch lacks a private name."""

import subprocess
import sys
from pathlib import Path

import pytest

import torch_la


def run(code: str, *arguments: str) -> str:
    """The standard output of a fresh Python, in a directory without the checkout."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    "module",
    [
        "triton",
        "torch._inductor",
        "torch._dynamo",
        "torch.distributed.tensor",
        "torch.utils.flop_counter",
        "torch_la.ops.kernels.launch",
        "torch_la.ops.sharding",
        "torch_la.nn",
        "sympy",
        "numpy.testing",
    ],
)
def test_import_loads_nothing_heavy(module: str) -> None:
    code = "import sys, torch; before = set(sys.modules); import torch_la; print(*(set(sys.modules) - before))"
    loaded = run(code).split()
    assert "torch_la.ops.operator" in loaded
    assert module not in loaded


def test_import_leaves_cuda_alone() -> None:
    assert run("import torch, torch_la; print(torch.cuda.is_initialized())") == "False"


def test_import_is_quick() -> None:
    code = "import time, torch; start = time.perf_counter(); import torch_la; print(time.perf_counter() - start)"
    assert min(float(run(code)) for _ in range(5)) < 0.1


def test_typed() -> None:
    assert (Path(torch_la.__file__).parent / "py.typed").is_file()


def test_public_names() -> None:
    for name in torch_la.__all__:
        assert hasattr(torch_la, name)
    code = "import torch_la; print(*sorted(n for n in torch_la.__all__))"
    assert run(code).split() == sorted(torch_la.__all__)


def test_the_late_imports_register_whatever_the_order() -> None:
    code = """
import sys
order = sys.argv[1].split(",")
import importlib
for module in order:
    importlib.import_module(module)
import torch
from torch.utils.flop_counter import flop_registry
from torch.distributed.tensor import DTensor
names = ["chunk", "chunk_backward", "fused_chunk", "fused_chunk_backward", "recurrent", "recurrent_backward"]
ops = [getattr(torch.ops.la, n) for n in names]
assert all(op in flop_registry for op in [*ops, torch.ops.la.recurrent_step_]), order
propagator = DTensor._op_dispatcher.sharding_propagator
assert all(op.default in propagator.op_strategy_funcs for op in ops), order
import torch.utils.flop_counter as module
assert type(module.__spec__.loader).__module__ != "torch_la.ops.late"
print("ok")
"""
    names = ["torch_la", "torch.utils.flop_counter", "torch.distributed.tensor"]
    for order in (names, names[::-1], [names[1], names[0], names[2]]):
        assert run(code, ",".join(order)) == "ok"


def test_a_module_that_is_only_looked_up_registers_when_it_is_imported() -> None:
    """Libraries ask `find_spec` whether a module is there; a first import may fail, and a second one succeed."""
    code = """
import importlib.util, sys
import torch_la
for _ in range(2):
    assert importlib.util.find_spec("torch.utils.flop_counter") is not None
    assert importlib.util.find_spec("torch.distributed.tensor") is not None
from torch_la.ops import late
ran = []
late.when_imported("wave", lambda: ran.append(1))
sys.modules["struct"] = None
try:
    import wave
except ImportError:
    pass
assert ran == []
del sys.modules["struct"]
import wave
assert ran == [1]
import torch
from torch.utils.flop_counter import flop_registry
from torch.distributed.tensor import DTensor
assert torch.ops.la.chunk in flop_registry
assert torch.ops.la.chunk.default in DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
print("ok")
"""
    assert run(code) == "ok"


FALLBACK = """
import sys
import torch
owner, name = sys.argv[1].rsplit(".", 1)
import importlib
try:
    owner = importlib.import_module(owner)
except ImportError:
    owner = getattr(importlib.import_module(owner.rsplit(".", 1)[0]), owner.rsplit(".", 1)[1])
gone = getattr(owner, name)
delattr(owner, name)
import torch_la

setattr(owner, name, gone)  # torch itself still wants it
from torch_la.ops import private, reference
assert not private.AVAILABLE
assert private.MISSING == [sys.argv[1]], private.MISSING

torch.manual_seed(0)
B, T, H, K, V = 2, 70, 2, 3, 4
rand = lambda *shape: torch.rand(shape, dtype=torch.float64).requires_grad_()
cu = torch.tensor([0, 10, 10, 60])


def dual(function, q):
    with torch.autograd.forward_ad.dual_level():
        return function(torch.autograd.forward_ad.make_dual(q, q))


def close(xs, ys):
    for x, y in zip(xs, ys, strict=True):
        assert y.norm() > 0
        assert (x - y).norm() <= 1e-9 * y.norm()


for name in ("chunk", "fused_chunk", "recurrent"):
    for packed in (False, True):
        for decay in (False, True):
            rows, states = (1, 3) if packed else (B, B)
            q, k, v = rand(rows, T, H, K), rand(rows, T, H, K), rand(rows, T, H, V)
            g, gamma = (None, rand(H)) if decay else (rand(rows, T, H), None)
            with torch.no_grad():
                (gamma if decay else g).mul_(-0.2)
            S = rand(states, H, K, V + 1)
            x = [q, k, v, g, gamma, S]
            leaves = [y for y in x if y is not None]
            options = dict(initial_state=S, output_final_state=True, cu_seqlens=cu if packed else None, normalize=True)
            firsts, seconds = [], []
            for op in (getattr(torch_la, name), reference.recurrent):
                o, final = op(q, k, v, g, gamma, **options)
                gradients = torch.autograd.grad(o.sin().sum() + final.sin().sum(), leaves, create_graph=True)
                firsts.append([o, final, *gradients])
                loss = sum(y.sin().sum() for y in gradients)
                seconds.append(torch.autograd.grad(loss, leaves))
            close(*firsts)
            close(*seconds)

    function = lambda q: getattr(torch_la, name)(q, k.detach(), v.detach())[0]
    q = q.detach()
    for call in (lambda: torch.func.jvp(function, (q,), (q,)), lambda: dual(function, q)):
        try:
            call()
        except NotImplementedError as error:
            assert sys.argv[1] in str(error), error
        else:
            raise AssertionError("forward mode did not raise")

    compiled = torch.compile(getattr(torch_la, name), fullgraph=True, backend="aot_eager")
    close(compiled(q, k, v)[:1], getattr(torch_la, name)(q, k, v)[:1])
    close(torch.func.vmap(lambda v: getattr(torch_la, name)(q, k.detach(), v)[0])(v.detach()[None]), [function(q)])

state = torch.zeros(1, H, K, V, dtype=torch.float64)
o = torch_la.recurrent_step(q[:, 0], k[:, 0].detach(), v[:, 0].detach(), state)
want, S = torch_la.recurrent(q[:, :1], k[:, :1].detach(), v[:, :1].detach(), output_final_state=True)
close([o, state], [want[:, 0], S])
try:
    torch_la.recurrent_step(q[:, 0], k[:, 0], v[:, 0], state)
except RuntimeError:
    pass
else:
    raise AssertionError("the step took a gradient")
print("ok")
"""


@pytest.mark.parametrize(
    "name",
    ["torch.autograd.function._SingleLevelFunction", "torch._functorch.utils.enable_single_level_autograd_function"],
)
def test_without_a_private_name(name: str) -> None:
    """Reverse mode and double backward by `register_autograd`; forward mode raises instead of returning zeros."""
    assert run(FALLBACK, name) == "ok"

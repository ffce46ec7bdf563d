"""DTensor on two processes: split by heads and by batch; a split along time is redistributed. All in one test."""

import socket
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

import torch_la  # before torch.distributed.tensor, which then calls for the sharding rules
from cases import NAMES, OPERATORS, Case, close, norm

Dims = dict[str, int | None]
# where each argument is split: None is a copy on every rank
HEADS: Dims = {"q": 2, "k": 2, "v": 2, "g": 2, "g_gamma": 0, "initial_state": 1}
BATCH: Dims = {"q": 0, "k": 0, "v": 0, "g": 0, "g_gamma": None, "initial_state": 0}
TIME: Dims = {"q": 1, "k": 1, "v": 1, "g": 1, "g_gamma": None, "initial_state": None}
MIXED: Dims = {"q": 2, "k": 0, "v": 1, "g": None, "g_gamma": None, "initial_state": 3}

BASE = Case(B=2, T=6, H=4, K=3, V=4)
SETTINGS: dict[str, tuple[Case, Dims]] = {
    "heads": (BASE, HEADS),
    "heads, decay, normalize": (BASE.but(gate="g_gamma", normalize=True), HEADS),
    "grouped heads": (BASE.but(H=2, groups=2), HEADS),
    "one key head for three value heads": (BASE.but(H=1, groups=3), HEADS),
    "three heads on two ranks": (BASE.but(H=3), HEADS),
    "three key heads for six value heads": (BASE.but(H=3, groups=2), HEADS),
    "batch": (BASE, BATCH),
    "batch, decay: its gradient is a partial sum": (BASE.but(gate="g_gamma"), BATCH),
    "batch of three on two ranks": (BASE.but(B=3, reverse=True), BATCH),
    "time": (BASE, TIME),
    "time, decay": (BASE.but(gate="g_gamma"), TIME),
    "each another way": (BASE, MIXED),
    "packed, by heads": (BASE.but(B=1, cu=(0, 2, 6)), HEADS),
    "packed, by time": (BASE.but(B=1, cu=(0, 2, 6), normalize=True), TIME),
    "no gate, no state": (BASE.but(gate="none", state=False, final=False), HEADS),
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def forward_backward(op: Any, x: dict[str, Any]) -> list[Tensor]:
    o, S = op(**x)
    outputs = [o] if S is None else [o, S]
    inputs = [y for y in x.values() if isinstance(y, Tensor) and y.requires_grad]
    return [*outputs, *torch.autograd.grad(sum(y.sin().sum() for y in outputs), inputs)]


def worker(rank: int, port: int) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def distributed(x: dict[str, Any], dims: Dims) -> dict[str, Any]:
        out = dict(x)
        for n, y in x.items():
            if isinstance(y, Tensor):
                d = dims.get(n)
                placement = Replicate() if d is None else Shard(d)
                out[n] = distribute_tensor(y.detach(), mesh, [placement]).requires_grad_(y.requires_grad)
        return out

    def equal(got: list[Tensor], want: list[Tensor], what: str) -> None:
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert isinstance(a, DTensor), what
            assert norm(b) > 0, what
            close(a.full_tensor(), b, 1e-9)

    for name in NAMES:
        for what, (case, dims) in SETTINGS.items():
            x = case.arguments(grad=True)
            want = forward_backward(OPERATORS[name], x)
            equal(forward_backward(OPERATORS[name], distributed(x, dims)), want, f"{name}, {what}")

        # Nothing is gathered where the split suits the operator.
        x = BASE.arguments(grad=True)
        for dims, o_at, S_at in ((HEADS, Shard(2), Shard(1)), (BATCH, Shard(0), Shard(0))):
            o, S = OPERATORS[name](**distributed(x, dims))
            assert o.placements == (o_at,), (name, o.placements)
            assert S.placements == (S_at,), (name, S.placements)
        x = distributed(BASE.but(gate="g_gamma").arguments(), BATCH)
        do = distribute_tensor(torch.ones(2, 6, 4, 4, dtype=torch.float64), mesh, [Shard(0)])
        backward = getattr(torch.ops.la, f"{name}_backward")
        inputs = (x[n] for n in ("q", "k", "v", "g", "g_gamma", "initial_state"))
        dgamma = backward(*inputs, None, None, False, False, None, do, None, True)[4]
        assert dgamma.placements == (Partial(),), (name, dgamma.placements)

        torch._dynamo.reset()
        compiled = torch.compile(OPERATORS[name], fullgraph=True, backend="aot_eager")
        for dims in (HEADS, BATCH):
            x = BASE.arguments(grad=True)
            want = forward_backward(OPERATORS[name], x)
            equal(forward_backward(compiled, distributed(x, dims)), want, f"compiled {name}")

    # DTensor would hand back q for an operator whose name ends in an underscore: better refused.
    q, k, v, state = (distribute_tensor(torch.randn(2, 4, *more), mesh, [Shard(1)]) for more in ([3], [3], [5], [3, 5]))
    with pytest.raises(NotImplementedError, match="recurrent_step_"):
        torch_la.recurrent_step(q, k, v, state)
    dist.destroy_process_group()


def test_dtensor() -> None:
    assert torch_la.__version__
    mp.spawn(worker, args=(free_port(),), nprocs=2)

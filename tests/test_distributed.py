"""Several processes, compiled: DTensor on two and four, a tensor-parallel layer, and FSDP2; each equal to one process.

`test_dtensor.py` has the sharding rules one by one. On a machine with two GPUs the same runs over NCCL:
`pytest tests/test_distributed.py -m gpu`.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import torch_la  # before torch.distributed.tensor, which then calls for the sharding rules
from cases import NAMES, OPERATORS, Case, close, norm

HEADS, WIDTH = 4, 8
CASE = Case(B=4, T=6, H=HEADS, K=3, V=4, dtype=torch.float32)
# where the dimension of the batch and of the heads stands in each argument
BATCH = {"q": 0, "k": 0, "v": 0, "g": 0, "initial_state": 0}
HEAD = {"q": 2, "k": 2, "v": 2, "g": 2, "g_gamma": 0, "initial_state": 1}


class Block(nn.Module):
    """Gated linear attention and an MLP, as a tensor-parallel plan wants them: one projection for each of q, k, v."""

    def __init__(self) -> None:
        super().__init__()
        size = HEADS * WIDTH
        self.norms = nn.ModuleList(nn.RMSNorm(size) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.gate = nn.Linear(size, HEADS)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (f(y).unflatten(-1, (-1, WIDTH)) for f in (self.q, self.k, self.v))
        o, _ = torch_la.chunk(q, k, v, F.logsigmoid(self.gate(y)))
        x = x + self.out(o.flatten(-2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


def forward_backward(op: Callable[..., Any], x: dict[str, Any]) -> list[Tensor]:
    o, S = op(**x)
    inputs = [y for y in x.values() if isinstance(y, Tensor) and y.requires_grad]
    return [o, S, *torch.autograd.grad(o.sin().sum() + S.sin().sum(), inputs)]


def dtensor(device: str, world: int) -> None:
    """By heads, by batch, and on four processes both at once."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    meshes: list[tuple[tuple[int, ...], list[dict[str, int]]]] = [((world,), [HEAD]), ((world,), [BATCH])]
    if world == 4:
        meshes.append(((2, 2), [BATCH, HEAD]))
    for shape, dims in meshes:
        mesh = init_device_mesh(device, shape)

        def split(x: dict[str, Any], mesh: Any = mesh, dims: Any = dims) -> dict[str, Any]:
            out = dict(x)
            for n, y in x.items():
                if isinstance(y, Tensor):
                    placements = [Shard(d[n]) if n in d else Replicate() for d in dims]
                    out[n] = distribute_tensor(y.detach(), mesh, placements).requires_grad_()
            return out

        for name in NAMES if world == 2 else NAMES[:1]:  # the rules are the same for every operator
            for case in (CASE, CASE.but(gate="g_gamma", normalize=True)):
                torch._dynamo.reset()
                compiled = torch.compile(OPERATORS[name], fullgraph=True, backend="aot_eager")
                x = case.arguments(device, grad=True)
                got, want = forward_backward(compiled, split(x)), forward_backward(OPERATORS[name], x)
                for a, b in zip(got, want, strict=True):
                    assert norm(b) > 0
                    close(a.full_tensor(), b, 1e-5)
                # nothing was gathered for the output
                assert got[0].placements == tuple(Shard(d["q"]) for d in dims), (name, got[0].placements)


def tensor_parallel(device: str, world: int) -> None:
    """The usual plan: q, k, v, gate by columns, the output by rows; each process sees its heads as plain tensors."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    alone = Block().to(device)
    torch.manual_seed(0)
    columns, rows = ColwiseParallel(), RowwiseParallel()
    plan = {**dict.fromkeys(("q", "k", "v", "gate", "up"), columns), "out": rows, "down": rows}
    together = parallelize_module(Block().to(device), init_device_mesh(device, (world,)), plan)
    x = torch.randn(2, 10, HEADS * WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    want = alone(x)
    got = torch.compile(together, fullgraph=True, backend="aot_eager")(x)
    close(got, want, 1e-5)
    want.sin().sum().backward()
    got.sin().sum().backward()
    for (n, a), (m, b) in zip(together.named_parameters(), alone.named_parameters(), strict=True):
        assert n == m
        assert norm(b.grad) > 0
        close(a.grad.full_tensor() if hasattr(a.grad, "full_tensor") else a.grad, b.grad, 1e-5)


def fsdp(device: str, world: int) -> None:
    """Each block compiled in one graph and sharded with `fully_shard`; two steps; every process has its own batch."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(device)
    alone = copy.deepcopy(model)
    for block in model:
        block.compile(fullgraph=True)
        fully_shard(block)
    fully_shard(model)
    random = torch.Generator().manual_seed(2)
    for _ in range(2):
        x = torch.randn(2 * world, 10, HEADS * WIDTH, generator=random).to(device)
        for net, inputs in ((model, x.chunk(world)[dist.get_rank()]), (alone, x)):
            net.zero_grad()
            net(inputs).square().mean().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert norm(b.grad) > 0
        close(a.grad.full_tensor(), b.grad, 1e-4)  # means of means, in another order
        close(a.full_tensor(), b, 1e-5)


WORK = {f.__name__: f for f in (dtensor, tensor_parallel, fsdp)}


def worker(rank: int, world: int, device: str, store: str, what: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world)
    WORK[what](device, world)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads outlive the group; Python would abort where one of them still frees a tensor


RUNS = [("dtensor", 2), ("dtensor", 4), ("tensor_parallel", 2), ("fsdp", 2)]
PARAMETERS = [pytest.param(*run, "cpu", id=f"{run[0]}-{run[1]}") for run in RUNS]
if torch.cuda.device_count() >= 2:
    PARAMETERS += [
        pytest.param(*run, "cuda", id=f"{run[0]}-{run[1]}-nccl", marks=pytest.mark.gpu) for run in RUNS if run[1] == 2
    ]


@pytest.mark.parametrize(("what", "world", "where"), PARAMETERS)
def test_equal_to_one_process(what: str, world: int, where: str, tmp_path: Path) -> None:
    mp.spawn(worker, args=(world, where, str(tmp_path / "store"), what), nprocs=world)

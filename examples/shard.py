"""Shard: the heads of a layer on two processes (tensor parallelism by DTensor), with the gradients of one process."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import torch_la


def worker(rank: int, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    layer = torch_la.nn.LinearAttention(32, 4, decay="data", output_gate=True)
    x = torch.randn(2, 50, 32)
    layer(x).square().mean().backward()
    want = {name: weight.grad for name, weight in layer.named_parameters()}
    y = layer(x)
    layer.zero_grad()

    # Each process holds two of the four heads. DTensor knows how the operator splits.
    mesh = init_device_mesh("cpu", (2,))
    heads = ColwiseParallel(use_local_output=False)
    plan = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "decay_proj"), heads)
    parallelize_module(layer, mesh, {**plan, "o_proj": RowwiseParallel()})
    torch.testing.assert_close(layer(x), y)
    layer(x).square().mean().backward()
    for name, weight in layer.named_parameters():
        assert isinstance(weight, DTensor)
        torch.testing.assert_close(weight.grad.full_tensor(), want[name])
    if rank == 0:
        local = layer.q_proj.weight.to_local().shape
        print(f"4 heads on 2 processes, q_proj {tuple(local)} on each: outputs and gradients as on one", flush=True)
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads outlive the group; Python would abort where one of them still frees a tensor


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, (port,), nprocs=2)

"""`explain`: its picks and errors are those of the call, its plan is what the launcher does."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_la
from cases import NAMES, OPERATORS, Case
from torch_la import checks, doctor

BASE = Case(B=1, T=5000, H=2, K=64, V=48, dtype=torch.float32)
PACKED = (0, 1000, 1000, 4100, 4900)
CASES = {
    "no gate": BASE.but(gate="none", state=False, final=False),
    "gate": BASE.but(groups=2),
    "one sequence whole": BASE.but(T=500, B=3),
    "fixed decay, normalised": BASE.but(gate="g_gamma", normalize=True),
    "fixed decay in half": BASE.but(gate="g_gamma", half_gate=True, dtype=torch.float16, groups=2),
    "half": BASE.but(dtype=torch.bfloat16, B=2, groups=2, normalize=True),
    "many heads": BASE.but(H=140, T=4200, K=4, V=4, gate="g_gamma"),
    "wide": BASE.but(K=200, V=30),
    "packed": BASE.but(cu=PACKED),
    "packed, normalised": BASE.but(cu=PACKED, normalize=True, gate="none", long_offsets=False),
    "packed, whole": BASE.but(T=600, cu=(0, 200, 600), dtype=torch.float16),
    "reverse": BASE.but(reverse=True, scale=0.0),
    "copied": BASE.but(B=2, strided=True, T=30),
    "no tokens": BASE.but(T=0),
    "no sequences": BASE.but(T=9, cu=(0,)),
}


# ------------------------------------------------------------------------------------ the plan, beside what is launched


Found = tuple[list[tuple[str, Any]], int]


def record(case: Case, x: dict[str, Any], op: str, backward: bool) -> Found:
    """What the launcher does with these tensors: its launches with their grids, and bytes allocated beside the results.

    No kernel runs: each is replaced by a note of its call.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    from torch_la.ops.kernels import launch

    launches: list[tuple[str, Any]] = []
    allocated = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal allocated
            out = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if name in ("empty", "zeros", "sum", "_to_copy", "clone", "zeros_like"):
                allocated += out.nbytes
            label = {"sum": "[sum]", "_to_copy": "[copy]", "clone": "[copy]", "copy_": "[copy]", "zero_": "[zero]"}
            label |= {"zeros": "[zeros]", "zeros_like": "[zeros_like]"}
            if name in label:
                launches.append((label[name], None))
            return out

    class Kernel:
        def __init__(self, kernel: Any) -> None:
            self.name = kernel.fn.__name__

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: launches.append((self.name, math.prod(grid)))

    tensors = [x[n] for n in ("q", "k", "v", "g", "g_gamma", "initial_state")]
    do, o = torch.ones_like(x["v"]), torch.ones_like(x["v"]) if case.normalize else None
    dS = torch.ones(case.N, case.HV, case.K, case.V + case.normalize) if case.final else None
    with pytest.MonkeyPatch.context() as patch, Count():
        for name, value in list(vars(launch).items()):
            if hasattr(value, "arg_names"):
                patch.setattr(launch, name, Kernel(value))
        scale = case.K**-0.5 if case.scale is None else case.scale
        options = scale, case.normalize, case.reverse
        if backward:
            out: Any = launch.backward(op, *tensors, x["cu_seqlens"], *options, o, do, dS, True)
        else:
            out = launch.forward(op, *tensors, case.final, x["cu_seqlens"], *options)
    return launches, allocated - sum(y.nbytes for y in out if y is not None)


def compare() -> int:
    """Every case, explained and recorded. In Triton's interpreter CPU tensors take the way of CUDA's."""
    failed = 0
    for name, case in CASES.items():
        x = case.arguments()
        for op in NAMES:
            told = torch_la.explain(**x, op=op)
            for backward, it in enumerate((told.forward, told.backward)):
                made = record(case, x, op, bool(backward))
                said = [(launch.name, launch.programs) for launch in it.launches or ()], it.workspace
                failed += said != made
                if said != made:
                    print(f"{name}, {op}: {it.name}\n  told {said}\n  made {made}")
    print(f"{failed} failed")
    return failed


def test_the_plan_is_what_the_launcher_does() -> None:
    """In a process of its own: the interpreter must be chosen before torch_la is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


# ---------------------------------------------------------------------------------------------------- what can be seen


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("T", [1, 4, 5, 200])
@pytest.mark.parametrize(("B", "HV", "V"), [(2, 4, 64), (4, 32, 64), (1, 64, 65), (1, 64, 64)])
def test_the_operator_is_that_of_the_call(T: int, B: int, HV: int, V: int, packed: bool) -> None:
    called = []

    class Stop(Exception):
        pass

    def stop(name: str) -> Any:
        def call(*_: Any) -> None:
            called.append(name)
            raise Stop

        return call

    q, v = torch.zeros(1 if packed else B, T, 1, 2), torch.zeros(1 if packed else B, T, HV, V)
    cu = torch.zeros(B + 1, dtype=torch.int32) if packed else None
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.setitem(getattr(torch_la.ops, name).operator.kernels, "cpu", stop(name))
        with pytest.raises(Stop):
            torch_la.linear_attention(q, q, v, cu_seqlens=cu)
    told = torch_la.explain(q, q, v, cu_seqlens=cu)
    assert [told.op] == ["la::" + name for name in called]
    walks = B * HV * -(-V // 64)
    assert told.why.startswith(f"N HV ceil(V / 64) = {walks} walks")
    S = torch.zeros(B, HV, 2, V)
    assert torch_la.explain(q, q, v, initial_state=S, cu_seqlens=cu).op == told.op  # a CPU never gains by recurrence
    assert torch_la.explain(q, q, v, cu_seqlens=cu, device="cuda").op == told.op
    there = torch_la.explain(q, q, v, initial_state=S, cu_seqlens=cu, device="cuda")
    assert there.op == ("la::recurrent" if T <= 4 else told.op)
    assert there.why.startswith(f"T = {T} behind an initial state is at most 4" if T <= 4 else told.why)


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_those_of_the_counter(name: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x = Case(T=70, groups=2).arguments(grad=True)
    with FlopCounterMode(display=False) as counter:
        o, S = OPERATORS[name](**x)
    forward = counter.get_total_flops()
    with counter:
        (o.sum() + S.sum()).backward()
    told = torch_la.explain(**x, op=name)
    assert told.forward.flops == forward > 0
    assert told.forward.flops + told.backward.flops == counter.get_total_flops() + forward


def test_floors_are_the_tensors() -> None:
    """Every input and output once: counted from those that a call takes and returns."""
    for case in (
        Case(T=70, groups=2),
        Case(B=1, T=70, cu=(0, 60), normalize=True, gate="g_gamma", dtype=torch.float16),
    ):
        x = case.arguments(grad=True)
        o, S = torch_la.chunk(**x)
        given = [y for y in x.values() if isinstance(y, Tensor)]
        leaves = [y for y in given if y.requires_grad]
        gradients = torch.autograd.grad((o.float().sum() + S.sum()), leaves)
        told = torch_la.explain(**x)
        assert told.forward.floor == sum(y.nbytes for y in [*given, o, S])
        kept = [o] if case.normalize else []
        assert told.backward.floor == sum(y.nbytes for y in [*given, *kept, o, S, *gradients])


def test_on_a_cpu() -> None:
    told = torch_la.explain(*(torch.zeros(1, 70, 2, 4) for _ in range(3)))
    assert told.path == "cpu: ATen, chunks of 64 tokens"
    assert told.forward.launches is None
    text = str(told)
    assert text.splitlines()[0] == "la::chunk on cpu: ATen, chunks of 64 tokens"
    assert "forward   0.0001523 GFLOP, memory floor 8.75 KiB" in text, text


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: None)
    told = torch_la.explain(*(meta(1, 70, 2, 4) for _ in range(3)))
    assert told.path == "cuda: Triton, which is not installed"
    assert "pip install triton" in told.notes[0]
    assert told.forward.floor == 4 * 70 * 2 * 4 * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_for_a_gpu_that_is_not_here() -> None:
    """Shapes alone decide, so meta tensors, CPU tensors with device="cuda" and fake CUDA tensors give the same."""
    pytest.importorskip("triton")
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    shape = (1, 131072, 4, 128)
    told = torch_la.explain(*(meta(*shape) for _ in range(3)), g=meta(*shape[:3]))
    assert told.op == "la::chunk"
    assert told.path == f"cuda: Triton {doctor.installed('triton')}"
    assert [launch.name for launch in told.forward.launches or ()] == [
        "gate_sums",
        "local_state",
        "scan",
        "hopper.walk",
    ]
    assert told.forward.segments is not None
    assert told.forward.segments > 1
    assert any("132 multiprocessors" in note for note in told.notes)
    assert f"in {told.forward.segments} pieces of up to {told.forward.segment} tokens, 4 launches" in str(told)
    mode = FakeTensorMode()
    fake = [FakeTensor(mode, meta(*shape), torch.device("cuda:0")) for _ in range(3)]
    there = torch_la.explain(*fake, g=FakeTensor(mode, meta(*shape[:3]), torch.device("cuda:0")))
    assert (there.forward, there.backward) == (told.forward, told.backward)


def test_bytes_of_the_launches() -> None:
    """One launch moves the floor; the sums of gates and the states of segments come on top."""
    pytest.importorskip("triton")
    heads, T, D = 140, 300, 64
    q, g = meta(1, T, heads, D), meta(1, T, heads)
    plain = torch_la.explain(q, q, q, op="chunk").forward
    assert plain.moved == plain.floor == 4 * q.nbytes
    gated = torch_la.explain(q, q, q, g, op="chunk").forward
    assert gated.floor == plain.floor + g.nbytes
    assert gated.moved == gated.floor + 2 * (2 * g.nbytes)  # written and read, in float32
    assert gated.workspace == 2 * g.nbytes
    q = meta(1, 65536, 2, D)
    cut = torch_la.explain(q, q, q, op="chunk").forward
    assert cut.segments is not None
    states = cut.segments * 2 * D * D * 4
    assert cut.segments > 1
    assert cut.workspace == states
    assert cut.moved == cut.floor + 2 * q.nbytes + 4 * states  # k and v again; states written, scanned, read


def test_the_plan_is_for_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = []
    for count in (60, 120):
        properties = types.SimpleNamespace(multi_processor_count=count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, it=properties: it)
        q = meta(1, 1 << 20, 1, 64)
        told = torch_la.explain(q, q, q)
        assert not any("multiprocessors" in note for note in told.notes)
        found.append(told.forward.segments)
    assert found[0] is not None
    assert found[1] is not None
    assert 1.8 < found[1] / found[0] < 2.2


def test_the_tiles_are_those_of_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose tiles the hardware copies are longer pipelines, for the chips that have the memory."""
    pytest.importorskip("triton")
    from torch_la.ops.kernels import tiles

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    q = meta(1, 1 << 19, 1, 128)
    found = {}
    monkeypatch.setattr(tiles, "hopper", False)
    for capability in ((8, 0), (9, 0), (10, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        launches = torch_la.explain(q, q, q).forward.launches or ()
        found[capability] = launches[-1]
    assert found[9, 0].stages == found[10, 0].stages > found[8, 0].stages == found[12, 0].stages
    monkeypatch.setattr(tiles, "hopper", True)
    launches = {}
    for capability in ((9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        launches[capability] = (torch_la.explain(q, q, q).forward.launches or ())[-1]
    assert [it.name for it in launches.values()] == ["hopper.walk", "forward"]
    assert (launches[9, 0].block, launches[9, 0].warps) == (64, 8)  # one head: programs of one consumer
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for heads, op, block in ((64, "fused_chunk", 64), (67, "fused_chunk", 128), (67, "chunk", 64), (128, "chunk", 128)):
        q = meta(1, 4096, heads, 128)
        told = torch_la.explain(q, q, q, op=op)
        assert (told.forward.launches or ())[-1].block == block  # of 128 if they fill half of the GPU, uncut
        assert told.forward.segments == 1
    for width, names in ((128, ["hopper.backward"]), (256, ["hopper.walk"] * 3)):
        q = meta(4, 8192, 8, width)
        told = torch_la.explain(q, q, q)
        assert [it.name for it in told.backward.launches or ()] == names
    q, g = meta(8, 4096, 16, 128), meta(8, 4096, 16, dtype=torch.float32)
    first, second, last = (torch_la.explain(q, q, q, g).backward.launches or ())[1:]
    assert [first.name, second.name, last.name] == ["hopper.backward", "hopper.backward", "gate_gradient"]
    # each reads the four inputs and the gates; the states of all chunks pass from one to the other; q.dq and k.dk
    both = (4 + 2) * q.nbytes + (1 + 21) * g.nbytes
    assert first.bytes == both + 2 * q.nbytes
    assert second.bytes == both + q.nbytes + g.nbytes // 8 + g.nbytes // 64
    for width, blocks in ((128, (128, 128)), (256, (128, 64))):  # without the normaliser, and with it
        q = meta(8, 4096, 32, width)
        walks = [(torch_la.explain(q, q, q, normalize=it).forward.launches or ())[-1] for it in (False, True)]
        assert [(it.name, it.block) for it in walks] == [("hopper.walk", block) for block in blocks]


def test_recurrent_has_one_stage() -> None:
    """What the doctor recommends where software pipelines are in doubt."""
    pytest.importorskip("triton")
    q = meta(1, 65536, 2, 64)
    told = torch_la.explain(q, q, q, q[..., 0], normalize=True, op="recurrent")
    stages = {launch.stages for it in (told.forward, told.backward) for launch in it.launches or ()}
    assert stages == {None, 1}


def test_copies_are_told() -> None:
    pytest.importorskip("triton")
    q, v = meta(1, 4, 2, 70).permute(0, 3, 2, 1), meta(1, 70, 2, 4)
    told = torch_la.explain(q, v, v, op="chunk").forward
    assert told.launches is not None
    assert [(launch.name, launch.bytes) for launch in told.launches if launch.name[0] == "["] == [
        ("[copy]", 2 * q.nbytes)
    ]


@pytest.mark.gpu
def test_nothing_happens_on_the_gpu() -> None:
    q = torch.randn(1, 4096, 4, 64, device="cuda", dtype=torch.bfloat16)
    cu = torch.tensor([0, 7, 4096], device="cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    told = torch_la.explain(q, q, q, g=q[..., 0], cu_seqlens=cu, op="chunk")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert told.path.startswith("cuda:0: Triton")
    assert not any("multiprocessors" in note for note in told.notes)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gate", "fixed decay, normalised", "half", "packed"])
def test_the_launches_on_a_gpu(name: str) -> None:
    """Beside what the profiler sees of Triton's kernels."""
    x = CASES[name].arguments("cuda", grad=True)
    told = torch_la.explain(**x, op="chunk")
    kernels = {launch.name for it in (told.forward, told.backward) for launch in it.launches or ()}
    torch_la.chunk(**x)  # compiles
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        o, S = torch_la.chunk(**x)
        torch.cuda.synchronize()
    seen = sorted((e.time_range.start, e.name) for e in profile.events() if e.name in kernels)
    assert [n for _, n in seen] == [launch.name for launch in told.forward.launches or () if launch.programs]
    (o.float().sum() + S.sum()).backward()
    torch.cuda.synchronize()
    leaves = [y for y in x.values() if isinstance(y, Tensor) and y.requires_grad]
    o, S = torch_la.chunk(**x)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.autograd.grad([o, S], leaves, [torch.ones_like(o), torch.ones_like(S)])
        torch.cuda.synchronize()
    seen = sorted((e.time_range.start, e.name) for e in profile.events() if e.name in kernels)
    assert [n for _, n in seen] == [launch.name for launch in told.backward.launches or () if launch.programs]


# --------------------------------------------------------------------------------------------------------------- errors


X = Case(T=70, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(2, 70, 2, 9)}, ValueError, r"k must be \[B, T, H, K\]"),
        ({"q": None}, TypeError, "q must be a torch.Tensor: got q=None"),
        ({"g": torch.zeros(2, 70)}, ValueError, "g must have 3 dimensions"),
        ({"scale": "1"}, TypeError, "scale must be a number"),
        ({"normalize": 1}, TypeError, "normalize must be a bool"),
        ({"op": "fused"}, ValueError, "op must be None or one of chunk, fused_chunk, recurrent: got op='fused'"),
        ({"device": "mps"}, ValueError, "kernels for cpu and cuda: got device='mps'"),
    ],
)
def test_errors_are_those_of_the_call(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torch_la.explain(**{**X.arguments(), **change})


def test_the_contract_of_the_device_that_is_asked_about() -> None:
    wide, double = torch.zeros(1, 9, 1, 300), torch.zeros(1, 9, 1, 3, dtype=torch.float64)
    torch_la.explain(wide, wide, wide)
    with pytest.raises(ValueError, match=f"q may be at most {checks.MAX_WIDTH_CUDA} wide on CUDA"):
        torch_la.explain(wide, wide, wide, device="cuda")
    with pytest.raises(TypeError, match="q may be float64 only on the CPU"):
        torch_la.explain(double, double, double, device="cuda")
    with pytest.raises(TypeError, match="k must be on the device of q"):
        torch_la.explain(meta(1, 9, 1, 3), torch.zeros(1, 9, 1, 3).bfloat16(), meta(1, 9, 1, 3))


if __name__ == "__main__":
    raise SystemExit(compare())

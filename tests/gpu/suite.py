# ruff: noqa: C408, E731
"""The proof of the kernels on a GPU: every op, dtype, width and option against float64, and the rest of the contract.

    python tests/gpu/suite.py --json OUT [--only cases|extras|timing|tiles ...] [--jobs 12] [--match SUBSTRING] [--full]
    python tests/gpu/suite.py --sanitize WIDTH [--hopper]     one small case of each kernel, for compute-sanitizer

Errors are |x - reference| / |reference| in the Euclidean norm. The truth is `reference.chunk` in float64 on the same
device, with autograd. Where the normaliser's gradients cancel ("cancels"), the norm is that of the terms that do so:
`tune.held_denominator`. Free memory is filled with NaN before each case: an element that no kernel wrote shows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from torch_la import tune
from torch_la.ops import reference
from torch_la.ops.kernels import launch, tiles

LIMITS = {"bf16": 5e-3, "fp16": 1e-3, "tf32": 1e-3, "ieee": 1e-5}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
WIDTHS = [16, 32, 60, 64, 100, 128, 192, 256, (1, 1), (5, 7), (64, 128), (128, 64), (128, 256), (256, 40)]
DEVICE = "cuda"
DESCRIBED, HOPPER = tiles.described, tiles.hopper
copy_bandwidth: float | None = None  # TB/s, measured with the timings


def inputs(case: dict) -> dict:
    """Fresh tensors for a case. q, k and v are slices of one packed tensor where shapes allow."""
    dtype = DTYPES[case["dtype"]]
    B, T, H, HV, K, V = (case[x] for x in ("B", "T", "H", "HV", "K", "V"))
    norm = case["normalize"]
    N = B
    cu = None
    if case.get("cu") is not None:
        cu = torch.tensor(case["cu"], device=DEVICE, dtype=torch.int64 if case.get("long") else torch.int32)
        N = len(case["cu"]) - 1
    r = lambda *s: torch.randn(*s, device=DEVICE)
    qkv = r(B, T, 2 * H * K + HV * V)
    if norm:
        qkv[..., : 2 * H * K] = qkv[..., : 2 * H * K].abs() + 0.1
    qkv = qkv.to(dtype)
    q, k, v = (
        x.unflatten(-1, s)
        for x, s in zip(qkv.split([H * K, H * K, HV * V], -1), ((H, K), (H, K), (HV, V)), strict=True)
    )
    g = gamma = None
    if case["gate"] == "gamma":
        # dg_gamma is one number for each head, and grows with its memory: heads much alike, so that the norm
        # is one over many numbers. From case to case the memory goes from 5 to 500 tokens.
        gamma = -(0.2, 0.05, 0.01, 0.002)[case["seed"] % 4] * (0.5 + torch.rand(HV, device=DEVICE))
    elif case["gate"] != "none":
        g = torch.nn.functional.logsigmoid(r(B, T, HV)) / 8
        if case["gate"] == "strong":
            g = torch.full_like(g, -20.0)
        elif case["gate"] == "reset":
            g = torch.where(torch.rand_like(g) < 0.05, -1e4, g)
        elif case["gate"] == "mixed":
            u = torch.rand_like(g)
            g = torch.where(u < 0.1, -20.0, torch.where(u < 0.15, -torch.inf, g))
        elif case["gate"] == "rare":
            u = torch.rand_like(g)
            g = torch.where(u < 0.01, -20.0, torch.where(u < 0.015, -torch.inf, g))
        elif case["gate"] == "edge":  # mild gates of whole segments of 192 tokens next to a reset
            g[:, 191 if case["reverse"] else 192 :: 384] = -1e4
        elif case["gate"] == "half":
            g = g.to(dtype)
    S0 = dS1 = None
    if case["state"]:
        shape = (N, HV, K, V + norm)
        S0 = torch.rand(*shape, device=DEVICE) if norm else r(*shape)
        S0 = S0.transpose(-1, -2).contiguous().transpose(-1, -2)  # strided
        dS1 = r(*shape)
    do = r(B, HV, T, V).to(dtype).transpose(1, 2)
    return dict(q=q, k=k, v=v, g=g, gamma=gamma, S0=S0, dS1=dS1, do=do, cu=cu)


def truth(case: dict, x: dict, form: Callable = reference.chunk) -> dict:
    names = ["q", "k", "v", "g", "gamma", "S0"]
    # exp(-1e4) is 0 too, and does not turn the differences of the chunked form into inf - inf
    leaves = [None if x[n] is None else x[n].detach().double() for n in names]
    leaves = [y if y is None else y.clamp_min(-1e4) if n == "g" else y for n, y in zip(names, leaves, strict=True)]
    leaves = [y if y is None else y.clone().requires_grad_() for y in leaves]
    o, S = form(*leaves, True, x["cu"], case["scale"], case["normalize"], case["reverse"])
    loss = (o * x["do"].double()).sum()
    if x["dS1"] is not None:
        loss = loss + (S * x["dS1"].double()).sum()
    fixed = ("g", "gamma") if case.get("fixed") else ()  # decays that want no gradient take another way backward
    used = [(n, leaf) for n, leaf in zip(names, leaves, strict=True) if leaf is not None and n not in fixed]
    grads = torch.autograd.grad(loss, [leaf for _, leaf in used], allow_unused=True)
    out = dict(o=o.detach(), S=S.detach())
    for (n, leaf), grad in zip(used, grads, strict=True):
        out["d" + n] = torch.zeros_like(leaf) if grad is None else grad
    return out


def ours(case: dict, x: dict) -> dict:
    torch.set_float32_matmul_precision("highest" if case["dtype"] == "ieee" else "high")
    tiles.segment = case.get("segment")
    tiles.described = 0 if case.get("copied", True) else tiles.NEVER
    tiles.hopper = case.get("hopper", False)
    options = (case["scale"], case["normalize"], case["reverse"])
    qkvg = (x["q"], x["k"], x["v"], x["g"], x["gamma"], x["S0"])
    o, S = launch.forward(case["op"], *qkvg, True, x["cu"], *options)
    out = dict(o=o, S=S)
    if case.get("backward", True):
        saved = o if case["normalize"] else None
        grads = launch.backward(case["op"], *qkvg, x["cu"], *options, saved, x["do"], x["dS1"], not case.get("fixed"))
        out |= {"d" + n: y for n, y in zip(["q", "k", "v", "g", "gamma", "S0"], grads, strict=True) if y is not None}
    tiles.segment = None
    tiles.described = DESCRIBED
    tiles.hopper = HOPPER
    return out


plans: list = []  # of the calls of the case that runs: what they really chose
_plan = launch._plan


def _noted(*arguments: object) -> object:
    plans.append(_plan(*arguments))
    return plans[-1]


launch._plan = _noted


def poison() -> None:
    """Fills what the caching allocator will hand out next with NaN."""
    blocks = [torch.full((size,), float("nan"), device=DEVICE) for size in [1 << 24] * 4 + [1 << 16] * 64 + [64] * 64]
    del blocks


def error(a: torch.Tensor, b: torch.Tensor, terms: torch.Tensor | None = None) -> float:
    a, b = a.double(), b.double()
    if not torch.isfinite(a).all():
        return float("inf")
    assert torch.isfinite(b).all(), "the reference is not finite"
    norm = b.norm() if terms is None else torch.maximum(b.norm(), terms.norm())
    return ((a - b).norm() / norm).item() if norm > 0 else a.norm().item()


def run(case: dict) -> dict[str, float]:
    torch.manual_seed(case["seed"])
    x = inputs(case)
    want = truth(case, x)
    terms = truth(case, x, tune.held_denominator) if case.get("cancels") else {}
    poison()
    plans.clear()
    got = ours(case, x)
    assert got.keys() == want.keys(), (got.keys(), want.keys())
    for name, y in got.items():
        assert y.is_contiguous(), name
        assert y.shape == want[name].shape, name
    return {name: error(got[name], want[name], terms.get(name)) for name in want}


OPTIONS = [
    dict(gate="g", state=True),
    dict(gate="none", state=False, reverse=True),
    dict(gate="g", normalize=True, state=True),
    dict(gate="gamma", state=True, H=8, HV=32),  # dg_gamma is one number per head: a norm over few of them says little
    dict(gate="g", cu=[0, 0, 130, 130, 131, 700, 980], state=True, T=1001, B=1, HV=4),
    dict(gate="gamma", normalize=True, reverse=True, state=True, segment=192, H=32, HV=32),
    dict(gate="half", cu=[0, 64, 300, 1000], T=1000, B=1, state=False, segment=192, reverse=True),
    dict(gate="none", normalize=True, state=True, HV=4, segment=192),
    dict(gate="g", normalize=True, cu=[0, 333, 333, 900], T=950, B=1, state=True, segment=192, long=True),
    dict(gate="g", reverse=True, state=True, T=1300),
    dict(gate="none", state=True, T=1300, segment=192),
    dict(gate="strong", state=True),
    dict(gate="reset", state=True),
    dict(gate="mixed", state=True, reverse=True, segment=192),
    dict(gate="gamma", state=True, fixed=True, segment=192),
    dict(gate="reset", state=True, fixed=True, reverse=True, T=1300),
    dict(gate="rare", normalize=True, state=True),
    dict(gate="none", cu=[0, 0, 130, 131, 700, 980], T=1001, B=1, state=True, segment=192),
    dict(gate="gamma", cu=[0, 64, 300, 1000], T=1000, B=1, fixed=True, state=True, H=4, HV=8, reverse=True),
    dict(gate="g", cu=[0, 333, 333, 900], T=950, B=1, fixed=True, state=False, normalize=True),
    dict(gate="none", state=True, B=2, H=34, HV=68, T=300),  # many heads: another form of program on Hopper
    dict(gate="g", state=True, fixed=True, B=1, H=136, HV=136, T=300),
    dict(gate="gamma", state=False, fixed=True, B=1, H=136, HV=136, T=300, reverse=True),
    dict(gate="mixed", state=True, fixed=True, B=1, H=136, HV=136, T=300),
    dict(gate="mixed", state=True, B=1, H=68, HV=136, T=500, segment=192),
    dict(gate="gamma", state=True, B=1, H=136, HV=136, T=300, reverse=True),
    dict(gate="g", normalize=True, state=True, B=1, H=136, HV=136, T=300),
    dict(gate="gamma", normalize=True, state=True, B=1, H=68, HV=136, T=500, reverse=True, segment=192),
    dict(gate="reset", state=True, fixed=True, segment=192, H=2, HV=4),
    dict(gate="edge", state=True, fixed=True, segment=192),
    dict(gate="edge", state=True, fixed=True, segment=192, reverse=True),
    # Behind a strong decay o is v, whatever q is: dq and most of dk are differences of equal terms. With -20 at every
    # token e^-20 of the terms is left, which rounding hides in every dtype: relative errors of that would say nothing.
    dict(gate="mixed", normalize=True, state=True, cancels=True),
    dict(gate="strong", normalize=True, state=True, cancels=True),
]


def cases(full: bool, first: int = 0) -> Iterator[dict]:
    base = dict(op="chunk", B=2, T=1000, H=2, HV=2, gate="g", normalize=False, reverse=False, state=True, scale=0.11)
    seed = first

    def make(**kw: object) -> dict:
        nonlocal seed
        seed += 1
        case = base | dict(copied=seed % 2 == first % 2, hopper=seed % 4 == first % 2) | kw | dict(seed=seed)
        if case["normalize"] and case["K"] < 16:
            # o does not change with the length of q, so dq has nothing along q: with K = 1 it is 0, up to EPS.
            case["cancels"] = True
        if case["normalize"] and case["K"] == 1:
            case["H"] = case["HV"] = 16  # a norm over enough numbers
        if case["op"] == "recurrent":
            case["T"] = min(case["T"], 1300)
        return case

    turn = 0
    for dtype in DTYPES:
        for width in WIDTHS:
            K, V = (width, width) if isinstance(width, int) else width
            common = (16, 64, 128, 256)
            every = dtype == "bf16" and width in (64, 128, 256)  # the rows of the tile table
            count = len(OPTIONS) if full or every else 4 if width in common else 2
            for j in range(count):
                options = OPTIONS[(turn + j) % len(OPTIONS)]
                op = ("chunk", "fused_chunk")[(turn + j) % 2]
                case = dict(dtype=dtype, K=K, V=V, op=op, **options)
                if every and "cu" not in options:
                    yield make(**case, copied=False)
                    case["copied"] = True
                    if width != 64:
                        yield make(**case, hopper=True)
                    case["hopper"] = False
                yield make(**case)
            turn += count
    for dtype in DTYPES:
        for j, options in enumerate(OPTIONS):
            if full or dtype == "bf16" or j % 4 == 0:
                yield make(dtype=dtype, K=64, V=64, op="recurrent", **options)
        for width in (128, 256):  # the wider rows of "tokens"
            yield make(dtype=dtype, K=width, V=width, op="recurrent", gate="g", normalize=True, state=True)
    for dtype in ("bf16", "fp16"):  # columns past the end, in tiles that are copied
        for K, V in ((256, 40), (192, 232), (128, 72)):
            for gate in ("none", "g", "gamma", "reset"):
                yield make(dtype=dtype, K=K, V=V, gate=gate, fixed=True, copied=True, hopper=False)
            yield make(dtype=dtype, K=K, V=V, gate="g", normalize=True, copied=True)
            yield make(dtype=dtype, K=K, V=V, gate="g", fixed=True, cu=[0, 64, 300, 1000], B=1, copied=True)
    for T in (1, 63, 64, 65, 1000, 4096, 32768):
        for gate in ("none", "g", "gamma"):
            heads = 8 if T > 4096 else 32 if gate == "gamma" or T == 1 else 2
            yield make(dtype="bf16", K=64, V=64, T=T, gate=gate, H=heads, HV=heads)
            yield make(dtype="bf16", K=128, V=128, T=T, gate=gate, B=1, H=heads, HV=heads)
        yield make(dtype="ieee", K=32, V=32, T=T)
        if T <= 4096:
            yield make(dtype="fp16", K=64, V=64, T=T, op="recurrent")


def name(case: dict) -> str:
    flags = "".join(f" {k}" for k in ("normalize", "reverse", "state", "fixed", "cancels") if case.get(k))
    if case.get("copied") and case["dtype"] in ("bf16", "fp16") and case["op"] != "recurrent":
        flags += " copied" + " hopper" * bool(case.get("hopper") and not case.get("cu"))
    more = "".join(f" {k}={case[k]}" for k in ("segment", "cu") if case.get(k) is not None)
    shape = f"B{case['B']} T{case['T']} H{case['H']} HV{case['HV']} K{case['K']} V{case['V']}"
    return f"{case['op']} {case['dtype']} {shape} {case['gate']}{flags}{more}"


def shard(index: int, count: int, full: bool, match: str, seed: int) -> list[dict]:
    records = []
    for i, case in enumerate(c for c in cases(full, seed) if match in name(c)):
        if i % count != index:
            continue
        try:
            errors = run(case)
            worst = max(errors.values())
            record = dict(
                case=name(case),
                seed=case["seed"],
                limit=LIMITS[case["dtype"]],
                copied=" ".join(
                    pass_ + " on Hopper" * plan.on_hopper
                    for pass_, plan in zip(("forward", "backward"), plans, strict=True)
                    if plan.views
                ),
                errors=errors,
                ok=worst <= LIMITS[case["dtype"]],
            )
        except Exception as problem:
            record = dict(
                case=name(case), errors={}, ok=False, problem=f"{type(problem).__name__}: {str(problem)[-300:]}"
            )
        records.append(record)
        if "illegal" in record.get("problem", "") or "CUDA error" in record.get("problem", ""):
            break  # the context is gone
    return records


def all_cases(jobs: int, full: bool, match: str, seed: int) -> list[dict]:
    """Compilation is what takes time, so the cases go over processes that share the GPU."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--match", match, "--seed", str(seed), *(["--full"] * full)]
        devices = torch.cuda.device_count()
        children = [
            subprocess.Popen(
                [*command, "--shard", f"{i}/{jobs}", "--json", f"{folder}/{i}.json"],
                env=os.environ | {"CUDA_VISIBLE_DEVICES": str(i % devices)},
            )
            for i in range(jobs)
        ]
        for child in children:
            child.wait()
        files = [Path(folder) / f"{i}.json" for i in range(jobs)]
        return [
            r
            for f in files
            for r in (
                json.loads(f.read_text())
                if f.exists()
                else [dict(case=f.name, ok=False, errors={}, problem="process died")]
            )
        ]


def extras() -> list[dict]:
    records = []

    def check(what: str, ok: bool, detail: str = "") -> None:
        records.append(dict(case=what, ok=bool(ok), errors={}, detail=detail))

    base = dict(op="chunk", B=2, T=1500, H=2, HV=4, K=64, V=64, gate="g", normalize=False, reverse=False, state=True,
                scale=0.125, dtype="bf16", seed=1)  # fmt: skip
    variants = [base, base | dict(normalize=True, gate="gamma"), base | dict(op="fused_chunk", K=128, V=128),
                base | dict(op="recurrent", T=300), base | dict(B=1, cu=[0, 0, 700, 1400], segment=256),
                base | dict(gate="none", K=128, V=128), base | dict(K=256, V=256),
                base | dict(gate="gamma", fixed=True, K=256, V=256),
                base | dict(gate="none", K=128, V=128, hopper=True),
                base | dict(gate="gamma", fixed=True, K=256, V=256, hopper=True)]  # fmt: skip
    for case in variants:
        torch.manual_seed(0)
        x = inputs(case)
        first = ours(case, x)
        poison()
        second = ours(case, x)
        check("same bits " + name(case), all(torch.equal(first[n], second[n]) for n in first))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                captured = ours(case, x)
        for n in ("q", "k", "v", "do"):
            x[n].copy_(torch.randn_like(x[n]).abs())
        graph.replay()
        torch.cuda.synchronize()
        again = ours(case, x)
        check("graph " + name(case), all(torch.equal(captured[n], again[n]) for n in again))

    # step: in place, slots, every slot once; against the reference
    for K, V, norm, dtype in (
        (64, 64, False, "bf16"),
        (128, 128, True, "fp16"),
        (60, 100, False, "tf32"),
        (256, 256, True, "bf16"),
    ):
        B, H, HV, P = 5, 2, 4, 9
        r = lambda *s: torch.rand(*s, device=DEVICE)
        q, k, v = (r(B, h, w).to(DTYPES[dtype]) for h, w in ((H, K), (H, K), (HV, V)))
        g, state = -r(B, HV), r(P, HV, K, V + norm)
        index = torch.tensor([3, -1, 0, 8, 9], device=DEVICE)
        before = state.clone()
        o = launch.step_(q, k, v, state, g, None, index, 0.3, norm)
        live = index.clamp(0, P - 1)
        token = (y[:, None].double() for y in (q, k, v, g))
        want, S = reference.recurrent(*token, None, before[live].double(), True, None, 0.3, norm)
        rows = torch.tensor([0, 2, 3], device=DEVICE)
        good = error(o[rows], want[rows, 0]) < LIMITS[dtype] and error(state[index[rows]], S[rows]) < 1e-6
        other = [i for i in range(P) if i not in (3, 0, 8)]
        good &= torch.equal(state[other], before[other]) and not o[[1, 4]].any().item()
        check(f"step {dtype} K{K} V{V} normalize={norm}", good)

    # many heads, and more than 2^31 elements
    case = base | dict(B=66000, T=16, H=1, HV=1)
    e = run(case)
    check("B x HV beyond 65,535", max(e.values()) < 5e-3, str(e))
    torch.cuda.empty_cache()
    case = base | dict(
        B=136, T=4096, H=32, HV=32, K=128, V=128, state=False, op="fused_chunk", gate="gamma", fixed=True
    )
    x = {n: torch.randn(136, 4096, 32, 128, device=DEVICE, dtype=torch.bfloat16) for n in ("q", "k", "v", "do")}
    x |= dict(g=None, gamma=-torch.rand(32, device=DEVICE), S0=None, dS1=None, cu=None)
    got = ours(case, x)
    last = {n: y[-1:, :, -1:].contiguous() for n, y in x.items() if y is not None and n != "gamma"}
    want = truth(case, x | last | dict(gamma=x["gamma"][-1:]))
    e = {n: error(got[n][-1:, :, -1:], want[n]) for n in ("o", "dq", "dk", "dv")}
    check("more than 2^31 elements", max(e.values()) < 5e-3, str(e))
    return records


SHAPES = [
    dict(B=8, T=4096, H=16, HV=16, K=128, V=128),
    dict(B=32, T=2048, H=8, HV=8, K=64, V=64),
]
MORE_SHAPES = [
    dict(B=1, T=32768, H=32, HV=32, K=128, V=128),
    dict(B=1, T=131072, H=4, HV=4, K=128, V=128),
    dict(B=4, T=4096, H=8, HV=8, K=256, V=256),
    dict(B=4, T=2048, H=16, HV=16, K=128, V=128),
    dict(B=1, T=32768, H=4, HV=32, K=128, V=128),
]


def call(case: dict, x: dict) -> tuple:
    """The two calls to time: forward, and backward alone (the sum is the training step)."""
    options = (case["scale"], case["normalize"], case["reverse"])
    qkvg = (x["q"], x["k"], x["v"], x["g"], x["gamma"], x["S0"])
    forward = lambda: launch.forward(case["op"], *qkvg, False, x["cu"], *options)
    o = forward()[0]
    saved = o if case["normalize"] else None
    return forward, lambda: launch.backward(
        case["op"], *qkvg, x["cu"], *options, saved, x["do"], None, not case.get("fixed")
    )


def bandwidth() -> float:
    a = torch.randn(1 << 29, device=DEVICE)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / triton.testing.do_bench(lambda: b.copy_(a), return_mode="median") / 1e9  # TB/s


def timing(more: bool) -> list[dict]:
    records = []
    global copy_bandwidth
    copy_bandwidth = tbs = bandwidth()
    print(f"copy bandwidth {tbs:.2f} TB/s")
    base = dict(op="chunk", normalize=False, reverse=False, state=False, scale=0.1, dtype="bf16", seed=1)
    for shape in SHAPES + MORE_SHAPES * more:
        for gate, normalize in (("none", False), ("g", False), ("gamma", False), ("g", True))[: 4 if more else 2]:
            case = base | shape | dict(gate=gate, normalize=normalize)
            x = inputs(case)
            x = {n: y.contiguous() if isinstance(y, torch.Tensor) else y for n, y in x.items()}
            torch.cuda.synchronize()
            start = time.time()
            fwd, bwd = call(case, x)
            bwd()
            torch.cuda.synchronize()
            first = time.time() - start
            f, b = (triton.testing.do_bench(fn, return_mode="median", warmup=15, rep=60) for fn in (fwd, bwd))
            tokens = shape["B"] * shape["T"] * 2
            H, HV, K, V = (shape[n] for n in ("H", "HV", "K", "V"))
            floor_f = tokens * (2 * H * K + 2 * HV * V) / tbs / 1e9
            floor_b = tokens * (4 * H * K + 3 * HV * V) / tbs / 1e9
            record = dict(
                case=f"{name(case)}", forward=f, backward=b, forward_floor=f / floor_f,
                both_floor=(f + b) / (floor_f + floor_b), first=first, ok=True, errors={},
            )  # fmt: skip
            records.append(record)
            print(
                f"{record['case']:70} fwd {f:.3f} ms ({record['forward_floor']:.2f}x)  bwd {b:.3f}  f+b {f + b:.3f} "
                f"({record['both_floor']:.2f}x)  first {first:.1f} s",
                flush=True,
            )
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                fwd()
                bwd()
                torch.cuda.synchronize()
            parts = [(e.key, e.device_time_total / 1e3) for e in profile.key_averages() if e.device_time_total > 0]
            print("   ", "  ".join(f"{k[:24]} {t:.3f}" for k, t in parts), flush=True)
            record["kernels"] = dict(parts)
            del x, fwd, bwd
    return records


def sweep(rows: list[str], check_only: bool) -> list[dict]:
    """Times rows of the form kernel:width:gate:chunk,block,warps,stages[:dtype] and checks each against float64."""
    records = []
    for row in rows:
        kernel, width, gate, numbers, dtype = (row + ":bf16").split(":")[:5]
        D = int(width)
        shape = {64: SHAPES[1], 128: SHAPES[0], 256: MORE_SHAPES[2]}[D]
        base = dict(
            op="chunk", normalize=gate.endswith("+norm"), reverse=False, state=False, scale=0.1, dtype=dtype, seed=1
        )
        base |= dict(gate=gate.removesuffix("+norm"))
        tiles.override[kernel] = tiles.Tile(*map(int, numbers.split(",")))
        try:
            e = max(run(base | dict(B=1, T=1000, H=2, HV=2, K=D, V=D)).values())
            if check_only:
                print(f"{row:45} error {e:.1e}", flush=True)
                continue
            fwd, bwd = call(
                base | shape,
                {n: y.contiguous() if isinstance(y, torch.Tensor) else y for n, y in inputs(base | shape).items()},
            )
            t = triton.testing.do_bench(fwd if kernel == "forward" else bwd, return_mode="median", warmup=10, rep=40)
            print(f"{row:45} {t:.3f} ms  error {e:.1e}", flush=True)
            records.append(dict(case=row, ms=t, error=e, ok=e < LIMITS[dtype], errors={}))
        except Exception as problem:
            print(f"{row:45} {type(problem).__name__} {str(problem)[-150:]}", flush=True)
            records.append(dict(case=row, ok=False, errors={}, problem=str(problem)))
        tiles.override.clear()
    return records


def sanitize(width: int, on_hopper: bool) -> None:
    """Every kernel once, small: those of hopper.py, or all others. Run under compute-sanitizer."""
    processors = launch._processors
    base = dict(
        op="chunk", B=1, T=100, H=1, HV=2, K=width, V=width, normalize=False, reverse=False, state=True, scale=0.2
    )
    # (initcheck does not see what the hardware's copies write, and sums over groups of heads read that, as the
    # backward of the normaliser reads o: there are no groups, and of the normaliser the forward alone)
    wide = dict(H=2, T=470, fixed=True, dtype="bf16", hopper=True)  # eight chunks: every place is used again
    gates = [wide | dict(gate=gate) for gate in ("none", "g", "strong")]
    gates += [wide | dict(gate="gamma", reverse=True, segment=192), wide | dict(gate="strong", dtype="fp16")]
    gates += [wide | dict(gate=gate, normalize=True, backward=False) for gate in ("none", "g")]
    if width <= 128:
        gates += [wide | dict(gate="g", fixed=False), wide | dict(gate="gamma", fixed=False, reverse=True, segment=192)]
    for i, options in enumerate([*gates, *(dict(many=1, **x) for x in gates)] if on_hopper else [
        dict(gate="g", normalize=True, segment=64), dict(gate="gamma", cu=[0, 0, 70, 90], segment=64),
        dict(gate="none"), dict(gate="g"), dict(gate="g", op="recurrent", T=70, normalize=True, segment=64),
        dict(gate="g", fixed=True), dict(gate="gamma", fixed=True, segment=64),
        dict(gate="g", normalize=True, cu=[0, 3, 99]), dict(gate="strong", dtype="fp16", copied=False),
        dict(gate="g", dtype="ieee", segment=64),
        dict(gate="none", normalize=True), dict(gate="g", fixed=True, normalize=True, cu=[0, 3, 99]),
        dict(gate="none", cu=[0, 3, 99]),
    ]):  # fmt: skip
        for dtype in [options["dtype"]] if "dtype" in options else ["bf16", "tf32"]:
            case = base | options | dict(dtype=dtype, seed=i)
            # two heads fill a GPU of one processor: they take the programs of many heads
            launch._processors = (lambda index: 1) if case.get("many") else processors
            torch.manual_seed(0)
            ours(case, inputs(case))
            torch.cuda.synchronize()
    if not on_hopper:
        x, state = torch.randn(2, 2, width, device=DEVICE), torch.randn(2, 2, width, width, device=DEVICE)
        launch.step_(x, x, x, state, torch.zeros(2, 2, device=DEVICE), None, None, 0.5, False)
        torch.cuda.synchronize()
    print("sanitize", width, "done")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", default=None)
    parser.add_argument("--only", nargs="+", default=["cases", "extras", "timing"])
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--shard", default=None)
    parser.add_argument("--match", default="")
    parser.add_argument("--full", action="store_true", help="every option set at every width")
    parser.add_argument(
        "--seed", type=int, default=int.from_bytes(os.urandom(2), "big") * 10000, help="default: a fresh one"
    )
    parser.add_argument("--more", action="store_true")
    parser.add_argument("--rows", nargs="*", default=[])
    parser.add_argument("--check-only", action="store_true", help="rows: no timing")
    parser.add_argument("--sanitize", type=int, default=None)
    parser.add_argument("--hopper", action="store_true", help="with --sanitize: hopper.py alone")
    args = parser.parse_args()
    if args.sanitize is not None:
        return sanitize(args.sanitize, args.hopper)
    if args.shard is not None:
        index, count = map(int, args.shard.split("/"))
        Path(args.json).write_text(json.dumps(shard(index, count, args.full, args.match, args.seed)))
        return None
    start = time.time()
    records: dict[str, list] = {}
    for part in args.only:
        if part == "cases":
            records[part] = all_cases(args.jobs, args.full, args.match, args.seed)
        elif part == "extras":
            records[part] = extras()
        elif part == "timing":
            records[part] = timing(args.more)
        elif part == "tiles":
            records[part] = sweep(args.rows, args.check_only)
        print(f"{part}: {time.time() - start:.0f} s", flush=True)
    if args.json:
        properties = torch.cuda.get_device_properties(0)
        header = dict(
            date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), torch=torch.__version__,
            triton=triton.__version__, device=properties.name, copy_bandwidth_tb_s=copy_bandwidth,
        )  # fmt: skip
        Path(args.json).write_text(json.dumps(header | records, indent=1))
    bad = 0
    for part in ("cases", "extras"):
        worst: dict[str, dict[str, float]] = {}
        for r in records.get(part, []):
            for n, e in r["errors"].items():
                key = r["case"].split()[1]
                worst.setdefault(key, {})[n] = max(worst.get(key, {}).get(n, 0.0), e)
            if not r["ok"]:
                bad += 1
                wrong = {n: f"{e:.1e}" for n, e in r["errors"].items() if not e <= r.get("limit", 0)}
                print("FAIL", r["case"], wrong, r.get("problem", ""), r.get("detail", ""))
        for key, errors in worst.items():
            print(key, "worst:", "  ".join(f"{n} {e:.1e}" for n, e in errors.items()))
        print(f"{part}: {len(records.get(part, []))} run")
    print(f"{bad} failed")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()

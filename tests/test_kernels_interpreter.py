# ruff: noqa: C408
"""The Triton kernels under Triton's interpreter: every kernel and flag, against `reference.recurrent` in float64.

The interpreter must be chosen before Triton is imported, so the cases run in a process of their own (this file, as a
script). It knows no bfloat16 products; float32 and float16 run the same code. Real compilation is covered by
tests/gpu/offline.py (without a GPU) and tests/gpu/suite.py (on one).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

import pytest

Case = dict[str, Any]

# name -> options over DEFAULTS. `chunk` and `segment` force a small tile, so that tiny shapes have several of each.
DEFAULTS: Case = dict(
    op="chunk", dtype="ieee", B=1, T=37, H=1, HV=1, K=5, V=7, gate="g", normalize=False, reverse=False, state=True,
    dfinal=True, cu=None, chunk=16, segment=None, scale=0.37,
)  # fmt: skip
PACKED = dict(cu=[0, 0, 20, 20, 33], T=40)
COPIED = dict(described=0, dtype="fp16", K=16, V=16)  # by descriptors, which large calls have by default
CASES: dict[str, Case] = {
    "plain": dict(gate="none", state=False, dfinal=False, K=16, V=16),
    "gated": dict(B=2, H=1, HV=2),
    "head gate": dict(gate="gamma"),
    "head gate, reverse": dict(gate="gamma", reverse=True, T=35),
    "reverse": dict(reverse=True),
    "no final gradient": dict(dfinal=False),
    "no initial state": dict(state=False),
    "more key heads": dict(H=2, HV=4, B=2, T=18),
    "wide keys": dict(K=33, V=3),
    "wide values": dict(K=3, V=33),
    "one token": dict(T=1),
    "one token, normalised": dict(T=1, normalize=True),
    "one column": dict(K=1, V=1),
    "chunk of the table": dict(chunk=None, T=20),
    "tf32": dict(dtype="tf32"),
    "tf32, ungated": dict(dtype="tf32", gate="none", normalize=True),
    "tf32, normalised": dict(dtype="tf32", normalize=True, T=50, K=16, V=16),
    "tf32, normalised, strong decay, segments, reverse": dict(
        dtype="tf32", normalize=True, gate="some", HV=2, segment=16, reverse=True, K=16, V=16
    ),
    "float16": dict(dtype="fp16", K=16, V=16),
    "float16, strong decay": dict(dtype="fp16", gate="strong", K=16, V=16),
    "float16, strong decay, reverse": dict(dtype="fp16", gate="strong", segment=16, reverse=True, state=False),
    "float16, segments, normalised": dict(dtype="fp16", segment=16, normalize=True),
    "normalised": dict(normalize=True, B=2, H=1, HV=2),
    "normalised, o in other strides": dict(normalize=True, B=2, HV=2, folded=True),
    "normalised, ungated": dict(normalize=True, gate="none"),
    "normalised, head gate, reverse": dict(normalize=True, gate="gamma", reverse=True),
    "normalised, no states": dict(normalize=True, state=False, dfinal=False),
    "normalised, gates without a gradient": dict(normalize=True, fixed=True, HV=2),
    "normalised, head gate without a gradient, reverse, segments": dict(
        normalize=True, fixed=True, gate="gamma", reverse=True, segment=16, B=2
    ),
    "normalised, ungated, segments, reverse": dict(normalize=True, gate="none", segment=16, reverse=True),
    "normalised, ungated, wide keys, packed, segments": dict(
        **PACKED, normalize=True, gate="none", segment=16, K=33, H=1, HV=2
    ),
    "normalised, gates without a gradient, packed, reverse": dict(**PACKED, normalize=True, fixed=True, reverse=True),
    "segments": dict(segment=16),
    "segments, ungated": dict(segment=16, gate="none", dfinal=False),
    "segments, head gate": dict(segment=32, gate="gamma", state=False),
    "segments, reverse": dict(segment=16, reverse=True, B=2),
    "segments, normalised": dict(segment=16, normalize=True),
    "segments, normalised, reverse": dict(segment=16, normalize=True, reverse=True, gate="gamma"),
    "segments, more key heads": dict(segment=32, H=2, HV=4),
    "packed": dict(**PACKED),
    "packed, tokens before the first": dict(cu=[5, 5, 20, 33], T=40, HV=2),
    "packed, 64-bit offsets": dict(**PACKED, long=True, gate="gamma"),
    "packed, reverse, normalised": dict(**PACKED, reverse=True, normalize=True),
    "packed, ungated": dict(**PACKED, gate="none", state=False, HV=2),
    "packed, segments": dict(**PACKED, segment=16),
    "packed, segments, reverse": dict(**PACKED, segment=16, reverse=True, HV=2),
    "packed, segments, normalised": dict(**PACKED, segment=16, normalize=True, gate="gamma"),
    "packed, segments, ungated": dict(**PACKED, segment=16, gate="none", dfinal=False),
    "packed, only a tail": dict(cu=[0, 0], T=5),
    "fused": dict(op="fused_chunk", T=20),
    "strong decay": dict(gate="strong"),
    "strong decay, segments, reverse": dict(gate="strong", segment=16, reverse=True),
    "some strong decay": dict(gate="some", HV=2),  # one head takes the factored form, the other cannot
    "some strong decay, reverse": dict(gate="some", HV=2, reverse=True, segment=16),
    "head gates, one strong": dict(gate="gamma some", HV=2, cu=[0, 20, 33], T=40),
    "gates without a gradient": dict(fixed=True, HV=2),
    "gates without a gradient, segments, reverse": dict(fixed=True, segment=16, reverse=True),
    "head gates without a gradient, packed": dict(fixed=True, gate="gamma", cu=[0, 20, 33], T=40, segment=16),
    "resets": dict(gate="reset", segment=16),
    "resets, reverse": dict(gate="reset", reverse=True),
    "growth": dict(gate="growth"),
    "zero scale": dict(scale=0.0, T=20),
    "half gates": dict(gate="half", dtype="fp16"),
    "strides": dict(strided=True, H=2, HV=4),
    "last dimension strided": dict(strided="last", T=20),
    "copied": dict(**COPIED, gate="none", B=2, T=50),
    "copied, gated": dict(**COPIED, HV=2, T=50),
    "copied, head gate, reverse": dict(**COPIED, gate="gamma", reverse=True),
    "copied, gates without a gradient, segments": dict(**COPIED, fixed=True, segment=16, H=2, HV=4, B=2),
    "copied, gates without a gradient, reverse": dict(**COPIED, fixed=True, reverse=True, gate="gamma"),
    "copied, normalised": dict(**COPIED | dict(V=24), normalize=True),
    "copied, normalised, gates without a gradient": dict(**COPIED | dict(V=24), normalize=True, fixed=True, segment=16),
    "copied, packed": dict(**COPIED, **PACKED, gate="none"),
    "copied, packed, segments, reverse": dict(**COPIED, **PACKED, fixed=True, segment=16, reverse=True, H=2, HV=4),
    "copied, packed, normalised": dict(**COPIED, **PACKED, normalize=True, gate="none"),
    "copied, in tiles of columns": dict(**COPIED | dict(K=40, V=24), T=20),
    "copied, some strong decay": dict(**COPIED, gate="some", HV=2),
    "copied, strides": dict(**COPIED | dict(K=32, V=16), strided=True, H=2, HV=4, gate="none", segment=32),
    "tokens": dict(op="recurrent", T=15),
    "tokens, reverse, normalised": dict(op="recurrent", T=15, reverse=True, normalize=True),
    "tokens, head gate": dict(op="recurrent", T=15, gate="gamma", H=1, HV=2),
    "tokens, ungated, normalised": dict(op="recurrent", T=15, gate="none", normalize=True),
    "tokens, segments": dict(op="recurrent", T=150, segment=64, gate="reset"),
    "tokens, segments, normalised": dict(op="recurrent", T=150, segment=64, normalize=True, reverse=True),
    "tokens, strong decay": dict(op="recurrent", T=70, gate="strong"),
    "tokens, packed": dict(op="recurrent", cu=[0, 0, 9, 9, 15], T=18, normalize=True),
    "no tokens": dict(T=0),
    "no batch": dict(B=0),
    "no sequences": dict(cu=[0], T=3),
}
LIMITS = {"ieee": 2e-5, "tf32": 1e-3, "fp16": 1e-3}
STEPS: dict[str, Case] = {
    "step": dict(),
    "step, slots": dict(indexed=True),
    "step, slots, normalised": dict(indexed=True, normalize=True, V=33),
    "step, head gate": dict(gate="gamma", normalize=True),
    "step, ungated": dict(gate="none", K=1, V=1),
    "step, resets": dict(gate="reset", V=65),
}


def test_every_kernel_and_flag() -> None:
    pytest.importorskip("triton")
    result = subprocess.run([sys.executable, "-W", "ignore", __file__], capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]


def run(options: Case) -> dict[str, float]:
    """Relative error of everything that the forward and the backward return."""
    import torch

    from torch_la.ops import reference
    from torch_la.ops.kernels import launch, tiles

    case = DEFAULTS | options
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if case["dtype"] == "ieee" else "high")
    dtype = torch.float16 if case["dtype"] == "fp16" else torch.float32
    B, T, H, HV, K, V, normalize = (case[x] for x in ("B", "T", "H", "HV", "K", "V", "normalize"))
    cu = (
        None if case["cu"] is None else torch.tensor(case["cu"], dtype=torch.int64 if case.get("long") else torch.int32)
    )
    N = B if cu is None else cu.numel() - 1
    W = V + normalize

    def rows(heads: int, width: int) -> torch.Tensor:
        if case.get("strided") == "last":
            return torch.randn(B, T, heads, 2 * width, dtype=torch.float32).to(dtype)[..., ::2]
        if case.get("strided"):
            return torch.randn(B, heads, T, 3 * width).to(dtype).transpose(1, 2)[..., width : 2 * width]
        return torch.randn(B, T, heads, width).to(dtype)

    q, k, v, do = rows(H, K), rows(H, K), rows(HV, V), rows(HV, V)
    if normalize:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    g = gamma = None
    if case["gate"].startswith("gamma"):
        gamma = -torch.rand(HV)
        if case["gate"] == "gamma some":
            gamma[0] = -30.0
    elif case["gate"] != "none":
        g = -torch.rand(B, T, HV)
        if case["gate"] == "strong":
            g = torch.full_like(g, -20.0)
        elif case["gate"] == "some":
            g[:, 5:9, 0] = -30.0
        elif case["gate"] == "reset":
            g = torch.where(torch.rand_like(g) < 0.3, torch.where(torch.rand_like(g) < 0.5, -1e4, -torch.inf), g)
        elif case["gate"] == "growth":
            g = -g * 0.2
        elif case["gate"] == "half":
            g = g.half()
    S0 = dS1 = None
    if case["state"]:
        S0 = torch.rand(N, HV, W, K).transpose(-1, -2)
    if case["dfinal"]:
        dS1 = torch.randn(N, HV, K, W)

    leaves = [None if x is None else x.double().clamp_min(-1e30).requires_grad_() for x in (q, k, v, g, gamma, S0)]
    flags = (case["scale"], normalize, case["reverse"])
    o, S = reference.recurrent(*leaves, True, cu, *flags)
    loss = (o * do.double()).sum() + (0.0 if dS1 is None else (S * dS1.double()).sum())
    used = {n: x for n, x in zip(["dq", "dk", "dv", "dg", "dgamma", "dS0"], leaves, strict=True) if x is not None}
    if case.get("fixed"):
        used = {n: x for n, x in used.items() if n not in ("dg", "dgamma")}
    grads = torch.autograd.grad(loss, list(used.values()), allow_unused=True, materialize_grads=True)
    want = {"o": o, "S": S} | dict(zip(used, grads, strict=True))

    tiles.segment, tiles.described = case["segment"], case.get("described", tiles.NEVER)
    tiles.override.clear()
    if case["chunk"]:
        tiles.override |= {name: tiles.Tile(case["chunk"], 16, 4, 1) for name in ("forward", "backward")}
    plans = []
    plan = launch._plan
    launch._plan = lambda *arguments: plans.append(plan(*arguments)) or plans[-1]
    mine, S = launch.forward(case["op"], q, k, v, g, gamma, S0, True, cu, *flags)
    saved = mine if normalize else None
    if case.get("folded"):
        saved = mine.transpose(1, 2).contiguous().transpose(1, 2)
    grads = launch.backward(
        case["op"], q, k, v, g, gamma, S0, cu, *flags, saved, do, dS1,
        not case.get("fixed"),
    )  # fmt: skip
    launch._plan = plan
    assert any(p.views for p in plans) == ("described" in options), "what is meant to be read by descriptors is not"
    got = {"o": mine, "S": S} | dict(zip(["dq", "dk", "dv", "dg", "dgamma", "dS0"], grads, strict=True))
    got = {n: x for n, x in got.items() if x is not None}
    assert got.keys() == want.keys(), (got.keys(), want.keys())
    for n, x in got.items():
        assert x.shape == want[n].shape, n
        assert x.is_contiguous(), n
    return {n: error(got[n], want[n].detach()) for n in want}


def run_step(options: Case) -> dict[str, float]:
    import torch

    from torch_la.ops import reference
    from torch_la.ops.kernels import launch

    case = dict(B=4, H=1, HV=2, K=5, V=7, gate="g", normalize=False, indexed=False) | options
    torch.manual_seed(0)
    B, H, HV, K, V, normalize = (case[x] for x in ("B", "H", "HV", "K", "V", "normalize"))
    q, k, v = torch.rand(B, H, K), torch.rand(B, H, K), torch.randn(B, HV, V)
    g = -torch.rand(B, HV) if case["gate"] in ("g", "reset") else None
    if case["gate"] == "reset":
        g[0], g[1] = -1e4, -torch.inf
    gamma = -torch.rand(HV) if case["gate"] == "gamma" else None
    P = 7 if case["indexed"] else B
    state = torch.rand(P, HV, V + normalize, K).transpose(-1, -2)  # strided
    index = torch.tensor([5, -1, 2, 7]) if case["indexed"] else None
    rows = [0, 2] if case["indexed"] else list(range(B))
    slots = [5, 2] if case["indexed"] else rows
    before = state.clone()
    o = launch.step_(q, k, v, state, g, gamma, index, 0.3, normalize)
    x = [None if y is None else y[rows, None].double().clamp_min(-1e30) for y in (q, k, v, g)]
    want, S = reference.recurrent(
        *x, None if gamma is None else gamma.double(), before[slots].double(), True, None, 0.3, normalize
    )
    others = [i for i in range(P) if i not in slots]
    assert torch.equal(state[others], before[others])
    assert not o[[i for i in range(B) if i not in rows]].any()
    return {"o": error(o[rows], want[:, 0]), "S": error(state[slots], S)}


def error(a: Any, b: Any) -> float:
    a, b = a.double(), b.double()
    if a.numel() == 0:
        return 0.0
    scale = b.norm()
    return float((a - b).norm() / scale if scale > 0 else a.norm())


def main() -> int:
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy
    import torch

    if tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        # NumPy 2.4 no longer turns an array of one element into an int; Triton 3.6's interpreter counts on it
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor: Any, *rest: Any) -> Any:
            result = patch(tensor, *rest)
            tensor.__index__ = lambda self: int(self.handle.data.item())
            return result

        interpreter._patch_lang_tensor = patched
    torch.set_num_threads(1)
    failed, start = 0, time.time()
    for name, options in (CASES | STEPS).items():
        limit = LIMITS[options.get("dtype", "ieee")]
        try:
            errors = run_step(options) if name in STEPS else run(options)
            bad = {n: f"{e:.1e}" for n, e in errors.items() if not e <= limit}
            verdict = f"FAILED {bad}" if bad else f"{max(errors.values()):.1e}"
        except Exception as problem:
            bad, verdict = {"": ""}, f"FAILED {type(problem).__name__}: {str(problem)[-800:]}"
        failed += bool(bad)
        print(f"{time.time() - start:5.0f} s  {name:36} {verdict}", flush=True)
    print(f"{len(CASES | STEPS)} cases, {failed} failed")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())

"""`python -m torch_la tune`: measures tile choices on this GPU and rewrites the tile table.

For every row of the table (kernel, kind of product, width) it takes the candidates in turn. A candidate must first
agree with the float64 reference on fresh inputs: every gate, the normaliser, ragged lengths, cut segments, both half
dtypes. One that does not is refused, however fast: the compilers for these kernels have been wrong before. The fastest
of the rest is written.

Each candidate runs in a worker process, because an illegal access ends the process it happens in.
"""

from __future__ import annotations

import argparse
import itertools
import json
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import astuple
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = tuple[int, ...]  # chunk, block, warps, stages, and perhaps registers

# Each kind of product: the dtypes it serves and the relative error against float64 that each may have.
LIMITS = {
    "half": {torch.bfloat16: 5e-3, torch.float16: 1e-3},
    "half+blocks": {torch.bfloat16: 5e-3, torch.float16: 1e-3},  # a backward with gradients of gates
    "tf32": {torch.float32: 1e-3},
    "tf32+blocks": {torch.float32: 1e-3},
    "ieee": {torch.float32: 1e-5},
    "ieee+blocks": {torch.float32: 1e-5},
    "any": {torch.float32: 1e-5},
}
WIDTHS = (64, 128, 256)
CANDIDATES: dict[str, dict[str, list[Row]]] = {
    kernel: {
        "half": list(itertools.product((64, 128), (64, 128), (4, 8), (1, 2, 3))),
        "tf32": list(itertools.product((32, 64), (32, 64), (4, 8), (1, 2))),
        "ieee": [
            *itertools.product((16, 32), (16, 32, 64), (4, 8), (1,)),
            *itertools.product((1,), (32, 64), (4, 8), (1,)),
        ],
    }
    for kernel in ("forward", "backward")
}
CANDIDATES["backward"] |= {
    "half+blocks": [
        *itertools.product((64, 128), (64, 128), (4, 8), (1,)),
        *itertools.product((64,), (64,), (4,), (1,), (104, 128, 144, 168)),
    ],
    "tf32+blocks": list(itertools.product((32, 64), (32, 64), (4, 8), (1,))),
    "ieee+blocks": list(itertools.product((1,), (32, 64), (2, 4, 8), (1,))),
}
CANDIDATES["states"] = {
    "half": list(itertools.product((64,), (32, 64, 128), (4, 8), (1, 2, 3, 4))),
    "tf32": list(itertools.product((64,), (32, 64), (4, 8), (1, 2, 3))),
}
CANDIDATES["tokens"] = {"any": list(itertools.product((1,), (16, 32, 64), (2, 4, 8), (1,)))}
CANDIDATES["step"] = {"any": list(itertools.product((1,), (8, 16, 32, 64), (1, 2, 4), (1,)))}


def _error(got: Tensor, right: Tensor) -> float:
    """Relative error in the Euclidean norm; NaN and infinity count as infinite."""
    got = got.double()
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got - right).norm() / right.norm().clamp_min(1e-30))


def _call(kernel: str, op: Any, x: dict[str, Tensor | None], options: tuple[Any, ...]) -> list[Tensor]:
    """What the kernel under test computes: outputs, or gradients of all inputs."""
    leaves = {n: t.detach().requires_grad_() if t is not None else None for n, t in x.items() if n not in ("do", "cu")}
    o, S = op(*(leaves[n] for n in ("q", "k", "v", "g", "gamma", "S0")), True, x["cu"], *options)
    if kernel in ("forward", "step"):
        return [o.detach(), S.detach()]
    do = x["do"]
    assert do is not None
    given = [t for t in leaves.values() if t is not None]
    return [o.detach(), S.detach(), *torch.autograd.grad((o.float() * do.to(o.device).float()).sum() + S.sum(), given)]


def _worst(kernel: str, dtype: torch.dtype, width: int) -> float:
    """The worst error of a kernel over the option sets that stress a tile."""
    from . import ops
    from .ops import reference

    worst = 0.0
    name = {"tokens": "recurrent", "step": "recurrent"}.get(kernel, "fused_chunk")
    for gate, normalize, cut, reverse in (
        ("none", False, False, False),
        ("g", False, False, True),
        ("g", True, True, False),
        ("gamma", False, True, False),
        ("strong", True, False, False),
    ):
        B, T, H, HV = 2, 1 if kernel == "step" else 200 if kernel == "tokens" else 700, 2, 4
        r = torch.randn
        q, k = ((x.abs() + 0.1 if normalize else x) for x in (r(B, T, H, width), r(B, T, H, width)))
        g = torch.nn.functional.logsigmoid(r(B, T, HV)) / 8
        x: dict[str, Tensor | None] = {
            "q": q.to(dtype), "k": k.to(dtype), "v": r(B, T, HV, width).to(dtype), "do": r(B, T, HV, width).to(dtype),
            "g": g if gate == "g" else torch.where(g < -0.1, -20.0, g) if gate == "strong" else None,
            "gamma": -torch.rand(HV) / 8 if gate == "gamma" else None,
            "S0": torch.rand(B, HV, width, width + normalize), "cu": None,
        }  # fmt: skip
        options = (None, normalize, reverse)
        on_device = {n: None if t is None else t.cuda() for n, t in x.items()}
        op = getattr(ops, "chunk" if cut and name == "fused_chunk" else name).operator
        if kernel == "step":
            from .functions import recurrent_step

            y = on_device
            assert y["S0"] is not None
            state = y["S0"].clone()
            q, k, v, g = (None if t is None else t[:, 0] for t in (y["q"], y["k"], y["v"], y["g"]))  # type: ignore[assignment]
            assert v is not None
            o = recurrent_step(q, k, v, state, g, y["gamma"], normalize=normalize)
            got = [o.unsqueeze(1), state]
            options = (None, normalize, False)
        else:
            got = _call(kernel, op, on_device, options)
        exact = {n: None if t is None else t.double() for n, t in x.items()}
        right = _call(kernel, reference.chunk, exact, options)
        worst = max(worst, *(_error(a.cpu(), b) for a, b in zip(got, right, strict=True)))
    return worst


def _time(kernel: str, dtype: torch.dtype, width: int, gated: bool) -> float:
    """Milliseconds on a shape that fills the GPU."""
    import triton.testing

    from . import ops
    from .functions import recurrent_step

    tokens = 1 << 21  # over all heads and batch rows, times 64 / width
    T, H = (512, 16) if kernel == "tokens" else (4096, 16)
    B = max(1, tokens * 64 // width // T // H)
    q, k, v, do = (torch.randn(B, T, H, width, device="cuda", dtype=dtype) for _ in range(4))
    g = torch.nn.functional.logsigmoid(torch.randn(B, T, H, device="cuda")) / 16
    if kernel == "step":
        pool = torch.randn(256, H, width, width, device="cuda")
        q, k, v, g = (x[0, :256].contiguous() for x in (q, k, v, g))
        return triton.testing.do_bench(lambda: recurrent_step(q, k, v, pool, g), return_mode="median")
    gate = g if gated else None
    op = ops.recurrent.operator if kernel == "tokens" else ops.fused_chunk.operator
    if kernel != "backward":
        return triton.testing.do_bench(
            lambda: op(q, k, v, gate, None, None, False, None, None, False, False), return_mode="median"
        )
    return triton.testing.do_bench(
        lambda: op.backward(q, k, v, gate, None, None, None, None, False, False, None, do, None, gated),
        return_mode="median",
    )


def _measure(kernel: str, precision: str, width: int, row: Row, seed: int) -> tuple[float, float]:
    """(error as a share of what is allowed, milliseconds) of one candidate; runs in the worker."""
    from .ops.kernels import tiles

    tiles.override[kernel] = tiles.Tile(*row)
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.manual_seed(seed)
    share = max(_worst(kernel, dtype, width) / limit for dtype, limit in LIMITS[precision].items())
    gated = kernel == "states" or precision != "half"
    return share, _time(kernel, next(iter(LIMITS[precision])), width, gated) if share <= 1 else float("inf")


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def tune(kernels: list[str], precisions: list[str], widths: list[int], output: Path, write: bool) -> int:
    """Measures the rows that the lists name, prints every candidate, and writes the winners. Returns the exit code."""
    from .ops.kernels import tiles

    table = json.loads(tiles.TABLE.read_text())
    seed = torch.seed() % (1 << 31)
    pool = _pool()
    for kernel, precision, width in itertools.product(kernels, precisions, widths):
        candidates = CANDIDATES[kernel].get(precision)
        if candidates is None or str(width) not in table[kernel].get(precision, {}):
            continue
        current: Row = tuple(x for x in astuple(tiles.tile(kernel, precision, width, width)) if x is not None)
        best: tuple[float, Row] | None = None
        for row in dict.fromkeys([current, *candidates]):
            ms = float("inf")
            try:
                share, ms = pool.submit(_measure, kernel, precision, width, row, seed).result()
                verdict = f"{share:5.2f} of the allowed error  " + (f"{ms:8.4f} ms" if share <= 1 else "REFUSED")
            except BrokenProcessPool:
                verdict, pool = "REFUSED: the process died", _pool()
            except Exception as problem:
                # Out of shared memory is harmless, an illegal access poisons the context: a fresh worker for both.
                pool.shutdown(wait=False, cancel_futures=True)
                verdict, pool = f"REFUSED: {str(problem).splitlines()[0]}", _pool()
            print(f"{kernel:9s} {precision:5s} {width:4d}  {list(row)}  {verdict}", flush=True)
            if ms < float("inf") and (best is None or ms < best[0]):
                best = ms, row
        if best is None:
            print(f"{kernel} {precision} {width}: no candidate is right; the row stays, and must not be used")
            return 1
        table[kernel][precision][str(width)] = list(best[1])
    pool.shutdown()
    if write:
        output.write_text(_text(table))
        print(f"wrote {output}")
    return 0


def _text(table: dict[str, Any]) -> str:
    """The table as JSON, a line for each kind of product."""
    kernels = []
    for kernel, rows in table.items():
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
        kernels.append(f"  {json.dumps(kernel)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernel", choices=sorted(CANDIDATES), action="append", help="default: all")
    parser.add_argument("--precision", choices=sorted(LIMITS), action="append", help="default: all")
    parser.add_argument("--width", type=int, choices=WIDTHS, action="append", help="default: all")
    parser.add_argument("--output", type=Path, help="default: the table of this installation")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if not torch.cuda.is_available():
        print("tune measures on a CUDA device, and there is none")
        return 2
    from .ops.kernels import tiles

    return tune(
        arguments.kernel or sorted(CANDIDATES),
        arguments.precision or list(LIMITS),
        arguments.width or list(WIDTHS),
        arguments.output or tiles.TABLE,
        not arguments.dry_run,
    )

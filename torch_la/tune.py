"""`python -m torch_la tune`: measures tile choices on this GPU and rewrites the tile table.

For every row of the table (kernel, name, width) it times all candidates, in the first of `CASES` that reads the row.
Then, from the fastest on, it compares them with the float64 reference on fresh inputs in all of those cases: gates with
and without a gradient, the normaliser, ragged lengths, cut segments, both half dtypes. One that disagrees is refused,
however fast: the compilers for these kernels have been wrong before. The first that agrees is written, and slower ones
are not compared: a comparison compiles the kernel for every case and dtype, a time only once.

Candidates run in a worker process, because an illegal access ends the process it happens in.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = tuple[int, ...]  # chunk, block, warps, stages, and perhaps registers

DEVICE = "cuda"
TOKENS = 1 << 21  # of the shape that is timed: over all heads and batch rows, times 64 / width
# Each kind of product, the first word of a row's name: its dtypes, and the relative error that each may have.
LIMITS = {
    "half": {torch.bfloat16: 5e-3, torch.float16: 1e-3},
    "tf32": {torch.float32: 1e-3},
    "ieee": {torch.float32: 1e-5},
    "any": {torch.float32: 1e-5},
}
WIDTHS = (64, 128, 256)
# What has no candidates of its own takes those of the row that is named with less.
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
for kernel in ("forward", "backward"):
    CANDIDATES[kernel]["half+copied"] = [
        *itertools.product((64,), (32, 64, 128), (4, 8), (1, 2, 3, 4, 5)),
        *itertools.product((128,), (64,), (8,), (1, 2)),
    ]
CANDIDATES["states"] = {
    "half": list(itertools.product((64,), (32, 64, 128), (4, 8), (1, 2, 3, 4))),
    "tf32": list(itertools.product((64,), (32, 64), (4, 8), (1, 2, 3))),
}
CANDIDATES["hopper"] = {"half": list(itertools.product((64,), (128,), (12,), (2, 3), (176, 200, 208, 216)))}
CANDIDATES["hopper_few"] = {"half": list(itertools.product((64,), (64,), (8,), (2, 3), (216, 232)))}
CANDIDATES["tokens"] = {"any": list(itertools.product((1,), (16, 32, 64), (2, 4, 8), (1,)))}
CANDIDATES["step"] = {"any": list(itertools.product((1,), (8, 16, 32, 64), (1, 2, 4), (1,)))}


@dataclass(frozen=True)
class Case:
    """Options of a call: which row it reads depends on the first three."""

    gate: str  # "none", "g", "gamma", or "strong": g with decays of e^-20 among the others
    normalize: bool = False
    fixed: bool = False  # the gate gets no gradient
    cut: bool = False  # into segments
    reverse: bool = False

    def in_blocks(self, width: int) -> bool:
        """The form of its backward."""
        return (self.gate != "none" and not self.fixed) or (self.normalize and width > 128)

    @property
    def cancels(self) -> bool:
        """Its gradients are judged by the size of the terms that cancel in them."""
        return self.normalize and self.gate == "strong"


CASES = (
    Case("g"),
    Case("g", fixed=True),
    Case("none"),
    Case("none", normalize=True),
    Case("g", normalize=True),
    Case("g", reverse=True),
    Case("g", normalize=True, cut=True),
    Case("g", fixed=True, cut=True),
    Case("gamma", cut=True),
    Case("gamma", fixed=True, reverse=True),
    Case("gamma", normalize=True, fixed=True, reverse=True),
    Case("strong", cut=True, reverse=True),
    Case("strong", fixed=True),
    Case("strong", normalize=True),
    Case("none", cut=True, reverse=True),
    Case("none", normalize=True, cut=True, reverse=True),
)


def reading(
    kernel: str, name: str, names: Iterable[str], width: int, dtype: torch.dtype = torch.bfloat16
) -> list[Case]:
    """The cases whose calls of this width read the row `name`, if the table has the rows `names` for this kernel."""
    from .ops.kernels import tiles

    kind = name.partition("+")[0]
    if kind not in LIMITS or kernel not in CANDIDATES:
        return []
    if kernel in ("tokens", "step"):
        return list(CASES) if name == "any" else []
    if kernel in ("hopper", "hopper_few"):
        normalizes = dtype == torch.bfloat16 and (width <= 128 or kernel == "hopper_few")
        return [case for case in CASES if normalizes or not case.normalize]
    if kernel == "states":
        return [case for case in CASES if case.cut or case.in_blocks(width)] if name in ("half", "tf32") else []

    def asked(case: Case) -> str:
        blocks = kernel == "backward" and case.in_blocks(width)
        gate = {"none": 0, "gamma": 2}.get(case.gate, 1)
        return tiles.name(kind, blocks, "+copied" in name, case.normalize, gate)

    return [case for case in CASES if tiles.nearest(asked(case), set(names)) == name]


def candidates(kernel: str, name: str) -> list[Row]:
    """The choices for a row; none for a row that this file does not know."""
    from .ops.kernels import tiles

    known = CANDIDATES.get(kernel, {})
    return known.get(tiles.nearest(name, known), [])


def held_denominator(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, g_gamma: Tensor | None, initial_state: Tensor | None,
    output_final_state: bool, cu_seqlens: Tensor | None, scale: float | None, normalize: bool, reverse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`reference.chunk` whose denominators are constants to autograd: for the size of what cancels in a gradient.

    With the normaliser dq, dk and the gradients of gates are differences: what comes through the numerators of o, less
    what comes through its denominators. Behind a strong decay o is v, whatever q is, and nothing of the difference is
    left, while each of the two is rounded. This form gives the first of them: errors refer to the larger of its norm
    and that of the difference.
    """
    from .ops import reference

    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    o, S = reference.chunk(q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, False, reverse)
    if normalize:
        o = o[..., :-1] / (o[..., -1:] + reference.EPS).detach()
    return o, S


def _error(got: Tensor, right: Tensor, terms: Tensor) -> float:
    """Relative error in the Euclidean norm; NaN and infinity count as infinite."""
    got = got.double()
    if not bool(got.isfinite().all()):
        return float("inf")
    return float((got - right).norm() / max(right.norm(), terms.norm()).clamp_min(1e-30))


def _call(kernel: str, op: Any, x: dict[str, Tensor | None], case: Case) -> list[Tensor]:
    """What the kernel under test computes: outputs, or outputs and gradients of all inputs that get one."""
    fixed = ("do", "g", "gamma") if case.fixed else ("do",)
    leaves = {n: t if t is None else t.detach().requires_grad_(n not in fixed) for n, t in x.items()}
    options = None, case.normalize, case.reverse
    o, S = op(*(leaves[n] for n in ("q", "k", "v", "g", "gamma", "S0")), True, None, *options)
    if kernel in ("forward", "step"):
        return [o.detach(), S.detach()]
    given = [t for t in leaves.values() if t is not None and t.requires_grad]
    assert leaves["do"] is not None
    loss = (o.float() * leaves["do"]).sum() + S.sum()
    return [o.detach(), S.detach(), *torch.autograd.grad(loss, given)]


def _draw(kernel: str, dtype: torch.dtype, width: int, case: Case) -> dict[str, Tensor | None]:
    """Fresh inputs, on the CPU."""
    B, T, H, HV = 2, {"step": 1, "tokens": 200}.get(kernel, 700), 2, 68 if kernel == "hopper" else 4
    r = torch.randn
    q, k = ((x.abs() + 0.1 if case.normalize else x) for x in (r(B, T, H, width), r(B, T, H, width)))
    g = torch.nn.functional.logsigmoid(r(B, T, HV)) / 8
    return {
        "q": q.to(dtype), "k": k.to(dtype), "v": r(B, T, HV, width).to(dtype), "do": r(B, T, HV, width).to(dtype),
        "g": g if case.gate == "g" else torch.where(g < -0.1, -20.0, g) if case.gate == "strong" else None,
        "gamma": -torch.rand(HV) / 8 if case.gate == "gamma" else None,
        "S0": torch.rand(B, HV, width, width + case.normalize),
    }  # fmt: skip


def _compute(kernel: str, x: dict[str, Tensor | None], case: Case) -> list[Tensor]:
    """`_call` of the operator that runs the kernel under test."""
    from . import ops
    from .functions import recurrent_step
    from .ops.kernels import tiles

    if kernel == "step":
        q, k, v, g = (None if t is None else t[:, 0] for t in (x["q"], x["k"], x["v"], x["g"]))
        assert q is not None
        assert k is not None
        assert v is not None
        assert x["S0"] is not None
        state = x["S0"].clone()
        o = recurrent_step(q, k, v, state, g, x["gamma"], normalize=case.normalize)
        return [o.unsqueeze(1), state]
    op = ops.recurrent if kernel == "tokens" else ops.chunk if case.cut else ops.fused_chunk
    assert x["q"] is not None
    try:
        # (segments are long by default, for speed: none of these sequences would be cut)
        tiles.segment = x["q"].shape[1] // 3 if case.cut else None
        return _call(kernel, op.operator, x, case)
    finally:
        tiles.segment = None


def _worst(kernel: str, dtype: torch.dtype, width: int, cases: Iterable[Case]) -> float:
    """The worst error of a kernel over the cases."""
    from .ops import reference

    worst = 0.0
    for case in cases:
        if kernel == "step":
            case = replace(case, reverse=False)  # of one token there is none
        x = _draw(kernel, dtype, width, case)
        got = _compute(kernel, {n: None if t is None else t.to(DEVICE) for n, t in x.items()}, case)
        exact = {n: None if t is None else t.double() for n, t in x.items()}
        right = _call(kernel, reference.chunk, exact, case)
        terms = _call(kernel, held_denominator, exact, case) if case.cancels else right
        worst = max(worst, *(_error(a.cpu(), b, c) for a, b, c in zip(got, right, terms, strict=True)))
    return worst


def _time(kernel: str, dtype: torch.dtype, width: int, case: Case) -> float:
    """Milliseconds on a shape that fills the GPU, of whole sequences."""
    import triton.testing

    from . import ops
    from .functions import recurrent_step

    def median(run: Callable[[], Any]) -> float:
        return float(triton.testing.do_bench(run, return_mode="median"))

    T, H = 512 if kernel == "tokens" else 4096, 192 if kernel == "hopper" else 16
    B = 1 if kernel == "hopper_few" else max(1, TOKENS * 64 // width // T // H)
    q, k, v, do = (torch.randn(B, T, H, width, device=DEVICE, dtype=dtype) for _ in range(4))
    if case.normalize:
        q, k = q.abs(), k.abs()
    g = None if case.gate in ("none", "gamma") else torch.randn(B, T, H, device=DEVICE)
    g = None if g is None else torch.nn.functional.logsigmoid(g) / 16
    gamma = -torch.rand(H, device=DEVICE) / 16 if case.gate == "gamma" else None
    if kernel == "step":
        pool = torch.randn(256, H, width, width + case.normalize, device=DEVICE)
        q, k, v = (x[0, :256].contiguous() for x in (q, k, v))
        g = None if g is None else g[0, :256].contiguous()
        return median(lambda: recurrent_step(q, k, v, pool, g, normalize=case.normalize))
    op = (ops.recurrent if kernel == "tokens" else ops.fused_chunk).operator
    options = None, case.normalize, False  # scale, normalize, reverse

    def forward() -> Tensor:
        return op(q, k, v, g, gamma, None, False, None, *options)[0]

    if kernel not in ("backward", "states"):
        return median(forward)
    o = forward() if case.normalize else None
    gradient = case.gate != "none" and not case.fixed
    return median(lambda: op.backward(q, k, v, g, gamma, None, None, *options, o, do, None, gradient))


def _set(kernel: str, name: str, row: Row, seed: int) -> str:
    """In the worker: the calls that follow take this row. Returns the kind of product."""
    from .ops.kernels import tiles

    tiles.override[kernel] = tiles.Tile(*row)
    copied = "+copied" in name or "+blocks" in name or kernel.startswith("hopper")
    tiles.described = 0 if copied else tiles.NEVER
    tiles.hopper = kernel.startswith("hopper")
    kind = name.partition("+")[0]
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    torch.manual_seed(seed)
    return kind


def _timed(kernel: str, name: str, width: int, row: Row, seed: int) -> float:
    """Milliseconds of one candidate; runs in the worker."""
    from .ops.kernels import tiles

    kind = _set(kernel, name, row, seed)
    return _time(kernel, next(iter(LIMITS[kind])), width, reading(kernel, name, tiles.table()[kernel], width)[0])


def _checked(kernel: str, name: str, width: int, row: Row, seed: int) -> float:
    """The error of one candidate as a share of what is allowed; runs in the worker."""
    from .ops.kernels import tiles

    kind = _set(kernel, name, row, seed)
    names = tiles.table()[kernel]
    worst = 0.0
    both = (
        {tiles.described, tiles.NEVER} if name.startswith("half+blocks") else {tiles.described}
    )  # one row for both ways
    for described in both:
        tiles.described = described
        for dtype, limit in LIMITS[kind].items():
            worst = max(worst, _worst(kernel, dtype, width, reading(kernel, name, names, width, dtype)) / limit)
    return worst


def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


class _Worker:
    """The process that runs one candidate after the other; a fresh one after each that ended or raised."""

    def __init__(self) -> None:
        self.pool = _pool()

    def run(self, function: Callable[..., float], *arguments: Any) -> float | str:
        """What the function returns there, or why it did not."""
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            reason = "the process died"
        except Exception as problem:
            # Out of shared memory is harmless, an illegal access poisons the context: a fresh worker for both.
            self.pool.shutdown(wait=False, cancel_futures=True)
            reason = (str(problem).splitlines() or [type(problem).__name__])[0]
        self.pool = _pool()
        return reason


def _best(worker: _Worker, kernel: str, name: str, width: int, rows: Iterable[Row], seed: int) -> Row | None:
    """The fastest candidate that is right, or None; prints what became of each."""
    times: dict[Row, float] = {}

    def say(row: Row, verdict: str) -> None:
        print(f"{kernel:9s} {name:24s} {width:4d}  {list(row)}  {verdict}", flush=True)

    for row in rows:
        ms = worker.run(_timed, kernel, name, width, row, seed)
        if isinstance(ms, str):
            say(row, f"REFUSED: {ms}")
        else:
            times[row] = ms
            say(row, f"{ms:8.4f} ms")
    order = sorted(times, key=times.__getitem__)
    for row in order:
        share = worker.run(_checked, kernel, name, width, row, seed)
        if not isinstance(share, str) and share <= 1:
            say(row, f"{times[row]:8.4f} ms  {share:5.2f} of the allowed error: taken")
            for slower in order[order.index(row) + 1 :]:
                say(slower, f"{times[slower]:8.4f} ms  slower, not checked")
            return row
        say(row, "REFUSED: " + (share if isinstance(share, str) else f"{share:.2f} of the allowed error"))
    return None


def _copies_tiles() -> int:
    """The capability of this GPU, if calls on it read by descriptors at all, or 0."""
    from .ops.kernels import launch

    return launch._copies_tiles(torch.cuda.current_device() if torch.cuda.is_available() else None)


def tune(kernels: list[str], names: list[str], widths: list[int], output: Path, write: bool) -> int:
    """Measures the rows that the lists name, prints every candidate, and writes the winners. Returns the exit code."""
    from .ops.kernels import tiles

    table = json.loads(tiles.TABLE.read_text())
    rows = [(k, n, w) for k in kernels for n in names if n in table[k] for w in widths if str(w) in table[k][n]]
    seed = torch.seed() % (1 << 31)
    worker, wrong = _Worker(), 0
    for kernel, name, width in rows:
        if not candidates(kernel, name) or not reading(kernel, name, table[kernel], width):
            why = "no call that reads it is known" if candidates(kernel, name) else "there are no candidates for it"
            print(f"{kernel} {name} {width}: {why}; the row stays")
            continue
        capability = _copies_tiles()
        if ("+copied" in name and not capability) or (kernel.startswith("hopper") and capability != 9):
            print(f"{kernel} {name} {width}: calls on this GPU do not read it; the row stays")
            continue
        current: Row = tuple(table[kernel][name][str(width)])
        best = _best(worker, kernel, name, width, dict.fromkeys([current, *candidates(kernel, name)]), seed)
        if best is None:
            print(f"{kernel} {name} {width}: no candidate is right; the row stays, and must not be used")
            wrong += 1
            continue
        table[kernel][name][str(width)] = list(best)
    worker.pool.shutdown()
    if write:
        output.write_text(_text(table))
        print(f"wrote {output}")
    return int(wrong > 0)


def _text(table: dict[str, Any]) -> str:
    """The table as JSON, a line for each kind of product, in columns."""
    kernels = []
    for kernel, rows in table.items():
        longest = max(map(len, rows)) + 3
        lines = ",\n".join(f"    {json.dumps(name) + ':':{longest}} {json.dumps(row)}" for name, row in rows.items())
        kernels.append(f"  {json.dumps(kernel)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from .ops.kernels import tiles

    parser.add_argument("--kernel", choices=list(tiles.table()), action="append", help="default: all")
    parser.add_argument("--precision", choices=_names(), action="append", help="default: all")
    parser.add_argument("--width", type=int, choices=WIDTHS, action="append", help="default: all")
    parser.add_argument("--output", type=Path, help="default: the table of this installation")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, write nothing")


def _names() -> list[str]:
    """Of all rows."""
    from .ops.kernels import tiles

    return list(dict.fromkeys(name for rows in tiles.table().values() for name in rows))


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code."""
    if not torch.cuda.is_available():
        print("tune measures on a CUDA device, and there is none")
        return 2
    from .ops.kernels import tiles

    return tune(
        arguments.kernel or list(tiles.table()),
        arguments.precision or _names(),
        arguments.width or list(WIDTHS),
        arguments.output or tiles.TABLE,
        not arguments.dry_run,
    )

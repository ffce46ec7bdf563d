"""`explain`: what a call of `linear_attention` would run, without running it.

- `explain`: checks the arguments, picks the operator, and asks the launcher of the Triton kernels what it would do
- `Explanation`, `Pass`, `Launch`: what it returns; `print` them
- `_dry_run`: the launcher's own code, on tensors without data, with kernels that only leave a note
"""

from __future__ import annotations

import functools
import importlib.util
import math
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import checks
from .functions import FILLING_PROGRAMS, RECURRENT_TOKENS, select
from .ops import chunk, cpu, cuda, fused_chunk, recurrent, rules
from .ops.operator import NAMESPACE

OPERATORS = {"chunk": chunk, "fused_chunk": fused_chunk, "recurrent": recurrent}


@dataclass(frozen=True)
class Launch:
    """One kernel. In brackets: one of PyTorch's own, `[copy]` or `[sum]`."""

    name: str
    bytes: int  # of the tensors that it reads and writes, each once: what its programs share comes from the cache
    programs: int | None = None  # the grid
    chunk: int | None = None  # tokens of a chunk
    block: int | None = None  # columns of the state that a program holds
    warps: int | None = None
    stages: int | None = None

    def __str__(self) -> str:
        tile = {"chunk": self.chunk, "block": self.block, "warps": self.warps, "stages": self.stages}
        parts = [_size(self.bytes), *([] if self.programs is None else [f"{self.programs} programs"])]
        return f"{self.name:16}" + ", ".join([*parts, *(f"{n} {x}" for n, x in tile.items() if x is not None)])


@dataclass(frozen=True)
class Pass:
    """What one direction of the call would do. `None` where ATen decides, or where Triton is not there to ask."""

    name: str  # "forward" or "backward"
    flops: int  # multiplications and additions, by the formula that FLOP counters use
    floor: int  # bytes: every input read once, every output written once
    launches: tuple[Launch, ...] | None = None  # in their order
    segments: int | None = None  # pieces of sequences that are walked at once
    segment: int | None = None  # tokens of a piece, at most
    workspace: int | None = None  # bytes allocated beside the results

    @property
    def moved(self) -> int | None:
        """Bytes that the launches ask for, all together."""
        return None if self.launches is None else sum(launch.bytes for launch in self.launches)

    def __str__(self) -> str:
        lines = [f"{self.flops / 1e9:.4g} GFLOP, memory floor {_size(self.floor)}"]
        if self.launches is not None:
            lines[0] += f", moves {_size(self.moved or 0)}, workspace {_size(self.workspace or 0)}"
            pieces, launches = _count(self.segments or 0, "piece"), _count(len(self.launches), "launch")
            lines.append(f"sequences in {pieces} of up to {self.segment} tokens, {launches}")
            lines += [f"  {launch}" for launch in self.launches]
        return "\n".join(f"{self.name if i == 0 else '':10}{line}" for i, line in enumerate(lines))


@dataclass(frozen=True)
class Explanation:
    """What a call would run."""

    op: str  # "la::chunk", "la::fused_chunk" or "la::recurrent"
    why: str  # how it was picked
    path: str  # device and kernels
    forward: Pass
    backward: Pass  # if gradients of all inputs are wanted
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        notes = [f"note: {note}" for note in self.notes]
        lines = [f"{self.op} on {self.path}", f"{'why':10}{self.why}", f"{self.forward}", f"{self.backward}", *notes]
        return "\n".join(lines)


class _Like:
    """What the checks ask of a tensor, as if it were on another device."""

    def __init__(self, x: Tensor, device: torch.device) -> None:
        self.shape, self.dtype, self.device, self.ndim = x.shape, x.dtype, device, x.ndim
        self.is_cuda = device.type == "cuda"
        self.nbytes = math.prod(x.shape) * x.dtype.itemsize


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    normalize: bool = False,
    reverse: bool = False,
    op: str | None = None,
    device: torch.device | str | None = None,
) -> Explanation:
    """What `linear_attention` would run for these arguments: operator, kernels, tiles, segments, bytes, FLOPs.

    Runs nothing, and reads no data: tensors on the meta device and fake tensors serve as well. Where there is no GPU to
    ask for its number of multiprocessors, 132 (H100, H200) are assumed, and a note says so.

    Args:
        q, k, v, g, g_gamma, initial_state, output_final_state, cu_seqlens, scale, normalize, reverse: as in
            `torch_la.linear_attention`.
        op: "chunk", "fused_chunk" or "recurrent": explain that operator. None: the one that `linear_attention` picks.
        device: plan as if the tensors were on this device. None: their own; meta counts as "cuda".

    Returns:
        an `Explanation`; print it.

    Raises:
        ValueError, TypeError: what the call itself would raise; an unknown op; a device without kernels.
    """
    from . import doctor

    checks.tensors(q=q, k=k, v=v, g_or_None=g, g_gamma_or_None=g_gamma, initial_state_or_None=initial_state)
    checks.tensors(cu_seqlens_or_None=cu_seqlens)
    checks.options(scale, output_final_state=output_final_state, normalize=normalize, reverse=reverse)
    if op is not None and op not in OPERATORS:
        raise ValueError(f"op must be None or one of {', '.join(OPERATORS)}: got {op=}")
    target = torch.device(device or ("cuda" if q.device.type == "meta" else q.device))
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"there are kernels for cpu and cuda: got {device=}, {q.device=}")

    def like(x: Tensor | None) -> Any:
        return None if x is None else _Like(x, target if x.device == q.device else x.device)

    given = {"q": like(q), "k": like(k), "v": like(v), "g": like(g), "g_gamma": like(g_gamma)}
    given |= {"initial_state": like(initial_state), "cu_seqlens": like(cu_seqlens)}
    checks.attention(**given, normalize=normalize)
    name = (
        op or {x.operator: name for name, x in OPERATORS.items()}[select(q, v, initial_state, cu_seqlens, target.type)]
    )
    why = "asked for" if op else _why(q, v, initial_state, cu_seqlens, target.type)
    counted = 0 if name == "recurrent" else rules.FLOP_CHUNK
    floors = _floors(given, output_final_state, normalize)
    forward = Pass("forward", rules.flops(q.shape, v.shape, counted, 1), floors[0])
    backward = Pass("backward", rules.flops(q.shape, v.shape, counted, 3), floors[1])
    if target.type == "cpu" and not (cuda.INTERPRETED and q.dtype != torch.float64):
        how = "token by token" if name == "recurrent" else f"chunks of {cpu.CHUNK} tokens"
        return Explanation(f"{NAMESPACE}::{name}", why, f"{target}: ATen, {how}", forward, backward)
    version = doctor.installed("triton")
    if version is None:
        note = "the call would raise ModuleNotFoundError: pip install triton"
        return Explanation(
            f"{NAMESPACE}::{name}", why, f"{target}: Triton, which is not installed", forward, backward, (note,)
        )

    processors = 132
    if target.type == "cuda" and torch.cuda.is_available():
        notes = list(doctor.hazards(version, torch.cuda.get_device_capability(target)))
        processors = torch.cuda.get_device_properties(target).multi_processor_count
    else:
        notes = [f"planned for {processors} multiprocessors (H100, H200): there is no GPU here to ask"]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    inputs = (q, k, v, g, g_gamma, initial_state, cu_seqlens)
    device = target if target.type == "cuda" and torch.cuda.is_available() else None
    forward, backward = _dry_run(
        name, inputs, output_final_state, (scale, normalize, reverse), processors, device, (forward, backward)
    )
    path = f"{target}: Triton {version}" + (", interpreted" if target.type == "cpu" else "")
    return Explanation(f"{NAMESPACE}::{name}", why, path, forward, backward, tuple(notes))


def _why(q: Tensor, v: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, device: str) -> str:
    """The rule of `linear_attention` with the numbers of this call."""
    T, (HV, V) = q.shape[1], v.shape[2:]
    if initial_state is not None and T <= RECURRENT_TOKENS and device != "cpu":
        return f"T = {T} behind an initial state is at most {RECURRENT_TOKENS}"
    walks = checks.states(q, cu_seqlens) * HV * -(-V // 64)
    side = "at least" if walks >= FILLING_PROGRAMS else "below"
    return f"N HV ceil(V / 64) = {walks} walks, {side} the {FILLING_PROGRAMS} that fill a GPU"


def _floors(given: dict[str, Any], final: bool, normalize: bool) -> tuple[int, int]:
    """Bytes that no implementation can avoid: forward and backward."""
    q, v, cu = given["q"], given["v"], given["cu_seqlens"]
    offsets = 0 if cu is None else cu.nbytes
    inputs = sum(x.nbytes for x in given.values() if x is not None) - offsets
    state = checks.states(q, cu) * v.shape[2] * q.shape[3] * (v.shape[3] + normalize)
    last = state * checks.state_dtype(q).itemsize if final else 0
    o = v.nbytes
    # backward: the inputs and their gradients, do, the gradient of the final state; with the normaliser o
    return inputs + offsets + o + last, 2 * inputs + offsets + o * (2 if normalize else 1) + last


# ------------------------------------------------------------------------------- the launcher, on tensors without data

_lock = threading.Lock()  # one copy of the launcher, one call at a time


@functools.cache
def _copy_of_the_launcher() -> tuple[ModuleType, list[Any]]:
    """`ops/kernels/launch.py` as a module of its own, and the list where its kernels leave notes of their launches.

    A copy, so that calls which run meanwhile keep their kernels. It shares the tile table.
    """
    from .ops.kernels import launch

    spec = importlib.util.spec_from_file_location(launch.__name__ + "_explained", launch.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    notes: list[Any] = []
    for name, value in list(vars(copy).items()):
        if hasattr(value, "arg_names") and hasattr(value, "fn"):  # a function of triton.jit
            setattr(copy, name, _Note(value, notes))
    plan = copy._plan

    def planned(*arguments: Any) -> Any:
        notes.append(plan(*arguments))
        return notes[-1]

    vars(copy)["_plan"] = planned
    return copy, notes


class _Note:
    """In the place of a kernel: `kernel[grid](...)` notes the launch."""

    def __init__(self, kernel: Any, notes: list[Any]) -> None:
        gluon = kernel.fn.__module__.endswith(".hopper")
        self.name = f"hopper.{kernel.fn.__name__}" if gluon else kernel.fn.__name__
        self.arguments, self.notes = kernel.arg_names, notes

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            touched: dict[tuple[int, int], int] = {}
            for name, x in zip(self.arguments, arguments, strict=False):
                x = getattr(x, "base", x)  # a descriptor of a tensor
                # Arguments that a kernel will not touch are pointers to the tokens, under names that are not theirs.
                other = not options.get("ROLES", 7) & ROLES.get(name, 7)
                if isinstance(x, Tensor) and not other and (name in TOKENS or not getattr(x, "tokens", False)):
                    touched[x.untyped_storage()._cdata, int(x.storage_offset())] = x.nbytes
            count = sum(touched.values())
            if self.name == "scan":  # in place: reads and writes
                count += arguments[0].nbytes
            tile = [options.get(name) for name in ("C", "BN", "num_warps", "num_stages")]
            if "NC" in options:  # warpgroups that multiply, and one for the scores
                tile = [64, 64 * options["NC"], 4 * options["NC"] + 4, options["SB"]]
            self.notes.append(Launch(self.name, count, math.prod(grid), *tile))

        return launch


ROLES = {"dq": 1, "across": 1, "factor": 1, "dk": 2, "dv": 4}  # of hopper.backward: who writes what
TOKENS = ("q", "k", "v", "o", "do", "q_n", "k_n", "do_n", "a", "b", "c")


class _Watch(TorchDispatchMode):
    """Notes the kernels that PyTorch itself would launch, and counts the bytes of what is allocated."""

    def __init__(self, notes: list[Any]) -> None:
        super().__init__()
        self.notes, self.allocated = notes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view:
            return out
        if not func._schema.is_mutable:
            self.allocated += out.nbytes
        if not name.startswith(("empty", "new_empty")):
            label = "[copy]" if name in ("clone", "_to_copy", "copy_") else f"[{name.strip('_')}]"
            self.notes.append(Launch(label, out.nbytes + sum(x.nbytes for x in args if isinstance(x, Tensor))))
        return out


def _dry_run(
    op: str,
    inputs: tuple[Tensor | None, ...],
    final: bool,
    options: tuple[float, bool, bool],
    processors: int,
    device: torch.device | None,
    passes: tuple[Pass, Pass],
) -> tuple[Pass, Pass]:
    """`launch.forward` and `launch.backward`, every gradient wanted, on the meta device."""
    from .ops.kernels import launch

    # not what is remembered: "cuda" without an index is another device tomorrow
    copies = 0 if any(map(_unaligned, inputs[:3])) else launch._copies_tiles.__wrapped__(device)

    def meta(x: Tensor | None, tokens: bool) -> Any:
        if x is None:
            return None
        y: Any = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        y.tokens = tokens
        return y

    *x, cu = (meta(y, tokens=i < 3) for i, y in enumerate(inputs))
    (T, K), (HV, V), normalize = x[0].shape[1::2], x[2].shape[2:], options[1]
    o, do = meta(inputs[2], tokens=True) if normalize else None, meta(inputs[2], tokens=True)
    dfinal = torch.empty(checks.states(x[0], cu), HV, K, V + normalize, device="meta") if final else None
    arguments = {"forward": (op, *x, final, cu, *options), "backward": (op, *x, cu, *options, o, do, dfinal, True)}

    def run(it: Pass) -> Pass:
        notes.clear()
        with _Watch(notes) as watch:
            results = getattr(launcher, it.name)(*arguments[it.name])
        launches = tuple(x for x in notes if isinstance(x, Launch))
        plan = next((x for x in notes if not isinstance(x, Launch)), None)
        segments, segment = (0, 0) if plan is None else (plan.slots, min(plan.length, T))
        workspace = watch.allocated - sum(x.nbytes for x in results if x is not None)
        return replace(it, launches=launches, segments=segments, segment=segment, workspace=workspace)

    with _lock:
        launcher, notes = _copy_of_the_launcher()
        vars(launcher)["_copies_tiles"] = lambda index: copies
        vars(launcher)["_processors"] = lambda index: processors
        return run(passes[0]), run(passes[1])


def _unaligned(x: Tensor | None) -> bool:
    """As far as x has an address."""
    return x is not None and x.device.type != "meta" and type(x) is Tensor and x.data_ptr() % 16 != 0


def _count(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "es" if what.endswith("ch") else "s")


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"

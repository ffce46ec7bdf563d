"""What this machine would run, and what is known to go wrong on it: `python -m torch_la doctor`.

Prints versions, devices, the kernels that each device would use, and the known-bad pairs of Triton and GPU, with what
runs there. It imports no Triton, and initialises CUDA only where there is a GPU. The exit code is 1 when something here
cannot run.
"""

from __future__ import annotations

import argparse
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from . import __version__
from .ops import cuda, private

OLDEST_TORCH = (2, 11, 0)
OLDEST_TRITON = (3, 6, 0)
OLDEST_GPU = (8, 0)  # bfloat16 products on tensor cores

# GPU generation by the first number of the compute capability.
GENERATIONS = {7: "Volta or Turing", 8: "Ampere or Ada", 9: "Hopper", 10: "Blackwell", 11: "Blackwell", 12: "Blackwell"}


@dataclass(frozen=True)
class Hazard:
    """A generation of GPUs on which some releases of Triton go wrong."""

    generation: str
    since: tuple[int, int, int]  # the first bad Triton
    until: tuple[int, int, int]  # the first good one
    what: str
    source: str
    runs: str  # what torch_la runs there


HAZARDS = (
    Hazard(
        "Hopper",
        (3, 4, 0),
        (3, 7, 1),
        "tl.dot(tl.trans(x), y) gives wrong numbers where x is itself the result of a product. flash-linear-attention "
        "refuses gated chunk training there; other Triton code may be wrong without a word",
        "https://github.com/fla-org/flash-linear-attention/issues/640",
        "the same kernels as everywhere, since none of them transposes the result of a product",
    ),
    Hazard(
        "Blackwell",
        (3, 5, 1),
        (3, 7, 1),
        "num_stages above 1 is reported to corrupt recurrent kernels",
        "a note in the source of Mamba-3",
        "the same kernels as everywhere, some with 2 stages, and never tested on Blackwell. Compare them with "
        "`torch_la.reference` before you rely on them; `torch_la.recurrent` has 1 stage throughout",
    ),
)
INSTEAD = "Instead: `torch_la.reference`, in plain PyTorch on any device, or tensors on the CPU"
BAD_INTERPRETER_NUMPY = (2, 4, 0)  # no longer turns an array of one element into an int


def numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.13.0+cpu is (2, 13, 0)."""
    return tuple(int(n) for n in re.findall(r"\d+", text.split("+")[0])[:3])


def installed(package: str) -> str | None:
    """The version of a package, without importing it."""
    if find_spec(package) is None:
        return None
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown version"


def hazards(triton: str, capability: tuple[int, int]) -> Iterator[str]:
    """What is known to go wrong with this Triton on a GPU of this compute capability."""
    for it in HAZARDS:
        if GENERATIONS.get(capability[0]) == it.generation and it.since <= numbers(triton) < it.until:
            since, until = (".".join(map(str, version)) for version in (it.since, it.until))
            pair = f"{it.generation} with Triton {since} to below {until}"
            yield f"{pair}: {it.what} ({it.source}). What runs: {it.runs}"


def cpu_kernels() -> str:
    return "Triton's interpreter (TRITON_INTERPRET=1); float64: ATen" if cuda.INTERPRETED else "ATen"


def report() -> tuple[list[str], list[str], list[str]]:
    """What there is, what to know about it, and what cannot run."""
    lines, notes, problems = [], [], []
    triton = installed("triton")
    lines.append(f"torch_la  {__version__}")
    lines.append(f"python    {platform.python_version()} on {platform.system()} {platform.machine()}")
    lines.append(f"torch     {torch.__version__} (CUDA {torch.version.cuda or 'not built in'})")
    lines.append(f"triton    {triton or 'not installed'}")
    lines.append(f"cpu       {torch.get_num_threads()} threads, kernels: {cpu_kernels()}")
    if numbers(torch.__version__) < OLDEST_TORCH:
        problems.append(f"torch {torch.__version__} is older than 2.11, the oldest that torch_la is made for")
    if cuda.INTERPRETED and triton is None:
        problems.append("TRITON_INTERPRET=1 asks for Triton's interpreter, and Triton is not installed")
    if cuda.INTERPRETED:
        notes.append("Triton's interpreter computes products of bfloat16 wrongly: give it float32 or float16")
        numpy = installed("numpy")
        if numpy is not None and numbers(numpy) >= BAD_INTERPRETER_NUMPY:
            problems.append(f"Triton's interpreter fails with NumPy {numpy}: pip install 'numpy<2.4'")
    if private.MISSING:
        notes.append(
            f"this torch lacks {', '.join(private.MISSING)}: the operators fall back to register_autograd, "
            "with reverse mode alone and without the eager short cut"
        )
    if not torch.cuda.is_available():
        lines.append("gpu       none")
        return lines, notes, problems
    if triton is None:
        problems.append(f"the kernels for the GPU need Triton: pip install triton. Calls there raise. {INSTEAD}")
    elif numbers(triton) < OLDEST_TRITON:
        problems.append(f"Triton {triton} is older than 3.6, the oldest that torch_la is made for")
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        kernels = "none" if triton is None or capability < OLDEST_GPU else "Triton"
        name = f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}"
        lines.append(f"cuda:{index}    {name}, kernels: {kernels}")
        if capability < OLDEST_GPU:
            problems.append(
                f"cuda:{index} is older than sm_80: the Triton kernels need Ampere or newer, and may fail or be wrong. "
                + INSTEAD
            )
        if triton is not None:
            notes += [f"cuda:{index}: {line}" for line in hazards(triton, capability)]
    return lines, notes, problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes no arguments."""


def run(options: argparse.Namespace) -> int:
    lines, notes, problems = report()
    print(*lines, sep="\n")
    for title, entries in (("note", notes), ("PROBLEM", problems)):
        for entry in entries:
            print(f"{title}: {entry}")
    if not problems:
        print("no known problem" if not notes else "it runs; read the notes")
    return 1 if problems else 0

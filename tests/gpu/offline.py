# ruff: noqa: C408
"""Compiles every launch of the kernels for Hopper without a GPU, and prints what the compiler made of each.

    python tests/gpu/offline.py [--only SUBSTRING] [--widths 64 128 256] [--record FILE | --check FILE]

The launches are real ones of `launch.forward`, `launch.backward` and `launch.step_` on CPU tensors; only the last step,
running the kernel, is replaced by a compilation for sm_90. Columns: registers, stack bytes (spills), shared memory,
CTAs per multiprocessor, wgmma and mma.sync instructions, spill stores and loads. Needs triton, and TRITON_INTERPRET
unset.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

from torch_la.ops.kernels import launch, tiles

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
SHARED = 232448  # bytes of shared memory that a program may have on Hopper
TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
seen: set = set()
rows: list[dict] = []
label = ""
only = ""


def compile_for_hopper(fn: JITFunction, args: tuple, options: dict) -> dict | None:
    """The specialisation that Triton itself would choose: 1 is a constant, multiples of 16 are marked."""
    num_warps, num_stages = options.pop("num_warps", 4), options.pop("num_stages", 3)
    target = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": options.pop("maxnreg", None)}
    values = dict(zip(fn.arg_names, args, strict=False)) | options
    signature, constants, attrs = {}, {}, {}
    gluon = fn.is_gluon()
    for index, (name, parameter) in enumerate(zip(fn.arg_names, fn.params, strict=True)):
        x = values[name]
        if parameter.is_constexpr or (isinstance(x, int) and x == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants[(index,)] = x
        elif isinstance(x, torch.Tensor):
            signature[name] = TYPES[x.dtype]
            attrs[(index,)] = [["tt.divisibility", 16]]
        elif hasattr(x, "block_shape"):  # a descriptor, of Triton or of Gluon
            block = ",".join(map(str, x.block_shape))
            layout = f",{x.layout!r}" if gluon else ""
            signature[name] = f"tensordesc<{TYPES[x.base.dtype][1:]}[{block}]{layout}>"
        elif isinstance(x, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            if x % 16 == 0 and not parameter.do_not_specialize:
                attrs[(index,)] = [["tt.divisibility", 16]]
    key = (fn.__name__, str(signature), str(constants), str(attrs), num_warps, num_stages)
    if key in seen:
        return None
    seen.add(key)
    source = (GluonASTSource if gluon else ASTSource)(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
    start = time.time()
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=target)
    seconds = time.time() - start
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", f.name], capture_output=True, text=True).stdout
        sass = subprocess.run([CUOBJDUMP, "-sass", f.name], capture_output=True, text=True).stdout
    if compiled.metadata.shared > SHARED:
        raise RuntimeError(f"{compiled.metadata.shared} bytes of shared memory, of {SHARED}")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    return dict(
        kernel=fn.__name__, registers=registers, stack=stack, shared=shared,
        ctas=min((SHARED + 1024) // (shared + 1024), 65536 // (registers * num_warps * 32)),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)), mma=len(re.findall(r"mma\.sync", ptx)),
        stl=len(re.findall(r"\bSTL", sass)), ldl=len(re.findall(r"\bLDL", sass)), warps=num_warps, seconds=seconds,
    )  # fmt: skip


def run(self: JITFunction, *args, grid, warmup, **options) -> None:
    if only not in f"{label} {self.__name__}":
        return
    try:
        row = compile_for_hopper(self, args, options)
    except Exception as error:  # a failed row is a finding to print, not the end of the report
        while error.__cause__ is not None:  # where the source was called from comes last
            error = error.__cause__
        row = dict(kernel=self.__name__, failed=f"{type(error).__name__}: {error}")
    if row is None:
        return
    row = dict(case=label) | row
    rows.append(row)
    if "failed" in row:
        print(f"{label:34} {row['kernel']:14} FAILED {row['failed']}", flush=True)
    else:
        print(
            f"{label:34} {row['kernel']:14} regs {row['registers']:3} stack {row['stack']:5} "
            f"smem {row['shared'] // 1024:3}K ctas {row['ctas']:2} wgmma {row['wgmma']:3} "
            f"mma {row['mma']:3} STL {row['stl']:3} LDL {row['ldl']:3} "
            f"warps {row['warps']} {row['seconds']:.1f}s",
            flush=True,
        )


def main() -> None:
    global label, only
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--widths", nargs="+", default=["64", "128", "256"], help="K and V, as in 64 or 256x40")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "tf32", "ieee"])
    parser.add_argument("--gates", nargs="+", default=["none", "g", "gamma", "g+norm", "g fixed"])
    parser.add_argument("--ops", nargs="+", default=["chunk"])
    parser.add_argument(
        "--layouts",
        nargs="+",
        default=["dense", "copied", "hopper", "many hopper"],
        choices=["dense", "copied", "hopper", "many hopper", "packed", "cut", "packed+copied", "cut+copied"],
    )
    parser.add_argument(
        "--tile", nargs="*", default=[], help="kernel:chunk,block,warps,stages instead of the table's row"
    )
    parser.add_argument("--record", type=Path, help="write the stack bytes of each kernel here")
    parser.add_argument("--check", type=Path, help="fail if a kernel has more stack bytes than this record says")
    args = parser.parse_args()
    only = args.only
    for row in args.tile:
        kernel, numbers = row.split(":")
        tiles.override[kernel] = tiles.Tile(*map(int, numbers.split(",")))
    JITFunction.run = run
    for dtype in args.dtypes:
        torch.set_float32_matmul_precision("highest" if dtype == "ieee" else "high")
        t = torch.bfloat16 if dtype == "bf16" else torch.float16 if dtype == "fp16" else torch.float32
        for D in args.widths:
            for gate in args.gates:
                normalize = "norm" in gate
                K, V = (int(x) for x in (D.split("x") * 2)[:2])
                for op, layout in itertools.product(args.ops, args.layouts):
                    if layout.endswith("hopper") and (max(K, V) <= 64 or dtype not in ("bf16", "fp16")):
                        continue
                    T, H = (512, 160) if layout == "many hopper" else (8192, 2)
                    q, v = torch.empty(1, T, H, K, dtype=t), torch.empty(1, T, H, V, dtype=t)
                    g = torch.empty(1, T, H) if gate.startswith(("g+", "g ")) or gate == "g" else None
                    gamma = torch.empty(H) if gate.startswith("gamma") else None
                    S = torch.empty(1, H, K, V + normalize)
                    label = f"{op} {dtype} {D} {gate} {layout}"
                    dense = not layout.startswith(("packed", "cut"))
                    cu = None if dense else torch.tensor([0, T], dtype=torch.int32)
                    tiles.segment = None if dense else T if layout.startswith("packed") else 1024
                    tiles.described = 0 if layout.endswith(("copied", "hopper")) else tiles.NEVER
                    tiles.hopper = layout.endswith("hopper")
                    launch.forward(op, q, q, v, g, gamma, S, True, cu, 0.5, normalize, False)
                    options = (cu, 0.5, normalize, False, v if normalize else None)
                    launch.backward(op, q, q, v, g, gamma, S, *options, v, S, "fixed" not in gate)
                    tiles.segment = None
            label = f"step {D}"
            x, y, state = torch.empty(2, 2, K, dtype=t), torch.empty(2, 2, V, dtype=t), torch.empty(2, 2, K, V)
            launch.step_(x, x, y, state, torch.empty(2, 2), None, None, 0.5, False)
    failed = [r for r in rows if "failed" in r]
    stack: dict[str, int] = {}
    for r in rows:
        if "failed" not in r:
            name = f"{r['case']} {r['kernel']}"
            stack[name] = max(stack.get(name, 0), r["stack"])
    if args.record:
        lines = ",\n".join(f"  {json.dumps(name)}: {size}" for name, size in stack.items())
        args.record.write_text(f'{{\n "triton": "{triton.__version__}",\n "stack_bytes": {{\n{lines}\n }}\n}}\n')
    if args.check:
        known = json.loads(args.check.read_text())["stack_bytes"]
        for name, size in stack.items():
            if size > known.get(name, 0):
                failed.append({"case": name})
                print(f"{name}: {size} bytes of stack, on record {known.get(name, 0)}")
    print(f"{len(rows)} kernels, {len(failed)} failed")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()

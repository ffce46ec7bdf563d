# ruff: noqa: C408
"""The whole proof on a GPU, in one command: what a release must show before it ships a kernel.

    python tests/gpu/proof.py --out FOLDER [--jobs 40] [--tests 10] [--skip cases extras sanitizer pytest timing]

Runs at once, over all GPUs of the machine: every case of suite.py against float64, the rest of the contract (extras),
compute-sanitizer's memcheck, initcheck and racecheck over every kernel at every width, and the test suite on CUDA
tensors; then, alone, the timings. Writes docs/records/gpu_*.json anew into FOLDER: one line for each case.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
import triton

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WIDTHS = (0, 16, 32, 60, 64, 100, 128, 192, 256)  # 0: handover.py
TOOLS = ("memcheck", "initcheck", "racecheck")
FINDINGS = re.compile(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+)")
RACE = re.compile(r"Race reported between(?:.*\n)(?:=+ +and .*\n)*")
PLACE = re.compile(r" in (\w+\.py):(\d+)")


def rounded(x: Any) -> Any:
    """Three digits are what a record needs."""
    if isinstance(x, float):
        return float(f"{x:.3g}")
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items() if v not in ("", None)}
    return [rounded(v) for v in x] if isinstance(x, list) else x


def write(path: Path, key: str, rows: list[dict], **more: Any) -> None:
    header = dict(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), torch=torch.__version__,
        triton=triton.__version__, device=torch.cuda.get_device_name(0), **more,
    )  # fmt: skip
    lines = ",\n".join("  " + json.dumps(rounded(row)) for row in rows)
    head = "".join(f" {json.dumps(k)}: {json.dumps(v)},\n" for k, v in header.items())
    path.write_text(f"{{\n{head} {json.dumps(key)}: [\n{lines}\n ]\n}}\n")


def start(command: list[str], log: Path, device: int | None = None, **environment: str) -> subprocess.Popen:
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    return subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT, env=os.environ | environment)


def ordered(text: str, path: Path) -> dict[str, int]:
    """Reports of racecheck on partitions of a program, of accesses that barriers order which the tool does not follow.

    "passed": what `warp_specialize` itself passes to them; such a report names lines of `def`, of the specialisation
    and of its callers alone. "handed": factors (in the control: box) stored before an mbarrier and loaded behind it.
    """
    lines = dict(enumerate(path.read_text().splitlines(), 1))
    call = next(n for n, line in lines.items() if "gl.warp_specialize(" in line)
    passed = {n for n, line in lines.items() if n >= call - 1 or line.startswith("def ")}
    factors = re.compile(r"\b(((d|u|gain|r)_s|box)\.index\(\w+\)|weights)\.(load|store)\(")
    handed = {n for n, line in lines.items() if factors.search(line)}
    found: dict[str, int] = dict(passed=0, handed=0)
    for race in RACE.findall(text):
        places = PLACE.findall(race)
        if places and all(file == path.name for file, _ in places):
            numbers = {int(n) for _, n in places}
            found["passed"] += numbers <= passed
            found["handed"] += numbers <= handed
    return found


def parts(widths: list[int]) -> list[tuple[int, str]]:
    """What the sanitizer runs over: at wide heads hopper.py by itself, because each takes minutes."""
    return [(w, part) for w in sorted(widths, reverse=True) for part in ("", "hopper") if w > 100 or not part]


def sanitizer(out: Path, devices: int, widths: list[int]) -> dict[tuple[int, str, str], subprocess.Popen]:
    if shutil.which("compute-sanitizer") is None:
        raise SystemExit("compute-sanitizer is not on the PATH")
    running = {}
    for i, (width, part, tool) in enumerate((*x, tool) for x in parts(widths) for tool in reversed(TOOLS)):
        program = [str(HERE / "suite.py"), "--sanitize", str(width), *(["--hopper"] if part else [])]
        if width == 0:
            program = [str(HERE / "handover.py")]
        log = out / f"sanitizer_{width}{part}_{tool}.log"
        # (by default it prints 100 reports and drops the rest: what is not printed, `ordered` could not judge)
        command = ["compute-sanitizer", "--print-limit", "100000", "--tool", tool, sys.executable, *program]
        # with the caching allocator, reads past a tensor would land in a neighbour and go unnoticed
        running[width, part, tool] = start(command, log, i % devices, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=40, help="processes of the cases")
    parser.add_argument("--tests", type=int, default=10, help="processes of the test suite (pytest-xdist)")
    parser.add_argument("--skip", nargs="*", default=[])
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="for the sanitizer")
    parser.add_argument("--some", action="store_true", help="cases: not every option set at every width")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which what still runs is ended")
    args = parser.parse_args()
    out, begin, devices = args.out, time.time(), torch.cuda.device_count()
    logs = out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    suite = [sys.executable, str(HERE / "suite.py")]
    running: dict[Any, subprocess.Popen] = {}
    if "sanitizer" not in args.skip:
        running |= sanitizer(logs, devices, args.widths)
    if "cases" not in args.skip:
        more = [] if args.some else ["--full"]
        command = [*suite, "--only", "cases", "--jobs", str(args.jobs), "--json", str(logs / "cases.json"), *more]
        running["cases"] = start(command, logs / "cases.log")
    if "extras" not in args.skip:
        running["extras"] = start(
            [*suite, "--only", "extras", "--json", str(logs / "extras.json")], logs / "extras.log", 0
        )
    if "pytest" not in args.skip:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-rf",
            "--tb=short",
            "-m",
            "gpu",
            "-n",
            str(args.tests),
            str(ROOT / "tests"),
        ]
        command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
        command += [f"--ignore={HERE}", f"--junitxml={logs / 'pytest.xml'}"]
        running["pytest"] = start(command, logs / "pytest.log")

    left = dict(running)
    while left and time.time() - begin < args.limit:
        for name in [n for n, p in left.items() if p.poll() is not None]:
            print(f"{time.time() - begin:5.0f} s  {name}: exit {left.pop(name).returncode}", flush=True)
        time.sleep(0.5)
    for name, process in left.items():
        process.send_signal(signal.SIGINT)  # pytest then says what failed so far
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20 if name == "pytest" else 1)
        process.kill()
        print(f"ENDED after {args.limit:.0f} s: {name}", flush=True)

    bad = len(left)
    if "sanitizer" not in args.skip:
        rows = []
        control, blind = logs / "sanitizer_0_racecheck.log", dict(passed=0, handed=0)
        if control.exists():
            blind = ordered(control.read_text(errors="replace"), HERE / "handover.py")
        for width, part in reversed(parts(args.widths)):
            row: dict[str, Any] = dict(width=width) | (dict(kernels="hopper.py") if part else {})
            for tool in TOOLS:
                text = (logs / f"sanitizer_{width}{part}_{tool}.log").read_text(errors="replace")
                found = FINDINGS.findall(text)
                # no summary, or a program that did not reach its end, is a finding too
                row[tool] = int(found[-1]) if found and f"sanitize {width} done" in text else "did not finish"
                if tool == "racecheck" and row[tool] != "did not finish" and (part or not width):
                    path = ROOT / "ops" / "kernels" / "hopper.py" if width else HERE / "handover.py"
                    row |= {k: n for k, n in ordered(text, path).items() if n and blind[k]}
                    row[tool] -= row.get("passed", 0) + row.get("handed", 0)
                if row[tool] != 0:
                    bad += 1
                    print(f"sanitizer {width} {part} {tool}: {row[tool]}\n" + "\n".join(text.splitlines()[:25]))
            rows.append(row)
        what = (
            "compute-sanitizer over tests/gpu/suite.py --sanitize WIDTH: every kernel once, bfloat16 and TF32. "
            "passed and handed: what racecheck reports of barriers that it does not follow; width 0 is the control, "
            "tests/gpu/handover.py, a right kernel: a kind of report that it does not show stays a finding"
        )
        write(out / "gpu_sanitizer.json", "findings", rows, what=what)
    for name, key in (("cases", "cases"), ("extras", "contract")):
        if name not in args.skip:
            text = (logs / f"{name}.log").read_text(errors="replace")
            print("\n".join(text.splitlines()[-60:]))
            if (logs / f"{name}.json").exists():
                records = json.loads((logs / f"{name}.json").read_text())[name]
                bad += sum(not r["ok"] for r in records)
                for r in records:
                    if key == "contract":
                        r.pop("errors")
                        r.pop("detail")
                write(out / f"gpu_{key}.json", "cases", records)
            else:
                bad += 1
    if "pytest" not in args.skip:
        lines = (logs / "pytest.log").read_text(errors="replace").splitlines()
        print("\n".join([line for line in lines if " FAILED " in line or " ERROR " in line] + lines[-150:]))
        if (logs / "pytest.xml").exists():
            rows = []
            for case in ElementTree.parse(logs / "pytest.xml").getroot().iter("testcase"):
                result = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
                rows.append(dict(test=f"{case.get('classname')}::{case.get('name')}", result=(result or ["passed"])[0]))
            bad += sum(row["result"] in ("failure", "error") for row in rows)
            files: dict[str, dict[str, int]] = {}
            for row in rows:
                counts = files.setdefault(row["test"].split("::")[0].removeprefix("tests."), {})
                counts[row["result"]] = counts.get(row["result"], 0) + 1
            write(out / "gpu_pytest.json", "files", [dict(file=f, **c) for f, c in sorted(files.items())])
        else:
            bad += 1
    if "timing" not in args.skip:
        subprocess.run([*suite, "--only", "timing", "--more", "--json", str(logs / "timing.json")], check=False)
        if (logs / "timing.json").exists():
            record = json.loads((logs / "timing.json").read_text())
            write(
                out / "gpu_timing.json", "timing", record["timing"], copy_bandwidth_tb_s=record["copy_bandwidth_tb_s"]
            )
    subprocess.run(["tar", "czf", str(out / "logs.tgz"), "-C", str(out), "logs"], check=True)
    shutil.rmtree(logs)
    print(f"{time.time() - begin:.0f} s, {bad} bad")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()

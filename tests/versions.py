"""The compile contract on several releases of PyTorch: the oldest supported, 2.13, and the newest in the registry.

    python tests/versions.py --folder FOLDER [--only 2.11.0 ...] [--rows export ...] [--record FILE]

For each release it makes a virtual environment in FOLDER (or uses the one it finds there), installs torch and what the
tests need, and runs the contract's CPU rows in it against a copy of this checkout. The record says what was installed,
on which day, and how many tests of each file passed or failed; a record that exists is brought up to date. PyPI's torch
brings CUDA libraries: 6 GB for a release.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import tempfile
import venv
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RELEASES = ["2.11.0", "2.13.0", "newest"]
ROWS = ["compile", "dynamic", "export", "compile_cache", "layout", "distributed", "transforms", "limits", "dtensor"]
ROWS += ["opcheck"]


def environment(folder: Path, release: str) -> Path:
    """The Python of the environment for a release; made and filled where it is missing."""
    python = folder / release / "bin" / "python"
    if not python.exists():
        venv.create(folder / release, with_pip=True)
        torch = "torch" if release == "newest" else f"torch=={release}"
        packages = [torch, "numpy", "pytest", "hypothesis", "tqdm"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages], check=True)
    return python


def run(python: Path, rows: list[str], record: dict[str, Any], report: Any) -> None:
    """Fills `record`, and reports after each file."""
    code = "import json, platform, torch; print(json.dumps([torch.__version__, platform.python_version()]))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    record["torch"], record["python"] = json.loads(found.splitlines()[-1])
    record["date"] = datetime.date.today().isoformat()
    record.setdefault("rows", {})
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        ignore: Any = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "torch_la", copy / "torch_la", ignore=ignore)
        shutil.copytree(ROOT / "ops", copy / "torch_la/ops", ignore=ignore)
        shutil.copytree(ROOT / "tests", copy / "tests", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", copy)
        paths = {"PYTHONPATH": name, "CI": "1", "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": f"{name}/cache"}
        for row in rows:
            results = copy / f"{row}.xml"
            command = [python, "-m", "pytest", "-q", f"tests/test_{row}.py", f"--junit-xml={results}", "--tb=line"]
            done = subprocess.run(command, cwd=copy, env={**os.environ, **paths}, capture_output=True, text=True)
            if not results.exists():
                record["rows"][row] = {"problem": (done.stdout + done.stderr)[-500:]}
                continue
            suite = ET.parse(results).getroot()[0]
            failures = {case.attrib["name"]: problem for case in suite.iter("testcase") if (problem := message(case))}
            tests = int(suite.attrib["tests"]) - int(suite.attrib["skipped"])
            passed = tests - int(suite.attrib["failures"]) - int(suite.attrib["errors"])
            seconds = round(float(suite.attrib["time"]))
            record["rows"][row] = {"passed": passed, "of": tests, "seconds": seconds, "failures": failures}
            report(f"{record['torch']} {row}: {passed} of {tests} passed, {seconds} s")


def message(case: ET.Element) -> str:
    """Why a test failed; empty where it did not."""
    found = [*case.iter("failure"), *case.iter("error")]
    return found[0].attrib.get("message", "failed")[:300] if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the environments are, or are made")
    parser.add_argument("--only", nargs="+", choices=RELEASES, default=RELEASES)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--record", type=Path, help="docs/records/compile_versions.json")
    options = parser.parse_args()
    record: dict[str, Any] = {"what": "the compile contract's CPU rows on releases of PyTorch", "releases": {}}
    if options.record and options.record.exists():
        record = json.loads(options.record.read_text())

    def report(line: str) -> None:
        print(line, flush=True)
        if options.record:
            options.record.write_text(json.dumps(record, indent=1) + "\n")

    for release in options.only:
        found = record["releases"].setdefault(release, {})
        run(environment(options.folder, release), options.rows, found, report)
    failed = sum(len(row.get("failures", "?")) for r in record["releases"].values() for row in r["rows"].values())
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()

"""The command line: `python -m torch_la demo`, `doctor`, `tune` or `bench`; installed as `torch-la` too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "demo": "train a small language model, then generate from it token by token",
    "doctor": "print versions, devices, which kernels would run, and known-bad combinations",
    "tune": "measure tile choices on this GPU and rewrite the tile table",
    "bench": "time this library and its peers, in one process and one run",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Each is a module of its name, imported only when it is asked for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="torch-la", description="Causal linear attention as a PyTorch operator.")
    commands = parser.add_subparsers(metavar="command", required=True)
    for name, line in COMMANDS.items():
        if name not in arguments[:1]:
            commands.add_parser(name, help=line)
            continue
        module = import_module(f".{name}", __package__)
        command = commands.add_parser(name, help=line, description=(module.__doc__ or line).splitlines()[0])
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""What each layout tag makes Inductor do with q, k and v: writes docs/records/compile_layout.json and prints its table.

    python docs/measure_layout.py

A tag says which strides an operator wants of its inputs. For each tag, in a process of its own, three models are
compiled for training on the CPU, and what is written before the operator can read q, k and v is counted, in units of
the size of q: buffers in Inductor's code that are not the projection, and copies that a kernel makes of tensors whose
last dimension is not contiguous.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "records" / "compile_layout.json"
TAGS = ["no tag", "needs_exact_strides", "needs_fixed_stride_order", "needs_contiguous_strides", "flexible_layout"]
B, T, H, D = 2, 96, 4, 16


def models() -> dict[str, Any]:
    import torch.nn.functional as F
    from torch import Tensor, nn

    import torch_la

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(H * D, 3 * H * D)
            self.conv = nn.Conv1d(3 * H * D, 3 * H * D, 4, padding=3, groups=3 * H * D)

        def heads(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.unflatten(-1, (3, H, D)).unbind(-3)

    class Packed(Layer):
        """Slices of the projection, as they are."""

        def forward(self, x: Tensor) -> Tensor:
            return torch_la.chunk(*self.heads(self.qkv(x)))[0]

    class Features(Layer):
        """q and k through a feature map, v as it is."""

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(self.qkv(x))
            return torch_la.chunk(F.elu(q) + 1, F.elu(k) + 1, v)[0]

    class Convolution(Layer):
        """A short convolution over time, which leaves time as the last dimension in memory."""

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.qkv(x).mT)[..., : x.shape[1]]
            return torch_la.chunk(*self.heads(F.silu(y).mT))[0]

    return {"packed projection": Packed, "feature map": Features, "short convolution": Convolution}


def measure(tag: str) -> dict[str, Any]:
    """In a process of its own: the tag is added while the operators are defined."""
    import torch

    define = torch.library.Library.define

    def tagged(library: Any, schema: str, alias_analysis: str = "", *, tags: Any = ()) -> Any:
        if library.ns == "la" and tag != "no tag":
            tags = (*(x for x in tags if "layout" not in str(x) and "stride" not in str(x)), getattr(torch.Tag, tag))
        return define(library, schema, alias_analysis, tags=tags)

    torch.library.Library.define = tagged
    from torch._inductor.utils import run_and_get_code

    torch.set_num_threads(1)
    found = {}
    for name, model in models().items():
        torch._dynamo.reset()
        layer, x = model(), torch.randn(B, T, H * D)
        compiled = torch.compile(layer, fullgraph=True)
        _, codes = run_and_get_code(lambda: compiled(x).sum().backward())  # noqa: B023
        code = codes[0][codes[0].index("def call(") :]
        code, call = re.split(r"torch\.ops\.la\.chunk\.default\(", code)[:2]
        views = re.findall(r"(?:reinterpret_tensor\((\w+), \((.*?)\), \((.*?)\), \d+\)|(\w+)),", call)[:3]
        strides = {}
        buffers = re.findall(r"(\w+) = empty_strided_cpu\(\((.*?)\), \((.*?)\)", code)
        for buffer, _, stride in buffers:
            strides[buffer] = stride
        numbers = [[int(n) for n in (view[2] or strides[view[3]]).split(", ")] for view in views]
        written = {buffer: math.prod(int(n) for n in size.split(",") if n.strip()) for buffer, size, _ in buffers}
        unit = B * T * H * D
        # The projection, and the convolution with its input, have to be written whatever the tag.
        needed = {"short convolution": 6}.get(name, 3)
        extra = sum(written.values()) / unit - needed
        found[name] = {
            "strides": numbers,
            "inductor": extra,
            "kernel": sum(stride[-1] != 1 for stride in numbers),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tag", choices=TAGS)
    options = parser.parse_args()
    if options.tag:
        print(json.dumps(measure(options.tag)))
        return
    table = {}
    for tag in TAGS:
        command = [sys.executable, __file__, "--tag", tag]
        # the keys of the compile cache know nothing of tags
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        table[tag] = json.loads(done.stdout.splitlines()[-1])
        print(tag, {name: (row["inductor"], row["kernel"], row["strides"]) for name, row in table[tag].items()})
    import torch

    record = {"what": "copies of q, k and v by layout tag, in units of q", "date": date.today().isoformat()}
    record |= {"torch": torch.__version__, "table": table}
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

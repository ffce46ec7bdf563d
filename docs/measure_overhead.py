"""Microseconds of an eager call that does no work: writes docs/records/overhead.json and prints its table.

    python docs/measure_overhead.py

The kernel is the same everywhere: it allocates an output of the right shape. Around it stand, with one signature,

- a plain Python function; where a gradient is recorded, a torch.autograd.Function
- the same after the checks of the contract
- the public function of torch_la, which goes around the dispatcher in plain eager calls
- torch.ops.la, through the dispatcher and the "Autograd" kernel
- torch.library.custom_op with register_autograd

and each is called without a gradient, with one recorded, and forward and backward together. Best of several repeats.
"""

from __future__ import annotations

import argparse
import json
import platform
import timeit
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_la import checks, ops

RECORD = Path(__file__).parent / "records" / "overhead.json"
OPTIONS = (False, None, None, False, False)  # output_final_state, cu_seqlens, scale, normalize, reverse


def forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, None]:
    return v.new_empty(v.shape), None


def backward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Any) -> tuple[Any, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), g.new_empty(g.shape), None, None


def checked(*inputs: Any) -> tuple[Tensor, None]:
    q, k, v, g, g_gamma, initial_state, _, cu_seqlens, _, normalize, _ = inputs
    checks.attention(q, k, v, g, g_gamma, initial_state, cu_seqlens, normalize)
    return forward(*inputs)


def function(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel as a torch.autograd.Function."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.save_for_backward(*inputs[:4])
            ctx.set_materialize_grads(False)
            return kernel(*inputs)

        @staticmethod
        def backward(ctx: Any, do: Tensor, dfinal_state: Tensor | None) -> Any:
            return *backward(*ctx.saved_tensors), *(None,) * 5

    return Function.apply


def custom_op() -> Callable[..., Any]:
    """The same operator, and its backward, as torch.library.custom_op."""
    op = torch.library.custom_op("overhead::noop", forward, mutates_args=(), schema=ops.operator.FORWARD)
    op_backward = torch.library.custom_op(
        "overhead::noop_backward", backward, mutates_args=(), schema=ops.operator.BACKWARD
    )

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, g, g_gamma, initial_state, _, cu_seqlens, scale, normalize, reverse = inputs
        ctx.save_for_backward(q, k, v, g, g_gamma, initial_state, cu_seqlens)
        ctx.options = scale, normalize, reverse
        ctx.set_materialize_grads(False)

    def formula(ctx: Any, do: Tensor, dfinal_state: Tensor | None) -> Any:
        gradients = op_backward(*ctx.saved_tensors, *ctx.options, None, do, dfinal_state, True)
        return *gradients, *(None,) * 5

    op.register_autograd(formula, setup_context=setup_context)
    return op


def microseconds(call: Callable[[], Any], repeats: int, calls: int) -> float:
    call()
    return min(timeit.repeat(call, repeat=repeats, number=calls)) / calls * 1e6


def measure(repeats: int, calls: int) -> list[dict[str, Any]]:
    operator = ops.operator.Operator("noop", {"cpu": forward}, {"cpu": backward}, 0)
    custom = custom_op()
    rows = (
        ("plain Python function", forward, function(forward)),
        ("the same, with the checks", checked, function(checked)),
        ("torch_la, the public function", operator, operator),
        ("torch.ops.la, through the dispatcher", operator.forward, operator.forward),
        ("torch.library.custom_op", custom, custom),
    )

    def inputs(gradient: bool) -> tuple[Any, ...]:
        q, k, v = (torch.zeros(1, 1, 1, 1, requires_grad=gradient) for _ in range(3))
        g = torch.zeros(1, 1, 1, requires_grad=gradient)
        return (q, k, v, g, None, None, *OPTIONS)

    given, wanting = inputs(False), inputs(True)
    do = torch.zeros(1, 1, 1, 1)
    table = []
    for name, plain, differentiable in rows:
        table.append(
            {
                "call": name,
                "forward": microseconds(lambda: plain(*given), repeats, calls),  # noqa: B023
                "forward_recorded": microseconds(lambda: differentiable(*wanting), repeats, calls),  # noqa: B023
                "forward_and_backward": microseconds(
                    lambda: torch.autograd.grad(differentiable(*wanting)[0], wanting[:4], do),  # noqa: B023
                    repeats,
                    calls // 4,
                ),
            }
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--machine", default="2-core x86 CPU", help="how the record names this machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = measure(options.repeats, options.calls)
    record = {
        "what": "microseconds of an eager call without work, best of the repeats",
        "date": date.today().isoformat(),
        "machine": options.machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "repeats": options.repeats,
        "calls": options.calls,
        "table": [{k: round(x, 2) if isinstance(x, float) else x for k, x in row.items()} for row in table],
    }
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for row in table:
        print(f"{row['call']:38s}" + "".join(f"{x:8.2f}" for x in list(row.values())[1:]))


if __name__ == "__main__":
    main()

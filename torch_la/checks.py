"""Every rule of the operators' contract, checked before any kernel runs.

Each rule raises ValueError (a shape, a value, a combination) or TypeError (a dtype, a device, a Python type). The
message names the argument and shows what came. The kernels and the fake functions call the same rules, so a mistake
surfaces with the same words in eager mode and while tracing. Sizes may be symbolic: a comparison that the tracer cannot
decide becomes a guard or a run-time assertion.

    B batch   T time   H key heads   HV value heads   K key width   V value width   N states   S slots of a state pool
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_WIDTH_CUDA = 256


def state_dtype(q: Tensor) -> torch.dtype:
    """The dtype that states are kept in, and that kernels accumulate in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _require(condition: Any, message: Callable[[], str], error: type[Exception] = ValueError) -> None:
    if condition is True:
        return
    if condition is False:
        raise error(message())
    if torch.compiler.is_dynamo_compiling():  # it traces these lines, and cannot trace a message with a closure
        from torch.fx.experimental.symbolic_shapes import guard_or_true

        if not guard_or_true(condition):  # undecided: left to the operator's fake function, which comes later
            raise error(message())
        return
    torch._check_with(error, condition, message)  # a SymBool: becomes a guard, or an assertion in the graph


def _ndim(name: str, x: Tensor, letters: str) -> None:
    wanted = letters.count(",") + 1
    if x.ndim != wanted:
        raise ValueError(f"{name} must have {wanted} dimensions [{letters}]: got {name}.shape={tuple(x.shape)}")


def _shape(name: str, x: Tensor, wanted: Sequence[Any], letters: str) -> None:
    if type(x) is Tensor and not torch.compiler.is_dynamo_compiling() and x.shape == wanted:
        return  # plain sizes, and right: most calls are
    _ndim(name, x, letters)
    for size, right in zip(x.shape, wanted, strict=True):
        same = size == right
        if same is not True:
            _require(same, lambda: f"{name} must be [{letters}] = {tuple(wanted)}: got {name}.shape={tuple(x.shape)}")


def _dtype(name: str, x: Tensor, right: torch.dtype, why: str) -> None:
    if x.dtype != right:
        raise TypeError(f"{name} must be {right} {why}: got {name}.dtype={x.dtype}")


def _floating(name: str, x: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating-point dtype: got {name}.dtype={x.dtype}")


def _device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise TypeError(f"{name} must be on the device of q: got {name}.device={x.device}, q.device={q.device}")


def tensors(**arguments: Any) -> None:
    """TypeError unless every argument is a tensor; an argument whose name ends in `_or_None` may be None."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor) and not (x is None and name.endswith("_or_None")):
            name = name.removesuffix("_or_None")
            raise TypeError(f"{name} must be a torch.Tensor: got {name}={x!r} ({type(x).__name__})")


def options(scale: Any, **flags: Any) -> None:
    """TypeError unless `scale` is a number or None, and every flag a bool."""
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"scale must be a number or None: got scale={scale!r} ({type(scale).__name__})")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be a bool: got {name}={flag!r} ({type(flag).__name__})")


def sizes(least: int = 1, **named: Any) -> None:
    """TypeError unless every size is an int, ValueError unless it is at least `least`."""
    for name, size in named.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"{name} must be an int: got {name}={size!r} ({type(size).__name__})")
        if size < least:
            raise ValueError(f"{name} must be at least {least}: got {name}={size}")


def _qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What q, k and v share in every operator, once their numbers of dimensions are right."""
    (H, K), (HV, V) = q.shape[-2:], v.shape[-2:]
    _require(H > 0, lambda: f"q must have at least one head: got q.shape={tuple(q.shape)}")
    _require(HV > 0, lambda: f"v must have at least one head: got v.shape={tuple(v.shape)}")
    _require(
        HV % H == 0,
        lambda: f"v must have a multiple of the heads of q: got v.shape={tuple(v.shape)}, q.shape={tuple(q.shape)}",
    )
    _require(K > 0, lambda: f"q has width 0: got q.shape={tuple(q.shape)}")
    _require(V > 0, lambda: f"v has width 0: got v.shape={tuple(v.shape)}")
    dtype = q.dtype
    if dtype not in DTYPES:
        raise TypeError(f"q must be float32, bfloat16, float16 or (on the CPU) float64: got q.dtype={dtype}")
    if q.is_cuda:
        wide = f"may be at most {MAX_WIDTH_CUDA} wide on CUDA"
        _require(K <= MAX_WIDTH_CUDA, lambda: f"q {wide}: got q.shape={tuple(q.shape)}")
        _require(V <= MAX_WIDTH_CUDA, lambda: f"v {wide}: got v.shape={tuple(v.shape)}")
        if dtype == torch.float64:
            raise TypeError(f"q may be float64 only on the CPU: got q.dtype={dtype}, q.device={q.device}")
    _dtype("k", k, dtype, "like q")
    _dtype("v", v, dtype, "like q")
    _device("k", k, q)
    _device("v", v, q)


def _gates(g: Tensor | None, g_gamma: Tensor | None, q: Tensor, wanted: Sequence[Any], letters: str) -> None:
    if g is None and g_gamma is None:
        return
    if g is not None and g_gamma is not None:
        raise ValueError(
            f"g and g_gamma exclude each other: got g.shape={tuple(g.shape)} and g_gamma.shape={tuple(g_gamma.shape)}"
        )
    if g is not None:
        _shape("g", g, wanted, letters)
        _floating("g", g)
        _device("g", g, q)
    if g_gamma is not None:
        _shape("g_gamma", g_gamma, wanted[-1:], "HV")
        _floating("g_gamma", g_gamma)
        _device("g_gamma", g_gamma, q)


def _state(name: str, state: Tensor, q: Tensor, v: Tensor, rows: Any, letter: str, normalize: bool) -> None:
    """A state or state pool: [rows, HV, K, V], one column wider when it carries z."""
    HV, K, V = v.shape[-2], q.shape[-1], v.shape[-1]
    _ndim(name, state, f"{letter}, HV, K, V + 1" if normalize else f"{letter}, HV, K, V")
    if normalize:
        _require(
            state.shape[-1] != V,
            lambda: (
                f"{name} lacks z: with normalize=True it has V + 1 = {V + 1} columns, z the last: "
                f"got {name}.shape={tuple(state.shape)}"
            ),
        )
    columns = V + 1 if normalize else V
    letters = f"{letter}, HV, K, V + 1" if normalize else f"{letter}, HV, K, V"
    _shape(name, state, (rows, HV, K, columns), letters)
    _dtype(name, state, state_dtype(q), f"(for {q.dtype} inputs)")
    _device(name, state, q)


def states(q: Tensor, cu_seqlens: Tensor | None) -> Any:
    """N, the number of states: one for each batch row, or for each packed sequence."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
) -> None:
    """The contract of `chunk`, `fused_chunk` and `recurrent`."""
    _ndim("q", q, "B, T, H, K")
    _shape("k", k, q.shape, "B, T, H, K")
    _ndim("v", v, "B, T, HV, V")
    B, T, _, _ = q.shape
    _, _, HV, V = v.shape
    _shape("v", v, (B, T, HV, V), "B, T, HV, V")
    _qkv(q, k, v)
    _gates(g, g_gamma, q, (B, T, HV), "B, T, HV")
    if cu_seqlens is not None:
        _ndim("cu_seqlens", cu_seqlens, "N + 1")
        _require(
            cu_seqlens.shape[0] > 0,
            lambda: f"cu_seqlens must hold at least one offset: got cu_seqlens.shape={tuple(cu_seqlens.shape)}",
        )
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64: got cu_seqlens.dtype={cu_seqlens.dtype}")
        _device("cu_seqlens", cu_seqlens, q)
        _require(
            B == 1,
            lambda: f"cu_seqlens packs the sequences into one batch row, so q must have B = 1: got {tuple(q.shape)=}",
        )
    if initial_state is not None:
        _state("initial_state", initial_state, q, v, states(q, cu_seqlens), "N", normalize)


def offsets(cu_seqlens: Tensor, T: int) -> list[int]:
    """The offsets as a list, checked. For the CPU only: on CUDA nothing is copied to the host."""
    values: list[int] = cu_seqlens.tolist()
    if values[0] < 0 or values[-1] > T or any(a > b for a, b in itertools.pairwise(values)):
        raise ValueError(f"cu_seqlens must rise from 0 or more to at most T = {T}: got cu_seqlens={values}")
    return values


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    o: Tensor | None,
    do: Tensor,
    dfinal_state: Tensor | None,
) -> None:
    """The contract of the backward operators: the forward's, and that each gradient is shaped like its output."""
    attention(q, k, v, g, g_gamma, initial_state, cu_seqlens, normalize)
    if (o is not None) != normalize:
        raise ValueError(f"o must be given exactly when normalize is set: got o={type(o).__name__}, {normalize=}")
    for name, x in (("do", do), ("o", o)):
        if x is not None:
            _shape(name, x, v.shape, "B, T, HV, V")
            _dtype(name, x, v.dtype, "like v")
            _device(name, x, q)
    if dfinal_state is not None:
        _state("dfinal_state", dfinal_state, q, v, states(q, cu_seqlens), "N", normalize)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    g: Tensor | None,
    g_gamma: Tensor | None,
    state_indices: Tensor | None,
    normalize: bool,
) -> None:
    """The contract of `recurrent_step_`."""
    _ndim("q", q, "B, H, K")
    _shape("k", k, q.shape, "B, H, K")
    _ndim("v", v, "B, HV, V")
    B = q.shape[0]
    _shape("v", v, (B, *v.shape[1:]), "B, HV, V")
    _qkv(q, k, v)
    _gates(g, g_gamma, q, (B, v.shape[1]), "B, HV")
    if state_indices is None:
        _state("state", state, q, v, B, "B", normalize)
    else:
        _ndim("state", state, "S, HV, K, V + 1" if normalize else "S, HV, K, V")
        _state("state", state, q, v, state.shape[0], "S", normalize)
        _shape("state_indices", state_indices, (B,), "B")
        if state_indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"state_indices must be int32 or int64: got state_indices.dtype={state_indices.dtype}")
        _device("state_indices", state_indices, q)

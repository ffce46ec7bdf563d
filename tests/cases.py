"""Random calls of the operators, and how close their results must come to the reference.

- `Case`: the shapes, dtype and options of one call; `Case.arguments` builds its tensors from the seed it carries
- `cases`: a hypothesis strategy that draws one
- `truth`: outputs and gradients of `reference.recurrent` in float64 on the CPU
- `check`: outputs and gradients of an operator against that truth
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import torch_la
from torch_la import checks
from torch_la.ops import reference

OPERATORS = {"chunk": torch_la.chunk, "fused_chunk": torch_la.fused_chunk, "recurrent": torch_la.recurrent}
NAMES = list(OPERATORS)
INPUTS = ("q", "k", "v", "g", "g_gamma", "initial_state")

# |got - want| <= LIMIT |want| in the Euclidean norm.
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
# On top, this much of the size of the terms that the result is a sum of: where they cancel, their rounding remains.
ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}

LENGTHS = [0, 1, 2, 3, 7, 17, 63, 64, 65, 100, 129, 150]
GATES = ["none", "weak", "growing", "strong", "reset", "-inf", "g_gamma"]


@dataclass(frozen=True)
class Case:
    B: int = 2
    T: int = 7
    H: int = 2
    groups: int = 1  # HV = H * groups
    K: int = 3
    V: int = 5
    dtype: torch.dtype = torch.float64
    gate: str = "weak"
    half_gate: bool = False  # the gate in the dtype of q
    cu: tuple[int, ...] | None = None
    long_offsets: bool = True
    state: bool = True
    strided: bool = False
    final: bool = True
    scale: float | None = None
    normalize: bool = False
    reverse: bool = False
    seed: int = 0

    @property
    def HV(self) -> int:
        return self.H * self.groups

    @property
    def N(self) -> int:
        return self.B if self.cu is None else len(self.cu) - 1

    def but(self, **changes: Any) -> Case:
        return replace(self, **changes)

    def arguments(self, device: str = "cpu", grad: bool = False) -> dict[str, Any]:
        """The arguments of an operator by name, in the order of its schema."""
        random = torch.Generator().manual_seed(self.seed)
        B, T, H, HV, K, V, N = self.B, self.T, self.H, self.HV, self.K, self.V, self.N

        def rand(*shape: int) -> Tensor:
            return torch.rand(shape, generator=random, dtype=torch.float64)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64)

        # A normaliser wants positive features: 0.1 and more keeps q.z far from 0.
        feature = (lambda *shape: 0.1 + rand(*shape)) if self.normalize else randn
        if self.strided:  # slices of one packed tensor
            packed = feature(B, T, H, 2 * K)
            q, k = packed[..., :K], packed[..., K:]
            v = randn(B, HV, T, V).transpose(1, 2)
        else:
            q, k, v = feature(B, T, H, K), feature(B, T, H, K), randn(B, T, HV, V)
        g = g_gamma = None
        if self.gate == "g_gamma":
            g_gamma = -0.3 * rand(HV)
        elif self.gate != "none":
            g = -rand(B, T, HV)
            some = rand(B, T, HV)
            if self.gate == "growing":
                g = 0.05 * randn(B, T, HV)
            elif self.gate == "strong":
                g = torch.where(some < 0.5, -20.0, g)
            elif self.gate == "reset":
                g = torch.where(some < 0.2, -1e4, g)
            elif self.gate == "-inf":
                g = torch.where(some < 0.2, -torch.inf, g)
        state = None
        if self.state:
            state = (rand if self.normalize else randn)(N, HV, K, V + self.normalize)
            if self.strided:
                state = state.mT.contiguous().mT

        dtype = self.dtype
        gate_dtype = dtype if self.half_gate or dtype == torch.float64 else torch.float32
        q, k, v = (_move(x, dtype, device, grad) for x in (q, k, v))
        return {
            "q": q,
            "k": k,
            "v": v,
            "g": _move(g, gate_dtype, device, grad),
            "g_gamma": _move(g_gamma, gate_dtype, device, grad),
            "initial_state": _move(state, checks.state_dtype(q), device, grad),
            "output_final_state": self.final,
            "cu_seqlens": None
            if self.cu is None
            else torch.tensor(self.cu, dtype=torch.int64 if self.long_offsets else torch.int32, device=device),
            "scale": self.scale,
            "normalize": self.normalize,
            "reverse": self.reverse,
        }

    def cotangents(self, o: Tensor, final_state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Random gradients for the outputs, in their dtypes."""
        random = torch.Generator().manual_seed(self.seed + 1)
        do = torch.randn(o.shape, generator=random, dtype=torch.float64).to(o.device, o.dtype)
        if final_state is None:
            return do, None
        return do, torch.randn(final_state.shape, generator=random, dtype=torch.float64).to(o.device, final_state.dtype)


def _move(x: Tensor | None, dtype: torch.dtype, device: str, grad: bool) -> Tensor | None:
    return None if x is None else x.to(device, dtype).requires_grad_(grad)


def dtypes(device: str) -> list[torch.dtype]:
    low = [torch.float32, torch.bfloat16, torch.float16]
    return [torch.float64, *low] if device == "cpu" else low


@st.composite
def cases(
    draw: st.DrawFn,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    lengths: list[int] | None = None,
    packed: bool | None = None,
    gates: list[str] | None = None,
    normalize: bool | None = None,
    **fixed: Any,
) -> Case:
    """A random case. Arguments restrict what is drawn; those in `fixed` set a field of the case."""
    T = draw(st.sampled_from(lengths or LENGTHS))
    packed = draw(st.booleans()) if packed is None else packed
    cu = None
    if packed:
        # equal offsets are empty sequences, a single offset is no sequence at all, the tokens past the last are in none
        cuts = sorted(draw(st.lists(st.integers(0, T), min_size=0, max_size=4)))
        cu = (0, *cuts)
    drawn: dict[str, Any] = {
        "B": 1 if packed else draw(st.integers(0, 3)),
        "T": T,
        "H": draw(st.integers(1, 3)),
        "groups": draw(st.integers(1, 3)),
        "K": draw(st.sampled_from([1, 2, 3, 5, 8])),
        "V": draw(st.sampled_from([1, 2, 3, 7, 9])),
        "dtype": dtype or draw(st.sampled_from(dtypes(device))),
        "gate": draw(st.sampled_from(gates or GATES)),
        "half_gate": draw(st.booleans()),
        "cu": cu,
        "long_offsets": draw(st.booleans()),
        "state": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "final": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 1.0, 0.3])),
        "normalize": draw(st.booleans()) if normalize is None else normalize,
        "reverse": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }
    return Case(**{**drawn, **fixed})


# ------------------------------------------------------------------------------------------------------------ the truth


def double(arguments: dict[str, Any], grad: bool = False) -> dict[str, Any]:
    """The same arguments in float64 on the CPU: fresh leaves."""
    out = dict(arguments)
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            out[name] = x.detach().cpu().clone()
            if x.is_floating_point():
                out[name] = out[name].double().requires_grad_(grad)
    return out


def outputs_and_gradients(
    function: Callable[..., Any], arguments: dict[str, Any], do: Tensor, dfinal_state: Tensor | None
) -> dict[str, Tensor]:
    """o, the final state, and the gradient of every differentiable input, by name."""
    o, final_state = function(**arguments)
    results, outputs = {"o": o.detach()}, [(o, do)]
    if final_state is not None:
        results["final_state"] = final_state.detach()
        outputs.append((final_state, dfinal_state))
    leaves = {name: arguments[name] for name in INPUTS if arguments[name] is not None}
    plain = function is reference.recurrent
    if plain:  # without tokens or sequences, an output of the reference may hang on no input
        outputs = [(x, dx) for x, dx in outputs if x.requires_grad]
    found: Any = [None] * len(leaves)
    if outputs:
        xs, dxs = zip(*outputs, strict=True)
        found = torch.autograd.grad(xs, list(leaves.values()), dxs, allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
        if plain and gradient is None:
            gradient = torch.zeros_like(leaf)
        assert gradient is not None, f"no gradient for {name}"
        assert gradient.shape == leaf.shape
        assert gradient.dtype == leaf.dtype
        results["d" + name] = gradient.detach()
    return results


def truth(arguments: dict[str, Any], do: Tensor, dS: Tensor | None) -> dict[str, Tensor]:
    """What the operator must return for these very (already rounded) arguments."""
    do, dS = do.double().cpu(), None if dS is None else dS.double().cpu()
    return outputs_and_gradients(reference.recurrent, double(arguments, grad=True), do, dS)


def sizes(case: Case, arguments: dict[str, Any], do: Tensor, dS: Tensor | None) -> dict[str, float]:
    """The norm of each result with every term of its sums made positive: the size that rounding errors refer to."""
    exact = double(arguments)
    for name in ("q", "k", "v", "initial_state"):
        if exact[name] is not None:
            exact[name] = exact[name].abs()
    for name in INPUTS:
        if exact[name] is not None:
            exact[name].requires_grad_()
    do, dS = do.double().cpu().abs(), None if dS is None else dS.double().cpu().abs()

    # The normaliser by hand: n / den has one term with each sign.
    V, ones = case.V, torch.ones_like(exact["v"][..., :1])
    extended = torch.cat([exact["v"], ones], -1)
    if case.normalize:
        both, S = reference.recurrent(**{**exact, "v": extended, "normalize": False})
        n, den = both[..., :V], both[..., V:] + reference.EPS
        o, loss = n / den, (do * (n / den.detach() - n.detach() / den)).sum()
    else:
        o, S = reference.recurrent(**exact)
        loss = (do * o).sum()
    results = {"o": o.detach().norm().item()}
    if S is not None:
        loss = loss + (S * dS).sum()
        results["final_state"] = S.detach().norm().item()
    leaves = {name: exact[name] for name in INPUTS if exact[name] is not None}
    loss = loss + 0 * sum(x.sum() for x in leaves.values() if x.isfinite().all())  # a graph even without tokens
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    gradients = dict(zip(leaves, found, strict=True))
    # The gates' gradient is a sum over later tokens of q.dq - k.dk.
    terms = (exact["q"] * gradients["q"] + exact["k"] * gradients["k"]).sum() + sum(
        (exact[name] * gradients[name]).sum() for name in ("initial_state",) if exact[name] is not None
    )
    for name, gradient in gradients.items():
        size = gradient.norm().item()
        results["d" + name] = size + terms.item() if name in ("g", "g_gamma") else size
    return results


def norm(x: Tensor) -> float:
    return x.double().norm().item()


def compare(
    got: dict[str, Tensor], want: dict[str, Tensor], size: dict[str, float], dtype: torch.dtype, rounding: float
) -> None:
    assert got.keys() == want.keys()
    for name, x in got.items():
        assert x.shape == want[name].shape, name
        assert x.isfinite().all(), f"{name} is not finite"
        limit = LIMIT[dtype]
        error = norm(x.cpu().double() - want[name])
        allowed = limit * norm(want[name]) + rounding * size[name]
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, norm {norm(want[name]):.3e}"


def check(name: str, case: Case, device: str = "cpu") -> None:
    """One operator against the reference: outputs and all gradients."""
    arguments = case.arguments(device, grad=True)
    with torch.no_grad():
        do, dS = case.cotangents(*OPERATORS[name](**arguments))
    got = outputs_and_gradients(OPERATORS[name], arguments, do, dS)
    assert got["o"].dtype == case.dtype
    assert got["o"].is_contiguous()
    if case.final:
        assert got["final_state"].dtype == checks.state_dtype(arguments["q"])
        assert got["final_state"].is_contiguous()
    want, size = truth(arguments, do, dS), sizes(case, arguments, do, dS)
    rounding = ROUNDING[case.dtype]
    # The backward of the normaliser reads the rounded o, and the CUDA kernels round what goes into their products.
    if case.dtype.itemsize == 2 and (case.normalize or device == "cuda"):
        rounding = LIMIT[case.dtype]
    compare(got, want, size, case.dtype, rounding)


def close(got: Tensor | None, want: Tensor | None, limit: float) -> None:
    """Two results of the same call made in two ways: |got - want| <= limit |want|, or both None."""
    if want is None:
        assert got is None
        return
    assert got is not None
    assert got.shape == want.shape
    assert got.isfinite().all()
    error = norm(got.double() - want.double())
    assert error <= limit * max(norm(want), 1e-30), f"error {error:.3e}, norm {norm(want):.3e}"

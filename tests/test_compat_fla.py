"""torch_la.compat.fla: the signatures of flash-linear-attention, and the results of the definition in float64."""

from __future__ import annotations

import inspect
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import compat_signatures
from cases import close
from torch_la.compat import fla
from torch_la.ops import reference

RECORD = json.loads(compat_signatures.RECORD.read_text())["fla"]
NAMES = list(RECORD["signatures"])
NAIVE = [name for name in NAMES if name.startswith("naive")]
KERNELS = [name for name in NAMES if name not in NAIVE]
SWALLOWS = [name for name in NAMES if "kwargs" in RECORD["signatures"][name]]


def decay(name: str, arguments: dict[str, Any], H: int) -> Tensor | None:
    """The log-decay per head that a function brings along."""
    h = torch.arange(H, dtype=torch.float64)
    if "retention" in name:
        return torch.log(1 - 2.0 ** (-5 - h))
    if "lightning" in name:
        return -(8 / H) * (1 - arguments["layer_idx"] / arguments["num_layers"]) * h
    return None


@st.composite
def calls(draw: st.DrawFn, name: str) -> tuple[dict[str, Any], dict[str, Any], list[Tensor]]:
    """Arguments of a function, all in float64; those of `reference.recurrent` that must give the same; and the random
    tensors that both were made from."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    names = inspect.signature(getattr(fla, name)).parameters

    inputs = []

    def rand(*shape: int) -> Tensor:
        inputs.append((0.1 + torch.rand(shape, generator=random, dtype=torch.float64)).requires_grad_())
        return inputs[-1]

    B, T, H, K, V = 2, draw(st.sampled_from([1, 5, 70])), draw(st.integers(1, 3)), 3, 4
    cu = None
    if "cu_seqlens" in names and draw(st.booleans()):
        B, cu = 1, torch.tensor([0, T // 3, T // 3, T])
    N = B if cu is None else 3
    q, k, v = rand(B, T, H, K), rand(B, T, H, K), rand(B, T, H, V) - 0.6
    given: dict[str, Any] = {"q": q, "k": k, "v": v}
    want: dict[str, Any] = {"q": q, "k": k, "v": v, "output_final_state": False}
    if cu is not None:
        given["cu_seqlens"] = want["cu_seqlens"] = cu
        if "cu_seqlens_cpu" in names and draw(st.booleans()):
            given["cu_seqlens_cpu"] = cu.clone()
    if "g" in names and (names["g"].default is inspect.Parameter.empty or draw(st.booleans())):
        given["g"] = want["g"] = -0.5 * rand(B, T, H)
    elif "g_gamma" in names and draw(st.booleans()):
        given["g_gamma"] = want["g_gamma"] = -0.5 * rand(H)
    if "layer_idx" in names:
        given.update(layer_idx=draw(st.integers(0, 4)), num_layers=5)
    if (gamma := decay(name, given, H)) is not None:
        want["g_gamma"] = gamma
    for option in ("output_final_state", "reverse", "normalize"):
        if option in names:
            want[option] = names[option].default
            if draw(st.booleans()):
                given[option] = want[option] = draw(st.booleans())
    if "scale" in names and draw(st.booleans()):
        given["scale"] = want["scale"] = 0.3
    if "chunk_size" in names or (name.startswith("chunk") and name in SWALLOWS):
        given["chunk_size"] = 16
    if "initial_state" in names and draw(st.booleans()):
        kv = rand(N, H, K, V)
        given["initial_state"], want["initial_state"] = kv, kv
        if want.get("normalize"):
            z = rand(N, 1, H, K)
            given["initial_state"] = (kv, z)
            want["initial_state"] = torch.cat([kv, z.squeeze(1)[..., None]], -1)
    if "state_v_first" in names and draw(st.booleans()):
        given["state_v_first"] = True
        if "initial_state" in given:
            given["initial_state"] = given["initial_state"].mT.contiguous()
    return given, want, inputs


def outputs(result: Any) -> list[Tensor]:
    flat = result if isinstance(result, tuple) else (result,)
    flat = [y for x in flat for y in (x if isinstance(x, tuple) else (x,))]
    return [x for x in flat if x is not None]


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    assert compat_signatures.of_function(getattr(fla, name)) == RECORD["signatures"][name]


def test_every_function_is_on_record() -> None:
    public = [name for name, x in vars(fla).items() if inspect.isfunction(x) and name[0] != "_"]
    assert sorted(public) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=8)
@given(st.data())
def test_results_and_gradients(name: str, data: st.DataObject) -> None:
    given, want, inputs = data.draw(calls(name))
    if name == "naive_retention":
        given = {key: x.transpose(1, 2) for key, x in given.items()}
    limit = 1e-6 if "retention" in name or "lightning" in name else 1e-10  # their decays are float32

    result = getattr(fla, name)(**given)
    o, final = reference.recurrent(**want)
    expected = [o]
    if final is not None and want.get("normalize"):
        expected += [final[..., :-1], final[..., -1].unsqueeze(1)]
    elif final is not None:
        expected.append(final.mT if given.get("state_v_first") else final)
    got = outputs(result)
    if name == "naive_parallel_simple_gla":
        got = got[:1]
    if name == "naive_retention":
        got = [got[0].transpose(1, 2)]
    for x, y in zip(got, expected, strict=True):
        assert x.dtype == torch.float64
        assert final is None or x.is_contiguous()
        close(x, y, limit)
    cotangents = [torch.rand_like(y) for y in expected]
    options: dict[str, Any] = {"materialize_grads": True, "retain_graph": True}
    gradients = [torch.autograd.grad(ys, inputs, cotangents, **options) for ys in (got, expected)]
    for x, y in zip(*gradients, strict=True):  # some are zero: of one normalised token, say
        assert (x - y).norm() <= 10 * limit * max(y.norm(), 1.0)


@pytest.mark.parametrize("name", ["parallel_simple_gla", "parallel_retention", "naive_parallel_simple_gla"])
@pytest.mark.parametrize("gate", ["none", "weak", "reset", "-inf"])
def test_attention_matrix(name: str, gate: str) -> None:
    """The matrix, entry by entry, and that it times v is the output: with gates that no difference of sums survives."""
    B, T, H, K = 2, 9, 2, 3
    q, k, v = torch.randn(3, B, T, H, K, dtype=torch.float64)
    g = -torch.rand(B, T, H, dtype=torch.float64)
    if gate in ("reset", "-inf"):
        g = torch.where(torch.rand(B, T, H) < 0.3, float(gate) if gate == "-inf" else -1e9, g)
    if gate == "none":
        g = torch.zeros_like(g)
    if name == "parallel_retention":
        g = torch.log(1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))).expand(B, T, H)
        o, weights = fla.parallel_retention(q, k, v, scale=0.7, output_attentions=True)
    elif name == "parallel_simple_gla":
        o, weights = fla.parallel_simple_gla(q, k, v, None if gate == "none" else g, 0.7, output_attentions=True)
    else:
        o, weights = fla.naive_parallel_simple_gla(q, k, v, None if gate == "none" else g, 0.7)
    want = torch.zeros(B, H, T, T, dtype=torch.float64)
    for i in range(T):
        for j in range(i + 1):
            want[:, :, i, j] = 0.7 * (q[:, i] * k[:, j]).sum(-1) * g[:, j + 1 : i + 1].sum(1).exp()
    close(weights, want, 1e-6 if name == "parallel_retention" else 1e-10)
    close(o.transpose(1, 2), weights @ v.transpose(1, 2), 1e-6 if name == "parallel_retention" else 1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name: str) -> None:
    """bfloat16 in: what is float32 there is float32 here."""
    q, k, v = torch.rand(3, 2, 6, 2, 4).bfloat16()
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v}
    names = inspect.signature(getattr(fla, name)).parameters
    if "g" in names:
        arguments["g"] = -torch.rand(2, 6, 2)
    if "layer_idx" in names:
        arguments.update(layer_idx=1, num_layers=3)
    if "output_final_state" in names:
        arguments["output_final_state"] = True
    if "output_attentions" in names:
        arguments["output_attentions"] = True
    o, *rest = outputs(getattr(fla, name)(**arguments))
    wide = name in ("naive_chunk_simple_gla", "naive_parallel_simple_gla")
    assert o.dtype == (torch.float32 if wide else torch.bfloat16)
    assert rest or not {"output_final_state", "output_attentions"} & set(names)
    for x in rest:
        assert x.dtype == (torch.bfloat16 if name.startswith("parallel") else torch.float32)


@pytest.mark.parametrize("name", ["chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"])
def test_the_pair_carries_on(name: str) -> None:
    """Two calls that hand over (kv, z) equal one."""
    function = getattr(fla, name)
    q, k, v = torch.rand(3, 2, 20, 2, 4)
    whole, (kv, z) = function(q, k, v, output_final_state=True, normalize=True)
    first, state = function(q[:, :7], k[:, :7], v[:, :7], output_final_state=True, normalize=True)
    assert state[1].shape == (2, 1, 2, 4)
    second, last = function(q[:, 7:], k[:, 7:], v[:, 7:], None, state, True, normalize=True)
    close(torch.cat([first, second], 1), whole, 1e-5)
    close(last[0], kv, 1e-5)
    close(last[1], z, 1e-5)
    assert function(q, k, v, normalize=True)[1] is None


@pytest.mark.parametrize("name", KERNELS)
def test_fullgraph(name: str) -> None:
    q, k, v = torch.rand(3, 1, 12, 2, 4)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_seqlens": torch.tensor([0, 5, 12])}
    if "layer_idx" in inspect.signature(getattr(fla, name)).parameters:
        arguments.update(layer_idx=1, num_layers=3)
    function = getattr(fla, name)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for x, y in zip(outputs(compiled(**arguments)), outputs(function(**arguments)), strict=True):
        close(x, y, 1e-6)


def rand(*shape: int) -> Tensor:
    return torch.rand(shape)


Q, G, S, Z, CU = rand(1, 6, 2, 4), -rand(1, 6, 2), rand(1, 2, 4, 4), rand(1, 1, 2, 4), torch.tensor([0, 6])


@pytest.mark.parametrize("name", SWALLOWS)
@pytest.mark.parametrize("unknown", ["gamma", "head_first", "use_qk_l2norm_in_kernel", "g_gama"])
def test_unknown_arguments_raise(name: str, unknown: str) -> None:
    extra = {"layer_idx": 0, "num_layers": 2} if "lightning" in name else {}
    with pytest.raises(TypeError, match=rf"{name}\(\) got unexpected keyword arguments \['{unknown}'\]"):
        getattr(fla, name)(Q, Q, Q, **extra, **{unknown: False})


def test_lightning_takes_no_decay_of_yours() -> None:
    """fla ignores it."""
    with pytest.raises(TypeError, match="g_gamma"):
        fla.chunk_lightning_attn(Q, Q, Q, 0, 2, g_gamma=G[0, 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fla.chunk_linear_attn(Q, Q, Q, initial_state=S), ValueError, "initial_state must be the pair"),
        (lambda: fla.chunk_linear_attn(Q, Q, Q, initial_state=[S, Z]), ValueError, "initial_state must be the pair"),
        (lambda: fla.chunk_linear_attn(Q, Q, Q, initial_state=(S, None)), TypeError, r"initial_state\[1\]"),
        (lambda: fla.chunk_linear_attn(Q, Q, Q, initial_state=(None, Z)), TypeError, r"initial_state\[0\]"),
        (lambda: fla.chunk_linear_attn(Q, Q, Q, initial_state=(S, Z[:, 0])), ValueError, r"initial_state\[1\]"),
        (lambda: fla.chunk_linear_attn(Q, Q, Q, initial_state=(S[..., :3], Z)), ValueError, "initial_state"),
        (lambda: fla.fused_recurrent_linear_attn(Q, Q, Q, initial_state=(S, Z)), ValueError, "one tensor"),
        (lambda: fla.chunk_linear_attn(Q, Q, Q, normalize=1), TypeError, "normalize"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, G, G[0, 0]), ValueError, "exclude each other"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, chunk_size=48), ValueError, "power of 2"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, chunk_size=-64), ValueError, "power of 2"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, initial_state=S[0]), ValueError, "initial_state"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, initial_state=S.long()), TypeError, "initial_state"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, cu_seqlens_cpu=CU), ValueError, "cu_seqlens=None"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, cu_seqlens=CU, cu_seqlens_cpu=CU + 1), ValueError, "cu_seqlens"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, cu_seqlens=CU, cu_seqlens_cpu=CU // 2), ValueError, "must equal"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, cu_seqlens=CU, cu_seqlens_cpu=CU.float()), TypeError, "int32"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, cu_seqlens=CU, cu_seqlens_cpu=CU[:1]), ValueError, "cu_seqlens_cpu"),
        (lambda: fla.chunk_simple_gla(None, Q, Q), TypeError, "q must be"),
        (lambda: fla.chunk_lightning_attn(Q, Q, Q, 0, 0), ValueError, "num_layers"),
        (lambda: fla.chunk_lightning_attn(Q, Q, Q, None, 2), TypeError, "layer_idx must be an int: got layer_idx=None"),
        (lambda: fla.chunk_lightning_attn(Q[:, :, :0], Q, Q, 0, 2), ValueError, "q must have at least one head"),
        (lambda: fla.chunk_retention(Q[0, 0], Q, Q), ValueError, "q must have 4 dimensions"),
        (lambda: fla.parallel_retention(Q[0], Q, Q), ValueError, "q must have 4 dimensions"),
        (lambda: fla.chunk_simple_gla(Q[0, 0, 0], Q, Q), ValueError, "q must have 4 dimensions"),
        (lambda: fla.parallel_simple_gla(Q[0, 0, 0], Q, Q), ValueError, "q must have 4 dimensions"),
        (lambda: fla.chunk_simple_gla(Q, Q, Q, state_v_first=1), TypeError, "state_v_first"),
        (
            lambda: fla.fused_recurrent_simple_gla(Q, Q, Q, state_v_first=True, transpose_state_layout=True),
            ValueError,
            "old name",
        ),
        (
            lambda: fla.parallel_simple_gla(Q, Q, Q, output_attentions=True, cu_seqlens=CU),
            ValueError,
            "output_attentions",
        ),
        (lambda: fla.parallel_simple_gla(Q, Q, Q, output_attentions=1), TypeError, "output_attentions"),
        (lambda: fla.naive_recurrent_simple_gla(Q, Q, Q, None), TypeError, "g must be"),
        (lambda: fla.naive_recurrent_simple_gla(Q, Q, Q, G[:, :3]), ValueError, "g must be"),
        (lambda: fla.naive_recurrent_linear_attn(Q, Q[:, :3], Q), ValueError, "k must be"),
        (lambda: fla.naive_chunk_simple_gla(Q, Q, Q, G, chunk_size=0), ValueError, "chunk_size"),
        (lambda: fla.naive_parallel_simple_gla(Q, Q, Q[:, :3], G), ValueError, "v must be"),
        (lambda: fla.naive_retention(Q[0], Q, Q), ValueError, "q must have 4"),
    ],
)
def test_errors(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["fused_recurrent_simple_gla", "fused_recurrent_retention"])
def test_the_old_name_of_state_v_first(name: str) -> None:
    q, k, v, S = rand(1, 6, 2, 3), rand(1, 6, 2, 3), rand(1, 6, 2, 5), rand(1, 2, 5, 3)
    function = getattr(fla, name)
    new = function(q, k, v, initial_state=S, output_final_state=True, state_v_first=True)
    with pytest.warns(DeprecationWarning, match="state_v_first"):
        old = function(q, k, v, initial_state=S, output_final_state=True, transpose_state_layout=True)
    assert new[1].shape == (1, 2, 5, 3)
    for x, y in zip(old, new, strict=True):
        assert torch.equal(x, y)


def test_resets_in_the_naive_forms() -> None:
    q, k, v, g = rand(1, 70, 2, 3), rand(1, 70, 2, 3), rand(1, 70, 2, 5), -rand(1, 70, 2).abs() / 8
    for reset in (-math.inf, -1e4):
        g[:, ::9] = reset
        want, _ = reference.recurrent(q.double(), k.double(), v.double(), g.double())
        for function in (fla.naive_chunk_simple_gla, fla.naive_recurrent_simple_gla, fla.naive_parallel_simple_gla):
            torch.testing.assert_close(function(q, k, v, g)[0].double(), want, rtol=1e-5, atol=1e-5)


def test_retention_of_many_heads() -> None:
    """The decay of head 30 is log(1 - 2^-35): 1 - 2^-35 would be 1 in float32."""
    gamma = fla._retnet(31, torch.device("cpu"))
    want = torch.tensor([math.log1p(-(2.0 ** (-5 - h))) for h in range(31)], dtype=torch.float64)
    torch.testing.assert_close(gamma.double(), want, rtol=1e-6, atol=0)

"""The layer: its formula and gradients in float64, padding, packing, caches, compiler and export, weights, errors."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import norm
from torch_la import decay, feature_maps
from torch_la.nn import DECAYS, LinearAttention
from torch_la.ops import reference

D, H = 8, 2
LAYERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no normaliser": {"normalize": False, "scale": 0.7},
    "relu": {"feature_map": "relu", "decay": "alibi"},
    "squared relu": {"feature_map": "squared_relu", "decay": "learnable", "tie_feature_maps": True},
    "dpfp": {"feature_map": lambda width, heads: feature_maps.Dpfp(width, heads, nu=2), "num_value_heads": 4},
    "hedgehog": {"feature_map": "hedgehog", "decay": "data", "value_head_dim": 3},
    "t2r": {"feature_map": "t2r", "tie_feature_maps": True, "decay": "retnet", "normalize": False},
    "taylor": {"feature_map": "taylor", "head_dim": 3, "output_norm": True},
    "gated": {
        **{"feature_map": "identity", "normalize": False, "decay": "data", "num_value_heads": 6, "head_dim": 5},
        **{"value_head_dim": 3, "output_norm": True, "output_gate": True, "bias": True},
    },
    "minimax": {
        **{"feature_map": "identity", "normalize": False, "decay": "minimax", "layer": 1, "layers": 4},
        **{"output_gate": True, "scale": 1.0},
    },
    "own decay": {"decay": torch.tensor([-0.5, -0.01])},
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str, device: str = "cpu", dtype: torch.dtype = torch.float64, **options: Any) -> LinearAttention:
    """The layer with every parameter random."""
    torch.manual_seed(0)
    layer = LinearAttention(D, H, **{**LAYERS[name], **options}, device=device, dtype=dtype)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def inputs(B: int, T: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(B, T, D, dtype=torch.float64)
    return x.to(device, dtype)


# ------------------------------------------------------------------------------------ the formula, sequence by sequence


def truth(layer: LinearAttention, x: Tensor) -> Tensor:
    """One sequence [T, D] without padding, from the weights of the layer and the definition in `reference`."""
    w = dict(layer.named_parameters())

    def project(name: str, heads: int) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        y = y + w[f"{name}.bias"] if f"{name}.bias" in w else y
        return y.reshape(1, x.shape[0], heads, -1)

    HV = layer.num_value_heads
    q, k = layer.feature_map_q(project("q_proj", H)), layer.feature_map_k(project("k_proj", H))
    v = project("v_proj", HV)
    g = g_gamma = None
    if layer.decay == "data":
        g = (project("decay_proj", HV)[..., 0].sigmoid()).log() / 16
    elif layer.decay == "learnable":
        g_gamma = -w["decay_log"].exp()
    else:
        g_gamma = layer.g_gamma
    o, _ = reference.recurrent(q, k, v, g, g_gamma, scale=layer.scale, normalize=layer.normalize)
    if layer.o_norm is not None:
        o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["o_norm.weight"]
    o = o.reshape(x.shape[0], -1)
    if layer.gate_proj is not None:
        gate = project("gate_proj", 1)[0, :, 0]
        o = o * gate * gate.sigmoid()
    y = o @ w["o_proj.weight"].T
    return y + w["o_proj.bias"] if "o_proj.bias" in w else y


def padded_truth(layer: LinearAttention, x: Tensor, mask: Tensor) -> Tensor:
    """Each row alone, without its padding; zeros where the padding was."""
    rows = []
    for row, live in zip(x, mask.bool(), strict=True):
        y = row.new_zeros(row.shape[0], D)
        rows.append(y.index_put((live.nonzero()[:, 0],), truth(layer, row[live])) if live.any() else y)
    return torch.stack(rows)


def masks(T: int) -> Tensor:
    """No padding, left, right, both, in between, nothing but padding."""
    t = torch.arange(T)
    return torch.stack([t >= 0, t >= 3, t < T - 4, (t >= 2) & (t < T - 3), (t < 3) | (t > 7), t < 0])


def gradients(layer: LinearAttention, x: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = run(x)
    weights = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    return [y, *torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])]


def equal(got: list[Tensor], want: list[Tensor], limit: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert norm(a.double() - b.double()) <= limit * norm(b), (norm(a - b), norm(b))
        assert norm(b) > 0


@pytest.mark.parametrize("padding", ["none", "bool", "integer"])
@every_layer
def test_formula_gradients_and_padding(name: str, padding: str) -> None:
    layer, x = make(name), inputs(6, 12)
    mask = torch.ones(6, 12, dtype=torch.bool) if padding == "none" else masks(12)
    given = None if padding == "none" else mask.long() if padding == "integer" else mask
    got = gradients(layer, x, lambda x: layer(x, given))
    equal(got, gradients(layer, x, lambda x: padded_truth(layer, x, mask)), 1e-9)
    assert not got[0][~mask].any()


def test_what_stands_in_the_padding_is_without_effect() -> None:
    layer, mask = make("gated"), masks(12)
    for wild in (float("inf"), float("nan")):
        x = inputs(6, 12)
        want = layer(x, mask)
        got = layer(x.masked_fill(~mask[..., None], wild), mask)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["defaults", "gated", "minimax"])
def test_packing(name: str) -> None:
    layer, x = make(name), inputs(1, 20)
    cuts = [0, 7, 7, 18]
    want = torch.cat([*(truth(layer, x[0, a:b]) for a, b in itertools.pairwise(cuts) if a < b)])
    o = layer(x, cu_seqlens=torch.tensor(cuts))[0]
    equal([o[:18]], [want], 1e-9)
    mask = torch.ones(1, 20, dtype=torch.bool)
    mask[0, 3] = mask[0, 9] = False
    live = [torch.tensor([t for t in range(a, b) if mask[0, t]]) for a, b in ((0, 7), (7, 18))]
    got = layer(x, mask, cu_seqlens=torch.tensor(cuts))[0]
    for tokens in live:
        equal([got[tokens]], [truth(layer, x[0, tokens])], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_layer
def test_other_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    """The same weights, rounded; and under autocast, where they stay float32."""
    layer, x = make(name, device, dtype), inputs(3, 12, device, dtype)
    mask = masks(12)[:3].to(device)
    exact = copy.deepcopy(layer).to("cpu", torch.float64)
    want = padded_truth(exact, x.double().cpu(), mask.cpu())
    got = layer(x, mask)
    assert got.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 0.02
    assert norm(got.cpu().double() - want) <= limit * norm(want)
    if dtype == torch.float32:
        with torch.autocast(device, torch.bfloat16):
            got = layer(x, mask)
        assert got.dtype == torch.bfloat16
        assert norm(got.cpu().double() - want) <= 0.03 * norm(want)


# --------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("name", ["defaults", "hedgehog", "gated", "minimax", "squared relu"])
def test_generation_is_the_parallel_form(name: str) -> None:
    """Left-padded prompts, a step, a draft of which a part is kept, an extension, in slots in another order."""
    layer, mask = make(name), masks(12)[:3]
    x = inputs(3, 12)
    more = inputs(3, 9)
    kept = [3, 1, 0]
    want = []
    for row, live, rest, n in zip(x, mask, more, kept, strict=True):
        want.append(truth(layer, torch.cat([row[live], rest[: 1 + n], rest[4:]]))[live.sum() :])
    cache, slots = layer.make_cache(4, draft=3), torch.tensor([2, 0, 3])
    got: list[Tensor] = []
    with torch.no_grad():
        y = layer(x, mask, cache=cache, slots=slots)
        equal([y], [padded_truth(layer, x, mask)], 1e-9)
        step = layer(more[:, :1], cache=cache, slots=slots)
        draft = layer(more[:, 1:4], cache=cache, slots=slots, verify=True)
        cache.accept(torch.tensor(kept), slots=slots)
        rest = layer(more[:, 4:], cache=cache, slots=slots)
    for row, n in enumerate(kept):
        got.append(torch.cat([step[row], draft[row, :n], rest[row]]))
    equal(got, want, 1e-9)


def test_a_masked_token_of_a_batch_leaves_its_state() -> None:
    """Rows that are done while others go on."""
    layer = make("gated")
    cache = layer.make_cache(2)
    with torch.no_grad():
        layer(inputs(2, 5), cache=cache)
        before = cache.state.clone()
        layer(inputs(2, 1), torch.tensor([[1], [0]]), cache=cache)
    assert torch.equal(cache.state[1], before[1])
    assert not torch.equal(cache.state[0], before[0])


# -------------------------------------------------------------------------------------------------- compiler and export


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["defaults", "hedgehog", "gated", "taylor"])
def test_compiles_in_one_graph(name: str, device: str) -> None:
    layer = make(name, device, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def run(x: Tensor, mask: Tensor) -> Tensor:
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(mask, 1)
        return compiled(x, mask)

    for i, T in enumerate((20, 33, 5)):
        x, mask = inputs(3, T, device, torch.float32), masks(T).to(device)[:3]
        with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
            got = gradients(layer, x, functools.partial(run, mask=mask))
        # (each within 1e-5 of the truth)
        limit = 2e-5 if device == "cuda" else 1e-5
        equal(got, gradients(layer, x, functools.partial(layer, attention_mask=mask)), limit)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step(device: str) -> None:
    """The whole layer with its cache: one graph, and one for all steps."""
    layer = make("gated", device, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    caches = [layer.make_cache(3) for _ in range(2)]
    with torch.no_grad():
        for i in range(4):
            x = inputs(3, 1, device, torch.float32)
            with torch.compiler.set_stance("default" if i == 0 else "fail_on_recompile"):
                equal([compiled(x, cache=caches[0])], [layer(x, cache=caches[1])], 1e-5)
    equal([caches[0].state[:3]], [caches[1].state[:3]], 1e-5)


@pytest.mark.parametrize("name", ["defaults", "hedgehog", "gated"])
def test_export_with_any_length(name: str, device: str) -> None:
    layer = make(name, device, torch.float32)
    time = torch.export.Dim("time", min=2, max=4096)
    x, mask = inputs(6, 20, device, torch.float32), masks(20).to(device)
    program = torch.export.export(layer, (x, mask), dynamic_shapes=({1: time}, {1: time}))
    assert sum("la." in str(node.target) for node in program.graph.nodes) == 1
    for T in (31, 4):
        x, mask = inputs(6, T, device, torch.float32), masks(T).to(device)
        equal([program.module()(x, mask)], [layer(x, mask)], 1e-6)


# --------------------------------------------------------------------------------------------------- weights and decays


STATE_DICTS: dict[str, list[str]] = {
    "defaults": [],
    "squared relu": ["decay_log"],
    "dpfp": [],
    "hedgehog": [
        *("feature_map_q.weight", "feature_map_q.bias", "feature_map_k.weight", "feature_map_k.bias"),
        *("decay_proj.weight", "decay_proj.bias"),
    ],
    "taylor": ["o_norm.weight"],
    "gated": [
        *("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias", "gate_proj.bias"),
        *("decay_proj.weight", "decay_proj.bias", "o_norm.weight", "gate_proj.weight"),
    ],
    "minimax": ["gate_proj.weight"],
    "own decay": [],
}


@pytest.mark.parametrize("name", STATE_DICTS)
def test_state_dict(name: str) -> None:
    layer = make(name)
    projections = [f"{x}_proj.weight" for x in "qkvo"]
    assert sorted(layer.state_dict()) == sorted(projections + STATE_DICTS[name])
    documented = LinearAttention.__doc__ or ""
    assert all(key in documented or key.removesuffix(".bias") + ".weight" in documented for key in layer.state_dict())
    K, V, HV = layer.head_dim, layer.value_head_dim, layer.num_value_heads
    shapes = {"q_proj.weight": (H * K, D), "v_proj.weight": (HV * V, D), "o_proj.weight": (D, HV * V)}
    shapes |= {"decay_proj.weight": (HV, D), "decay_log": (HV,), "o_norm.weight": (V,), "gate_proj.weight": (HV * V, D)}
    for key, value in layer.state_dict().items():
        assert value.shape == shapes.get(key, value.shape)
    other = make(name)
    other.load_state_dict({key: torch.randn_like(x) for key, x in layer.state_dict().items()})
    other.load_state_dict(layer.state_dict())
    x = inputs(1, 5)
    assert torch.equal(layer(x), other(x))


def test_the_same_seed_gives_the_same_weights() -> None:
    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(LinearAttention(D, H, feature_map="t2r", decay="data", bias=True).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(3), weights(3), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(3), weights(4), strict=True))


FIXED = {
    "alibi": decay.alibi(H),
    "retnet": decay.retnet(H),
    "minimax": decay.minimax(H, 2, 5),
    "minimax_transformers": decay.minimax_transformers(H, 2, 5),
    "bailing": decay.bailing(H, 2, 5),
}


@pytest.mark.parametrize("name", FIXED)
def test_fixed_decays_stay_what_they_are(name: str) -> None:
    """In float32, whatever happens to the layer: casts, meta devices, empty storage."""
    where = {"layer": 2, "layers": 5} if name in ("minimax", "minimax_transformers", "bailing") else {}
    layer = LinearAttention(D, H, decay=name, **where)
    with torch.device("meta"):
        empty = LinearAttention(D, H, decay=name, **where)
    for made in (layer, layer.bfloat16(), layer.double(), copy.deepcopy(layer), empty.to_empty(device="cpu")):
        assert made.g_gamma is not None
        assert torch.equal(made.g_gamma, FIXED[name])
        assert made.g_gamma.dtype == torch.float32
    assert "g_gamma" not in layer.state_dict()


def test_decays_by_name_are_all_tested() -> None:
    assert set(DECAYS) == {"data", "learnable", *FIXED}


def test_tied_feature_maps_share_their_weights() -> None:
    for tie in (False, True):
        layer = LinearAttention(D, H, feature_map="t2r", tie_feature_maps=tie)
        assert (layer.feature_map_q is layer.feature_map_k) == tie


def test_learnable_decays_start_at_retnets() -> None:
    layer = LinearAttention(D, 8, num_value_heads=16, decay="learnable")
    assert layer.decay_log is not None
    torch.testing.assert_close(-layer.decay_log.exp(), decay.retnet(16))


def test_a_cache_fits_the_layer() -> None:
    for name in LAYERS:
        layer = make(name)
        cache = layer.make_cache(2, draft=3)
        assert cache.state.dtype == torch.float64
        assert cache.state.shape[1:] == (
            *(layer.num_value_heads, layer.feature_map_q.features, layer.value_head_dim + layer.normalize),
        )
        assert make(name, dtype=torch.bfloat16).make_cache(1).state.dtype == torch.float32


def test_repr() -> None:
    sizes = "d_model=8, num_heads=2, head_dim=5, num_value_heads=6, value_head_dim=3"
    assert repr(make("gated")).splitlines()[1] == f"  {sizes}, decay=data, normalize=False, scale=None"
    assert "decay=fixed" in repr(make("own decay"))
    assert "Hedgehog(4 -> 8, heads=2)" in repr(make("hedgehog"))


# --------------------------------------------------------------------------------------------------------------- errors


X = torch.zeros(2, 5, D)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 3}, ValueError, "num_heads must divide d_model, or give head_dim: got num_heads=3, d_model=8"),
        ({"num_heads": 0}, ValueError, "got num_heads=0"),
        ({"num_heads": "2"}, TypeError, r"num_heads must be an int: got num_heads='2' \(str\)"),
        ({"value_head_dim": 2.0}, TypeError, "value_head_dim must be an int"),
        ({"head_dim": 0}, ValueError, "head_dim must be at least 1: got head_dim=0"),
        ({"num_value_heads": 3}, ValueError, "multiple of num_heads: got num_value_heads=3, num_heads=2"),
        ({"feature_map": "softmax"}, ValueError, "feature_map must be one of .*: got feature_map='softmax'"),
        ({"feature_map": 3}, TypeError, "feature_map must be a name or a function .*: got 3"),
        ({"feature_map": lambda *_: torch.nn.ReLU()}, TypeError, "must return a .*FeatureMap: got ReLU"),
        ({"feature_map": "identity"}, ValueError, "cross zero: got normalize=True, feature_map='identity'"),
        ({"decay": "fast"}, ValueError, "decay must be None, a tensor, or one of data, .*: got decay='fast'"),
        ({"decay": "minimax"}, ValueError, "depends on the layer: give layer and layers: got layer=None"),
        ({"decay": "minimax", "layer": 4, "layers": 4}, ValueError, r"layer must be in \[0, layers\)"),
        ({"decay": "data", "layer": 1}, ValueError, "layer and layers are for decay in .*: got decay='data', layer=1"),
        ({"decay": torch.zeros(3)}, ValueError, r"decay must be floating \[HV\] = \(2,\): got \(3,\)"),
        ({"scale": "1"}, TypeError, "scale must be a number or None"),
        ({"normalize": 1}, TypeError, "normalize must be a bool"),
        ({"output_gate": None}, TypeError, "output_gate must be a bool"),
    ],
)
def test_errors_of_the_constructor(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearAttention(**{"d_model": D, "num_heads": H, **options})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must be \[B, T, 8\]: got x.shape=\(5, 8\)"),
        ({"x": X[..., :7]}, ValueError, r"x must be \[B, T, 8\]: got x.shape=\(2, 5, 7\)"),
        ({"x": None}, TypeError, "x must be a torch.Tensor: got x=None"),
        (
            {"attention_mask": torch.ones(2, 4)},
            ValueError,
            r"attention_mask must be \[B, T\] = \(2, 5\), 0 for padding",
        ),
        ({"attention_mask": torch.ones(2, 1, 5, 5).bool()}, ValueError, r"got attention_mask.shape=\(2, 1, 5, 5\)"),
        ({"attention_mask": torch.zeros(2, 5)}, TypeError, "must be bool or integer: got .*float32"),
        ({"slots": torch.zeros(2).long()}, ValueError, "slots and verify need a cache"),
        ({"verify": True}, ValueError, "slots and verify need a cache"),
        ({"verify": 1}, TypeError, "verify must be a bool"),
        ({"cache": [X]}, TypeError, "cache must be the StateCache of this layer: got list"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "q must have B = 1"),
        ({"cache": LinearAttention(D, H, normalize=False).make_cache(2)}, ValueError, "made for normalize=False"),
        ({"cache": LinearAttention(D, 1).make_cache(2)}, RuntimeError, "has no derivative"),
    ],
)
def test_errors_of_a_call(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LinearAttention(D, H)(**{"x": X, **arguments})


def test_a_cache_of_another_layer() -> None:
    layer = LinearAttention(D, H)
    with torch.no_grad(), pytest.raises(ValueError, match=r"this cache is for H, HV, K, V = \(1, 1, 8, 8\)"):
        layer(X, cache=LinearAttention(D, 1).make_cache(2))
    with pytest.raises(ValueError, match="not packed sequences"):
        layer(X, cache=layer.make_cache(2, draft=9), verify=True, cu_seqlens=torch.tensor([0, 5]))


@pytest.mark.gpu
def test_too_many_features_for_cuda() -> None:
    layer = LinearAttention(88, 4, feature_map="taylor", device="cuda")
    with pytest.raises(ValueError, match="at most 256 features on CUDA: got 276 features of head_dim=22"):
        layer(torch.zeros(1, 3, 88, device="cuda"))


def test_a_fixed_decay_is_where_the_weights_are() -> None:
    with torch.device("meta"):
        layer = LinearAttention(16, 2, decay="retnet")
    assert layer.g_gamma.device == layer.q_proj.weight.device


def test_a_fixed_decay_follows_weights_that_are_assigned() -> None:
    there = LinearAttention(16, 2, decay="retnet")
    with torch.device("meta"):
        model = torch.nn.Sequential(LinearAttention(16, 2, decay="retnet"))
    model[0].load_state_dict(there.state_dict(), assign=True)
    x = torch.randn(1, 5, 16)
    assert torch.equal(model(x), there(x))
    with torch.device("meta"):
        model = torch.nn.Sequential(LinearAttention(16, 2, decay="retnet"))
    model.load_state_dict({f"0.{name}": y for name, y in there.state_dict().items()}, assign=True)
    assert torch.equal(pickle.loads(pickle.dumps(model)).to("cpu")(x), there(x))


def test_padding_may_be_nan() -> None:
    layer = LinearAttention(16, 2, decay="data")
    x = torch.randn(1, 4, 16)
    x[0, 3] = torch.nan
    layer(x, torch.tensor([[1, 1, 1, 0]])).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    "given", [feature_maps.dpfp, torch.relu, feature_maps.Hedgehog(8, 2)], ids=["map", "op", "module"]
)
def test_a_map_in_the_place_of_what_makes_one(given: Any) -> None:
    with pytest.raises(TypeError, match="feature_map must be a name or a function"):
        LinearAttention(16, 2, feature_map=given)


def test_a_map_of_another_width() -> None:
    with pytest.raises(ValueError, match="feature_map must return a map of width 8"):
        LinearAttention(16, 2, feature_map=lambda width, heads: feature_maps.Dpfp(4, heads))

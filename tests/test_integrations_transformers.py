"""torch_la.integrations.transformers: small models of the real package with random weights, before and after."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from cases import close
from torch_la import layers
from torch_la.integrations.transformers import LAYERS, accelerate

transformers.logging.set_verbosity_error()

COMMON: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "pad_token_id": 0}
SOFTMAX: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
MIXER: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 16}


def minimax() -> nn.Module:
    kinds = ["full_attention", "linear_attention", "linear_attention"]
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2}
    config = transformers.MiniMaxConfig(**COMMON, **SOFTMAX, **experts, layer_types=kinds, block_size=8)
    return transformers.MiniMaxForCausalLM(config)


def mamba2() -> nn.Module:
    sizes = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 16, "chunk_size": 16}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**COMMON, **sizes))


def bamba() -> nn.Module:
    config = transformers.BambaConfig(**COMMON, **SOFTMAX, **MIXER, attn_layer_indices=[1], mamba_chunk_size=16)
    return transformers.BambaForCausalLM(config)


def granite() -> nn.Module:
    kinds = ["mamba", "attention", "mamba"]
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 48}
    config = transformers.GraniteMoeHybridConfig(**COMMON, **SOFTMAX, **MIXER, **experts, layer_types=kinds)
    return transformers.GraniteMoeHybridForCausalLM(config)


def nemotron() -> nn.Module:
    sizes = {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16, "head_dim": 8}
    common = {name: x for name, x in COMMON.items() if name != "num_hidden_layers"}
    kinds = ["mamba", "attention", "mamba"]
    config = transformers.NemotronHConfig(**common, **SOFTMAX, **sizes, layers_block_type=kinds)
    return transformers.NemotronHForCausalLM(config)


def zamba2() -> nn.Module:
    sizes = {"n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 2, "mamba_d_state": 16, "mamba_expand": 2}
    kinds = {"layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1], "num_mem_blocks": 1}
    config = transformers.Zamba2Config(**COMMON, **{**SOFTMAX, "num_key_value_heads": 4}, **sizes, **kinds)
    return transformers.Zamba2ForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (minimax, mamba2, bamba, granite, nemotron, zamba2)
}
# Their released code clamps the step size in whole sequences but not in one-token steps: see docs/transformers.
CONSISTENT = ["minimax", "mamba2", "bamba", "granite"]


def model(name: str, seed: int) -> nn.Module:
    """A model with random weights that keep activations near 1, so that every layer counts."""
    torch.manual_seed(seed)
    out = MODELS[name]().eval()
    for key, p in out.named_parameters():
        with torch.no_grad():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) / p[0].numel() ** 0.5)
            elif key.endswith("A_log"):
                p.copy_(2 * torch.rand_like(p))
            else:
                p.add_(0.1 * torch.randn_like(p))
    return out


def padded(seed: int, T: int = 21) -> dict[str, Tensor]:
    """Two prompts, the first padded on the left."""
    ids = torch.randint(3, 97, (2, T), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_and_gradients(m: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    m.zero_grad()
    logits = m(**inputs, use_cache=False).logits
    random = torch.Generator().manual_seed(0)
    (logits * torch.randn(logits.shape, generator=random).to(logits.dtype)).sum().backward()
    return logits.detach(), {key: p.grad for key, p in m.named_parameters() if p.grad is not None}


seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=2)
@given(seed=seeds)
def test_logits_and_gradients(name: str, seed: int) -> None:
    m, inputs = model(name, seed), padded(seed)
    want, theirs = logits_and_gradients(m, inputs)
    with accelerate(m):
        got, ours = logits_and_gradients(m, inputs)
    close(got, want, 1e-5)
    assert ours.keys() == theirs.keys()
    size = torch.stack([x.norm() for x in theirs.values()]).norm()
    for key, x in theirs.items():
        assert (ours[key] - x).norm() <= 5e-5 * x.norm() + 2e-6 * size, key


@settings(max_examples=3)
@given(seed=seeds)
def test_minimax_in_float64(seed: int) -> None:
    """The same function to the last digit, gradients too: nothing here is an approximation."""
    m, inputs = model("minimax", seed).double(), padded(seed, T=30)
    m.set_experts_implementation("eager")  # the grouped product has no float64
    for module in m.modules():
        if isinstance(module, MiniMaxLightningAttention):  # its own tables are rounded to float32
            names = ("query_decay", "key_decay", "diagonal_decay")
            for name, x in zip(names, module.decay_factors(module.slope_rate), strict=True):
                getattr(module, name).copy_(x)
    want, theirs = logits_and_gradients(m, inputs)
    with accelerate(m):
        got, ours = logits_and_gradients(m, inputs)
    close(got, want, 1e-12)
    for key, x in theirs.items():
        close(ours[key], x, 1e-10)


@pytest.mark.parametrize("name", CONSISTENT)
@settings(max_examples=2)
@given(seed=seeds)
def test_generated_tokens(name: str, seed: int) -> None:
    """Greedy, with the model's own cache and left padding; the logits of every step as well."""
    m, inputs = model(name, seed), padded(seed)
    options = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = m.generate(**inputs, **options)
    with accelerate(m):
        got = m.generate(**inputs, **options)
    for x, y in zip(got.logits, want.logits, strict=True):
        close(x, y, 2e-5)
    assert torch.equal(got.sequences, want.sequences)


@pytest.mark.parametrize("name", ["minimax", "mamba2", "granite", "nemotron", "zamba2"])
def test_parts_equal_the_whole(name: str) -> None:
    """A prompt in parts of any length through the cache, shorter than the convolution too; with and without grad."""
    m, ids = model(name, torch.seed() % 2**31), padded(1)["input_ids"]
    cache_name = "cache_params" if name == "mamba2" else "past_key_values"
    with accelerate(m):
        whole = m(ids, use_cache=False).logits
        for grad in (False, True):
            cache, parts, start = None, [], 0
            with torch.set_grad_enabled(grad):
                for length in (2, 3, 1, 1, 9, 1, 4):
                    out = m(ids[:, start : start + length], use_cache=True, **{cache_name: cache})
                    cache, start = out[cache_name], start + length
                    parts.append(out.logits)
            close(torch.cat(parts, 1), whole, 2e-5)


@pytest.mark.parametrize("name", ["minimax", "bamba"])
def test_bfloat16(name: str) -> None:
    """As close to float32 as upstream is; the state stays float32, whatever the dtype of the model; generation runs."""
    m, inputs = model(name, 1), padded(1)
    exact = m(**inputs, use_cache=False).logits
    m = m.bfloat16()
    theirs = m(**inputs, use_cache=False).logits
    with accelerate(m):
        out = m(**inputs, use_cache=True)
        tokens = m.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert (out.logits - exact).norm() <= 1.25 * (theirs - exact).norm()
    assert tokens.shape == (2, 24)
    cache = out.past_key_values
    state = cache.get_linear_cache(1) if name == "minimax" else cache.get_recurrent_state(0, state_idx=0)
    assert state.dtype == torch.float32


@pytest.mark.parametrize("name", ["minimax", "mamba2", "bamba"])
def test_fullgraph(name: str) -> None:
    """One graph, forward and backward, of a size that does not grow with the length; upstream's grows by the block."""
    sizes = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    m = model(name, 3)
    with accelerate(m):
        for T in (12, 60):
            torch._dynamo.reset()
            torch.compile(m, fullgraph=True, backend=count, dynamic=False)(**padded(1, T), use_cache=False)
        assert sizes[0] == sizes[1]
        want, theirs = logits_and_gradients(m, padded(1))
        theirs = {key: x.clone() for key, x in theirs.items()}
        torch._dynamo.reset()
        m.compile(fullgraph=True, backend="aot_eager")
        got, ours = logits_and_gradients(m, padded(1))
    close(got, want, 1e-6)
    for key, x in theirs.items():
        assert (ours[key] - x).norm() <= 1e-5 * x.norm() + 1e-7, key


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op._schema.name)
        return op(*args, **kwargs or {})


def test_a_compiled_step_of_generation() -> None:
    """Mamba-2's static cache under fullgraph: the state is written in place, at one address."""
    m, ids = model("mamba2", 4), padded(2)["input_ids"]
    with accelerate(m), torch.no_grad():
        step = torch.compile(m, fullgraph=True, backend="aot_eager")
        whole = m(ids, use_cache=False).logits
        cache = m(ids[:, :15], use_cache=True).cache_params
        state = cache.get_recurrent_state(0, state_idx=0)
        address = state.data_ptr()
        for t in range(15, 21):
            close(step(ids[:, t : t + 1], cache_params=cache, use_cache=True).logits[:, 0], whole[:, t], 2e-5)
        assert cache.get_recurrent_state(0, state_idx=0).data_ptr() == address
        with Operators() as called:
            m(ids[:, :1], cache_params=cache, use_cache=True)
        assert called.names.count("la::recurrent_step_") == 3


@pytest.mark.parametrize("name", ["minimax", "mamba2"])
def test_export_with_a_dynamic_length(name: str) -> None:
    """Upstream's own code exports for the one length that it was traced with."""
    m = model(name, 5)
    dynamic = {"input_ids": {1: torch.export.Dim.DYNAMIC}, "use_cache": None}
    arguments: dict[str, Any] = {"args": (padded(1, 30)["input_ids"],), "kwargs": {"use_cache": False}}
    with accelerate(m):
        program = torch.export.export(m, **arguments, dynamic_shapes=dynamic, strict=False).module()
        for T in (17, 70):
            ids = padded(2, T)["input_ids"]
            close(program(ids, use_cache=False).logits, m(ids, use_cache=False).logits, 1e-6)


# ------------------------------------------------------------------------------------------- a public, reversible call


def test_restore() -> None:
    m, inputs = model("minimax", 1), padded(1)
    before = {key: x.clone() for key, x in m.state_dict().items()}
    theirs = m(**inputs, use_cache=False).logits
    handle = accelerate(m)
    assert list(handle.modules) == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert "model.layers.1.self_attn" in repr(handle)
    for module in handle.modules.values():
        assert module.forward.__func__ is layers.MiniMaxLightningAttention.forward
    after = m.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], x) for key, x in before.items())
    handle.restore()
    handle.restore()
    assert repr(handle) == "Accelerated(restored)"
    for module in handle.modules.values():
        assert module.forward.__func__ is MiniMaxLightningAttention.forward
    assert torch.equal(m(**inputs, use_cache=False).logits, theirs)


def test_restore_after_an_error() -> None:
    m = model("minimax", 1)
    with pytest.raises(ZeroDivisionError), accelerate(m):
        raise ZeroDivisionError
    assert not any("forward" in module.__dict__ for module in m.modules())


def test_a_copy_stands_on_its_own() -> None:
    m, inputs = model("minimax", 1), padded(1)
    with accelerate(m):
        other = copy.deepcopy(m)
        for p in other.parameters():
            p.data.mul_(1.5)
        changed = other(**inputs, use_cache=False).logits
    assert (changed - m(**inputs, use_cache=False).logits).norm() > 0.1 * changed.norm()


def test_a_pickled_copy_can_be_accelerated_again() -> None:
    m, inputs = model("minimax", 1), padded(1)
    with accelerate(m):
        other = pickle.loads(pickle.dumps(m))
        want = m(**inputs, use_cache=False).logits
    with accelerate(other) as handle:
        assert all("torch_la" in it.forward.__func__.__module__ for it in handle.modules.values())
        assert torch.equal(other(**inputs, use_cache=False).logits, want)


def test_twice() -> None:
    m = model("minimax", 1)
    with accelerate(m) as handle:
        with pytest.raises(RuntimeError, match=r"model\.layers\.1\.self_attn has been replaced already"):
            accelerate(m)
        first = next(iter(handle.modules.values()))
        ours = first.forward
        first.forward = MethodType(lambda self: None, first)
        with pytest.raises(RuntimeError, match="was replaced again"):
            handle.restore()
        first.forward = ours


def test_what_is_not_known() -> None:
    with pytest.raises(ValueError, match=r"no module that torch_la knows \(MiniMaxLightningAttention, .*got Linear"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be"):
        accelerate("MiniMaxAI/MiniMax-Text-01-hf")  # type: ignore[arg-type]


def test_another_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward with other arguments is not replaced, and nothing else either."""
    m = model("minimax", 1)

    def forward(self: nn.Module, hidden_states: Tensor, mask: Tensor) -> Tensor:
        return hidden_states

    monkeypatch.setattr(MiniMaxLightningAttention, "forward", forward)
    with pytest.raises(RuntimeError, match=r"this release of transformers calls MiniMaxLightningAttention with"):
        accelerate(m)
    assert not any("forward" in module.__dict__ for module in m.modules())


def test_a_release_whose_caches_are_older(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model("mamba2", 1)
    monkeypatch.delattr(transformers.Cache, "get_recurrent_state")
    with pytest.raises(RuntimeError, match=r"caches of transformers 5\.\S+ have no get_recurrent_state$"):
        accelerate(m)
    assert not any("forward" in module.__dict__ for module in m.modules())


def test_packed_sequences_raise() -> None:
    m, ids = model("bamba", 1), padded(1)["input_ids"]
    with accelerate(m), pytest.raises(ValueError, match="seq_idx is not supported"):
        m(ids, seq_idx=torch.zeros_like(ids, dtype=torch.int32), use_cache=False)


def test_every_layer_exists_there() -> None:
    for path, layer in LAYERS.items():
        module, _, name = path.rpartition(".")
        theirs = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)
        assert theirs.__module__ == f"transformers.models.{module}"
        assert layer in vars(layers).values()


def test_nothing_imports_transformers() -> None:
    code = "import sys, torch_la.integrations.transformers, torch_la.layers; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout.strip() == "False"


def test_what_upstream_raises_is_a_row_of_the_benchmark() -> None:
    """tests/gpu/integrations.py: our side is timed all the same, and what raises there still raises."""
    path = Path(__file__).parent / "gpu" / "integrations.py"
    spec = importlib.util.spec_from_file_location("gpu_integrations", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    x = torch.ones(3)

    def refuse(problem: Exception) -> Callable[[], Tensor]:
        def run() -> Tensor:
            raise problem

        return run

    bench = script.Bench("cpu", 2)
    no_memory = torch.OutOfMemoryError("CUDA out of memory.\nmore")
    bench.compare("both", lambda: x, lambda: x)
    bench.compare("compiler", refuse(TypeError("list indices\nmore")), lambda: x)
    bench.compare("silent", refuse(AssertionError()), lambda: x)
    bench.compare("memory", lambda: x, refuse(no_memory))
    with pytest.raises(TypeError, match="ours"):
        bench.compare("ours", lambda: x, refuse(TypeError("ours")))
    with pytest.raises(AssertionError, match="outputs differ"):
        bench.compare("wrong", lambda: x, lambda: 2 * x)
    rows = {row["what"]: row for row in bench.rows}
    assert list(rows) == ["both", "compiler", "silent", "memory"]
    assert rows["both"]["ratio"] > 0
    assert [rows[name].get("problem") for name in rows] == [
        None,
        "upstream: TypeError: list indices",
        "upstream: AssertionError: ",
        "torch_la: OutOfMemoryError: CUDA out of memory.",
    ]
    for name, there, absent in [("compiler", "torch_la", "upstream"), ("memory", "upstream", "torch_la")]:
        assert rows[name][f"{there}_ms"] >= 0
        assert rows[name][f"{absent}_ms"] is rows[name][f"first_{absent}_s"] is rows[name]["ratio"] is None

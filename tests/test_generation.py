"""A state cache is the parallel form, whatever is done with it: random programs against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torch_la
from cases import norm
from torch_la.generation import Cache, StateCache
from torch_la.ops import reference

DRAFT = 4


class Model:
    """What a cache must hold: for each slot all tokens of its sequence, in float64."""

    def __init__(self, draw: st.DrawFn, device: str) -> None:
        H, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        self.H, self.HV, self.K, self.V = H, H * groups, draw(st.integers(1, 4)), draw(st.integers(1, 4))
        self.slots = draw(st.integers(1, 4))
        self.normalize, self.gate = draw(st.booleans()), draw(st.sampled_from(["none", "g", "g_gamma"]))
        self.scale = draw(st.sampled_from([None, 0.3]))
        self.random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        self.device = device
        self.dtype = torch.float64 if device == "cpu" else torch.float32
        self.limit = 1e-10 if device == "cpu" else 1e-5
        self.gamma = -0.3 * torch.rand(self.HV, generator=self.random).double()
        self.cache = StateCache(
            *(self.slots, self.H, self.K, self.V),
            value_heads=self.HV,
            normalize=self.normalize,
            draft=DRAFT,
            dtype=self.dtype,
            device=device,
        )
        self.history: list[dict[str, Tensor]] = [self.tokens(0) for _ in range(self.slots)]
        self.addresses = [buffer.data_ptr() for buffer in self.cache.buffers()]

    def tokens(self, T: int) -> dict[str, Tensor]:
        """T random tokens of one sequence, [T, heads, width]."""

        def rand(*shape: int) -> Tensor:
            x = torch.rand(T, *shape, generator=self.random)
            return x.to(self.dtype).double()  # rounded as the cache will see it

        return {
            "q": rand(self.H, self.K) + 0.5,
            "k": rand(self.H, self.K) + 0.5,
            "v": rand(self.HV, self.V) - 0.5,
            "g": -rand(self.HV),
        }

    def arguments(self, rows: list[dict[str, Tensor]], packed: bool = False) -> dict[str, Any]:
        """Of `attend`: the rows as a batch, or end to end."""
        join = (lambda xs: torch.cat(xs)[None]) if packed else torch.stack
        x = {n: join([row[n] for row in rows]).to(self.device, self.dtype) for n in "qkvg"}
        gamma = self.gamma.to(self.device, self.dtype) if self.gate == "g_gamma" else None
        return {**x, "g": x["g"] if self.gate == "g" else None, "g_gamma": gamma, "scale": self.scale}

    def longer(self, slot: int | None, row: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sequence of a slot, and these tokens after it."""
        return {n: torch.cat([self.history[slot][n], row[n]]) if slot is not None else row[n] for n in row}

    def want(self, slot: int, row: dict[str, Tensor]) -> Tensor:
        """The outputs for these tokens by the parallel form: the whole sequence at once."""
        x = {n: y[None] for n, y in self.longer(slot, row).items()}
        gates = {"g": (x["g"], None), "g_gamma": (None, self.gamma), "none": (None, None)}[self.gate]
        o, _ = reference.recurrent(x["q"], x["k"], x["v"], *gates, scale=self.scale, normalize=self.normalize)
        return o[0, o.shape[1] - row["q"].shape[0] :]

    def check(self, o: Tensor, slot: int, row: dict[str, Tensor], among: list[int]) -> None:
        assert o.dtype == self.dtype
        if slot not in among:
            assert norm(o) == 0
            return
        want = self.want(slot, row)
        assert norm(o.cpu().double() - want) <= self.limit * max(norm(want), 1e-3), (norm(o - want), norm(want))

    def tensor(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


OPERATIONS = ["attend", "attend", "step", "step", "packed", "verify", "verify", "reorder", "fork", "reset"]


def rows_of(draw: st.DrawFn, model: Model) -> tuple[list[int], Tensor | None]:
    """The slot of each row: all in order without naming them, or any with padding rows between."""
    if draw(st.booleans()):
        return list(range(model.slots)), None
    some = draw(st.lists(st.sampled_from(range(model.slots)), min_size=1, unique=True))
    for outside in draw(st.lists(st.sampled_from([-1, -9, model.slots, model.slots + 3]), max_size=2)):
        some.insert(draw(st.integers(0, len(some))), outside)
    return some, model.tensor(some, draw(st.sampled_from([torch.int32, torch.int64])))


def run(draw: st.DrawFn, model: Model, operation: str) -> None:
    cache, inside = model.cache, list(range(model.slots))
    if operation in ("attend", "step"):
        rows, slots = rows_of(draw, model)
        T = 1 if operation == "step" else draw(st.sampled_from([0, 2, 3, 8, 9, 20]))
        new = [model.tokens(T) for _ in rows]
        o = cache.attend(**model.arguments(new), slots=slots)
        for out, slot, row in zip(o, rows, new, strict=True):
            model.check(out, slot, row, inside)
            if slot in inside:
                model.history[slot] = model.longer(slot, row)
    elif operation == "packed":
        rows = draw(st.lists(st.sampled_from(inside), min_size=1, unique=True))
        new = [model.tokens(draw(st.sampled_from([0, 1, 5, 12]))) for _ in rows]
        lengths = torch.tensor([0, *(len(row["q"]) for row in new)])
        cu = lengths.cumsum(0).to(model.device)
        o = cache.attend(**model.arguments(new, packed=True), slots=model.tensor(rows), cu_seqlens=cu)
        for n, (slot, row) in enumerate(zip(rows, new, strict=True)):
            model.check(o[0, cu[n] : cu[n + 1]], slot, row, inside)
            model.history[slot] = model.longer(slot, row)
    elif operation == "verify":
        rows, slots = rows_of(draw, model)
        T = draw(st.integers(1, DRAFT))
        new = [model.tokens(T) for _ in rows]
        o = cache.verify(**model.arguments(new), slots=slots)
        for out, slot, row in zip(o, rows, new, strict=True):
            model.check(out, slot, row, inside)
        if draw(st.booleans()):  # else it leaves no trace
            counts = [draw(st.integers(0, T)) for _ in rows]
            if draw(st.booleans()):  # as many as were read, said otherwise
                counts = [9 if count == T else count for count in counts]
            cache.accept(model.tensor(counts), slots=slots)
            for slot, count, row in zip(rows, counts, new, strict=True):
                if slot in inside:
                    model.history[slot] = model.longer(slot, {n: x[:count] for n, x in row.items()})
    elif operation == "reorder":
        sources = [draw(st.sampled_from(inside)) for _ in range(draw(st.integers(1, model.slots)))]
        cache.reorder(model.tensor(sources, torch.int32))
        model.history[: len(sources)] = [model.history[slot] for slot in sources]
    elif operation == "fork":
        targets = draw(st.lists(st.sampled_from(inside), min_size=1, unique=True))
        sources = [draw(st.sampled_from(inside)) for _ in targets]
        cache.reorder(model.tensor(sources), model.tensor(targets))
        moved = [model.history[slot] for slot in sources]
        for slot, tokens in zip(targets, moved, strict=True):
            model.history[slot] = tokens
    elif operation == "reset":
        if draw(st.booleans()):
            cache.reset()
            model.history = [model.tokens(0) for _ in inside]
        else:
            rows = draw(st.lists(st.sampled_from(inside), max_size=2))
            cache.reset(model.tensor(rows))
            for slot in rows:
                model.history[slot] = model.tokens(0)


@given(data=st.data())
def test_any_mix_is_the_parallel_form(device: str, data: st.DataObject) -> None:
    model = Model(data.draw, device)
    for operation in data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=2, max_size=10)):
        run(data.draw, model, operation)
    last = [model.tokens(3) for _ in range(model.slots)]
    o = model.cache.attend(**model.arguments(last))
    for slot, row in enumerate(last):
        model.check(o[slot], slot, row, list(range(model.slots)))
    assert [buffer.data_ptr() for buffer in model.cache.buffers()] == model.addresses


# ------------------------------------------------------------------------------------------------------ single promises


def small(device: str, **options: Any) -> tuple[StateCache, dict[str, Any]]:
    """A cache of 3 slots with random states, and the arguments of `attend` for 5 tokens of each."""
    cache = StateCache(3, 2, 4, 6, value_heads=4, draft=DRAFT, device=device, **options)
    for buffer in cache.buffers():
        buffer.uniform_(0.5, 1.5)
    q, k = torch.rand(2, 3, 5, 2, 4, device=device) + 0.5
    v, g = torch.randn(3, 5, 4, 6, device=device), -torch.rand(3, 5, 4, device=device)
    return cache, {"q": q, "k": k, "v": v, "g": g}


def cut(x: dict[str, Any], *at: Any) -> dict[str, Any]:
    return {n: y[at] for n, y in x.items()}


def test_verify_moves_nothing(device: str) -> None:
    cache, x = small(device)
    before = cache.state.clone()
    cache.verify(**cut(x, slice(None), slice(DRAFT)))
    assert torch.equal(cache.state, before)


def test_accept_counts_once(device: str) -> None:
    cache, x = small(device)
    cache.verify(**cut(x, slice(None), slice(DRAFT)))
    counts = torch.tensor([0, 2, DRAFT], device=device)
    cache.accept(counts)
    after = cache.state.clone()
    cache.accept(torch.full_like(counts, DRAFT))
    assert torch.equal(cache.state, after)


def test_only_the_named_slots_change(device: str) -> None:
    cache, x = small(device)
    slots = torch.tensor([2, -1], device=device)
    for call in (
        lambda: cache.attend(**cut(x, slice(2)), slots=slots),
        lambda: cache.attend(**cut(x, slice(2), slice(1)), slots=slots),
        lambda: cache.verify(**cut(x, slice(2), slice(2)), slots=slots),
        lambda: cache.accept(torch.tensor([1, 1], device=device), slots=slots),
        lambda: cache.reset(slots),
        lambda: cache.reorder(torch.tensor([1], device=device), torch.tensor([2], device=device)),
    ):
        before = [buffer[:2].clone() for buffer in cache.buffers()]
        call()
        assert all(torch.equal(a[:2], b) for a, b in zip(cache.buffers(), before, strict=True))
    assert torch.equal(cache.state[2], cache.state[1])


def test_accept_stays_exact_under_autocast(device: str) -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        cache, x = small(device)
        cache.verify(**cut(x, slice(None), slice(DRAFT)))
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            cache.accept(torch.tensor([1, 2, 3], device=device))
        results.append(cache.state.clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("normalize", [False, True])
def test_bytes(normalize: bool) -> None:
    """As the documentation says: 4 HV K (V + normalize) + 4 draft (H K + HV V + HV), for each slot and one more."""
    cache = StateCache(7, 2, 5, 3, value_heads=6, normalize=normalize, draft=4)
    assert cache.nbytes == 8 * (4 * 6 * 5 * (3 + normalize) + 4 * 4 * (2 * 5 + 6 * 3 + 6))
    assert cache.nbytes == sum(buffer.untyped_storage().nbytes() for buffer in cache.buffers())
    assert f"nbytes={cache.nbytes}" in repr(cache)
    assert cache.state_dict() == {}


def test_of_a_model() -> None:
    layers = [torch_la.nn.LinearAttention(8, 2, feature_map=name) for name in ("elu", "dpfp")]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), torch.nn.Sequential(layers[1]))
    cache = Cache.of(model, 3, draft=2)
    assert [layer.state.shape for layer in cache] == [(4, 2, 4, 5), (4, 2, 8, 5)]
    assert cache.nbytes == sum(layer.nbytes for layer in cache)
    with pytest.raises(ValueError, match=r"no torch_la\.nn\.LinearAttention: got ReLU"):
        Cache.of(torch.nn.ReLU(), 3)


# ------------------------------------------------------------------------------------- the compiler, graphs, and errors


def session(cache: StateCache, x: dict[str, Any], through: Callable[[Any], Any]) -> list[Tensor]:
    """Prefill, two steps (one by slots), a verified draft, a reordering. Outputs and the last state."""
    attend, verify, accept, reorder = (through(getattr(cache, n)) for n in ("attend", "verify", "accept", "reorder"))
    device = cache.state.device
    slots = torch.tensor([1, -1, 0], device=device)
    outputs = [
        attend(**x),
        attend(**cut(x, slice(None), slice(1))),
        attend(**cut(x, slice(None), slice(1)), slots=slots),
        attend(**x, slots=slots),
        verify(**cut(x, slice(None), slice(3))),
    ]
    accept(torch.tensor([0, 2, 3], device=device))
    reorder(torch.tensor([2, 2, 0], device=device))
    return [*outputs, cache.state.clone()]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("normalize", [False, True])
def test_compiles_in_one_graph(normalize: bool, device: str) -> None:
    results = []
    for through in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        cache, x = small(device, normalize=normalize)
        addresses = [buffer.data_ptr() for buffer in cache.buffers()]
        with torch.no_grad():
            results.append(session(cache, x, through))
        assert [buffer.data_ptr() for buffer in cache.buffers()] == addresses
    for got, want in zip(*results, strict=True):
        assert norm(got - want) <= 1e-6 * norm(want)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("by_slots", [False, True])
def test_a_compiled_step_copies_no_state(by_slots: bool) -> None:
    """What Inductor generates for one token is the operator, on the buffer itself: no kernel beside it, no copy."""
    from torch._inductor.utils import run_and_get_code

    cache, x = small("cpu")
    x = cut(x, slice(None), slice(1))
    slots = torch.tensor([2, 0, 1]) if by_slots else None
    want = cache.state.clone()
    other = StateCache(3, 2, 4, 6, value_heads=4, draft=DRAFT)
    other.state.copy_(want)
    with torch.no_grad():
        o = other.attend(**x, slots=slots)
        got, code = run_and_get_code(torch.compile(cache.attend, fullgraph=True), **x, slots=slots)
    assert norm(got - o) <= 1e-6 * norm(o)
    assert norm(cache.state - other.state) <= 1e-6 * norm(want)
    text = "\n".join(code)
    assert text.count("torch.ops.la.recurrent_step_.default(") == 1
    assert "cpp_fused" not in text  # the operator is all there is


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [False, True])
def test_cuda_graphs(normalize: bool) -> None:
    """Steps, verification and acceptance captured once and replayed with other tokens, slots and counts."""
    results = []
    for captured in (False, True):
        torch.manual_seed(0)
        cache, x = small("cuda", normalize=normalize)
        slots, counts = torch.tensor([0, 1, 2], device="cuda"), torch.tensor([1, 1, 1], device="cuda")
        token = {n: y[:, :1].clone() for n, y in x.items()}
        draft = {n: y[:, :3].clone() for n, y in x.items()}

        def run() -> list[Tensor]:
            step = cache.attend(**token, slots=slots)  # noqa: B023
            read = cache.verify(**draft, slots=slots)  # noqa: B023
            cache.accept(counts, slots=slots)  # noqa: B023
            return [step, read]

        start = [buffer.clone() for buffer in cache.buffers()]
        replay: Callable[[], Any] = run
        with torch.no_grad():
            if captured:
                run()  # compiles the kernels
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    static = run()

                def replay() -> list[Tensor]:
                    graph.replay()  # noqa: B023
                    return static  # noqa: B023

            for buffer, value in zip(cache.buffers(), start, strict=True):
                buffer.copy_(value)
            found = []
            for i in range(4):
                for y in (*token.values(), *draft.values()):
                    y.copy_(torch.rand(y.shape, generator=torch.Generator().manual_seed(i)) - (0 if y.ndim == 4 else 1))
                slots.copy_(torch.tensor([[0, 1, 2], [2, -1, 0], [-1, 2, 1], [1, 0, 2]][i]))
                counts.copy_(torch.tensor([[0, 3, 1], [2, 2, 2], [3, 0, 1], [1, 1, 3]][i]))
                found += [y.clone() for y in replay()]
        results.append([*found, cache.state[:3].clone()])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
def test_reduce_overhead() -> None:
    """`torch.compile` captures the step of a layer and replays it: the cache is no reason to skip CUDA graphs."""
    from torch._dynamo.utils import counters

    torch.manual_seed(0)
    layer = torch_la.nn.LinearAttention(64, 4, decay="data", device="cuda")
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    caches = [layer.make_cache(3) for _ in range(2)]
    counters.clear()
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(3, 1, 64, device="cuda")
            torch.compiler.cudagraph_mark_step_begin()
            got, want = compiled(x, cache=caches[0]).clone(), layer(x, cache=caches[1])
            assert norm(got - want) <= 1e-5 * norm(want)
    assert norm(caches[0].state[:3] - caches[1].state[:3]) <= 1e-5 * norm(caches[1].state[:3])
    assert counters["inductor"]["cudagraph_skips"] == 0


ZEROS = {n: torch.zeros(3, 5, *shape) for n, shape in {"q": (2, 4), "k": (2, 4), "v": (4, 6), "g": (4,)}.items()}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.attend(**{**ZEROS, "q": None}), TypeError, "q must be a torch.Tensor"),
        (lambda c: c.attend(**{**ZEROS, "k": torch.zeros(3, 5, 2, 3)}), ValueError, r"k must be \[B, T, H, K\]"),
        (lambda c: c.attend(**cut(ZEROS, slice(2))), ValueError, "slots must name the slot of each row"),
        (
            lambda c: c.attend(torch.zeros(3, 1, 2, 3), torch.zeros(3, 1, 2, 3), torch.zeros(3, 1, 4, 6)),
            ValueError,
            r"this cache is for H, HV, K, V = \(2, 4, 4, 6\): got q\.shape=\(3, 1, 2, 3\)",
        ),
        (
            lambda c: c.attend(**{n: x.double() for n, x in ZEROS.items()}),
            TypeError,
            "holds torch.float32 states, not for torch.float64 inputs",
        ),
        (lambda c: c.attend(**{n: x.to("meta") for n, x in ZEROS.items()}), TypeError, "this cache is on cpu"),
        (lambda c: c.attend(**ZEROS, slots=torch.zeros(2).long()), ValueError, r"slots must be \[3\]: got .*\(2,\)"),
        (lambda c: c.attend(**ZEROS, slots=torch.zeros(3)), TypeError, "slots must be int32 or int64: got .*float32"),
        (lambda c: c.attend(**ZEROS, slots=[0, 1, 2]), TypeError, "slots must be a torch.Tensor"),
        (
            lambda c: c.attend(**{**ZEROS, "v": ZEROS["v"].clone().requires_grad_()}),
            RuntimeError,
            "no derivative: an input requires a gradient",
        ),
        (lambda c: c.verify(**ZEROS), ValueError, r"at most draft = 4 tokens: got .*\(3, 5, 2, 4\)"),
        (lambda c: c.accept(torch.zeros(3)), TypeError, "counts must be int32 or int64"),
        (lambda c: c.accept(torch.zeros(2).long()), ValueError, r"counts must be \[3\]"),
        (lambda c: c.accept(torch.zeros(2).long(), slots=torch.zeros(2)), TypeError, "slots must be int32 or int64"),
        (lambda c: c.reorder(torch.zeros(4).long()), ValueError, "at most S = 3 slots"),
        (lambda c: c.reorder(torch.zeros(2).long(), torch.zeros(3).long()), ValueError, r"targets must be \[2\]"),
        (lambda c: c.reorder(torch.zeros(2).long(), torch.zeros(2)), TypeError, "targets must be int32 or int64"),
        (lambda c: c.reset(torch.zeros(2, 2).long()), ValueError, r"slots must be \[n\]"),
        (lambda c: c.reset(torch.zeros(2).long().to("meta")), TypeError, "slots must be on the device of the cache"),
        (lambda c: StateCache(0, 1, 1, 1), ValueError, "slots must be at least 1: got slots=0"),
        (lambda c: StateCache(1, 1, 1, 1, draft=-1), ValueError, "draft must be at least 0: got draft=-1"),
        (lambda c: StateCache(1, 2, 1, 1, value_heads=3), ValueError, "multiple of heads: got value_heads=3, heads=2"),
        (lambda c: StateCache(1, 1, 1, 1, dtype=torch.bfloat16), TypeError, "got dtype=torch.bfloat16"),
    ],
)
def test_errors(call: Callable[[StateCache], Any], error: type[Exception], message: str) -> None:
    cache = StateCache(3, 2, 4, 6, value_heads=4, draft=DRAFT)
    cache.state.uniform_()
    before = cache.state.clone()
    with pytest.raises(error, match=message):
        call(cache)
    assert torch.equal(cache.state, before)


def test_nothing_stays_of_a_dropped_token() -> None:
    """Not even of one that is infinite."""
    cache = StateCache(2, 1, 2, 2, draft=3)
    k = torch.ones(2, 3, 1, 2)
    v = k.clone()
    v[:, 2] = torch.inf
    cache.verify(k, k, v)
    cache.accept(torch.tensor([1, 1]))
    assert cache.state.isfinite().all()
    assert cache.draft_v.isfinite().all()


def test_verify_is_attend_under_autocast() -> None:
    first, second = (StateCache(1, 1, 4, 4, draft=4) for _ in range(2))
    q, k, v = (torch.randn(1, 4, 1, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        first.attend(q, k, v)
        second.verify(q, k, v)
        second.accept(torch.tensor([4]))
    assert first.state.any()
    torch.testing.assert_close(first.state, second.state, rtol=1e-6, atol=1e-6)


def test_reorder_knows_only_the_slots() -> None:
    cache = StateCache(1, 1, 4, 4)
    with pytest.raises(IndexError):
        cache.reorder(torch.tensor([1]))
    with pytest.raises(IndexError):
        cache.reorder(torch.tensor([0]), targets=torch.tensor([1]))

"""A remembered launch runs compiled code only where Triton would have chosen the same code."""

import contextlib
import random
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from torch_la.ops.kernels import dispatch, launch, tiles
from torch_la.ops.kernels.dispatch import Launch, form
from torch_la.ops.kernels.plan import planned

# ------------------------------------------------------------------------------------------------------------- a launch


class Function:
    """In the place of Triton's JITFunction: (x, y, n, scale, A, B)."""

    params = tuple(SimpleNamespace(name=name, is_constexpr=name in "AB") for name in ("x", "y", "n", "scale", "A", "B"))

    def __init__(self, found: bool = True) -> None:
        self.log: list[Any] = []
        self.found = found

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.log.append(("triton", grid, args, constants))
            return (
                SimpleNamespace(run=self.run, function="function", packed_metadata="metadata") if self.found else None
            )

        return launch

    def run(self, *args: Any) -> None:
        self.log.append(("compiled", *args))

    def warmup(self, *args: Any, grid: tuple[int], **constants: Any) -> None:
        self.log.append(("warmup", grid, args, constants))


X = torch.zeros(64)


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(dispatch, "driver", SimpleNamespace(active=active))


def way(it: Launch, kernel: Function, x: Tensor = X, scale: float = 0.5) -> str:
    """Which way the call went."""
    it(kernel, x, X, 16, scale)
    return kernel.log[-1][0]


def a_launch() -> Launch:
    return Launch(7, B=1, A=2, num_warps=4)


def test_the_second_call_goes_to_compiled_code() -> None:
    it, kernel, y = a_launch(), Function(), torch.zeros(64)
    assert way(it, kernel) == "triton"
    assert kernel.log == [("triton", (7,), (X, X, 16, 0.5), {"B": 1, "A": 2, "num_warps": 4})]
    assert way(it, kernel, y, 0.25) == "compiled"
    pointers = y.data_ptr(), X.data_ptr()
    code = 7, 1, 1, "stream of 0", "function", "metadata", None, None, None
    assert kernel.log[-1] == ("compiled", *code, *pointers, 16, 0.25, 2, 1)  # constants in the kernel's order


def test_a_kernel_that_does_not_compile_leaves_triton_as_it_was() -> None:
    from triton.runtime._async_compile import active_mode

    class Broken:
        def warmup(self, *_: Any, **__: Any) -> None:
            def fail() -> None:
                raise RuntimeError("it does not compile")

            mode = active_mode.get()
            assert mode is not None
            mode.submit("a key", fail, lambda compiled: None)

    with pytest.raises(RuntimeError, match="it does not compile"), dispatch.compiled_at_once():
        Launch(1)(Broken())
    assert active_mode.get() is None


def test_launches_that_wait_compile_first_and_keep_their_order() -> None:
    first, second, kernel = a_launch(), Launch(3, A=1, B=1), Function()
    first(kernel, X, X, 16, 0.5)
    kernel.log.clear()
    with dispatch.compiled_at_once():
        first(kernel, X, X, 16, 0.25)  # remembered: it could go ahead, and must not
        second(kernel, X, X, 8, 0.5)
        assert kernel.log == []
    assert [entry[0] for entry in kernel.log] == ["warmup", "warmup", "compiled", "triton"]
    assert kernel.log[0] == ("warmup", (7,), (X, X, 16, 0.25), {"B": 1, "A": 2, "num_warps": 4})
    assert kernel.log[3] == ("triton", (3,), (X, X, 8, 0.5), {"A": 1, "B": 1})


def test_launches_that_wait_are_dropped_with_an_error() -> None:
    it, kernel = a_launch(), Function()

    def fails() -> None:
        with dispatch.compiled_at_once():
            it(kernel, X, X, 16, 0.5)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert kernel.log == []
    assert way(it, kernel) == "triton"  # and none waits any longer


def test_only_the_first_call_of_a_kind_waits() -> None:
    def plan(T: int, dtype: torch.dtype = torch.float16, device: int | None = 0) -> Any:
        x = torch.zeros(1, T, 1, 16, dtype=dtype)
        args = ("chunk", "forward", False, False, False, False, False, device, 132, 9, False, tiles.settings())
        return planned(*args, form(x, x, x, None, None, None, None))

    def waits(plan: Any) -> bool:
        return launch._begin(plan) is not launch._HERE

    launch._begun.clear()
    assert [waits(plan(64)), waits(plan(64)), waits(plan(80))] == [True, False, False]
    assert [waits(plan(64, torch.bfloat16)), waits(plan(64, torch.bfloat16))] == [True, False]
    assert [waits(plan(64, device=1)), waits(plan(64, device=None))] == [True, False]


def test_a_pointer_that_is_not_aligned_is_left_to_triton() -> None:
    it, kernel = a_launch(), Function()
    for x, wanted in ((X[1:], "triton"), (X, "triton"), (X[2:], "triton"), (X[4:], "compiled"), (X, "compiled")):
        assert way(it, kernel, x) == wanted


def test_a_profiler_sees_every_launch() -> None:
    from triton import knobs

    it, kernel = a_launch(), Function()
    way(it, kernel)
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(print)
        try:
            assert way(it, kernel) == "triton"
        finally:
            chain.remove(print)
        assert way(it, kernel) == "compiled"


def test_the_code_of_one_kernel_is_not_that_of_another() -> None:
    it, one, other = a_launch(), Function(), Function()
    assert [way(it, one), way(it, one), way(it, other), way(it, other)] == ["triton", "compiled"] * 2


def test_a_dry_run_is_not_remembered() -> None:
    it, kernel = a_launch(), Function(found=False)
    assert [way(it, kernel), way(it, kernel)] == ["triton"] * 2


# ------------------------------------------------------------------------------------------------ those of the launcher


@pytest.fixture
def dry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernel runs, whatever the tile table is made to say."""
    for name, kernel in list(vars(launch).items()):
        if hasattr(kernel, "arg_names"):
            monkeypatch.setattr(launch, name, SimpleNamespace(name=name, params=kernel.params))
    forget()
    yield
    tiles.override.clear()
    tiles.segment, tiles.in_blocks = None, False
    forget()


def forget() -> None:
    of_a_device = launch._processors, launch._copies_tiles
    caches = [f for f in vars(launch).values() if hasattr(f, "cache_clear") and f not in of_a_device]
    assert len(caches) > 8
    for f in caches:
        assert f.cache_info().maxsize is not None
        f.cache_clear()


DEFAULTS: dict[str, Any] = {
    "way": "forward", "op": "chunk", "dtype": torch.bfloat16, "B": 1, "T": 96, "H": 1, "groups": 2, "K": 16, "V": 16,
    "gate": "g", "gate_dtype": torch.float32, "gate_strided": False, "cu": None, "state": True, "states_strided": "",
    "final": True, "normalize": False, "reverse": False, "gate_grad": True, "strided": "", "segment": None,
    "in_blocks": False, "tile": None, "exact": False,
}  # fmt: skip
CHANGES: dict[str, tuple[Any, ...]] = {
    "way": ("forward", "backward", "step"),
    "op": ("chunk", "fused_chunk", "recurrent"),
    "dtype": (torch.bfloat16, torch.float16, torch.float32),
    "B": (1, 2, 3),
    "T": (1, 64, 95, 96, 5000),
    "H": (1, 2, 4),
    "groups": (1, 2),
    "K": (1, 16, 17, 200),
    "V": (1, 16, 17, 200),
    "gate": ("none", "g", "gamma"),
    "gate_dtype": (torch.float32, torch.bfloat16),
    "gate_strided": (False, True),
    "cu": (None, (2, torch.int32), (2, torch.int64), (3, torch.int32), (17, torch.int32)),
    "state": (False, True),
    "states_strided": ("", "S0", "dS1"),
    "final": (False, True),
    "normalize": (False, True),
    "reverse": (False, True),
    "gate_grad": (False, True),
    "strided": ("", "q", "k", "v", "do"),
    "segment": (None, 64, 1024),
    "in_blocks": (False, True),
    "tile": (None, (16, 16, 4, 1), (16, 16, 8, 1)),
    "exact": (False, True),
}


def make(case: dict[str, Any]) -> None:
    """The call of the launcher that `case` describes."""
    it = SimpleNamespace(**case)
    B = 1 if it.cu else it.B
    N, HV, W = (it.cu[0] if it.cu else B), it.H * it.groups, it.V + it.normalize

    def rows(name: str, heads: int, width: int) -> Tensor:
        """[B, T, heads, width]; strided: of a tensor that is wider."""
        x = torch.empty(B, it.T, heads, 3 * width if name in it.strided else width, dtype=it.dtype)
        return x[..., :width] if name in it.strided else x

    def state(name: str) -> Tensor:
        shape = N, HV, it.K, W
        return torch.empty(N, HV, W, it.K).transpose(2, 3) if name == it.states_strided else torch.empty(shape)

    q, k, v, do = rows("q", it.H, it.K), rows("k", it.H, it.K), rows("v", HV, it.V), rows("do", HV, it.V)
    g = gamma = None
    if it.gate == "g":
        shape = B, it.T, HV
        g = (
            torch.empty(*shape, 2, dtype=it.gate_dtype)[..., 0]
            if it.gate_strided
            else torch.empty(shape, dtype=it.gate_dtype)
        )
    elif it.gate == "gamma":
        gamma = torch.empty(HV, dtype=it.gate_dtype)
    S0 = state("S0") if it.state else None
    cu = torch.zeros(it.cu[0] + 1, dtype=it.cu[1]) if it.cu else None
    o = torch.empty_like(v) if it.normalize else None
    tiles.segment, tiles.in_blocks = it.segment, it.in_blocks
    tiles.override.clear()
    if it.tile:
        tiles.override |= {name: tiles.Tile(*it.tile) for name in ("forward", "backward", "step", "states")}
    torch.set_float32_matmul_precision("highest" if it.exact else "high")
    options = 0.5, it.normalize, it.reverse
    if it.way == "forward":
        launch.forward(it.op, q, k, v, g, gamma, S0, it.final, cu, *options)
    elif it.way == "backward":
        dS1 = state("dS1") if it.final else None
        launch.backward(it.op, q, k, v, g, gamma, S0, cu, *options, o, do, dS1, it.gate_grad)
    else:
        pool = torch.empty(5, HV, it.K, W) if it.cu else torch.empty(B, HV, it.K, W)
        index = torch.zeros(B, dtype=it.cu[1]) if it.cu else None
        first = [None if x is None else x[:, 0] for x in (q, k, v, g)]
        launch.step_(*first[:3], pool, first[3], gamma, index, 0.5, it.normalize)


def signature(it: Launch, kernel: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All that Triton compiles for, and what runs: kernel, grid, constants, integers, dtypes, alignment."""

    def seen(x: Any) -> Any:
        if hasattr(x, "block_shape"):  # a descriptor of a tensor
            return seen(x.base), x.shape, x.strides, x.block_shape
        return (x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else float if isinstance(x, float) else x

    return kernel.name, it.grid, tuple(it.constants.items()), *map(seen, args)


@pytest.mark.usefixtures("dry")
def test_remembered_launches_are_those_made_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that differ in one property, and then the same with nothing remembered."""
    seed = random.randrange(1 << 30)
    print(f"{seed=}")
    draw = random.Random(seed)
    log: list[tuple[Any, ...]] = []
    met: dict[Launch, tuple[Any, ...]] = {}

    def note(it: Launch, kernel: Any, *args: Any) -> None:
        found = signature(it, kernel, args)
        assert met.setdefault(it, found) == found, "one launch, but other arguments"
        log.append(found)

    monkeypatch.setattr(Launch, "__call__", note)
    bases = [DEFAULTS | {"way": way} for way in CHANGES["way"]]
    bases += [DEFAULTS | {name: draw.choice(values) for name, values in CHANGES.items()} for _ in range(12)]
    for base in bases:
        cases = [base | {name: value} for name, values in CHANGES.items() for value in values]
        forget()
        met.clear()
        first, remembered = [], []
        for kept in (first, remembered):
            for case in cases:
                log.clear()
                make(case)
                kept.append(list(log))
        assert first == remembered
        for case, launches in zip(cases, first, strict=True):
            forget()
            log.clear()
            make(case)
            assert log == launches, case


@pytest.mark.usefixtures("dry")
@pytest.mark.parametrize("way", CHANGES["way"])
def test_each_device_has_launches_of_its_own(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    met: dict[int, set[Launch]] = {0: set(), 1: set()}
    for name, value in {"is_cuda": True, "get_device": lambda x: device}.items():
        monkeypatch.setattr(Tensor, name, value, raising=False)
    monkeypatch.setattr(launch, "_processors", lambda index: 132)
    monkeypatch.setattr(launch, "_copies_tiles", lambda index: 9)
    monkeypatch.setattr(launch, "_on", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(Launch, "__call__", lambda it, kernel, *args: met[device].add(it))
    for index in (0, 1, 0):
        device = index
        make(DEFAULTS | {"way": way})
    assert len(met[0]) == len(met[1]) > 0
    assert not met[0] & met[1]


def test_far_states_are_copied_for_32_bit_offsets() -> None:
    for inner in ((1, 1 << 22), (1 << 22, 1)):
        assert launch._near(torch.empty_strided((2, 3, 256, 256), (1, 1, *inner), device="meta")).is_contiguous()
    near = torch.empty_strided((2, 3, 256, 256), (1 << 40, 1 << 40, (1 << 22) - 1, 1), device="meta")
    assert launch._near(near) is near
    assert launch._near(None) is None


def test_roles_are_compiled_for_what_they_look_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "described", 0)
    monkeypatch.setattr(launch, "_hopper_walk", object())  # also where Triton is of another release
    x, g = torch.zeros(2, 128, 3, 128, dtype=torch.bfloat16), torch.zeros(2, 128, 3)
    plan = launch._plan("chunk", "backward", False, False, False, True, x, x, x, g, None, None, None, None, x)
    assert plan.on_hopper

    def seen(roles: int) -> list[bool]:
        """Of S0, dS1 and dS0: whether the code of these roles depends on it."""
        none = launch._roles_launch(plan, roles, False, False, False).constants
        one = [[i == j for j in range(3)] for i in range(3)]
        return [launch._roles_launch(plan, roles, *it).constants != none for it in one]

    assert [seen(roles) for roles in (1, 2, 4, 6, 7)] == [
        [True, False, False], [False, True, False], [False, True, True], [False, True, True], [True, True, True]
    ]  # fmt: skip


def test_what_is_read_by_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "described", 2 * 1024 * 3 * 256)

    def views(T: int = 1024, width: int = 128, dtype: torch.dtype = torch.float16, **other: Any) -> Any:
        x = torch.zeros(2, T, 3, width, dtype=dtype)
        q = other.get("q", x)
        plan = launch._plan(
            other.get("op", "chunk"), other.get("kernel", "forward"), False, False, False,
            other.get("gate_grad", False), q, x, x, None, other.get("gamma"), other.get("cu"), None, None, x,
        )  # fmt: skip
        return plan.views

    assert views() == (([2, 3, 1024, 128], [1024 * 384, 128, 384, 1]),) * 4
    assert views(T=1023) is None  # making them takes longer than they save
    monkeypatch.setattr(tiles, "described", 0)
    assert views(dtype=torch.float32) is None
    assert views(op="recurrent") is None
    assert len(views(cu=torch.tensor([0, 7]))[0][0]) == 5  # where a sequence ends is said in two more dimensions
    assert views(width=100) is None  # strides that are no multiple of 16 bytes
    assert views(width=104) is not None
    assert views(width=64) is None  # no row in the table
    assert views(kernel="backward", width=64) is None
    assert views(kernel="backward", width=64, gamma=torch.zeros(3)) is not None
    assert views(kernel="backward") is not None
    assert views(kernel="backward", gate_grad=True, width=256) is not None
    assert views(kernel="backward", gate_grad=True, dtype=torch.bfloat16) is not None  # on hopper.py
    for other in ({"dtype": torch.float16}, {"width": 120}):  # one program for a block
        assert views(kernel="backward", gate_grad=True, **{"dtype": torch.bfloat16, **other}) is None
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "hopper", False)
        assert views(kernel="backward", gate_grad=True, dtype=torch.bfloat16) is None
    x = torch.zeros(2, 1024, 3, 256, dtype=torch.float16)
    assert views(q=x[..., 8:136])[0] == ([2, 3, 1024, 128], [1024 * 768, 256, 768, 1])
    assert views(q=x[..., 4:132]) is None  # starts between two multiples of 16 bytes
    assert views(q=x[:, :, :1, :128].expand(2, 1024, 3, 128)) is None  # a stride of 0
    assert views(q=torch.zeros(2, 1024, 3, 130, dtype=torch.float16)[..., :128]) is None
    single = torch.zeros(1, 1024, 3, 128, dtype=torch.float16).as_strided((1, 1024, 3, 128), (5, 384, 128, 1))
    assert views(q=single)[0][1][0] % 8 == 0  # of a dimension of one, any stride will do


@pytest.mark.usefixtures("dry")
def test_two_threads_remember_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[int, list[Any]] = {}

    def note(it: Launch, kernel: Any, *args: Any) -> None:
        made[threading.get_ident()].append(signature(it, kernel, args))

    monkeypatch.setattr(Launch, "__call__", note)
    start = threading.Barrier(4)

    def work() -> None:
        log = made[threading.get_ident()] = []
        start.wait()
        for length in range(64, 96):
            make(DEFAULTS | {"way": "backward", "T": length})
        assert log

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logs = list(made.values())
    assert len(logs) == 4
    assert all(log == logs[0] for log in logs)


def test_the_form_is_dtype_shape_and_strides() -> None:
    x = torch.zeros(4, 4)
    others = [x.half(), x[:2], x.t(), None]
    found = [form(y) for y in (x, *others)]
    assert found[0] == form(x + 1)
    assert len(set(found[:3])) == 3
    assert found[3] != found[0] or x.t().stride() == x.stride()
    assert found[4] == (None,)

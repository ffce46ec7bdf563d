"""How the tests run.

- Every test that takes `device` runs on the CPU, and where there is CUDA again on "cuda", marked `gpu`.
- Tests marked `gpu` are not collected where there is no CUDA device.
- TORCH_LA_HYPOTHESIS_PROFILE=nightly draws many more random cases; the default profile is "ci".
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

CUDA = torch.cuda.is_available()

# Each example runs several operators and a loop over tokens, so time per example says nothing. Cases are fresh in every
# run, but for CI's: there they stay the same, so that a red run speaks of the change.
fixed = bool(os.environ.get("CI"))
hypothesis.settings.register_profile("ci", max_examples=30, deadline=None, print_blob=True, derandomize=fixed)
hypothesis.settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True, derandomize=False)
hypothesis.settings.load_profile(os.environ.get("TORCH_LA_HYPOTHESIS_PROFILE", "ci"))

# The tensors are small: threads cost more than they bring, and the workers of pytest-xdist share the cores.
torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        cuda = [pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("device", ["cpu", *(cuda if CUDA else [])])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CUDA:
        return
    away = [item for item in items if item.get_closest_marker("gpu")]
    if away:
        config.hook.pytest_deselected(items=away)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def ieee_products() -> Iterator[None]:
    """float32 is compared at float32 precision; a test that wants TF32 says so itself."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code from other tests, and none left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()

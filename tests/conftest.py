"""Fixtures of every test: seeded randomness, the backends, poisoned memory, and the `gpu` mark.

Helpers to import live beside this file: `random_models`, `close`, `tolerances`.
"""

import importlib.util
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings
from random_models import random_checkpoint as make_random_checkpoint

from qmamba_cli.errors import DeviceError
from qmamba_cli.kernels.backend import Backend, select_backend

# The tensors of tests are small: more threads would wait for each other longer than they compute.
torch.set_num_threads(1)

SEED = 20250


# The same examples in every run; `make fuzz` looks for others.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", help="K/N: of the GPU tests, each N-th from the K-th on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part, parts = _part(config.getoption("--part"))
    if parts > 1:
        kept = [item for item in items if item.get_closest_marker("gpu")][part - 1 :: parts]
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
        items[:] = kept
    reason = _no_gpu()
    if reason:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


def _part(option: str) -> tuple[int, int]:
    """K and N of the option `K/N`."""
    part, _, parts = option.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise pytest.UsageError(f"--part must be K/N with 1 <= K <= N, got {option}")
    return int(part), int(parts)


def _no_gpu() -> str:
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use"
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed: pip install 'qmamba-cli[cuda13]' or [cuda12]"
    return ""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


@pytest.fixture
def torch_rng() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each backend in turn; one that cannot run here skips with the reason it gives."""
    try:
        return select_backend(request.param)
    except DeviceError as error:
        pytest.skip(error.message)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialized memory holds NaN or the largest integer, so that an element never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def random_checkpoint() -> Callable[..., dict[str, torch.Tensor]]:
    """`random_models.random_checkpoint`."""
    return make_random_checkpoint

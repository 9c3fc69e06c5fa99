"""What surrounds a launch, as far as it shows without a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels import _launch


def test_the_limit_of_shared_memory_is_raised_and_never_lowered():
    # Launches of one instance with different sizes share the function and its limit.
    kernel = SimpleNamespace(max_dynamic_shared_size_bytes=48 * 1024)
    limits = []
    for size in (0, 20_000, 130_000, 60_000, 49_153, 200_000):
        _launch._allow_shared(kernel, size)
        limits.append(kernel.max_dynamic_shared_size_bytes)
    assert limits == [49_152, 49_152, 130_000, 130_000, 130_000, 200_000]


def test_bare_numbers_are_refused_as_arguments():
    for value in (1, 1.0, np.float64(1.0), np.int8(1)):
        with pytest.raises(TypeError, match="sized numpy scalar"):
            _launch._value(value)
    assert _launch._value(None) == 0
    tensor = torch.zeros(3)
    assert _launch._value(tensor) == tensor.data_ptr()


@pytest.mark.parametrize("grid", [(0, 1, 1), (1, 65536, 1), (1, 1, 65536), (2**31, 1, 1)])
def test_a_grid_out_of_range_is_refused(grid):
    with pytest.raises(ShapeError, match="out of range"):
        _launch.launch("x.cu", "x", grid=grid, block=(1, 1, 1), args=(), device=torch.device("cuda", 0))


def test_tensors_of_the_cpu_are_refused():
    with pytest.raises(ShapeError, match=r"`x` is on cpu, expected a CUDA tensor"):
        _launch.contiguous("x", torch.zeros(3))

import inspect
import math

import pytest
import torch
from close import assert_exact

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.argmax import cuda, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_signatures_are_equal():
    assert inspect.signature(cuda.argmax) == inspect.signature(reference.argmax)


@pytest.mark.parametrize("n", [1, 31, 1024, 8193, 50_280])
@pytest.mark.parametrize("steps", [1e6, 3.0], ids=["distinct", "recurring"])
def test_it_is_the_first_of_the_largest(backend, torch_rng, n, steps):
    x = torch.randn(2, 3, n, generator=torch_rng).mul(steps).round()
    got = backend.argmax(x.to(backend.device)).cpu()
    expected = [row.index(max(row)) for row in x.view(-1, n).tolist()]
    assert_exact("argmax", got, torch.tensor(expected).view(2, 3))


@pytest.mark.parametrize("at", [0, 5, 2999])
@pytest.mark.parametrize("largest", [math.inf, math.nan, -math.nan], ids=str)
def test_infinity_and_nan_are_large(backend, torch_rng, at, largest):
    x = torch.randn(3000, generator=torch_rng)
    x[at] = largest
    assert int(backend.argmax(x.to(backend.device))) == at


def test_zeros_are_equal_and_rows_may_be_padded(backend):
    x = torch.full((4, 7), -math.inf)
    x[:, 6] = 100.0
    x[0, 2:4] = torch.tensor([-0.0, 0.0])
    x[1, 1:3] = torch.tensor([0.0, -0.0])
    x[2, 4] = -3.0e38
    got = backend.argmax(x.to(backend.device)[:, :6])
    assert got.cpu().tolist() == [2, 1, 4, 0]


def test_refusals():
    for operator in (reference.argmax, cuda.argmax):
        with pytest.raises(ShapeError, match="float32 with a last axis"):
            operator(torch.zeros(3, dtype=torch.float64))
        with pytest.raises(ShapeError, match="not empty"):
            operator(torch.zeros(3, 0))

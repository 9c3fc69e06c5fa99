import inspect

import oracles
import pytest
import tolerances
import torch
from close import assert_close, assert_exact

from qmamba_cli.errors import ShapeError
from qmamba_cli.kernels.embedding import cuda, reference
from qmamba_cli.kernels.hadamard.matrix import plan_for
from qmamba_cli.kernels.hadamard.reference import hadamard

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Powers of two, symmetric and skew cores, blocks, the identity, and models' widths.
WIDTHS = [1, 2, 33, 36, 48, 64, 90, 100, 256, 320, 768, 1536, 2560]


@pytest.mark.parametrize("name", ["embedding", "unrotate"])
def test_signatures_are_equal(name):
    assert inspect.signature(getattr(cuda, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("width", [1, 33, 256])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rows_are_the_real_values_of_the_table(backend, torch_rng, dtype, width):
    table = torch.randn(11, width, generator=torch_rng).mul(40).to(dtype)
    scale = torch.rand(11, generator=torch_rng) if dtype == torch.int8 else None
    ids = torch.tensor([[10, 0, 3], [3, 3, 7]])
    got = oracles.call(backend, "embedding", ids, table, scale)
    expected = torch.stack([table[i].float() * (1.0 if scale is None else scale[i]) for i in ids.flatten()])
    assert_exact("embedding", got, expected.reshape(2, 3, width))


def test_a_table_is_not_changed(backend, torch_rng):
    table = torch.randn(4, 8, generator=torch_rng)
    before = table.clone()
    backend.embedding(torch.tensor([1, 1], device=backend.device), table.to(backend.device)).add_(1.0)
    assert_exact("table", table, before)


@pytest.mark.parametrize("with_gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize("width", WIDTHS)
def test_unrotate_is_the_transpose_of_the_dense_matrix(backend, torch_rng, width, with_gain):
    x = torch.randn(2, 3, width, generator=torch_rng)
    gain = torch.randn(width, generator=torch_rng) if with_gain else None
    got = oracles.call(backend, "unrotate", x, gain)
    # `hadamard` is x @ F.T; F is orthonormal.
    matrix = oracles.hadamard_matrix(width)
    factor = torch.ones(width).double() if gain is None else gain.double()
    exact = (x.double() @ matrix) * factor
    magnitude = (x.double().abs() @ matrix.abs()) * factor.abs()
    plan = plan_for(width)
    terms = plan.core + 2 * (plan.order // plan.core).bit_length() + 32
    assert_close("unrotate", got, exact, tolerances.HADAMARD.budget(magnitude, terms))


@pytest.mark.parametrize("width", [48, 90, 256, 2560])
def test_unrotate_undoes_hadamard(torch_rng, width):
    x = torch.randn(5, width, generator=torch_rng).double().float()
    assert float((reference.unrotate(hadamard(x)) - x).abs().max()) < 1e-5
    # And not by being its own inverse: the cores of these widths are not symmetric.
    if plan_for(width).core > 1:
        assert float((hadamard(hadamard(x)) - x).abs().max()) > 0.1


@pytest.mark.gpu
def test_an_id_outside_the_table_cannot_pass_unseen():
    table = torch.ones(5, 64, device="cuda")
    got = cuda.embedding(torch.tensor([4, 5, -1], device="cuda"), table)
    assert got[0].eq(1).all() and got[1:].isnan().all()


def test_refusals():
    ids, table = torch.zeros(2, dtype=torch.int64), torch.ones(3, 4)
    with pytest.raises(ShapeError, match="`ids` must be int64"):
        reference.embedding(ids.int(), table)
    with pytest.raises(ShapeError, match=r"must be \(V, d_model\)"):
        reference.embedding(ids, table[0])
    with pytest.raises(ShapeError, match=r"expected torch\.int8 with `scale`"):
        reference.embedding(ids, table, torch.ones(3))
    with pytest.raises(ShapeError, match="without `scale`"):
        reference.embedding(ids, table.to(torch.int8))
    with pytest.raises(ShapeError, match=r"`scale` must be float32 \(3,\)"):
        reference.embedding(ids, table.to(torch.int8), torch.ones(4))
    with pytest.raises(ShapeError, match="`x` must be float32"):
        reference.unrotate(table.double())
    with pytest.raises(ShapeError, match=r"`gain` must be float32 \(4,\)"):
        reference.unrotate(table, torch.ones(3))

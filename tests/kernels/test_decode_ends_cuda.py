"""A step's two ends on a GPU: the bits of the operators that they stand for."""

import pytest
import torch
from close import assert_exact

from qmamba_cli.kernels.argmax.cuda import argmax
from qmamba_cli.kernels.decode_ends import cuda
from qmamba_cli.kernels.embedding.cuda import embedding, unrotate
from qmamba_cli.kernels.hadamard.cuda import hadamard
from qmamba_cli.kernels.linear.cuda import linear
from qmamba_cli.kernels.rms_norm.cuda import rms_norm

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

# Powers of two up to the largest, every core, and what of S lies within a warp or across rows.
WIDTHS = [128, 256, 384, 512, 768, 896, 1024, 1536, 1792, 2048, 2560, 3072, 3584, 4096]
EPSILON = 1e-5


def rng(seed: int) -> torch.Generator:
    return torch.Generator(device="cuda").manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=rng(seed), device="cuda")


def table_of(rows: int, width: int, dtype: torch.dtype, seed: int = 1):
    real = normal(rows, width, seed=seed).mul_(40)
    scale = torch.rand(rows, generator=rng(seed), device="cuda").add_(0.01) if dtype == torch.int8 else None
    return real.clamp_(-128, 127).to(dtype), scale


def head_of(rows: int, width: int, dtype: torch.dtype, *, gain: bool = True, bias: bool = False) -> cuda.Head:
    weight, scale = table_of(rows, width, dtype)
    return cuda.Head(
        gain=normal(width, seed=3) if gain else None,
        weight=weight,
        weight_scale=scale,
        bias=normal(rows, seed=4) if bias else None,
        eps=EPSILON,
    )


def plain_logits(head: cuda.Head, residual: torch.Tensor) -> torch.Tensor:
    hidden = unrotate(rms_norm(residual, None, eps=head.eps), head.gain)
    return linear(hidden, head.weight, head.bias, weight_scale=head.weight_scale)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_step_begins_with_the_rotated_rows(width, dtype):
    table, scale = table_of(37, width, dtype)
    ids = torch.tensor([36, 0, 5], device="cuda")
    assert_exact("residual", cuda.begin(ids, table, scale), hadamard(embedding(ids, table, scale)))


def test_an_id_outside_the_table_cannot_pass_unseen():
    table, scale = table_of(5, 256, torch.int8)
    got = cuda.begin(torch.tensor([4, 5, -1], device="cuda"), table, scale)
    assert got[0].isfinite().all() and got[1:].isnan().all()


@pytest.mark.parametrize("with_gain", [False, True], ids=["plain", "gain"])
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_turn_back_as_by_norm_and_unrotate(width, with_gain):
    residual = normal(5, width).mul_(3)
    gain = normal(width, seed=2) if with_gain else None
    expected = unrotate(rms_norm(residual, None, eps=EPSILON), gain)
    assert_exact("hidden", cuda.turn(residual, gain, EPSILON), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_one_row_has_the_logits_of_the_operators(width, dtype):
    # Rows for several rounds of some warps and none of others, the last group of four not whole.
    head = head_of(9001, width, dtype, bias=True)
    assert cuda.supported(head.weight, head.weight, head.gain)
    for seed in range(2):
        residual = normal(1, width, seed=seed).mul_(3)
        assert_exact("logits", head.logits(residual), plain_logits(head, residual))


@pytest.mark.parametrize("rows", [1, 3, 4, 50_280])
def test_one_row_chooses_the_largest_logit(rows):
    head = head_of(rows, 768, torch.int8, gain=False)
    token = torch.empty(1, 1, dtype=torch.int64, device="cuda")
    residual = normal(1, 768)
    logits = plain_logits(head, residual)
    for limit in (None, rows, max(1, rows // 2), rows + 7):
        token.fill_(-1)
        head.choose(residual, token, limit)
        assert token.tolist() == argmax(logits[:, :limit]).unsqueeze(1).tolist()


def test_of_equal_logits_the_first_is_chosen():
    weight = normal(1, 256, seed=5).mul_(40).to(torch.int8).repeat(5000, 1)
    scale, token = torch.ones(5000, device="cuda"), torch.empty(1, 1, dtype=torch.int64, device="cuda")
    head = cuda.Head(gain=None, weight=weight, weight_scale=scale, bias=None, eps=EPSILON)
    residual = normal(1, 256)
    sign = plain_logits(head, residual).sign()[0, 0]
    for first, last in ((0, 4999), (17, 18), (1234, 4321)):
        scale.fill_(1.0)
        scale[first] = scale[last] = 1.0 + 0.5 * sign
        head.choose(residual, token)
        assert token.item() == first
    head.choose(residual.fill_(torch.nan), token)
    assert token.item() == 0, "NaN is the largest"


def test_what_the_kernels_do_not_take():
    table, gain = table_of(8, 256, torch.int8)[0], normal(256)
    assert cuda.supported(table, table, gain) and cuda.supported(table, table.half(), None)
    assert not cuda.supported(table.float(), table, gain)
    assert not cuda.supported(table, table, normal(257)[1:])
    for width in (64, 100, 640 * 9, 5120):
        other = table_of(2, width, torch.int8)[0]
        assert not cuda.supported(other, other, None)

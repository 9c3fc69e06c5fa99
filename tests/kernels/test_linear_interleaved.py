"""A matrix as the decode kernels read it is the one it was packed from, and multiplies as that does."""

import pytest
import torch
from close import assert_exact

from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.kernels.decode.pack import pack_block
from qmamba_cli.kernels.decode.samples import SCALES, random_block, to_device
from qmamba_cli.kernels.decode.tensors import DecodeColumns
from qmamba_cli.kernels.linear.interleaved import Interleaved
from qmamba_cli.kernels.linear.operands import expand
from qmamba_cli.modes import MODES
from qmamba_cli.quant.weights import GroupQuantized

COLUMNS = DecodeColumns.from_mode(MODES["0"])
# (d_model, d_inner, group size): whole tiles; a last tile of 8 rows, ragged units and rows; short groups.
SIZES = [(256, 512, 128), (192, 1536, 128), (64, 512, 32), (320, 1536, 96), (2560, 5120, 128)]
each_size = pytest.mark.parametrize(("d_model", "d_inner", "group_size"), SIZES)
each_width = pytest.mark.parametrize("w_bits", [8, 4])


def matrices(d_model, d_inner, group_size, w_bits, device="cpu"):
    """Name, packed form and int8 matrix of in_proj and out_proj."""
    tensors = random_block(
        d_model=d_model, d_inner=d_inner, dt_rank=8, w_bits=w_bits, seed=3, group_size=group_size
    )
    block = pack_block(to_device(tensors, device), SCALES, COLUMNS, norm_eps=1e-5)
    for name, matrix in (("in_proj", tensors.in_proj), ("out_proj", tensors.out_proj)):
        dense = matrix.expand() if isinstance(matrix, GroupQuantized) else matrix.qweight
        yield name, Interleaved(block=block, name=name), dense


@each_size
@each_width
def test_it_expands_to_the_matrix_it_was_packed_from(d_model, d_inner, group_size, w_bits):
    for name, weight, dense in matrices(d_model, d_inner, group_size, w_bits):
        assert weight.shape == tuple(dense.shape)
        assert_exact(name, weight.expand(), dense)


@pytest.mark.parametrize("tokens", [1, 5])
@each_width
def test_a_product_is_that_of_the_matrix(torch_rng, tokens, w_bits):
    ops = select_backend("cpu")
    for name, weight, dense in matrices(192, 1536, 128, w_bits):
        x = torch.randint(-128, 128, (tokens, dense.shape[1]), dtype=torch.int8, generator=torch_rng)
        scale = torch.rand(dense.shape[0], generator=torch_rng)
        expected = ops.linear(x, dense, x_scale=0.1, weight_scale=scale)
        assert_exact(name, ops.linear(x, weight, x_scale=0.1, weight_scale=scale), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 70, 300])
@each_size
@each_width
def test_on_a_gpu_it_is_read_where_it_lies(torch_rng, tokens, d_model, d_inner, group_size, w_bits):
    ops, cpu = select_backend("cuda"), select_backend("cpu")
    for name, weight, dense in matrices(d_model, d_inner, group_size, w_bits, "cuda"):
        assert_exact(name, expand(weight).cpu(), dense)
        x = torch.randint(-128, 128, (tokens, dense.shape[1]), dtype=torch.int8, generator=torch_rng)
        scale = torch.rand(dense.shape[0], generator=torch_rng)
        residual = torch.randn(tokens, dense.shape[0], generator=torch_rng)
        for options in ({"out_scale": 0.37}, {"residual": residual}, {}):
            expected = cpu.linear(x, dense, x_scale=1e-4, weight_scale=scale, **options)
            there = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            got = ops.linear(x.cuda(), weight, x_scale=1e-4, weight_scale=scale.cuda(), **there)
            assert_exact(name, got.cpu(), expected)
        split = dense.shape[0] // 2
        expected = cpu.linear_split(x, dense, split=split, x_scale=1e-4, weight_scale=scale, out_scale=0.3)
        got = ops.linear_split(
            x.cuda(), weight, split=split, x_scale=1e-4, weight_scale=scale.cuda(), out_scale=0.3
        )
        for part, wanted in zip(got, expected, strict=True):
            assert_exact(name, part.cpu(), wanted)

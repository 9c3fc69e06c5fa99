"""The scalar header compiled as C++, against torch, over every tie, both ends and a million values."""

import ctypes
import shutil
import subprocess
from importlib.resources import files

import numpy as np
import pytest
import torch

from qmamba_cli.kernels._source import kernel_source
from qmamba_cli.quant.grid import dequantize, quantize, reciprocal

HARNESS = """
#include "numerics.cuh"
extern "C" {
void quantize(const float* x, float inv_scale, signed char* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = qm_quantize(x[i], inv_scale);
}
void dequantize(const signed char* q, float scale, float* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = qm_dequantize(q[i], scale);
}
void silu(const float* x, float* out, long n) { for (long i = 0; i < n; ++i) out[i] = qm_silu(x[i]); }
void softplus(const float* x, float* out, long n) { for (long i = 0; i < n; ++i) out[i] = qm_softplus(x[i]); }
void softplus_from(const float* x, float* out, long n) {
  for (long i = 0; i < n; ++i) out[i] = qm_softplus_from(x[i], std::exp(-std::fabs(x[i])));
}
}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("header")
    text = files("qmamba_cli.kernels").joinpath("numerics.cuh").read_text()
    (folder / "numerics.cuh").write_text(text)
    (folder / "harness.cpp").write_text(HARNESS)
    library = folder / "harness.so"
    subprocess.run(
        [compiler, "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-o", library, folder / "harness.cpp"],
        check=True,
    )
    return ctypes.CDLL(str(library))


def call(function, x: np.ndarray, *scalars: float, dtype=np.float32) -> np.ndarray:
    out = np.empty(x.shape, dtype=dtype)
    arguments = [ctypes.c_float(value) for value in scalars]
    function(
        x.ctypes.data_as(ctypes.c_void_p),
        *arguments,
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_long(x.size),
    )
    return out


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, 3.7e-3, 8.123e5, 1e-8])
def test_quantize_has_the_bits_of_the_reference(header, rng, scale):
    ties = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * np.float32(scale)
    near = np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))
    whole = np.arange(-300, 300, dtype=np.float32) * np.float32(scale)
    spread = (rng.standard_normal(1_000_000) * 60 * scale).astype(np.float32)
    huge = np.array([3e38, -3e38, np.inf, -np.inf, 0.0, -0.0, 1e-45], dtype=np.float32)
    x = np.concatenate([ties, *near, whole, spread, huge])
    got = call(header.quantize, x, reciprocal(scale), dtype=np.int8)
    np.testing.assert_array_equal(got, quantize(torch.from_numpy(x), scale).numpy())


def test_dequantize_has_the_bits_of_the_reference(header):
    q = np.arange(-128, 128, dtype=np.int8)
    for scale in (1.0, 0.1, 7.3e-5):
        expected = dequantize(torch.from_numpy(q), float(np.float32(scale))).numpy()
        np.testing.assert_array_equal(call(header.dequantize, q, scale), expected)


@pytest.mark.parametrize("name", ["silu", "softplus", "softplus_from"])
def test_activations_within_four_ulp(header, rng, name):
    x = np.concatenate(
        [
            (rng.standard_normal(1_000_000) * 8).astype(np.float32),
            np.linspace(-90, 90, 20001, dtype=np.float32),
            np.array([20.0, np.nextafter(np.float32(20), np.float32(21)), 0.0, -0.0], dtype=np.float32),
        ]
    )
    activation = getattr(torch.nn.functional, name.removesuffix("_from"))
    expected = activation(torch.from_numpy(x.astype(np.float64))).numpy()
    got = call(getattr(header, name), x)
    ulp = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    # Below -88.7 exp(-x) overflows and silu is 0 instead of less than 1e-36, in torch as well.
    assert np.max((np.abs(got - expected) - 1e-36) / ulp) <= 4


def test_our_headers_are_inlined_once_and_lines_stay_true():
    source = kernel_source("linear/linear.cu")
    assert '#include "numerics.cuh"' not in source
    assert source.count("#define QM_NUMERICS_CUH") == 1
    own = files("qmamba_cli.kernels").joinpath("linear/linear.cu").read_text().splitlines()
    after = own.index('#include "numerics.cuh"') + 2
    assert f'#line {after} "linear/linear.cu"' in source

"""Random models have the form of real ones, and activations of a plausible size."""

import pytest
import torch

from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.backend import CPU
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.random_weights import random_float, random_quantized
from qmamba_cli.modes import MODES

HOST = torch.device("cpu")
CONFIG = MambaConfig(
    d_model=128, n_layer=12, vocab_size=300, d_state=16, d_conv=4, d_inner=256, dt_rank=8, proj_bias=True
)


def make(mode: str, w_bits: int = 8):
    if mode == "fp":
        return random_float(CONFIG, torch.float32, HOST)
    return random_quantized(CONFIG, w_bits, HOST, 3)


@pytest.mark.parametrize("w_bits", [4, 8])
@pytest.mark.parametrize("mode", ["0", "2-4", "3", "fp"])
def test_activations_neither_saturate_nor_vanish(torch_rng, mode, w_bits):
    model = Mamba(make(mode, w_bits), MODES[mode], CPU)
    ids = torch.randint(0, CONFIG.vocab_size, (1, 130), generator=torch_rng)
    seen = {}
    hidden, _ = model.forward(ids, hook=seen.__setitem__)
    logits = model.logits(hidden)
    assert bool(logits.isfinite().all()) and 0.1 < float(logits.std()) < 10
    for key, tensor in seen.items():
        real = tensor.float()
        size = float(real.square().mean().sqrt())
        if tensor.dtype == torch.int8:
            assert float((real.abs() >= 127).float().mean()) < 0.01, key
            assert size > 2, f"{key}: {size} steps"
        else:
            assert 1e-3 < size < 20, f"{key}: {size}"


def test_the_seed_decides():
    one, same, other = (random_quantized(CONFIG, 4, HOST, seed) for seed in (1, 1, 2))
    assert torch.equal(one.blocks[5].out_proj.weight, same.blocks[5].out_proj.weight)
    assert not torch.equal(one.blocks[5].out_proj.weight, other.blocks[5].out_proj.weight)
    assert not torch.equal(one.blocks[5].out_proj.weight, one.blocks[4].out_proj.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_float_model_has_the_dtype_asked_for(dtype):
    weights = random_float(CONFIG, dtype, HOST)
    assert weights.embedding.dtype == weights.blocks[0].in_proj.weight.dtype == dtype
    assert weights.lm_head.weight is weights.embedding
    assert weights.blocks[0].A.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize("w_bits", [4, 8])
def test_a_quantized_model_on_a_gpu_has_the_file_s_size(w_bits):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    weights = random_quantized(CONFIG, w_bits, torch.device("cuda"), 0)
    size = torch.cuda.memory_allocated() - before
    d, width = CONFIG.d_inner, CONFIG.d_model
    projections = CONFIG.n_layer * 3 * d * width * w_bits // 8
    assert projections < size < 2 * projections + 2 * CONFIG.vocab_size * width + 1_000_000
    assert weights.rotate_ends and weights.lm_head.weight is weights.embedding

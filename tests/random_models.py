"""Random Mamba models with the initialization that training starts from, ours and transformers'."""

import math
from typing import Any

import torch

from qmamba_cli.config import MambaConfig

# Step sizes that training starts from: log-uniform in this range.
DT_MIN, DT_MAX = 1e-3, 1e-1
# The bundled demo model's config.json in our terms.
DEMO = MambaConfig(
    d_model=256,
    n_layer=6,
    vocab_size=8192,
    d_state=16,
    d_conv=4,
    d_inner=512,
    dt_rank=16,
    bos_token_id=0,
    eos_token_id=0,
)


def small_config(**changes: Any) -> MambaConfig:
    """Two layers of 32 channels; ``d_inner`` and ``dt_rank`` follow ``d_model`` unless they are given."""
    d_model = changes.get("d_model", 32)
    sizes = {
        "d_model": d_model,
        "n_layer": 2,
        "vocab_size": 64,
        "d_state": 8,
        "d_conv": 4,
        "d_inner": 2 * d_model,
        "dt_rank": -(-d_model // 16),
    }
    return MambaConfig(**{**sizes, **changes})


def random_ids(vocab_size: int, *shape: int, seed: int) -> torch.Tensor:
    """Token ids, int64, of the given shape."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def random_checkpoint(config: MambaConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A float checkpoint: every tensor of ``config.tensor_shapes()``, float32.

    Norm weights and D are near 1 but not 1, biases are small but not 0, so that none can be left out unseen.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _initial(name, shape, config, generator).contiguous()
        for name, shape in config.tensor_shapes().items()
    }


def _initial(
    name: str, shape: tuple[int, ...], config: MambaConfig, generator: torch.Generator
) -> torch.Tensor:
    normal = torch.randn(shape, generator=generator)
    uniform = 2 * torch.rand(shape, generator=generator) - 1
    match name.rpartition("mixer.")[2]:
        case "A_log":
            return torch.log(torch.arange(1, config.d_state + 1, dtype=torch.float32)).repeat(shape[0], 1)
        case "dt_proj.bias":
            dt = torch.exp((uniform + 1) / 2 * math.log(DT_MAX / DT_MIN) + math.log(DT_MIN))
            # The inverse of softplus.
            return dt + torch.log(-torch.expm1(-dt))
        case "dt_proj.weight":
            return uniform * config.dt_rank**-0.5
        case "D":
            return 1 + 0.1 * normal
        case "conv1d.weight":
            return uniform * config.d_conv**-0.5
        case "in_proj.weight" | "x_proj.weight" | "out_proj.weight":
            return uniform * shape[1] ** -0.5
    if name.endswith(("norm.weight", "norm_f.weight")):
        return 1 + 0.2 * normal
    return 0.1 * normal


def transformers_model(config: MambaConfig, tensors: dict[str, torch.Tensor]) -> Any:
    """transformers' MambaForCausalLM with these weights, float32, in evaluation mode."""
    from transformers import MambaConfig as HuggingFaceConfig
    from transformers import MambaForCausalLM

    settings = HuggingFaceConfig(
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layer,
        vocab_size=config.vocab_size,
        state_size=config.d_state,
        conv_kernel=config.d_conv,
        time_step_rank=config.dt_rank,
        layer_norm_epsilon=config.norm_eps,
        use_bias=config.proj_bias,
        use_conv_bias=config.conv_bias,
        tie_word_embeddings=config.tie_embeddings,
    )
    # Not by `expand`, which is a whole number there.
    settings.intermediate_size = config.d_inner
    model = MambaForCausalLM(settings)
    state = dict(tensors)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["backbone.embeddings.weight"]
    model.load_state_dict({name: value.to(torch.float32) for name, value in state.items()})
    return model.float().eval()

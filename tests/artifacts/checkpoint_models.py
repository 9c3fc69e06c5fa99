"""Small random Mamba models and the folders they are stored in, for the checkpoint tests."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from qmamba_cli.resources import demo_model_path

StateDict = dict[str, torch.Tensor]


def random_model(**changes: Any) -> MambaForCausalLM:
    """A 2-layer model whose every parameter is random, so that none can be mistaken for another."""
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "vocab_size": 48,
        "state_size": 5,
        "time_step_rank": 3,
    }
    model = MambaForCausalLM(MambaConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def expected_tensors(model: MambaForCausalLM) -> StateDict:
    """transformers' state dict; a tied head is no tensor of its own."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def huggingface_folder(path: Path, *, shard: str | None = None, **changes: Any) -> MambaForCausalLM:
    """Store a random model as transformers does."""
    model = random_model(**changes)
    model.save_pretrained(path, **({"max_shard_size": shard} if shard else {}))
    return model


def mamba_ssm_state(model: MambaForCausalLM) -> StateDict:
    """The state dict under mamba_ssm's names, with the head that it always stores."""
    state = {
        name.replace("embeddings.", "embedding."): value.clone() for name, value in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state["backbone.embedding.weight"]
    return state


def mamba_ssm_folder(
    path: Path, *, weights: str, config: dict[str, Any] | None = None, **changes: Any
) -> Any:
    """Store a random model as mamba_ssm does, as ``pytorch_model.bin`` or ``model.safetensors``."""
    model = random_model(**changes)
    settings = {
        "d_model": 32,
        "n_layer": 2,
        # The stored vocabulary is padded to a multiple of 8, 48 here.
        "vocab_size": 45,
        "ssm_cfg": {"d_state": 5, "dt_rank": 3},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**settings, **(config or {})}))
    state = mamba_ssm_state(model)
    if weights.endswith(".bin"):
        torch.save(state, path / weights)
    else:
        save_file({name: value.clone() for name, value in state.items()}, path / weights)
    return model


def add_demo_tokenizer(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path() / name, path / name)


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_tensors(path: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors of a safetensors file, dots in names written as ``__``; None removes one."""
    state: dict[str, torch.Tensor | None] = dict(load_file(path))
    state |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file(
        {name: value for name, value in state.items() if value is not None}, path, metadata={"format": "pt"}
    )

"""Reads config.json of a Mamba-1 checkpoint: Hugging Face's form and the original mamba_ssm form."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import CheckpointError

SUPPORTED = (
    "Mamba-1 language models: transformers' `mamba` or an original mamba_ssm checkpoint (`Mamba1` layers)"
)
# Keys of mamba_ssm's ssm_cfg that shape the forward pass.
_SSM_KEYS = frozenset({"layer", "d_state", "d_conv", "expand", "dt_rank", "conv_bias", "bias"})
# Keys that matter to initialization and to the choice of kernel only.
_SSM_IGNORED = frozenset({"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"})
# Sizes beyond any model: a hostile file must not make us count that far.
_LARGEST = 2**31 - 1
_REQUIRED = object()


def read_config(folder: Path, source: str, *, quantized: bool = False) -> MambaConfig:
    """The architecture a checkpoint folder's config.json describes.

    Args:
        folder: the checkpoint.
        source: how messages name it.
        quantized: whether the weights beside it may be quantized.

    Raises:
        CheckpointError: config.json is missing, no JSON object, of another architecture or has a bad value,
            or the weights are quantized and may not be.
    """
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"no config.json in `{source}`, expected a model folder with config.json and weights",
            hint="name the folder that holds config.json, or `demo`, the bundled model",
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"config.json of `{source}` cannot be read, got `{error.strerror}`, expected a JSON file"
        ) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"config.json of `{source}` is no JSON, got `{error}`, expected a JSON object",
            hint="the file is damaged; copy or download it again",
        ) from None
    if not isinstance(document, dict):
        raise CheckpointError(
            f"config.json of `{source}` is no JSON object, got `{type(document).__name__}`, expected one"
        )
    if not quantized and document.get("quantization_config") is not None:
        raise _quantized(document["quantization_config"], source)
    values = _Values(document, f"config.json of `{source}`")
    if document.get("model_type") == "mamba":
        return _from_huggingface(values)
    if "model_type" not in document and "d_model" in document and "n_layer" in document:
        return _from_mamba_ssm(values)
    raise _unsupported(document, source)


def huggingface_config(config: MambaConfig) -> dict[str, Any]:
    """config.json of a model in transformers' form, the inverse of what `read_config` makes of it."""
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "hidden_act": "silu",
        "hidden_size": config.d_model,
        "intermediate_size": config.d_inner,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.vocab_size,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "time_step_rank": config.dt_rank,
        "layer_norm_epsilon": config.norm_eps,
        "use_conv_bias": config.conv_bias,
        "use_bias": config.proj_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }


def _quantized(settings: object, source: str) -> CheckpointError:
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method == "qmamba":
        hint = "run it with `qmamba run --checkpoint DIR`, or name the float model it was made from"
    else:
        hint = "name the float model it was made from"
    by = f" by `{method}`" if isinstance(method, str) else ""
    return CheckpointError(f"`{source}` is quantized{by}, expected a float checkpoint", hint=hint)


def _unsupported(document: Mapping[str, Any], source: str) -> CheckpointError:
    """Names the architecture found and what is supported."""
    found = document.get("model_type")
    architectures = document.get("architectures")
    if isinstance(architectures, list) and architectures:
        found = f"{found} ({architectures[0]})" if found else architectures[0]
    if found:
        message = f"`{source}` has an unsupported architecture, got `{found}`, expected `mamba`"
    else:
        message = f"config.json of `{source}` names no architecture, expected a `model_type`"
    return CheckpointError(message, hint=f"supported: {SUPPORTED}")


class _Values:
    """Typed access to a JSON object; every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], label: str) -> None:
        self.values = values
        self.label = label

    def error(self, key: str, got: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.label}: bad `{key}`, got {got!r}, expected {expected}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is _REQUIRED:
            raise CheckpointError(
                f"{self.label} lacks `{key}`", hint="the file is incomplete; download it again"
            )
        return value

    def integer(self, key: str, default: Any = _REQUIRED) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise self.error(key, value, "an integer >= 1")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._get(key, default)
        if type(value) not in (int, float) or not 0 < value <= _LARGEST:
            raise self.error(key, value, "a finite number > 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if type(value) is not bool:
            raise self.error(key, value, "true or false")
        return value

    def rank(self, key: str, d_model: int) -> int:
        """Rank of dt_proj; ``auto`` is a sixteenth of the width, rounded up."""
        return math.ceil(d_model / 16) if self._get(key, "auto") == "auto" else self.integer(key)

    def token_id(self, key: str, default: int | None) -> int | None:
        """A token id or None; of a list, which transformers allows for the end of text, the first."""
        value = self.values.get(key, default)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is None or (type(value) is int and value >= 0):
            return value
        raise self.error(key, value, "an integer >= 0 or null")


def _from_huggingface(values: _Values) -> MambaConfig:
    """Source: transformers ``MambaConfig`` 5.x, whose defaults stand in for keys an older file lacks."""
    activation = values.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise values.error("hidden_act", activation, "`silu`")
    d_model = values.integer("hidden_size")
    # transformers lets a stored intermediate_size win over expand.
    d_inner = (
        values.integer("intermediate_size")
        if values.values.get("intermediate_size") is not None
        else int(values.number("expand", 2) * d_model)
    )
    return MambaConfig(
        d_model=d_model,
        n_layer=values.integer("num_hidden_layers"),
        vocab_size=values.integer("vocab_size"),
        d_state=values.integer("state_size", 16),
        d_conv=values.integer("conv_kernel", 4),
        d_inner=d_inner,
        dt_rank=values.rank("time_step_rank", d_model),
        norm_eps=values.number("layer_norm_epsilon", 1e-5),
        conv_bias=values.flag("use_conv_bias", True),
        proj_bias=values.flag("use_bias", False),
        tie_embeddings=values.flag("tie_word_embeddings", True),
        bos_token_id=values.token_id("bos_token_id", 0),
        eos_token_id=values.token_id("eos_token_id", 0),
    )


def _from_mamba_ssm(values: _Values) -> MambaConfig:
    """Source: state-spaces/mamba ``MambaConfig`` and ``MambaLMHeadModel``, which pads the vocabulary."""
    ssm_cfg = values.values.get("ssm_cfg") or {}
    if not isinstance(ssm_cfg, dict):
        raise values.error("ssm_cfg", ssm_cfg, "an object")
    ssm = _Values(ssm_cfg, f"{values.label}, ssm_cfg")
    layer = ssm_cfg.get("layer", "Mamba1")
    if layer != "Mamba1":
        raise CheckpointError(
            f"{values.label} has an unsupported layer, got `{layer}`, expected `Mamba1`",
            hint=f"supported: {SUPPORTED}",
        )
    unknown = sorted(set(ssm_cfg) - _SSM_KEYS - _SSM_IGNORED)
    if unknown:
        raise ssm.error(unknown[0], ssm_cfg[unknown[0]], f"one of {', '.join(sorted(_SSM_KEYS))}")
    for key, rule in (("attn_layer_idx", "no attention layers"), ("d_intermediate", "no MLP")):
        if values.values.get(key):
            raise values.error(key, values.values[key], f"{rule}; supported: {SUPPORTED}")
    if not values.flag("rms_norm", True):
        raise values.error("rms_norm", False, "true: LayerNorm is not supported")
    d_model = values.integer("d_model")
    vocab_size, multiple = values.integer("vocab_size"), values.integer("pad_vocab_size_multiple", 8)
    return MambaConfig(
        d_model=d_model,
        n_layer=values.integer("n_layer"),
        vocab_size=math.ceil(vocab_size / multiple) * multiple,
        d_state=ssm.integer("d_state", 16),
        d_conv=ssm.integer("d_conv", 4),
        d_inner=int(ssm.number("expand", 2) * d_model),
        dt_rank=ssm.rank("dt_rank", d_model),
        norm_eps=values.number("norm_epsilon", 1e-5),
        conv_bias=ssm.flag("conv_bias", True),
        proj_bias=ssm.flag("bias", False),
        tie_embeddings=values.flag("tie_embeddings", True),
        bos_token_id=values.token_id("bos_token_id", None),
        eos_token_id=values.token_id("eos_token_id", None),
    )

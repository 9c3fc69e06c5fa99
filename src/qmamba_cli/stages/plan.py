"""What a run will take, told before anything is loaded."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.artifacts.quantized import read_quantized_manifest
from qmamba_cli.artifacts.safetensors_header import TensorInfo
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import UsageError
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.model.streaming import preparing_bytes, weight_bytes
from qmamba_cli.modes import Precision
from qmamba_cli.stages.estimate import batch_seconds
from qmamba_cli.stages.load import DTYPES, ModelOptions
from qmamba_cli.stages.parts import bits_per_weight

_FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Sizes of a run.

    Attributes:
        name: the quantized model or float checkpoint.
        digest: content digest of the quantized model; empty for a float model.
        mode: name of the row.
        backend: ``cpu`` or ``cuda``.
        weights: ``W4A8`` and the like, or the dtype of a float model.
        config: sizes of the model.
        stored_bytes: weights as they are stored, without the tokenizer.
        bits_per_weight: as stored.
        weight_bytes: weights in memory, where the model runs.
        activation_bytes: the largest tensors of one block and one batch, about.
        state_bytes: what a sequence carries from one token to the next.
        batch: (sequences, tokens) of a forward pass.
        batch_seconds: of one such pass with its logits, from small trials; a guess within a factor of about
            two on a CPU, an upper bound on a GPU, which is tried in float32.
    """

    name: str
    digest: str
    mode: str
    backend: str
    weights: str
    config: MambaConfig
    stored_bytes: int
    bits_per_weight: float
    weight_bytes: int
    activation_bytes: int
    state_bytes: int
    batch: tuple[int, int]
    batch_seconds: float

    @property
    def memory_bytes(self) -> int:
        """At the peak: the weights with a batch's activations and states, or while a table is prepared."""
        preparing = preparing_bytes(self.config) if self.backend == "cpu" else 0
        return self.weight_bytes + max(self.activation_bytes + self.batch[0] * self.state_bytes, preparing)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        values = {name: getattr(self, name) for name in self.__slots__ if name != "config"}
        return {"dry_run": True, **values, "memory_bytes": self.memory_bytes, "config": self.config.to_dict()}


def plan_run(options: ModelOptions, *, batch_size: int, seqlen: int) -> RunPlan:
    """Sizes of a run; reads manifests and tables of contents, loads no weight and writes nothing.

    Small trials on the device tell how fast it is.

    Args:
        options: which model would run.
        batch_size: sequences a forward pass.
        seqlen: tokens of the longest.

    Raises:
        UsageError: the mode and the inputs do not belong together.
        ArtifactError: the quantized model is damaged.
        QmambaError: an input or the backend is missing.
    """
    device = select_backend(options.backend).device
    backend = device.type
    if options.mode.precision is Precision.FP32:
        return _float_plan(options, device, (batch_size, seqlen))
    path = options.checkpoint or Workdir(options.workdir).resolve_export().path
    manifest = read_quantized_manifest(path)
    config = MambaConfig.from_dict(dict(manifest.model.config))
    sizes = {name: TensorInfo(row.dtype, row.shape).nbytes for name, row in manifest.tensors.items()}
    stored = sum(size for name, size in sizes.items() if not name.startswith("files/"))
    return RunPlan(
        name=str(path),
        digest=manifest.content_digest,
        mode=options.mode.name,
        backend=backend,
        weights=f"W{manifest.quantization.w_bits}A8",
        config=config,
        stored_bytes=stored,
        bits_per_weight=bits_per_weight(sizes, config),
        # A GPU keeps the file's own formats; a CPU expands them.
        weight_bytes=stored if backend == "cuda" else _expanded_bytes(config),
        activation_bytes=_activation_bytes(config, batch_size * seqlen),
        state_bytes=_state_bytes(config),
        batch=(batch_size, seqlen),
        batch_seconds=batch_seconds(config, device, batch_size * seqlen),
    )


def _float_plan(options: ModelOptions, device: torch.device, batch: tuple[int, int]) -> RunPlan:
    if options.model is None:
        raise UsageError(
            f"mode {options.mode.name} runs the float model and needs `--model`",
            hint="add `--model MODEL`: a folder, a Hub id or `demo`",
        )
    config = open_checkpoint(options.model, tokenizer=options.tokenizer, offline=options.offline).config
    parameters = sum(math.prod(shape) for shape in config.tensor_shapes().values())
    size = DTYPES[options.dtype].itemsize
    return RunPlan(
        name=options.model,
        digest="",
        mode=options.mode.name,
        backend=device.type,
        weights=options.dtype,
        config=config,
        stored_bytes=size * parameters,
        bits_per_weight=8.0 * size,
        weight_bytes=weight_bytes(config) if size == _FLOAT else size * parameters,
        activation_bytes=_activation_bytes(config, batch[0] * batch[1]),
        state_bytes=_state_bytes(config),
        batch=batch,
        batch_seconds=batch_seconds(config, device, batch[0] * batch[1]),
    )


def _expanded_bytes(config: MambaConfig) -> int:
    """Weights of a quantized model on a CPU: int8 matrices, and two float32 tables."""
    d_model, d, r, n = config.d_model, config.d_inner, config.dt_rank, config.d_state
    matrices = 3 * d * d_model + (2 * r + 2 * n) * d + d * config.d_conv
    # The scales of the rows, A, D and the two biases.
    floats = 2 * d + d_model + (r + 2 * n) + d + d * n + 4 * d
    return config.n_layer * (matrices + _FLOAT * floats) + 2 * config.vocab_size * d_model * _FLOAT


def _activation_bytes(config: MambaConfig, tokens: int) -> int:
    """Of x and z before the split, u, dt, y and their transposes, the residual and its norm, in float32."""
    return tokens * (8 * config.d_inner + 3 * config.d_model) * _FLOAT


def _state_bytes(config: MambaConfig) -> int:
    return config.n_layer * config.d_inner * (config.d_state + config.d_conv - 1) * _FLOAT

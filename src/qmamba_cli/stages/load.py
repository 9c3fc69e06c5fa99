"""Loading a model for stage 3: a quantized file or a float checkpoint, straight to where it runs."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.artifacts.manifest import QuantizedManifest
from qmamba_cli.artifacts.quantized import QuantizedArtifact, read_quantized
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.kernels.backend import Backend, select_backend
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model
from qmamba_cli.model.quantize import quantized_model
from qmamba_cli.model.weights import ModelWeights
from qmamba_cli.modes import MODES, Mode, Precision
from qmamba_cli.quant.grid import CHANNEL_SCALES, Scale
from qmamba_cli.quant.weights import DEFAULT_GROUP_SIZE
from qmamba_cli.sites import SITES, X_PROJ_INPUT, site_key
from qmamba_cli.tokenizer import Tokenizer

# Names of `--dtype`.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model runs, and how.

    Attributes:
        mode: the row.
        workdir: the work folder.
        checkpoint: the quantized file, or None for the work folder's last export.
        model: the float model of a row with precision=fp32.
        backend: auto, cpu or cuda.
        tokenizer: a folder or Hub id to take a float model's tokenizer from, or None for its own.
        offline: use only the Hub's local cache.
        dtype: what a float model computes its projections in: fp32, or on a GPU fp16 or bf16.
    """

    mode: Mode
    workdir: Path = Path("qmamba-artifacts")
    checkpoint: Path | None = None
    model: str | None = None
    backend: str = "auto"
    tokenizer: str | None = None
    offline: bool = False
    dtype: str = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model that is ready to run.

    Attributes:
        model: in its mode, on its backend.
        tokenizer: its tokenizer.
        provenance: where it comes from, for the results.
        name: the file or checkpoint as named.
    """

    model: Mamba
    tokenizer: Tokenizer
    provenance: Mapping[str, Any]
    name: str


def load_model(options: ModelOptions) -> LoadedModel:
    """Load what a mode needs: the quantized file, or the float checkpoint.

    Raises:
        UsageError: the mode and the inputs do not belong together.
        ArtifactError: the quantized file is damaged.
        QmambaError: an input or the backend is missing.
    """
    backend = select_backend(options.backend)
    _check_dtype(options, backend)
    if options.mode.precision is Precision.FP32:
        return _load_float(options, backend)
    if options.model is not None:
        raise UsageError(
            f"`--model` belongs to mode fp, got mode {options.mode.name}",
            hint="name the quantized file with `--checkpoint FILE`, or compare with `--baseline MODEL`",
        )
    path = options.checkpoint or Workdir(options.workdir).resolve_export().path
    artifact = read_quantized(path)
    return LoadedModel(
        model=Mamba(assemble(artifact, backend.device), options.mode, backend),
        tokenizer=Tokenizer.from_files(artifact.files),
        provenance=quantized_provenance(artifact),
        name=str(path),
    )


def quantized_provenance(artifact: QuantizedArtifact) -> dict[str, Any]:
    """Where a quantized file comes from, for results: its digest and those it names."""
    manifest = artifact.manifest
    return {
        "artifact": {"path": str(artifact.path), "digest": artifact.digest},
        "calibration": {"digest": manifest.calibration.digest},
        "model": {"source": manifest.model.source, "digest": manifest.model.digest},
        "weights": f"W{manifest.quantization.w_bits}A8",
    }


def _check_dtype(options: ModelOptions, backend: Backend) -> None:
    if options.dtype not in DTYPES:
        raise UsageError(f"`--dtype` must be one of {', '.join(DTYPES)}, got `{options.dtype}`")
    if DTYPES[options.dtype] == torch.float32:
        return
    if options.mode.precision is not Precision.FP32:
        raise UsageError(
            f"`--dtype {options.dtype}` belongs to the float model, got mode {options.mode.name}",
            hint="the mode decides what a quantized model computes in; leave `--dtype` out",
        )
    if backend.device.type != "cuda":
        raise UsageError(
            f"`--dtype {options.dtype}` needs the `cuda` backend, got `{backend.name}`",
            hint="leave `--dtype` out: the `cpu` backend computes in fp32",
        )


def assemble(artifact: QuantizedArtifact, device: torch.device | None = None) -> ModelWeights:
    """The weights of an open quantized file, as the block reads them.

    Args:
        artifact: the open file.
        device: where each tensor goes as soon as it is read; a GPU keeps the file's own formats.

    Raises:
        ArtifactError: a tensor the model needs is not in the file.
    """
    config = MambaConfig.from_dict(dict(artifact.manifest.model.config))
    try:
        return quantized_model(
            config,
            _Tensors(artifact),
            stored_scales(artifact, config),
            group_size=artifact.manifest.quantization.group_size or DEFAULT_GROUP_SIZE,
            device=device,
            packed=device is not None and device.type == "cuda",
        )
    except KeyError as error:
        raise ArtifactError(
            f"`{artifact.path}` has no tensor {error}, which its configuration asks for",
            hint=artifact.manifest.REMEDY,
        ) from None


def stored_scales(artifact: QuantizedArtifact, config: MambaConfig) -> dict[str, Scale]:
    """The activation scale of every site key; of ``x_proj:input`` possibly one a channel.

    Raises:
        ArtifactError: a site has none, or they are not as docs/artifact-format.md says.
    """
    scales: dict[str, Scale] = {}
    for site in SITES.values():
        name, layers = f"scales.{site.name}", range(config.n_layer) if site.per_layer else (None,)
        values = artifact.tensor(name)
        low, high = (0.0, math.inf) if values.dim() == 1 else CHANNEL_SCALES
        shapes = [(len(layers),), *([(len(layers), config.d_inner)] if site.name == X_PROJ_INPUT else [])]
        if values.dtype != torch.float32 or tuple(values.shape) not in shapes:
            raise ArtifactError(
                f"`{name}` of `{artifact.path}` is {values.dtype} {list(values.shape)}, expected "
                f"torch.float32 {' or '.join(str(list(shape)) for shape in shapes)}",
                hint=artifact.manifest.REMEDY,
            )
        if not bool(((values > 0) & (values >= low) & (values <= high) & values.isfinite()).all()):
            raise ArtifactError(
                f"`{name}` of `{artifact.path}` holds a scale that is none, expected finite numbers > 0"
                + (f" in {low} ... {high}" if low else ""),
                hint=artifact.manifest.REMEDY,
            )
        # Copied, so that the scales do not keep the file mapped.
        rows = values.tolist() if values.dim() == 1 else list(values.clone())
        scales |= {site_key(site.name, layer): row for layer, row in zip(layers, rows, strict=True)}
    return scales


def has_channel_scales(manifest: QuantizedManifest) -> bool:
    """Whether every channel of u has a scale, which the columns of x_proj's weight hold."""
    record = manifest.tensors.get(f"scales.{X_PROJ_INPUT}")
    return record is not None and len(record.shape) == 2


class _Tensors(Mapping[str, torch.Tensor]):
    """Tensors of a quantized file, read when they are asked for."""

    def __init__(self, artifact: QuantizedArtifact) -> None:
        self._artifact = artifact
        self._names = frozenset(artifact.names)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._artifact.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _load_float(options: ModelOptions, backend: Backend) -> LoadedModel:
    if options.model is None:
        raise UsageError(
            f"mode {options.mode.name} runs the float model and needs `--model`",
            hint="add `--model MODEL`: a folder, a Hub id or `demo`",
        )
    if options.checkpoint is not None:
        raise UsageError(f"`--checkpoint` holds quantized weights, got mode {options.mode.name}")
    checkpoint = open_checkpoint(options.model, tokenizer=options.tokenizer, offline=options.offline)
    dtype = DTYPES[options.dtype]
    weights = float_model(
        checkpoint.config,
        checkpoint.load,
        # Rotating changes nothing here but what 16 bits lose, and costs a transform in each layer.
        rotate=dtype == torch.float32,
        dtype=dtype,
        device=backend.device,
    )
    return LoadedModel(
        model=Mamba(weights, options.mode, backend),
        tokenizer=Tokenizer.from_files(checkpoint.tokenizer_files),
        provenance={
            "artifact": None,
            "calibration": None,
            "model": {"source": checkpoint.source, "digest": checkpoint.digest},
            "weights": options.dtype,
        },
        name=options.model,
    )


def load_baseline(source: str, loaded: LoadedModel, offline: bool) -> Mamba:
    """The float model that a loaded one is compared with, on the same backend.

    Raises:
        ArtifactError: their vocabularies differ.
    """
    checkpoint = open_checkpoint(source, offline=offline)
    if checkpoint.config.vocab_size != loaded.model.vocab_size:
        raise ArtifactError(
            f"baseline `{source}` has a vocabulary of {checkpoint.config.vocab_size}, "
            f"expected {loaded.model.vocab_size}",
            hint="name the float model that the quantized file was made from",
        )
    backend = loaded.model.backend
    weights = float_model(checkpoint.config, checkpoint.load, device=backend.device)
    return Mamba(weights, MODES["fp"], backend)

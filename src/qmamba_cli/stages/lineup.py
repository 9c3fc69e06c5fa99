"""Which models a comparison has: modes, their variants, and the float model they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qmamba_cli.artifacts.calibration import read_calibration
from qmamba_cli.artifacts.checkpoint import Checkpoint, open_checkpoint
from qmamba_cli.artifacts.quantized import QuantizedArtifact
from qmamba_cli.artifacts.workdir import Workdir
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError, CheckpointError, QmambaError, UsageError
from qmamba_cli.kernels.backend import Backend
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model
from qmamba_cli.model.quantize import Recipe, quantized_model, quantized_tensors
from qmamba_cli.model.weights import ModelWeights
from qmamba_cli.modes import COLUMNS, MODES, Mode, Precision, mode_by_name
from qmamba_cli.quant.grid import Scale
from qmamba_cli.quant.histogram import check_alpha
from qmamba_cli.quant.observers import ObserverSet, Reduction
from qmamba_cli.quant.weights import DEFAULT_GROUP_SIZE
from qmamba_cli.stages.common import require_checkpoint
from qmamba_cli.stages.load import assemble, has_channel_scales, stored_scales

ALL = "all"
_FLOAT = next(mode for mode in MODES.values() if mode.precision is Precision.FP32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model of a comparison.

    Attributes:
        name: of the mode, with what was changed behind a plus sign.
        mode: how the block computes.
        w_bits: bits of in_proj and out_proj quantized anew, or None for the file's weights.
        alpha: quantile of the Percentile sites derived anew, or None for the file's scales.
    """

    name: str
    mode: Mode
    w_bits: int | None = None
    alpha: float | None = None

    @property
    def is_float(self) -> bool:
        """Whether this is the float model."""
        return self.mode.precision is Precision.FP32

    def record(self) -> dict[str, Any]:
        """For the results."""
        return {**self.mode.columns(), "w_bits": self.w_bits, "alpha": self.alpha}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be compared.

    Attributes:
        entries: the quantized models, in the order of the modes.
        skipped: name of each variant that cannot be computed, with the reason.
        wants_float: whether the float model was asked for by name.
    """

    entries: tuple[Entry, ...]
    skipped: tuple[str, ...]
    wants_float: bool


def plan_entries(
    modes: Sequence[str], changes: Sequence[str], alphas: Sequence[float], w_bits: Sequence[int]
) -> Plan:
    """The file in every mode, then every variant of it.

    Args:
        modes: names of modes, or ``all``.
        changes: each ``COLUMN=VALUE[,COLUMN=VALUE]...`` adds a variant of every mode.
        alphas: each adds a variant of all these with other scales.
        w_bits: each adds a variant of all these with other weights.

    Raises:
        UsageError: a mode, column or value is unknown, no mode can be changed that way, or there is none.
    """
    names = [name for name in MODES if name != _FLOAT.name] if ALL in modes else list(dict.fromkeys(modes))
    chosen = [mode_by_name(name) for name in names]
    rows = [mode for mode in chosen if mode.precision is Precision.INT8]
    if not rows:
        raise UsageError(
            "`--modes`: got no quantized mode, expected at least one",
            hint="`--modes all`, or `--modes 0,2-4`",
        )
    skipped: list[str] = []
    variants: list[Mode] = []
    for change in changes:
        variants += _changed(rows, change, skipped)
    entries = {}
    for bits in (None, *dict.fromkeys(w_bits)):
        for alpha in (None, *dict.fromkeys(check_alpha(alpha) for alpha in alphas)):
            for mode in (*rows, *variants):
                entry = Entry(name=_name(mode.name, bits, alpha), mode=mode, w_bits=bits, alpha=alpha)
                entries[entry.name] = entry
    return Plan(
        entries=tuple(entries.values()),
        skipped=tuple(skipped),
        wants_float=ALL not in modes and len(rows) < len(chosen),
    )


def _changed(rows: Sequence[Mode], change: str, skipped: list[str]) -> list[Mode]:
    assignments = {}
    for assignment in change.split(","):
        column, equals, value = assignment.strip().partition("=")
        if not equals:
            raise UsageError(
                f"`--set` takes COLUMN=VALUE, got `{assignment}`", hint=f"columns: {', '.join(COLUMNS)}"
            )
        assignments[column] = value
    changed, refused = [], []
    for row in rows:
        try:
            variant = row.with_columns(assignments)
        except UsageError as error:
            refused.append(error)
        else:
            if variant is not row:
                changed.append(variant)
    if refused and len(refused) == len(rows):
        raise refused[0]
    skipped += [error.message for error in refused]
    return changed


def _name(mode: str, w_bits: int | None, alpha: float | None) -> str:
    parts = [f"w_bits={w_bits}"] if w_bits is not None else []
    parts += [f"alpha={alpha:g}"] if alpha is not None else []
    return mode + "".join(f"{',' if '+' in mode or i else '+'}{part}" for i, part in enumerate(parts))


def without_repeats(entries: Sequence[Entry], artifact: QuantizedArtifact) -> list[Entry]:
    """The entries, less those whose new weights and scales are the file's own."""
    quantization = artifact.manifest.quantization
    return [
        entry
        for entry in entries
        if entry.w_bits != quantization.w_bits and entry.alpha != quantization.alpha
    ]


def open_baseline(
    source: str | None, artifact: QuantizedArtifact, *, offline: bool
) -> tuple[Checkpoint | None, str]:
    """The float model of a comparison.

    Args:
        source: as named by the user, or None for the one the file names.
        artifact: the quantized file.
        offline: use only the Hub's local cache.

    Returns:
        The model and an empty string, or None and why the one that the file names cannot be used.

    Raises:
        QmambaError: the model that the user named cannot be opened.
        ArtifactError: it has another vocabulary.
    """
    record = artifact.manifest.model
    try:
        checkpoint = open_checkpoint(source or record.source, offline=offline)
    except QmambaError as error:
        if source is not None:
            raise
        return None, error.message
    expected = record.config["vocab_size"]
    if source is None and checkpoint.digest != record.digest:
        return None, f"`{record.source}` is no longer the checkpoint that the file was made from"
    if checkpoint.config.vocab_size != expected:
        raise ArtifactError(
            f"baseline `{source}` has a vocabulary of {checkpoint.config.vocab_size}, expected {expected}",
            hint="name the float model that the quantized file was made from",
        )
    return checkpoint, ""


def build_models(
    entries: Sequence[Entry],
    artifact: QuantizedArtifact,
    checkpoint: Checkpoint | None,
    backend: Backend,
    *,
    calibration: Path | None,
    workdir: Path,
) -> list[Mamba]:
    """One model an entry; entries with equal weights and scales share them.

    Args:
        entries: what to build.
        artifact: the quantized file.
        checkpoint: the float model, or None.
        backend: the operators.
        calibration: folder of the calibration behind the file, or None for the work folder's last one.
        workdir: the work folder.

    Raises:
        ArtifactError: the calibration or the float model is not the one that the file was made from.
        CheckpointError: new weights are wanted and there is no float model.
    """
    source = _Source(artifact, checkpoint, calibration, workdir)
    first: dict[tuple[bool, int | None, float | None], Mamba] = {}
    models = []
    for entry in entries:
        key = (entry.is_float, entry.w_bits, entry.alpha)
        weights = first[key].weights if key in first else source.weights(entry)
        models.append(Mamba(weights, entry.mode, backend))
        # Its weights are on the device already, so that the next model shares them.
        first.setdefault(key, models[-1])
    return models


class _Source:
    """Where the weights and scales of entries come from; what several need is read once."""

    def __init__(
        self,
        artifact: QuantizedArtifact,
        checkpoint: Checkpoint | None,
        calibration: Path | None,
        workdir: Path,
    ) -> None:
        self._artifact = artifact
        self._checkpoint = checkpoint
        self._calibration = calibration
        self._workdir = workdir
        self._config = MambaConfig.from_dict(dict(artifact.manifest.model.config))
        self._observers: ObserverSet | None = None
        self._tensors: dict[int | None, Mapping[str, torch.Tensor]] = {}

    def weights(self, entry: Entry) -> ModelWeights:
        if entry.is_float:
            assert self._checkpoint is not None
            return float_model(self._checkpoint.config, self._checkpoint.load)
        if entry.w_bits is None and entry.alpha is None:
            return assemble(self._artifact)
        quantization = self._artifact.manifest.quantization
        return quantized_model(
            self._config,
            self._tensors_of(entry.w_bits),
            self._scales_at(entry.alpha),
            group_size=quantization.group_size or DEFAULT_GROUP_SIZE,
        )

    def _tensors_of(self, w_bits: int | None) -> Mapping[str, torch.Tensor]:
        if w_bits not in self._tensors:
            if w_bits is None:
                found = {name: self._artifact.tensor(name) for name in self._artifact.names}
            else:
                checkpoint = self._matching_checkpoint()
                found = dict(
                    quantized_tensors(
                        checkpoint.config,
                        checkpoint.load,
                        self._recipe(w_bits),
                        scales=stored_scales(self._artifact, self._config),
                    )
                )
            self._tensors[w_bits] = found
        return self._tensors[w_bits]

    def _recipe(self, w_bits: int) -> Recipe:
        quantization = self._artifact.manifest.quantization
        return Recipe(
            w_bits=w_bits,
            group_size=quantization.group_size or DEFAULT_GROUP_SIZE,
            embedding_bits=min(quantization.embedding_bits, 16),
            ignore=tuple(quantization.ignore),
        )

    def _matching_checkpoint(self) -> Checkpoint:
        record = self._artifact.manifest.model
        if self._checkpoint is None:
            raise CheckpointError(
                f"`--w-bits` quantizes the float model anew, got none, expected `{record.source}`",
                hint="name it with `--baseline MODEL`",
            )
        require_checkpoint(
            self._checkpoint,
            record.digest,
            f"`--w-bits` needs the float model; `{self._artifact.path}` was made from",
            hint="name the float model that the quantized file was made from: `--baseline MODEL`",
        )
        return self._checkpoint

    def _scales_at(self, alpha: float | None) -> dict[str, Scale]:
        if alpha is None:
            return stored_scales(self._artifact, self._config)
        if has_channel_scales(self._artifact.manifest):
            raise UsageError(
                f"`--alpha` is one clip for all channels of u, got `{self._artifact.path}` with one for each",
                hint="sweep it on an export of `--recipe plain`",
            )
        if self._observers is None:
            self._observers = self._read_observers()
        # A quantized file stores its scales in float32.
        return {key: float(np.float32(scale)) for key, scale in self._observers.scales(alpha).items()}

    def _read_observers(self) -> ObserverSet:
        path = self._calibration or Workdir(self._workdir).resolve_calibration().path
        calibration = read_calibration(path)
        expected = self._artifact.manifest.calibration.digest
        if calibration.digest != expected:
            raise ArtifactError(
                f"`--alpha` needs the calibration behind `{self._artifact.path}`, got `{path}` with digest "
                f"{calibration.digest}, expected {expected}",
                hint="name it with `--calibration DIR`",
            )
        return ObserverSet.from_arrays(
            calibration.statistics,
            self._config.n_layer,
            alpha=calibration.manifest.alpha,
            reduction=Reduction(calibration.manifest.reduction),
        )


def float_entry() -> Entry:
    """The float model as an entry."""
    return Entry(name=_FLOAT.name, mode=_FLOAT)

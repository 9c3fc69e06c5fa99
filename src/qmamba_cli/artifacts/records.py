"""The records that manifests are made of: pydantic models, strict and frozen."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from qmamba_cli.sites import ObserverKind

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
Alpha = Annotated[float, Field(gt=0.5, le=1.0)]
Reduction = Literal["global", "mean", "ema"]
CalibrationFile = Literal["scales.safetensors", "statistics.safetensors", "coverage.safetensors"]
ConfigValue = bool | int | float | str | None


class Record(BaseModel):
    """Frozen; unknown keys, wrong types and numbers that are not finite are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_serialization_defaults_required=True,
        use_attribute_docstrings=True,
    )


class ModelRecord(Record):
    """The float checkpoint everything comes from."""

    source: str
    """What the user named: a folder, a Hub id or `demo`."""
    digest: Sha256
    """Digest of the checkpoint: its configuration and weight files."""
    config: dict[str, ConfigValue]
    """Architecture, the fields of `MambaConfig`."""
    weight_files: dict[str, Sha256]
    """File name → sha256."""
    tokenizer_files: dict[str, Sha256]
    """File name → sha256."""


class DatasetRecord(Record):
    """The text the activations were observed on."""

    dataset: str
    """What the user named: a file, a Hub name, `bundled` or `self`."""
    digest: str
    """Digest of the text."""
    text_column: str | None
    """Field that holds the text, or null where there are no fields."""
    sample_ids: list[Count]
    """Rows or windows chosen, in the order they were observed."""
    shuffle: bool
    """Whether the samples were drawn in a seeded random order."""
    seed: int
    """Seed of that order."""
    samples: Positive
    """Number of samples."""
    seqlen: Positive
    """Tokens a sample."""
    tokens: Positive
    """Tokens observed in all."""
    batch_size: Positive
    """Samples a forward pass."""


class SiteRecord(Record):
    """One observed site and the absmax chosen for it."""

    # Not strict, so that Python callers may pass the plain string.
    observer: Annotated[ObserverKind, Field(strict=False)]
    """How the absmax was chosen."""
    alpha: Alpha | None
    """Quantile of a percentile observer, null for any other."""
    absmax: Annotated[float, Field(ge=0)]
    """Chosen absmax, real units."""
    observations: Positive
    """Number of elements seen."""


class TensorRecord(Record):
    """One stored tensor."""

    dtype: str
    """Element type, as safetensors names it."""
    shape: tuple[Count, ...]
    """Dimensions, outermost first."""
    sha256: Sha256
    """Digest of the data: little-endian, row-major."""


class ShardRecord(Record):
    """Which part of the samples an artifact observed, where it is not all of them."""

    number: Positive
    """Number of the shard, from 1."""
    count: Positive
    """Shards in all."""
    first: Count
    """Position of its first sample in `dataset.sample_ids`."""
    samples: Positive
    """Number of samples it observed, one after the other."""


class CalibrationReference(Record):
    """The calibration a quantized model was made with."""

    digest: Sha256
    """Content digest of the calibration artifact."""
    dataset: DatasetRecord
    """Its text."""
    alpha: Alpha
    """Its quantile; the sites tell the one that was used."""
    reduction: Reduction
    """How the quantiles of samples were joined."""


def _recorded(schema: dict[str, Any]) -> None:
    """The schema of a key that only files of an older version lack."""
    (given,) = (choice for choice in schema.pop("anyOf") if choice.get("type") != "null")
    schema |= given
    del schema["default"]


class QuantizationRecord(Record):
    """How the weights were quantized."""

    recipe: Annotated[Literal["plain", "best"] | None, Field(json_schema_extra=_recorded)] = None
    """How what is rounded was chosen; not known of files of version 1."""
    w_bits: Literal[4, 8]
    """Bits of in_proj and out_proj."""
    group_size: Positive | None
    """Input channels that share a multiplier, or null where a row has one scale."""
    embedding_bits: Literal[8, 16, 32]
    """Bits of the embedding."""
    alpha: Alpha
    """Quantile used for the scales of percentile sites."""
    ignore: list[str]
    """Patterns of the modules left unquantized."""
    weights: dict[str, str]
    """Module name → scheme, as in `w4-g128`, `w8-row` or `fp32`."""

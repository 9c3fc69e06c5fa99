"""The manifests of both artifacts: what was made, from what, and the digest of every part.

A manifest has one spelling (`files.canonical_json`) and one digest over all of it; the digest of each
tensor's data is part of the manifest, so the content digest stands for the whole artifact. Nothing here
depends on the clock, the machine's paths or the order of a dictionary.
"""

import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from qmamba_cli.artifacts.files import canonical_json, sha256_bytes, shown, strict_json
from qmamba_cli.artifacts.safetensors_header import TensorInfo
from qmamba_cli.artifacts.safetensors_io import SafetensorsFile
from qmamba_cli.errors import ArtifactError
from qmamba_cli.sites import ObserverKind

FORMAT_VERSION: Final = 1
# The libraries whose version can change what an artifact holds.
_LIBRARIES = ("qmamba-cli", "numpy", "safetensors", "tokenizers", "torch")
_SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[int, Field(ge=1, le=2**63 - 1)]
Alpha = Annotated[float, Field(gt=0.5, le=1.0)]
Reduction = Literal["global", "mean", "ema"]
ConfigValue = bool | int | float | str | None


class _Record(BaseModel):
    """Frozen; unknown keys, wrong types and numbers that are not finite are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_serialization_defaults_required=True,
        use_attribute_docstrings=True,
    )


class ModelRecord(_Record):
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


class DatasetRecord(_Record):
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


class SiteRecord(_Record):
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


class TensorRecord(_Record):
    """One stored tensor."""

    dtype: str
    """Element type, as safetensors names it."""
    shape: tuple[Count, ...]
    """Dimensions, outermost first."""
    sha256: Sha256
    """Digest of the data: little-endian, row-major."""


class CalibrationReference(_Record):
    """The calibration a quantized model was made with."""

    digest: Sha256
    """Content digest of the calibration artifact."""
    dataset: DatasetRecord
    """Its text."""
    alpha: Alpha
    """Its quantile; the sites tell the one that was used."""
    reduction: Reduction
    """How the quantiles of samples were joined."""


class QuantizationRecord(_Record):
    """How the weights were quantized."""

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


class Manifest(_Record):
    """What the manifests of both artifacts share."""

    # A phrase for messages, and the command that makes the artifact again.
    KIND: ClassVar[str]
    REMEDY: ClassVar[str]
    FORMAT: ClassVar[str]

    format_version: Literal[1] = FORMAT_VERSION
    """Version of the format; a reader refuses a newer one."""
    tool_version: str
    """Version of qmamba-cli that wrote the artifact."""
    model: ModelRecord
    """The float checkpoint."""
    sites: dict[str, SiteRecord]
    """Site key → what was observed there; in a quantized model, as used."""
    # The writer's to fill in; never empty in a stored manifest.
    content_digest: Sha256 = ""
    """sha256 of the canonical JSON of this manifest with this value empty."""
    created_by: dict[str, str]
    """Library → version."""

    def sealed(self, **changes: object) -> Self:
        """A copy with ``changes`` and the content digest that belongs to them."""
        changed = self.model_copy(update={**changes, "content_digest": ""})
        return changed.model_copy(update={"content_digest": changed.compute_digest()})

    def compute_digest(self) -> str:
        """The content digest this manifest should carry."""
        content = {**self.model_dump(mode="json"), "content_digest": ""}
        return sha256_bytes(canonical_json(content).encode("ascii"))

    def to_json(self) -> str:
        """The one spelling of this manifest.

        Raises:
            ValueError: a configuration value has no JSON form.
        """
        return canonical_json(self.model_dump(mode="json"))


class CalibrationManifest(Manifest):
    """`manifest.json` of a calibration artifact."""

    KIND: ClassVar[str] = "calibration"
    REMEDY: ClassVar[str] = "make it again: `qmamba calibrate MODEL --force`"
    FORMAT: ClassVar[str] = "qmamba-calibration"

    format: Literal["qmamba-calibration"] = "qmamba-calibration"
    """Kind of artifact."""
    dataset: DatasetRecord
    """The text that was observed."""
    alpha: Alpha
    """Quantile of the percentile sites."""
    reduction: Reduction
    """How the quantiles of samples are joined."""
    dtype: str
    """Element type of the forward passes."""
    device: str
    """Kind of device of the forward passes."""
    tensors: dict[Literal["scales.safetensors", "statistics.safetensors"], dict[str, TensorRecord]] = Field(
        default_factory=dict
    )
    """File name → tensor name → record."""


class QuantizedManifest(Manifest):
    """The manifest inside a quantized file."""

    KIND: ClassVar[str] = "quantized file"
    REMEDY: ClassVar[str] = "make it again: `qmamba export --out FILE --force`"
    FORMAT: ClassVar[str] = "qmamba-quantized"

    format: Literal["qmamba-quantized"] = "qmamba-quantized"
    """Kind of artifact."""
    calibration: CalibrationReference
    """The calibration the scales come from."""
    quantization: QuantizationRecord
    """How the weights were quantized."""
    tensors: dict[str, TensorRecord] = Field(default_factory=dict)
    """Tensor name → record."""


M = TypeVar("M", bound=Manifest)


def parse_manifest(kind: type[M], data: bytes, source: str) -> M:
    """Read a manifest: JSON, then its format, its version, its schema and its spelling.

    The content digest is left to `check_digest`, since the tensors are looked at before it.

    Args:
        kind: the manifest that is expected.
        data: the text.
        source: the artifact's path, for messages.

    Raises:
        ArtifactError: one of these fails; the first one speaks.
    """
    where = f"the manifest of `{source}`"
    try:
        document = strict_json(data)
    except ValueError as error:
        raise ArtifactError(f"{where} is not valid JSON, got: {error}", hint=kind.REMEDY) from None
    if not isinstance(document, dict):
        raise ArtifactError(f"{where} is not a JSON object", hint=kind.REMEDY)
    _check_format(kind, document, source)
    missing = sorted(kind.model_fields.keys() - document.keys())
    if missing:
        raise ArtifactError(f"{where} lacks the key `{missing[0]}`", hint=kind.REMEDY)
    try:
        manifest = kind.model_validate_json(data)
        canonical = manifest.to_json().encode("ascii") == data
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = shown(".".join(str(part) for part in first["loc"]))
        raise ArtifactError(
            f"{where} breaks the schema at `{place}`, got: {first['msg']}", hint=kind.REMEDY
        ) from None
    except ValueError as error:
        raise ArtifactError(f"{where} breaks the schema, got: {error}", hint=kind.REMEDY) from None
    if not canonical:
        raise ArtifactError(f"{where} is not in canonical form, so it was edited", hint=kind.REMEDY)
    return manifest


def _check_format(kind: type[Manifest], document: Mapping[str, Any], source: str) -> None:
    found = document.get("format")
    if found != kind.FORMAT:
        other = {row.FORMAT: row.KIND for row in (CalibrationManifest, QuantizedManifest)}
        name = found if isinstance(found, str) else type(found).__name__
        what = f"`{source}` has format `{shown(name)}`, expected `{kind.FORMAT}`"
        hint = f"it is a {other[name]}; name a {kind.KIND} instead" if name in other else kind.REMEDY
        raise ArtifactError(what, hint=hint)
    got = document.get("format_version")
    if type(got) is not int:
        raise ArtifactError(
            f"`{source}` has no whole number as `format_version`, expected {FORMAT_VERSION}", hint=kind.REMEDY
        )
    if got > FORMAT_VERSION:
        raise ArtifactError(
            f"`{source}` has format version {shown(str(got))}, but qmamba-cli {tool_version()} reads up to "
            f"{FORMAT_VERSION}",
            hint="`pip install --upgrade qmamba-cli`, or make the file again with this version",
        )
    if got < FORMAT_VERSION:
        raise ArtifactError(
            f"`{source}` has format version {shown(str(got))}, expected {FORMAT_VERSION}", hint=kind.REMEDY
        )


def check_tensors(
    file: SafetensorsFile, records: Mapping[str, TensorRecord], *, remedy: str, verify: bool
) -> None:
    """Hold a file against the records of its tensors: presence, dtype, shape, spelling, then digests.

    Args:
        file: the open file.
        records: what the manifest says of it: these tensors, no more and no fewer.
        remedy: hint of the errors.
        verify: whether the data is read and its digests compared.

    Raises:
        ArtifactError: something differs; the first difference speaks.
    """
    for name in sorted(records.keys() - set(file.names)):
        raise ArtifactError(f"tensor `{shown(name)}` is missing from `{file.path}`", hint=remedy)
    for name in sorted(set(file.names) - records.keys()):
        raise ArtifactError(f"tensor `{shown(name)}` of `{file.path}` is not in the manifest", hint=remedy)
    for name, record in records.items():
        info = file.info(name)
        if info != TensorInfo(record.dtype, record.shape):
            raise ArtifactError(
                f"tensor `{shown(name)}` of `{file.path}` is {info.dtype} {list(info.shape)}, "
                f"expected {shown(record.dtype)} {list(record.shape)} as in the manifest",
                hint=remedy,
            )
    if not file.header.canonical:
        raise ArtifactError(f"the header of `{file.path}` is not in canonical form", hint=remedy)
    for name in file.names if verify else ():
        found = sha256_bytes(file.bytes(name))
        if found != records[name].sha256:
            raise ArtifactError(
                f"the data of tensor `{shown(name)}` of `{file.path}` is damaged, got sha256 {found}, "
                f"expected {records[name].sha256}",
                hint=f"copy the file again, or {remedy}",
            )


def check_digest(manifest: Manifest, source: str) -> None:
    """Hold a manifest against its own digest.

    Raises:
        ArtifactError: they differ.
    """
    found = manifest.compute_digest()
    if found != manifest.content_digest:
        raise ArtifactError(
            f"the manifest of `{source}` is damaged, got content digest {found}, "
            f"expected {manifest.content_digest}",
            hint=f"copy the artifact again, or {manifest.REMEDY}",
        )


def tensor_records(infos: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> dict[str, TensorRecord]:
    """Records of tensors from their dtypes and shapes and the sha256 of their data."""
    return {
        name: TensorRecord(dtype=infos[name].dtype, shape=infos[name].shape, sha256=digest)
        for name, digest in digests.items()
    }


def tool_version() -> str:
    """Version of this package."""
    from qmamba_cli import __version__

    return __version__


def library_versions() -> dict[str, str]:
    """Versions for `created_by`, read from package metadata so that nothing heavy is imported."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def json_schemas() -> dict[str, str]:
    """File name → JSON Schema of each manifest, as kept in docs/schemas."""
    schemas = {}
    for kind in (CalibrationManifest, QuantizedManifest):
        schema = {"$schema": _SCHEMA_DIALECT, **kind.model_json_schema(mode="serialization")}
        schemas[f"{kind.FORMAT}.schema.json"] = f"{json.dumps(schema, indent=2, sort_keys=True)}\n"
    return schemas

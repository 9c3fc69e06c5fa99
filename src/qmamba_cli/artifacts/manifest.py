"""The manifests of both artifacts: what was made, from what, and the digest of every part.

A manifest has one spelling (`files.canonical_json`) and one digest over all of it; the digest of each
tensor's data is part of the manifest, so the content digest stands for the whole artifact. Nothing here
depends on the clock, the machine's paths or the order of a dictionary.
"""

import json
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from qmamba_cli.artifacts.files import canonical_json, sha256_bytes, shown, strict_json
from qmamba_cli.artifacts.records import (
    Alpha,
    CalibrationFile,
    CalibrationReference,
    DatasetRecord,
    ModelRecord,
    QuantizationRecord,
    Record,
    Reduction,
    Sha256,
    ShardRecord,
    SiteRecord,
    TensorRecord,
)
from qmamba_cli.artifacts.safetensors_header import TensorInfo
from qmamba_cli.artifacts.safetensors_io import SafetensorsFile
from qmamba_cli.errors import ArtifactError

# The records are named here as well: a manifest is made of them.
__all__ = [
    "CalibrationManifest", "CalibrationReference", "DatasetRecord", "Manifest", "ModelRecord",
    "QuantizationRecord", "QuantizedManifest", "Sha256", "ShardRecord", "SiteRecord", "TensorRecord",
    "check_digest", "check_tensors", "json_schemas", "library_versions", "parse_manifest", "tensor_records",
    "tool_version",
]  # fmt: skip

# The current version of each format; `Manifest.ADDED` says how an older one differs.
CALIBRATION_VERSION: Final = 2
QUANTIZED_VERSION: Final = 2
# The libraries whose version can change what an artifact holds.
_LIBRARIES = ("qmamba-cli", "numpy", "safetensors", "tokenizers", "torch")
_HASHING_THREADS = 8
# What one thread hashes before others have begun.
_ALONE_BYTES = 1 << 21
_SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


class Manifest(Record):
    """What the manifests of both artifacts share."""

    # A phrase for messages, and the command that makes the artifact again.
    KIND: ClassVar[str]
    REMEDY: ClassVar[str]
    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    # Key, with a dot where it is inside another, → the version that brought it; an artifact of an older
    # version lacks it.
    ADDED: ClassVar[Mapping[str, int]] = {}

    format_version: int
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
        content = {**self._stored(), "content_digest": ""}
        return sha256_bytes(canonical_json(content).encode("ascii"))

    def to_json(self) -> str:
        """The one spelling of this manifest.

        Raises:
            ValueError: a configuration value has no JSON form.
        """
        return canonical_json(self._stored())

    def _stored(self) -> dict[str, Any]:
        """What an artifact of this version holds."""
        stored = self.model_dump(mode="json")
        for name, added in self.ADDED.items():
            outer, _, inner = name.rpartition(".")
            if added > self.format_version:
                del (stored[outer] if outer else stored)[inner]
        return stored

    @classmethod
    def missing_from(cls, document: Mapping[str, Any]) -> list[str]:
        """Keys that a document of its version should have and lacks, sorted."""
        version = document["format_version"]
        expected = {name for name in cls.model_fields if cls.ADDED.get(name, 0) <= version}
        nested = {name for name, added in cls.ADDED.items() if "." in name and added <= version}
        found = set(document)
        for name in nested:
            outer, _, inner = name.rpartition(".")
            value = document.get(outer)
            # A value of another kind is left to the schema.
            found |= {name} if not isinstance(value, Mapping) or inner in value else set()
        return sorted((expected | nested) - found)


def _current_version_only(schema: dict[str, Any]) -> None:
    del schema["enum"]
    schema["const"] = schema["default"]


class CalibrationManifest(Manifest):
    """`manifest.json` of a calibration artifact."""

    KIND: ClassVar[str] = "calibration"
    REMEDY: ClassVar[str] = "make it again: `qmamba calibrate MODEL --force`"
    FORMAT: ClassVar[str] = "qmamba-calibration"
    VERSION: ClassVar[int] = CALIBRATION_VERSION
    ADDED: ClassVar[Mapping[str, int]] = {"shard": 2}

    # The schema in docs/schemas is that of the current version alone.
    format_version: Annotated[Literal[1, 2], Field(json_schema_extra=_current_version_only)] = (
        CALIBRATION_VERSION
    )
    """Version of the format; a reader refuses a newer one."""
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
    shard: ShardRecord | None = None
    """The part of the samples that was observed; null where it is all of them."""
    tensors: dict[CalibrationFile, dict[str, TensorRecord]] = Field(default_factory=dict)
    """File name → tensor name → record."""


class QuantizedManifest(Manifest):
    """The manifest inside a quantized file."""

    KIND: ClassVar[str] = "quantized file"
    REMEDY: ClassVar[str] = "make it again: `qmamba export --out FILE --force`"
    FORMAT: ClassVar[str] = "qmamba-quantized"
    VERSION: ClassVar[int] = QUANTIZED_VERSION
    ADDED: ClassVar[Mapping[str, int]] = {"quantization.recipe": 2}

    # The schema in docs/schemas is that of the current version alone.
    format_version: Annotated[Literal[1, 2], Field(json_schema_extra=_current_version_only)] = (
        QUANTIZED_VERSION
    )
    """Version of the format; a reader refuses a newer one."""
    format: Literal["qmamba-quantized"] = "qmamba-quantized"
    """Kind of artifact."""
    calibration: CalibrationReference
    """The calibration the scales come from."""
    quantization: QuantizationRecord
    """How the weights were quantized."""
    tensors: dict[str, TensorRecord] = Field(default_factory=dict)
    """Tensor name → record."""

    @model_validator(mode="after")
    def _names_its_recipe(self) -> Self:
        if self.format_version >= self.ADDED["quantization.recipe"] and self.quantization.recipe is None:
            raise ValueError("`quantization.recipe` is null")
        return self


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
    missing = kind.missing_from(document)
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
            f"`{source}` has no whole number as `format_version`, expected {kind.VERSION}", hint=kind.REMEDY
        )
    if got > kind.VERSION:
        raise ArtifactError(
            f"`{source}` has format version {shown(str(got))}, but qmamba-cli {tool_version()} reads up to "
            f"{kind.VERSION}",
            hint="`pip install --upgrade qmamba-cli`, or make the file again with this version",
        )
    if got < 1:
        known = " or ".join(str(number) for number in range(1, kind.VERSION + 1))
        raise ArtifactError(
            f"`{source}` has format version {shown(str(got))}, expected {known}", hint=kind.REMEDY
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
    names = file.names if verify else ()
    size = sum(file.info(name).nbytes for name in names)
    # Hashing lets other threads run, and a file is read many times as fast as one core hashes it.
    with ThreadPoolExecutor(max_workers=_HASHING_THREADS) as pool:
        each = pool.map if size > _ALONE_BYTES else map
        digests = each(lambda name: sha256_bytes(file.bytes(name)), names)
        for name, found in zip(names, digests, strict=True):
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

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from artifact_samples import MODEL, calibration_manifest, make_calibration, make_quantized, quantized_manifest
from pydantic import ValidationError

from qmamba_cli.artifacts.manifest import ModelRecord, SiteRecord, json_schemas, library_versions
from qmamba_cli.sites import ObserverKind

SCHEMAS = Path(__file__).parents[2] / "docs" / "schemas"
REGENERATE = (
    'regenerate with: python -c "from pathlib import Path; from qmamba_cli.artifacts.manifest import '
    "json_schemas; [Path('docs/schemas', n).write_text(t) for n, t in json_schemas().items()]\""
)


def stored(tmp_path: Path, kind: str) -> tuple[dict[str, Any], jsonschema.Draft202012Validator]:
    """A manifest as the writer left it, and the validator of its schema file."""
    if kind == "calibration":
        make_calibration(tmp_path / "c")
        text = (tmp_path / "c" / "manifest.json").read_text()
    else:
        text = make_quantized(tmp_path / "q").to_json()
    schema = json.loads((SCHEMAS / f"qmamba-{kind}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return json.loads(text), jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", sorted(json_schemas()))
def test_schema_files_are_current(name: str) -> None:
    assert (SCHEMAS / name).read_text() == json_schemas()[name], REGENERATE


@pytest.mark.parametrize("kind", ["calibration", "quantized"])
def test_schema_accepts_what_the_writer_writes(tmp_path: Path, kind: str) -> None:
    document, validator = stored(tmp_path, kind)
    assert list(validator.iter_errors(document)) == []


@pytest.mark.parametrize("kind", ["calibration", "quantized"])
def test_schema_refuses_unknown_missing_and_wrong(tmp_path: Path, kind: str) -> None:
    document, validator = stored(tmp_path, kind)
    assert not validator.is_valid({**document, "surprise": 1})
    assert not validator.is_valid({**document, "model": {**document["model"], "surprise": 1}})
    assert not validator.is_valid({**document, "format_version": document["format_version"] + 1})
    assert not validator.is_valid({**document, "content_digest": ""})
    for key in document:
        assert not validator.is_valid({name: value for name, value in document.items() if name != key}), key


@pytest.mark.parametrize(
    "change",
    [
        {"surprise": 1},
        {"alpha": 0.5},
        {"alpha": 1.5},
        {"alpha": float("nan")},
        {"alpha": "0.9"},
        {"reduction": "median"},
        {"sites": {"x": {"observer": "minmax"}}},
    ],
)
def test_a_manifest_that_could_not_be_read_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        calibration_manifest(**change)


@pytest.mark.parametrize("value", [float("inf"), [1], {"a": 1}])
def test_a_configuration_holds_plain_values_only(value: Any) -> None:
    with pytest.raises(ValidationError):
        ModelRecord(**{**MODEL.model_dump(), "config": {"d_model": value}})


def test_numbers_keep_their_kind() -> None:
    config = {"a": 1, "b": 1.0, "c": True, "d": None, "e": "1"}
    record = ModelRecord(**{**MODEL.model_dump(), "config": config})
    assert json.loads(record.model_dump_json())["config"] == config
    assert [type(value) for value in record.config.values()] == [int, float, bool, type(None), str]


def test_an_observer_may_be_given_by_name_or_member() -> None:
    fields = {"alpha": None, "absmax": 1.0, "observations": 1}
    by_member = SiteRecord(observer=ObserverKind.MINMAX, **fields)
    assert by_member == SiteRecord(observer="minmax", **fields)


def test_manifests_are_frozen() -> None:
    manifest = quantized_manifest()
    with pytest.raises(ValidationError):
        manifest.tool_version = "x"


def test_the_digest_depends_on_everything_but_itself() -> None:
    manifest = quantized_manifest()
    sealed = manifest.sealed()
    assert sealed.content_digest == manifest.compute_digest() == sealed.compute_digest()
    assert sealed.sealed(tool_version="x").content_digest != sealed.content_digest


def test_library_versions_name_this_package() -> None:
    versions = library_versions()
    assert versions["qmamba-cli"] == "0.1.0"
    assert versions.keys() >= {"python", "torch", "numpy"}

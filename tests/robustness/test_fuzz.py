"""Mutated artifacts: a reader accepts exactly what was written, or refuses as it refuses a user's mistake.

A repeatable run of a minute by default; `make fuzz` asks for a long one with other examples each time.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from artifact_samples import (
    MODEL,
    TOKENIZER,
    calibration_manifest,
    make_calibration,
    make_quantized,
    quantized_manifest,
    statistics,
    tensors,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import small_config
from victims import CI_EXAMPLES, NEW, STAGES, working_folder

from qmamba_cli.artifacts.calibration import MANIFEST, read_calibration, read_calibration_manifest
from qmamba_cli.artifacts.files import canonical_json, sha256_bytes
from qmamba_cli.artifacts.folder import check_sums, write_folder
from qmamba_cli.artifacts.manifest import CalibrationManifest, Manifest, QuantizedManifest, parse_manifest
from qmamba_cli.artifacts.partial import Progress, read_progress, write_progress
from qmamba_cli.artifacts.quantized import METADATA_KEY, read_quantized, read_quantized_manifest
from qmamba_cli.artifacts.safetensors_header import parse_header
from qmamba_cli.artifacts.safetensors_io import open_safetensors, write_safetensors
from qmamba_cli.artifacts.workdir import RECORD, Workdir
from qmamba_cli.errors import ArtifactError, QmambaError
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import mode_by_name
from qmamba_cli.stages.export import ExportOptions, export
from qmamba_cli.stages.inspect import inspect
from qmamba_cli.stages.run import ModelOptions, load_model
from qmamba_cli.stages.verify import Others, verify

# What a reader is most likely to trip over, inside JSON and outside of it.
_WORDS = (
    *(b"\x00", b"\xff", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"-", b"0", b"1e999", b"NaN"),
    *(b"null", b"true", b'""', b"\\ud800", b"\xed\xa0\x80", b"9" * 30, b"__metadata__", b'"dtype":"F64"'),
    *((1 << power).to_bytes(8, "little") for power in (0, 7, 31, 32, 62, 63)),
    b"\xff" * 8,
)
Mutation = tuple[str, float, float, bytes]
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "replace", "insert", "remove", "repeat", "cut", "swap"]),
        # Half of the places lie in the first bytes, where the lengths are.
        st.one_of(st.floats(0, 1, exclude_max=True), st.floats(0, 0.01)),
        st.floats(0, 1),
        st.one_of(st.sampled_from(_WORDS), st.binary(min_size=1, max_size=12)),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, mutations: list[Mutation]) -> bytes:
    for kind, where, size, word in mutations:
        place = int(where * len(data))
        end = place + max(1, int(size * size * (len(data) - place)))
        match kind:
            case "flip" if data:
                data = data[:place] + bytes([data[place] ^ 1 << word[0] % 8]) + data[place + 1 :]
            case "replace":
                data = data[:place] + word + data[place + len(word) :]
            case "insert":
                data = data[:place] + word + data[place:]
            case "remove":
                data = data[:place] + data[end:]
            case "repeat":
                data = data[:end] + data[place : min(end, place + 10_000)] + data[end:]
            case "cut":
                data = data[:place]
            case "swap":
                data = (
                    data[end:] + data[:place] if word[0] % 2 else data[place:end] + data[:place] + data[end:]
                )
    return data


def fuzz(examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run a function on examples now: the same ones in a short run, others each time in a long one."""

    def run(check: Callable[..., None]) -> None:
        profile = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=examples <= CI_EXAMPLES,
            suppress_health_check=list(HealthCheck),
        )
        profile(given(*strategies)(check))()

    return run


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything that is read: a quantized file and folder, a calibration, progress, a record."""
    where = tmp_path_factory.mktemp("fuzz")
    written = make_quantized(where / "q")
    calibration = make_calibration(where / "c")
    write_progress(where / "p", calibration_manifest(), _progress())
    write_folder(
        where / "f",
        tensors=tensors(),
        files=TOKENIZER,
        manifest=quantized_manifest(model=MODEL.model_copy(update={"config": small_config().to_dict()})),
        card=lambda manifest: manifest.content_digest,
        max_shard_bytes=64,
    )
    Workdir(where).record_calibration(where / "c", calibration.content_digest)
    Workdir(where).record_export(where / "q", written.content_digest)
    return where


def _progress() -> Progress:
    return Progress(first=0, next=2, end=3, statistics=statistics(), coverage={})


READERS: dict[str, Callable[[Path], object]] = {
    "q": lambda where: read_quantized(where / "q"),
    **{
        f"c/{name}": lambda where: read_calibration(where / "c")
        for name in (MANIFEST, "scales.safetensors", "statistics.safetensors")
    },
    **{
        f"f/{name}": lambda where: read_quantized(where / "f")
        for name in ("qmamba.json", "model.safetensors.index.json", "model-00001*", "tokenizer.json")
    },
    "f/SHA256SUMS": lambda where: check_sums(where / "f", read_quantized_manifest(where / "f")),
    "p": lambda where: read_progress(where / "p", calibration_manifest(), first=0, end=3),
}


@contextmanager
def restored(path: Path) -> Iterator[None]:
    content = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", READERS)
def test_mutated_bytes_are_refused(sample: Path, name: str, fuzz_examples: int) -> None:
    (path,) = sample.glob(name)
    content = path.read_bytes()
    READERS[name](sample)

    def check(mutations: list[Mutation]) -> None:
        data = mutated(content, mutations)
        path.write_bytes(data)
        if data == content:
            READERS[name](sample)
        else:
            with pytest.raises(ArtifactError):
                READERS[name](sample)

    with restored(path):
        fuzz(fuzz_examples, MUTATIONS)(check)


def test_a_mutated_record_is_read_or_refused(sample: Path, fuzz_examples: int) -> None:
    """It has no digest of its own: what it says may change, and must then not fit the artifacts."""
    path = sample / RECORD
    content = path.read_bytes()
    kept = {Workdir(sample).last_calibration(), Workdir(sample).last_export(), None}

    def check(mutations: list[Mutation]) -> None:
        path.write_bytes(mutated(content, mutations))
        for resolve in (Workdir(sample).resolve_calibration, Workdir(sample).resolve_export):
            with suppress(QmambaError):
                assert resolve() in kept

    with restored(path):
        fuzz(fuzz_examples, MUTATIONS)(check)


def test_any_bytes_as_a_header(fuzz_examples: int) -> None:
    def check(data: bytes, framed: bool) -> None:
        content = len(data).to_bytes(8, "little") + data if framed else data
        with suppress(ArtifactError):
            header = parse_header(content, "x")
            assert sum(info.nbytes for info in header.infos.values()) <= len(content)

    fuzz(fuzz_examples, st.binary(max_size=300), st.booleans())(check)


HOSTILE_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**200, 1e308, 5e-324, -0.0, 0.5]),
    st.sampled_from(["", "0", "../../etc/passwd", "/dev/zero", "\x1b[2J", "é" * 200, "a\0b", "__class__"]),
    st.sampled_from([[], {}, [0], [[]], {"": ""}, {"a": {"b": []}}, [2**40, 2**40], ["x"] * 50]),
)
EDITS = st.lists(
    st.tuples(
        st.integers(0, 2**32),
        st.sampled_from(["set", "set", "set", "remove", "add", "rename"]),
        HOSTILE_VALUES,
    ),
    min_size=1,
    max_size=3,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside a JSON document; of lists and objects with many entries a few."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for number, (key, child) in enumerate(children):
        if number < 40:
            yield (*path, key)
            yield from places(child, (*path, key))


def edited(document: dict[str, Any], edits: list[tuple[int, str, Any]]) -> dict[str, Any]:
    document = json.loads(json.dumps(document))
    for number, kind, given_value in edits:
        # The examples share their values; one put inside itself would have no end.
        value = json.loads(json.dumps(given_value))
        # By name first, so that a key among hundreds of alike ones is not drawn each time.
        groups: dict[str, list[tuple[Any, ...]]] = {}
        for place in places(document):
            groups.setdefault(f"{place[0]}.{place[-1]}" if len(place) < 4 else str(place[0]), []).append(
                place
            )
        if not groups:
            break
        chosen = random.Random(number)
        *path, key = chosen.choice(groups[chosen.choice(sorted(groups))])
        holder: Any = document
        for step in path:
            holder = holder[step]
        if kind == "set" or isinstance(holder, list):
            holder[key] = value
        elif kind == "remove":
            del holder[key]
        elif kind == "rename":
            holder[str(value)] = holder.pop(key)
        else:
            holder[f"{key}2"] = value
    return document


def sealed(document: dict[str, Any]) -> bytes:
    """Canonical JSON with the digest that belongs to it, as somebody who means harm would write it."""
    if "content_digest" in document:
        document = {**document, "content_digest": ""}
        document["content_digest"] = sha256_bytes(canonical_json(document).encode())
    return canonical_json(document).encode()


@cache
def _exported(folder: Path) -> Path:
    stage = STAGES["export"]
    working_folder(stage, folder / "w")
    stage.make(folder / "w", NEW)
    return folder / "w"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration and an export of a model that runs."""
    return _exported(tmp_path_factory.mktemp("exported"))


def only_errors_of_ours(*uses: Callable[[], object]) -> None:
    for use in uses:
        with suppress(QmambaError):
            use()


@pytest.mark.slow
def test_a_forged_manifest_of_a_quantized_file(exported: Path, tmp_path: Path, fuzz_examples: int) -> None:
    """Digests keep accidents out, not people: a forged one is refused, or it is used without a crash."""
    original = open_safetensors(exported / "ckpt.safetensors")
    document = json.loads(original.metadata[METADATA_KEY])
    contents = {name: original.numpy(name) for name in original.names}
    path = tmp_path / "forged.safetensors"

    def check(edits: list[tuple[int, str, Any]]) -> None:
        forged = sealed(edited(document, edits)).decode()
        write_safetensors(path, contents, {METADATA_KEY: forged})
        only_errors_of_ours(
            lambda: read_quantized_manifest(path),
            lambda: inspect(path),
            lambda: verify(path, Others(workdir=exported, offline=True)),
            lambda: load_model(ModelOptions(mode=mode_by_name("2-4"), checkpoint=path, offline=True)),
        )

    fuzz(max(fuzz_examples // 4, 1), EDITS)(check)


@pytest.mark.slow
def test_a_forged_manifest_of_a_calibration(exported: Path, tmp_path: Path, fuzz_examples: int) -> None:
    path = tmp_path / "forged"
    shutil.copytree(exported / "calibration", path)
    document = json.loads((path / MANIFEST).read_text())

    def check(edits: list[tuple[int, str, Any]]) -> None:
        (path / MANIFEST).write_bytes(sealed(edited(document, edits)))
        asked = ExportOptions(
            out=tmp_path / "out.safetensors",
            workdir=tmp_path,
            calibration=path,
            recipe=Recipe(),
            force=True,
            offline=True,
        )
        only_errors_of_ours(
            lambda: read_calibration_manifest(path),
            lambda: inspect(path),
            lambda: verify(path, Others(workdir=exported, offline=True)),
            lambda: export(asked),
        )

    fuzz(max(fuzz_examples // 4, 1), EDITS)(check)


@pytest.mark.parametrize("kind", [CalibrationManifest, QuantizedManifest])
def test_forged_manifests_are_parsed_or_refused(kind: type[Manifest], fuzz_examples: int) -> None:
    manifest = calibration_manifest() if kind is CalibrationManifest else quantized_manifest()
    document = json.loads(manifest.sealed().to_json())

    def check(edits: list[tuple[int, str, Any]]) -> None:
        data = sealed(edited(document, edits))
        with suppress(ArtifactError):
            assert parse_manifest(kind, data, "x").to_json().encode() == data

    fuzz(fuzz_examples, EDITS)(check)

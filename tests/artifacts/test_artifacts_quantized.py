import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from artifact_samples import (
    TOKENIZER,
    make_calibration,
    make_quantized,
    quantized_manifest,
    tensors,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qmamba_cli.artifacts.calibration import MANIFEST, read_calibration
from qmamba_cli.artifacts.files import canonical_json, sha256_bytes
from qmamba_cli.artifacts.manifest import QuantizedManifest, tensor_records
from qmamba_cli.artifacts.quantized import (
    METADATA_KEY,
    read_quantized,
    read_quantized_manifest,
    write_quantized,
)
from qmamba_cli.artifacts.safetensors_header import TensorInfo
from qmamba_cli.artifacts.safetensors_io import (
    LazyTensor,
    describe,
    open_safetensors,
    write_safetensors,
)
from qmamba_cli.errors import ArtifactError, QmambaError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_quantized(tmp_path / "ckpt.safetensors")
    return tmp_path / "ckpt.safetensors"


def rebuild(path: Path, change: Callable[[dict], None], *, more: Mapping[str, np.ndarray] = {}) -> None:
    """Write the file anew with a changed manifest; header and spelling stay canonical."""
    file = open_safetensors(path)
    document = json.loads(file.metadata[METADATA_KEY])
    change(document)
    contents = {name: file.tensor(name).clone() for name in file.names}
    dropped = set(document.pop("drop", ()))
    contents = {name: value for name, value in contents.items() if name not in dropped}
    write_safetensors(path, {**contents, **more}, {METADATA_KEY: canonical_json(document)})


def test_round_trip(path: Path) -> None:
    artifact = read_quantized(path)
    assert artifact.names == tuple(sorted(tensors()))
    assert artifact.files == TOKENIZER
    assert artifact.path == path
    assert artifact.manifest == read_quantized_manifest(path)
    assert artifact.digest == artifact.manifest.content_digest == artifact.manifest.compute_digest()
    for name, value in tensors().items():
        expected = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        assert torch.equal(artifact.tensor(name), expected)
        assert artifact.info(name) == describe(value)
        assert artifact.tensor(name).dtype == expected.dtype
    assert artifact.numpy("layers.0.x_proj.qweight").tolist() == [[-128, 127, 3]]


def test_the_writer_returns_what_is_read(tmp_path: Path) -> None:
    assert make_quantized(tmp_path / "q") == read_quantized(tmp_path / "q").manifest


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    make_quantized(tmp_path / "a")
    write_quantized(
        tmp_path / "b",
        tensors=dict(reversed(tensors().items())),
        files=dict(reversed(TOKENIZER.items())),
        manifest=quantized_manifest(),
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_hash_seed_does_not_matter(tmp_path: Path) -> None:
    # Arrays alone, so that the two processes need not load torch.
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path;"
        "from qmamba_cli.artifacts.quantized import write_quantized;"
        "from artifact_samples import TOKENIZER, quantized_manifest, statistics;"
        "write_quantized(Path(sys.argv[2]), tensors=statistics(), files=TOKENIZER,"
        "manifest=quantized_manifest())"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / seed)],
            env={"PYTHONHASHSEED": seed},
            check=True,
        )
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_lazy_and_ready_tensors_give_the_same_file(tmp_path: Path) -> None:
    lazy = {
        name: LazyTensor(describe(value).dtype, describe(value).shape, lambda value=value: value)
        for name, value in tensors().items()
    }
    make_quantized(tmp_path / "a")
    write_quantized(tmp_path / "b", tensors=lazy, files=TOKENIZER, manifest=quantized_manifest())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_library_reads_the_file(path: Path) -> None:
    theirs = safetensors.torch.load_file(path)
    assert bytes(theirs["files/tokenizer.json"].numpy()) == TOKENIZER["tokenizer.json"]


@pytest.mark.parametrize("name", ["../tokenizer.json", "/etc/passwd", ".hidden", "", "a/b", "a" * 129, "é"])
def test_a_file_name_that_leads_elsewhere_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        write_quantized(tmp_path / "q", tensors={}, files={name: b""}, manifest=quantized_manifest())


def test_files_and_names_must_fit_the_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer_files"):
        write_quantized(
            tmp_path / "q",
            tensors={},
            files={**TOKENIZER, "tokenizer.json": b"{}"},
            manifest=quantized_manifest(),
        )
    with pytest.raises(ValueError, match="kept for files"):
        write_quantized(
            tmp_path / "q",
            tensors={"files/x": np.zeros(1)},
            files=TOKENIZER,
            manifest=quantized_manifest(),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failing_tensor_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()

    def fail() -> torch.Tensor:
        raise QmambaError("NaN in `layers.0.in_proj.weight`")

    with pytest.raises(QmambaError, match="NaN"):
        write_quantized(
            path,
            tensors={"x": LazyTensor("F32", (1,), fail)},
            files=TOKENIZER,
            manifest=quantized_manifest(),
            force=True,
        )
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def as_version_1(path: Path) -> None:
    """What the first version of the format held of the same model."""

    def older(document: dict) -> None:
        document["format_version"] = 1
        del document["quantization"]["recipe"]
        kept = {**document, "content_digest": ""}
        document["content_digest"] = sha256_bytes(canonical_json(kept).encode("ascii"))

    rebuild(path, older)


def test_a_file_of_version_1_is_read_as_it_is(path: Path) -> None:
    as_version_1(path)
    before = path.read_bytes()
    artifact = read_quantized(path)
    assert artifact.manifest.format_version == 1 and artifact.manifest.quantization.recipe is None
    assert artifact.names == tuple(sorted(tensors()))
    stored = open_safetensors(path).metadata[METADATA_KEY]
    assert artifact.manifest.to_json() == stored and "recipe" not in stored
    write_quantized(path, tensors=tensors(), files=TOKENIZER, manifest=artifact.manifest, force=True)
    assert path.read_bytes() == before


def test_a_manifest_must_name_its_recipe() -> None:
    quantization = quantized_manifest().quantization.model_copy(update={"recipe": None})
    with pytest.raises(ValidationError, match=r"`quantization\.recipe` is null"):
        quantized_manifest(quantization=quantization)


def test_missing_file_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(QmambaError, match="does not exist") as caught:
        read_quantized(tmp_path / "q")
    assert caught.value.exit_code == 1
    assert "qmamba export" in caught.value.hint


def test_other_things_are_no_quantized_file(tmp_path: Path) -> None:
    make_calibration(tmp_path / "c")
    with pytest.raises(ArtifactError, match=r"is a folder without `qmamba\.json`"):
        read_quantized(tmp_path / "c")
    with pytest.raises(ArtifactError, match="a safetensors file but no quantized one"):
        read_quantized(tmp_path / "c" / "scales.safetensors")
    (tmp_path / "text").write_text("not an artifact at all")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        read_quantized(tmp_path / "text")
    foreign = (tmp_path / "c" / MANIFEST).read_text()
    write_safetensors(tmp_path / "mixed", {}, {METADATA_KEY: foreign})
    with pytest.raises(ArtifactError, match="has format `qmamba-calibration`") as caught:
        read_quantized(tmp_path / "mixed")
    assert caught.value.hint == "it is a calibration; name a quantized file instead"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=3), r"version 3, but qmamba-cli 0\.1\.0 reads up to 2"),
        (lambda d: d.update(format_version=1), "is not in canonical form"),
        (lambda d: d["quantization"].pop("recipe"), r"lacks the key `quantization\.recipe`"),
        (lambda d: d["quantization"].update(recipe=None), r"`quantization\.recipe` is null"),
        (lambda d: d["quantization"].update(recipe="other"), r"breaks the schema at `quantization\.recipe`"),
        (lambda d: d.update(quantization=[]), "breaks the schema at `quantization`"),
        (lambda d: d.update(format_version=2**70), "version 1180591620717411303424, but"),
        (lambda d: d.update(format="gguf"), "has format `gguf`, expected `qmamba-quantized`"),
        (lambda d: d.update(surprise=1), "breaks the schema at `surprise`"),
        (lambda d: d["quantization"].update(w_bits=3), r"at `quantization\.w_bits`"),
        (lambda d: d["tensors"].pop("embeddings.weight"), "`embeddings.weight` of .* is not in the manifest"),
        (lambda d: d.update(drop=["embeddings.weight"]), "tensor `embeddings.weight` is missing"),
        (lambda d: d["tensors"]["embeddings.weight"].update(shape=[4, 8]), r"is BF16 \[8, 4\], expected"),
        (lambda d: d["tensors"]["embeddings.weight"].update(dtype="F16"), r"expected F16 \[8, 4\]"),
        (lambda d: d["tensors"]["embeddings.weight"].update(sha256="0" * 64), "the data of tensor"),
        (lambda d: d["quantization"].update(alpha=0.99), "got content digest"),
        (lambda d: d["model"].update(source="other"), "got content digest"),
    ],
)
def test_a_changed_file_is_refused(path: Path, change: Callable[[dict], None], message: str) -> None:
    rebuild(path, change)
    with pytest.raises(ArtifactError, match=message) as caught:
        read_quantized(path)
    assert caught.value.exit_code == 3
    assert caught.value.hint


def test_an_added_tensor_is_refused(path: Path) -> None:
    rebuild(path, lambda _: None)
    read_quantized(path)
    rebuild(path, lambda _: None, more={"extra": np.zeros(1)})
    with pytest.raises(ArtifactError, match=r"tensor `extra` of .* is not in the manifest"):
        read_quantized(path)


def test_other_metadata_is_refused(path: Path) -> None:
    file = open_safetensors(path)
    contents = {name: file.tensor(name).clone() for name in file.names}
    write_safetensors(path, contents, {**file.metadata, "format": "pt"})
    with pytest.raises(ArtifactError, match="other metadata"):
        read_quantized(path)


def test_a_header_spelled_differently_is_refused(path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    document = json.loads(content[8 : 8 + length])
    text = json.dumps(document).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ArtifactError, match=r"header of .* is not in canonical form"):
        read_quantized(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("files/../x", np.zeros(1, np.uint8)), ("files/x", np.zeros(1, np.float32))],
)
def test_a_hostile_file_entry_is_refused(tmp_path: Path, name: str, value: np.ndarray) -> None:
    infos: dict[str, TensorInfo] = {name: describe(value)}

    def metadata(digests: Mapping[str, str]) -> dict[str, str]:
        manifest: QuantizedManifest = quantized_manifest().sealed(tensors=tensor_records(infos, digests))
        return {METADATA_KEY: manifest.to_json()}

    write_safetensors(tmp_path / "q", {name: value}, metadata)
    with pytest.raises(ArtifactError, match="no valid file entry"):
        read_quantized(tmp_path / "q")


def test_files_that_are_not_the_manifests_are_refused(tmp_path: Path) -> None:
    def metadata(_: Mapping[str, str]) -> dict[str, str]:
        return {METADATA_KEY: quantized_manifest().sealed(tensors={}).to_json()}

    write_safetensors(tmp_path / "q", {}, metadata)
    with pytest.raises(ArtifactError, match="tokenizer files"):
        read_quantized(tmp_path / "q")


def test_the_manifest_alone_does_not_hash_the_data(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    read_quantized_manifest(path)
    read_quantized(path, verify=False)
    with pytest.raises(ArtifactError, match="the data of tensor"):
        read_quantized(path)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("flips") / "q"
    make_quantized(path)
    return path, path.read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.integers(min_value=0), st.integers(0, 7))
def test_any_flipped_bit_is_detected(original: tuple[Path, bytes], place: int, bit: int) -> None:
    path, content = original
    data = bytearray(content)
    data[place % len(data)] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(ArtifactError):
        read_quantized(path)


def test_a_flip_in_every_byte_is_detected(original: tuple[Path, bytes]) -> None:
    path, content = original
    path.write_bytes(content)
    with path.open("r+b", buffering=0) as file:
        for place, byte in enumerate(content):
            file.seek(place)
            # 0x20 is the flip that survives JSON: it changes the case of an escape's hexadecimal digits.
            file.write(bytes([byte ^ 0x20]))
            with pytest.raises(ArtifactError):
                read_quantized(path)
            file.seek(place)
            file.write(bytes([byte]))
    read_quantized(path)


def test_any_truncation_or_addition_is_detected(original: tuple[Path, bytes]) -> None:
    path, content = original
    for length in range(0, len(content), 16):
        path.write_bytes(content[:length])
        with pytest.raises(ArtifactError):
            read_quantized(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ArtifactError, match="take 96 bytes, got 97") as caught:
        read_quantized(path)
    assert "something was added" in caught.value.hint


def test_reading_manifests_does_not_import_torch(path: Path, tmp_path: Path) -> None:
    make_calibration(tmp_path / "c")
    script = (
        "import sys; from pathlib import Path;"
        "from qmamba_cli.artifacts.quantized import read_quantized_manifest;"
        "from qmamba_cli.artifacts.calibration import read_calibration, read_calibration_manifest;"
        "read_quantized_manifest(Path(sys.argv[1])); read_calibration_manifest(Path(sys.argv[2]));"
        "read_calibration(Path(sys.argv[2]));"
        "sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "c")]
    assert subprocess.run(command, check=False).returncode == 0
    assert read_calibration(tmp_path / "c").manifest.model == read_quantized_manifest(path).model

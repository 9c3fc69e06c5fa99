"""The model folder: the same manifest as the one file, and every kind of damage refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_samples import TOKENIZER, make_quantized, quantized_manifest, tensors
from safetensors.torch import load_file

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.artifacts.folder import (
    CARD,
    CONFIG,
    INDEX,
    MANIFEST,
    SUMS,
    WHOLE,
    known_entries,
    write_folder,
)
from qmamba_cli.artifacts.quantized import read_quantized, read_quantized_manifest
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import ArtifactError, CheckpointError, QmambaError

CONFIG_VALUES = MambaConfig(
    d_model=4, n_layer=1, vocab_size=8, d_state=2, d_conv=4, d_inner=8, dt_rank=1
).to_dict()


def manifest() -> Any:
    sample = quantized_manifest()
    return sample.model_copy(update={"model": sample.model.model_copy(update={"config": CONFIG_VALUES})})


def make_folder(path: Path, *, limit: int = 40, force: bool = False, **changes: Any) -> Any:
    given = {"tensors": tensors(), "files": TOKENIZER, "manifest": manifest(), **changes}
    return write_folder(path, card=lambda _: "# card\n", max_shard_bytes=limit, force=force, **given)


def test_a_folder_and_a_file_are_one_artifact(tmp_path: Path) -> None:
    written = make_folder(tmp_path / "f")
    make_quantized(tmp_path / "q", model=manifest().model)
    folder, file = read_quantized(tmp_path / "f"), read_quantized(tmp_path / "q")
    assert folder.manifest == file.manifest == written
    assert folder.digest == file.digest
    assert folder.files == file.files == TOKENIZER
    assert folder.names == file.names
    for name in folder.names:
        assert folder.info(name) == file.info(name)
        assert torch.equal(folder.tensor(name), file.tensor(name))
    assert (tmp_path / "f" / MANIFEST).read_text() == written.to_json()
    assert read_quantized_manifest(tmp_path / "f") == written


def test_shards_are_filled_in_order_up_to_the_limit(tmp_path: Path) -> None:
    # 64, 6, 12 and 3 bytes of data.
    make_folder(tmp_path / "f", limit=18)
    weight_map = json.loads((tmp_path / "f" / INDEX).read_text())["weight_map"]
    shards = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert weight_map == {
        "embeddings.weight": shards[0],
        "layers.0.in_proj.qweight": shards[1],
        "layers.0.in_proj.scale": shards[1],
        "layers.0.x_proj.qweight": shards[2],
    }
    assert json.loads((tmp_path / "f" / INDEX).read_text())["metadata"] == {"total_size": 85}
    found = {name for shard in shards for name in load_file(tmp_path / "f" / shard)}
    assert found == set(weight_map)
    make_folder(tmp_path / "whole", limit=1000)
    assert (tmp_path / "whole" / WHOLE).is_file() and not (tmp_path / "whole" / INDEX).exists()
    assert read_quantized(tmp_path / "whole").digest == read_quantized(tmp_path / "f").digest


def test_tensors_as_they_are_made(tmp_path: Path) -> None:
    """One after another from an iterator: the bytes of the mapping, and no spool is left."""
    make_folder(tmp_path / "a")
    make_folder(tmp_path / "b", tensors=iter(tensors().items()))
    for entry in (tmp_path / "a").iterdir():
        assert entry.read_bytes() == (tmp_path / "b" / entry.name).read_bytes()
    assert {entry.name for entry in tmp_path.iterdir()} == {"a", "b"}
    with pytest.raises(ValueError, match="given twice"):
        make_folder(tmp_path / "c", tensors=iter([*tensors().items(), *tensors().items()]))
    assert not (tmp_path / "c").exists()


def edited(name: str, change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(change((folder / name).read_text()))


def flipped(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return damage


SHARD = "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped(SHARD), "the data of tensor"),
        (flipped("tokenizer.json"), "`tokenizer.json` of .* is damaged"),
        (lambda folder: (folder / SHARD).unlink(), "is missing from model folder"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "is missing from model folder"),
        (lambda folder: (folder / INDEX).unlink(), "is missing from model folder"),
        (lambda folder: (folder / MANIFEST).unlink(), "is a folder without `qmamba.json`"),
        (edited(INDEX, lambda text: text.replace(": {", ":  {", 1)), "it was edited"),
        (edited(INDEX, lambda text: text.replace('"total_size": ', '"total_size": 1')), "it was edited"),
        (edited(INDEX, lambda text: text[:-5]), "is not valid JSON"),
        (edited(INDEX, lambda _: "[]"), "has no `weight_map`"),
        (edited(INDEX, lambda text: text.replace(SHARD, "../../etc/passwd", 1)), "bad file name"),
        (edited(INDEX, lambda text: text.replace("embeddings.weight", "other")), "does not list"),
        (edited(INDEX, lambda text: text.replace("00002-of", "00001-of")), "is not in the manifest|missing"),
        (edited(MANIFEST, lambda text: text.replace('"w_bits":4', '"w_bits":8')), "manifest .* is damaged"),
        (edited(MANIFEST, lambda text: text + "\n"), "not in canonical form"),
        (edited(MANIFEST, lambda text: text.replace("qmamba-quantized", "qmamba-calibration")), "format"),
    ],
)
def test_damage_is_refused(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    make_folder(tmp_path / "f", limit=64)
    read_quantized(tmp_path / "f")
    damage(tmp_path / "f")
    with pytest.raises(ArtifactError, match=message):
        read_quantized(tmp_path / "f")


def test_a_shard_of_another_model_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "f", limit=64)
    other = tensors()
    other["layers.0.in_proj.scale"] = other["layers.0.in_proj.scale"] * 2
    make_folder(tmp_path / "g", limit=64, tensors=other)
    shutil.copy(tmp_path / "g" / SHARD, tmp_path / "f" / SHARD)
    with pytest.raises(ArtifactError, match=r"data of tensor `layers.0.in_proj.scale`"):
        read_quantized(tmp_path / "f")


def test_what_is_replaced_and_what_is_not(tmp_path: Path) -> None:
    make_folder(tmp_path / "f", limit=18)
    with pytest.raises(QmambaError, match="already exists"):
        make_folder(tmp_path / "f")
    # Fewer shards than before: none of the old ones stays.
    make_folder(tmp_path / "f", limit=1000, force=True)
    expected = {WHOLE, MANIFEST, CONFIG, CARD, SUMS, *TOKENIZER}
    assert {entry.name for entry in (tmp_path / "f").iterdir()} == expected
    assert set(known_entries(tmp_path / "f")) == expected | {INDEX}
    (tmp_path / "f" / "notes.txt").touch()
    with pytest.raises(QmambaError, match=r"holds `notes.txt`"):
        make_folder(tmp_path / "f", force=True)
    # Shards are only ours beside a manifest of ours.
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(QmambaError, match="is not replaced"):
        make_folder(tmp_path / "float", force=True)


def test_a_failing_card_leaves_nothing(tmp_path: Path) -> None:
    def card(_: object) -> str:
        raise ArtifactError("no")

    with pytest.raises(ArtifactError):
        write_folder(tmp_path / "f", tensors=tensors(), files=TOKENIZER, manifest=manifest(), card=card)
    assert list(tmp_path.iterdir()) == []


def test_config_json_names_the_program(tmp_path: Path) -> None:
    """Others refuse the folder by name; so does what wants a float model."""
    make_folder(tmp_path / "f")
    config = json.loads((tmp_path / "f" / CONFIG).read_text())
    assert config["model_type"] == "mamba"
    assert config["quantization_config"]["quant_method"] == "qmamba"
    with pytest.raises(CheckpointError, match="is quantized by `qmamba`, expected a float checkpoint"):
        open_checkpoint(str(tmp_path / "f"))


def test_file_names_of_the_folder_are_taken(tmp_path: Path) -> None:
    sample = manifest()
    files = {"config.json": b"{}"}
    digests = {"config.json": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    model = sample.model.model_copy(update={"tokenizer_files": digests})
    with pytest.raises(ValueError, match="is taken in a model folder"):
        make_folder(tmp_path / "f", files=files, manifest=sample.model_copy(update={"model": model}))

"""Damaged or foreign artifacts, and outputs that cannot be written: nothing is left behind."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import (
    SCORE,
    SMALL,
    WORKDIR,
    artifacts,
    copied,
    done,
    edit_json,
    model_folder,
    qmamba,
    refused,
    refused_in,
    tree,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder in an otherwise empty working folder."""
    return model_folder(tmp_path / "model")


def test_calibration_of_another_checkpoint(model: Path) -> None:
    shutil.copytree(artifacts().folder / WORKDIR, model.parent / WORKDIR)
    refused_in(
        model.parent,
        3,
        *("export", "--out", "new.safetensors", "--model", "./model"),
        parts=("was made for another checkpoint", "weights of `./model` differ", "qmamba calibrate ./model"),
    )


def test_calibration_of_another_tokenizer(model: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text((model / name).read_text() + "\n")
    shutil.copytree(artifacts().folder / WORKDIR, model.parent / WORKDIR)
    refused_in(
        model.parent,
        3,
        *("export", "--out", "new.safetensors", "--tokenizer", "./model"),
        parts=("was made for another checkpoint", "tokenizer"),
    )


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size * 2 // 3)


def _flip_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size - 1000)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def _rewritten(change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Change the manifest and the tensors, and write a file that is a sound safetensors file again."""

    def damage(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            manifest = json.loads(file.metadata()["qmamba"])
        tensors = load_file(path)
        change(manifest, tensors)
        save_file(tensors, path, {"qmamba": json.dumps(manifest, sort_keys=True, separators=(",", ":"))})

    return damage


def _bump_version(manifest: dict[str, Any], _: dict[str, torch.Tensor]) -> None:
    manifest["format_version"] += 1


def _remove_tensor(_: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["layers.0.x_proj.qweight"]


BROKEN_FILES = [
    pytest.param(_truncate, ("w4.safetensors",), id="truncated"),
    pytest.param(_flip_bit, ("w4.safetensors", "got", "expected"), id="bit-flipped"),
    pytest.param(_rewritten(_bump_version), ("format version 3", "reads up to 2", "upgrade"), id="version"),
    pytest.param(_rewritten(_remove_tensor), ("`layers.0.x_proj.qweight` is missing",), id="tensor-removed"),
    pytest.param(lambda path: path.write_bytes(b"PK\3\4" * 50), ("no safetensors file",), id="foreign"),
    pytest.param(lambda path: path.write_bytes(b""), ("w4.safetensors",), id="empty"),
]


@pytest.mark.parametrize(("damage", "parts"), BROKEN_FILES)
def test_damaged_quantized_file(tmp_path: Path, damage: Callable[[Path], Any], parts: Any) -> None:
    shutil.copy(artifacts().w4, tmp_path)
    damage(tmp_path / "w4.safetensors")
    refused_in(tmp_path, 3, "run", "--checkpoint", "w4.safetensors", *SCORE, parts=parts)


@pytest.mark.parametrize(
    ("name", "damage", "parts"),
    [
        ("statistics.safetensors", _truncate, ("statistics.safetensors",)),
        ("statistics.safetensors", _flip_bit, ("statistics.safetensors", "got", "expected")),
        ("scales.safetensors", Path.unlink, ("scales.safetensors",)),
        ("manifest.json", lambda path: edit_json(path, format_version=3), ("version 3", "up to 2")),
        ("manifest.json", lambda path: edit_json(path, surprise=1), ("surprise",)),
        ("manifest.json", _truncate, ("the manifest of", "not valid JSON")),
    ],
    ids=["truncated", "bit-flipped", "file-removed", "version", "unknown-key", "manifest-truncated"],
)
def test_damaged_calibration(tmp_path: Path, name: str, damage: Callable[[Path], Any], parts: Any) -> None:
    damage(copied(tmp_path).calibration / name)
    refused_in(tmp_path, 3, "export", "--out", "new.safetensors", parts=parts)


def test_output_exists(tmp_path: Path) -> None:
    copied(tmp_path)
    refused_in(tmp_path, 1, "calibrate", "demo", *SMALL, parts=("calibration` already exists", "--force"))
    (tmp_path / "results.json").write_text("mine")
    refused_in(
        tmp_path, 1, "run", *SCORE, "--output", "results.json", parts=("`results.json` already exists",)
    )
    (tmp_path / "other.samples.jsonl").write_text("mine")
    arguments = ("run", *SCORE, "--output", "other.json", "--log-samples")
    refused_in(tmp_path, 1, *arguments, parts=("`other.samples.jsonl` already exists",))


def test_a_folder_that_is_no_calibration_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / WORKDIR / "calibration").mkdir(parents=True)
    (tmp_path / WORKDIR / "calibration" / "diary.txt").write_text("mine")
    refused_in(tmp_path, 1, "calibrate", "demo", *SMALL, "--force", parts=("is not replaced", "`diary.txt`"))


def test_a_parent_of_the_output_is_a_file(tmp_path: Path) -> None:
    copied(tmp_path)
    below, parts = "w8.safetensors/below", ("w8.safetensors/below", "Not a directory", "another path")
    refused_in(tmp_path, 1, "calibrate", "demo", *SMALL, "--workdir", below, parts=parts)
    refused_in(tmp_path, 1, "export", "--out", below, parts=parts)
    refused_in(tmp_path, 1, "run", *SCORE, "--output", below, parts=parts)


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the operating system's answer is given for it."""
    copied(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    parts = ("cannot write", "Permission denied", "choose a folder that can be written")
    refused_in(tmp_path, 1, "calibrate", "demo", *SMALL, "--workdir", "new", parts=parts)
    refused_in(tmp_path, 1, "export", "--out", "new", parts=parts)
    refused_in(tmp_path, 1, "run", *SCORE, "--output", "new", parts=parts)


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow past ``size`` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    copied(tmp_path)
    with file_size_limit(100_000):
        refused_in(tmp_path, 1, "export", "--out", "new", parts=("cannot write `new`", "File too large"))
        refused_in(tmp_path, 1, "export", "--out", "w4.safetensors", "--force", parts=("cannot write",))
        # What was observed is not lost with the disk's last bytes: a later `--resume` has only to write it.
        before = tree(tmp_path)
        failed = qmamba("calibrate", "demo", *SMALL, "--force", cwd=tmp_path)
        refused(failed, 1, "cannot write", "calibration")
        after = dict(tree(tmp_path))
        progress = "qmamba-artifacts/calibration.partial"
        assert after.pop(progress) and after == before
    done("calibrate", "demo", *SMALL, "--force", "--resume", cwd=tmp_path)
    assert progress not in tree(tmp_path)
    with file_size_limit(100):
        refused_in(tmp_path, 1, "run", *SCORE, "--output", "new.json", parts=("cannot write `new.json`",))


def test_a_full_stdout() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "qmamba_cli", "modes"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, encoding="utf-8", check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: cannot write to stdout, got `No space left on device`\n\nhint: ")
    assert "Traceback" not in ended.stderr

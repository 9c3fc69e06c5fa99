"""Export of a model folder: it runs as the file does, its card tells the truth, and it reaches the Hub."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest
from command_line import SCORE, artifacts, done, qmamba, refused, refused_in, tree

from qmamba_cli.artifacts.folder import check_sums
from qmamba_cli.artifacts.quantized import read_quantized, read_quantized_manifest
from qmamba_cli.errors import ArtifactError, UsageError
from qmamba_cli.stages.folder import FolderOptions, parse_size

EXPORT = ("export", "--calibration", artifacts().calibration, "--workdir", "w")
FOLDER = (*EXPORT, "--format", "folder", "--out", "f")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the shared export, and a folder of the same model in shards with these results."""
    home = tmp_path_factory.mktemp("folder")
    done(
        "run", "--checkpoint", artifacts().w4, "--mode", "2-4", *SCORE, "--output", "r.json",
        "--workdir", "none", cwd=home,
    )  # fmt: skip
    done(*FOLDER, "--results", "r.json", "--max-shard-size", "1MB", cwd=home)
    return home


def test_the_folder_runs_as_the_file_does(home: Path) -> None:
    found = done("run", "--checkpoint", "f", "--mode", "2-4", *SCORE, "--json", cwd=home).json()
    expected = json.loads((home / "r.json").read_text())
    assert found["results"] == expected["results"]
    assert found["qmamba"]["artifact"]["digest"] == expected["qmamba"]["artifact"]["digest"]
    # The work folder has it on record, as it would have the file.
    assert (
        done("run", "--workdir", "w", *SCORE, "--json", cwd=home).json()["qmamba"]["artifact"]["path"] == "f"
    )


def test_what_is_in_the_folder(home: Path) -> None:
    names = {path.name for path in (home / "f").iterdir()}
    shards = {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    fixed = {"config.json", "qmamba.json", "README.md", "SHA256SUMS", "model.safetensors.index.json"}
    assert names == shards | fixed | {"tokenizer.json", "tokenizer_config.json"}
    verified = done("verify", "f", "--calibration", artifacts().calibration, "--json", cwd=home).json()
    assert [row["verdict"] for row in verified["checks"]] == ["ok"] * 6
    one, other = (
        done("inspect", path, "--json", cwd=home).json()["manifest"] for path in ("f", artifacts().w4)
    )
    assert one == other


def test_an_edited_config_is_found(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "f", tmp_path / "f")
    text = (tmp_path / "f" / "config.json").read_text()
    (tmp_path / "f" / "config.json").write_text(text.replace('"state_size": 16', '"state_size": 8'))
    outcome = qmamba("verify", "f", cwd=tmp_path)
    assert outcome.code == 3
    assert "its config.json failed: d_state is 8, the manifest says 16" in outcome.err


def test_verify_names_what_differs_from_the_sums(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    shutil.copytree(home / "f", folder)
    ended = subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.count(": OK") == 3
    (folder / "README.md").write_text((folder / "README.md").read_text() + "Better than it is.\n")
    outcome = qmamba("verify", "f", cwd=tmp_path)
    assert outcome.code == 3
    assert "its config.json and README.md failed: `README.md` of `f` is damaged" in outcome.err
    # The sums of another model vouch for nothing here.
    done(*EXPORT, "--format", "folder", "--w-bits", 8, "--out", "other", cwd=tmp_path)
    for name in ("README.md", "SHA256SUMS", "config.json"):
        shutil.copy(tmp_path / "other" / name, folder / name)
    outcome = qmamba("verify", "f", cwd=tmp_path)
    assert outcome.code == 3
    assert "`qmamba.json` of `f` is damaged" in outcome.err


def test_a_folder_from_before_the_sums_is_read(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "f", tmp_path / "f")
    (tmp_path / "f" / "SHA256SUMS").unlink()
    assert read_quantized(tmp_path / "f").digest == read_quantized(home / "f").digest
    manifest = read_quantized_manifest(tmp_path / "f")
    assert not check_sums(tmp_path / "f", manifest.model_copy(update={"format_version": 1}))
    with pytest.raises(ArtifactError, match="`SHA256SUMS` is missing"):
        check_sums(tmp_path / "f", manifest.model_copy(update={"format_version": 2}))


def test_the_card(home: Path) -> None:
    from huggingface_hub import ModelCard

    text = (home / "f" / "README.md").read_text()
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["library_name"] == "qmamba-cli"
    assert {"mamba", "quantized", "4-bit"} <= set(data["tags"])
    # `demo` is no Hub id, so the card names no base model.
    assert "base_model" not in data
    results = json.loads((home / "r.json").read_text())["results"]["lastword"]
    measured = {row.metric_type: row.metric_value for row in card.data.eval_results}
    assert measured == {"acc": results["acc,none"], "perplexity": results["perplexity,none"]}
    digest = done("inspect", "f", "--json", cwd=home).json()["manifest"]["content_digest"]
    assert f"| digest | `{digest}` |" in text
    assert "| lastword | 2-4 | 1 | acc |" in text
    assert str(home) not in text


def test_a_base_model_on_the_hub(tmp_path: Path) -> None:
    done(*FOLDER, "--base-model", "state-spaces/mamba-130m-hf", cwd=tmp_path)
    text = (tmp_path / "f" / "README.md").read_text()
    assert "base_model: state-spaces/mamba-130m-hf\n" in text
    assert "base_model_relation: quantized\n" in text


def test_the_same_bytes_under_another_name(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "r.json", tmp_path / "s.json")
    given = ("--results", "s.json", "--max-shard-size", "1MB")
    done(*EXPORT, "--format", "folder", "--out", "deeper/g", *given, cwd=tmp_path)
    assert tree(tmp_path / "deeper" / "g") == tree(home / "f")


def test_results_of_another_model_are_refused(home: Path, tmp_path: Path) -> None:
    shutil.copy(home / "r.json", tmp_path)
    refused_in(tmp_path, 3, *FOLDER, "--results", "r.json", "--w-bits", 8, parts=("on another artifact",))
    text = (home / "r.json").read_text()
    digest = json.loads(text)["qmamba"]["calibration"]["digest"]
    (tmp_path / "r.json").write_text(text.replace(digest, "0" * 64))
    refused_in(tmp_path, 3, *FOLDER, "--results", "r.json", parts=("on another calibration",))
    (tmp_path / "r.json").write_text("{}")
    refused_in(tmp_path, 3, *FOLDER, "--results", "r.json", parts=("has no `results` and `qmamba`",))


class Hub:
    """Stands for huggingface_hub's HfApi."""

    calls: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def create_repo(self, repo: str, **options: Any) -> str:
        self.calls.append(("create", {"repo": repo, **options}))
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, **options: Any) -> None:
        names = {path.name for path in Path(options["folder_path"]).iterdir()}
        self.calls.append(("upload", {**options, "names": names}))


def test_push_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "calls", [])
    outcome = done(*FOLDER, "--push-to-hub", "me/mamba-w4", "--private", "--json", cwd=tmp_path).json()
    assert outcome["pushed"] == "https://huggingface.co/me/mamba-w4"
    (create, made), (upload, sent) = Hub.calls
    assert (create, made) == ("create", {"repo": "me/mamba-w4", "private": True, "exist_ok": True})
    assert upload == "upload" and sent["repo_id"] == "me/mamba-w4"
    assert sent["names"] == {path.name for path in (tmp_path / "f").iterdir()}


def test_a_hub_that_refuses_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("403 Forbidden\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "create_repo", refuse)
    outcome = refused(qmamba(*FOLDER, "--push-to-hub", "me/mamba-w4", cwd=tmp_path), 1, "403 Forbidden")
    assert "hf upload me/mamba-w4 f" in outcome.err and "and more" not in outcome.err
    done("inspect", "f", cwd=tmp_path)


def test_no_network_where_none_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: pytest.fail("asked the Hub"))
    push = (*FOLDER, "--push-to-hub", "me/mamba-w4")
    refused_in(tmp_path, 2, *push, "--offline", parts=("needs the network, got `--offline`",))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused_in(tmp_path, 1, *push, parts=("HF_HUB_OFFLINE",))
    # A dry run uploads nothing.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    done(*push, "--dry-run", cwd=tmp_path)
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--push-to-hub", "no id"), "must be a Hub id"),
        (("--base-model", "no id"), "must be a Hub id"),
        (("--max-shard-size", "large"), "must be a number with a unit"),
        (("--max-shard-size", "0"), "at least 1 byte"),
        (("--private",), "belongs to `--push-to-hub`"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: tuple[str, ...], part: str) -> None:
    refused_in(tmp_path, 2, *FOLDER, *options, parts=(part,))
    refused_in(tmp_path, 2, *EXPORT, "--out", "q", "--results", "r.json", parts=("--format folder",))


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "2 gib", "1.5KB", "7")] == [5 * 10**9, 2 << 30, 1500, 7]
    for text in ("", "GB", "-1GB", "1e9", "5 giga"):
        with pytest.raises(UsageError):
            parse_size(text)
    assert FolderOptions().max_shard_bytes == 5 * 10**9


def test_a_dry_run_says_what_it_will_take(tmp_path: Path) -> None:
    planned = done(*FOLDER, "--dry-run", "--json", cwd=tmp_path).json()
    assert tree(tmp_path) == {}
    real = done(*FOLDER, "--json", cwd=tmp_path).json()
    assert planned["parts"] == real["parts"] and planned["format"] == real["format"] == "folder"
    assert planned["bytes"] == sum(planned["tensors"].values())
    assert planned["config"]["n_layer"] == 6
    # The embedding, the largest thing that is held: 8192 x 256 in float32, looked at and quantized.
    assert planned["memory_bytes"] == 6 * 8192 * 256
    assert "before it starts" in done(*EXPORT, "--out", "q", "--dry-run", cwd=tmp_path).out

"""Every form a float model is stored in gives the tensors transformers reads from it."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from checkpoint_models import (
    edit_json,
    edit_tensors,
    expected_tensors,
    huggingface_folder,
    mamba_ssm_folder,
    random_model,
)
from safetensors.torch import load_file, save_file
from transformers import MambaForCausalLM

from qmamba_cli.artifacts import weight_files
from qmamba_cli.artifacts.checkpoint import Checkpoint, open_checkpoint
from qmamba_cli.artifacts.hub import HubId, parse_hub_id
from qmamba_cli.config import MambaConfig
from qmamba_cli.errors import CheckpointError, DatasetError
from qmamba_cli.resources import calib_data_path, demo_model_path


def assert_holds(checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.names) == set(expected)
    for name, value in expected.items():
        loaded = checkpoint.load(name)
        assert loaded.dtype == value.dtype, name
        assert loaded.is_contiguous(), name
        assert torch.equal(loaded, value), name


def test_demo_equals_transformers() -> None:
    checkpoint = open_checkpoint("demo")
    assert checkpoint.source == "demo"
    assert checkpoint.revision is None
    assert (checkpoint.config.d_model, checkpoint.config.n_layer, checkpoint.config.vocab_size) == (
        256,
        6,
        8192,
    )
    assert_holds(checkpoint, expected_tensors(MambaForCausalLM.from_pretrained(demo_model_path())))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False},
        {"use_bias": True, "conv_kernel": 3},
        {"use_conv_bias": False, "time_step_rank": "auto"},
        {"hidden_size": 40, "expand": 3, "hidden_act": "swish"},
    ],
    ids=["tied", "untied", "biases-w3", "no-conv-bias-auto-rank", "expand-3"],
)
@pytest.mark.parametrize("shard", [None, "20KB"], ids=["one-file", "sharded"])
def test_huggingface_folder_equals_transformers(tmp_path: Path, changes: dict, shard: str | None) -> None:
    model = huggingface_folder(tmp_path, shard=shard, **changes)
    checkpoint = open_checkpoint(str(tmp_path))
    assert (len(checkpoint.weight_files) > 1) == (shard is not None)
    assert checkpoint.config.tie_embeddings == model.config.tie_word_embeddings
    assert checkpoint.config.d_inner == model.config.intermediate_size
    assert checkpoint.config.dt_rank == model.config.time_step_rank
    assert_holds(checkpoint, expected_tensors(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_stored_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    random_model().to(dtype).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    assert {checkpoint.load(name).dtype for name in checkpoint.names} == {dtype}


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_mamba_ssm_folder_equals_transformers(tmp_path: Path, weights: str, tied: bool) -> None:
    folder = tmp_path / "m"
    config = {} if tied else {"tie_embeddings": False}
    model = mamba_ssm_folder(folder, weights=weights, config=config, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config.vocab_size == 48
    assert checkpoint.config.tie_embeddings == tied
    assert checkpoint.config.eos_token_id is None
    assert_holds(checkpoint, expected_tensors(model))


def test_mamba_ssm_defaults(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    mamba_ssm_folder(
        folder,
        weights="model.safetensors",
        config={"ssm_cfg": {"layer": "Mamba1", "dt_min": 0.01}, "vocab_size": 48},
        state_size=16,
        time_step_rank=2,
    )
    config = open_checkpoint(str(folder)).config
    assert (config.d_state, config.d_conv, config.d_inner, config.dt_rank) == (16, 4, 64, 2)
    assert (config.norm_eps, config.conv_bias, config.proj_bias) == (1e-5, True, False)


def test_huggingface_pickle_in_shards(tmp_path: Path) -> None:
    model = huggingface_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    state = dict(model.state_dict())
    files = {name: f"pytorch_model-0000{1 + ('layers.1' in name)}-of-00002.bin" for name in state}
    for file in set(files.values()):
        torch.save({name: state[name] for name in state if files[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    checkpoint = open_checkpoint(str(tmp_path))
    assert len(checkpoint.weight_files) == 2
    assert_holds(checkpoint, expected_tensors(model))


def test_pickle_of_the_old_format_is_read(tmp_path: Path) -> None:
    model = huggingface_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(dict(model.state_dict()), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_holds(open_checkpoint(str(tmp_path)), expected_tensors(model))


def test_model_without_head_has_no_prefix(tmp_path: Path) -> None:
    model = random_model()
    model.backbone.save_pretrained(tmp_path)
    assert not any(name.startswith("backbone.") for name in load_file(tmp_path / "model.safetensors"))
    assert_holds(open_checkpoint(str(tmp_path)), expected_tensors(model))


def test_config_defaults_are_those_of_transformers(tmp_path: Path) -> None:
    huggingface_folder(tmp_path, state_size=16, time_step_rank="auto")
    config = json.loads((tmp_path / "config.json").read_text())
    kept = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    full = open_checkpoint(str(tmp_path)).config
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in kept}))
    assert open_checkpoint(str(tmp_path)).config == full


def test_a_list_of_end_tokens_gives_the_first(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=[7, 9])
    assert open_checkpoint(str(tmp_path)).config.eos_token_id == 7


def test_tied_head_stored_again_is_ignored(tmp_path: Path) -> None:
    model = huggingface_folder(tmp_path)
    head = model.backbone.embeddings.weight.detach().clone()
    edit_tensors(tmp_path / "model.safetensors", lm_head__weight=head)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.tie_embeddings
    assert_holds(checkpoint, expected_tensors(model))


def test_tied_head_that_differs_is_untied_as_in_transformers(tmp_path: Path) -> None:
    model = huggingface_folder(tmp_path)
    head = model.backbone.embeddings.weight.detach() + 1.0
    edit_tensors(tmp_path / "model.safetensors", lm_head__weight=head)
    checkpoint = open_checkpoint(str(tmp_path))
    assert not checkpoint.config.tie_embeddings
    assert_holds(checkpoint, dict(MambaForCausalLM.from_pretrained(tmp_path).state_dict()))


def test_tied_head_without_embedding_stands_for_both(tmp_path: Path) -> None:
    model = huggingface_folder(tmp_path)
    weight = model.backbone.embeddings.weight.detach().clone()
    edit_tensors(tmp_path / "model.safetensors", backbone__embeddings__weight=None, lm_head__weight=weight)
    assert_holds(open_checkpoint(str(tmp_path)), expected_tensors(model))


def test_opening_reads_no_tensor_and_no_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_folder(tmp_path)
    reads: list[str] = []
    read, sha256 = weight_files.SafetensorsFile.read, weight_files.hashlib.file_digest
    monkeypatch.setattr(
        weight_files.SafetensorsFile, "read", lambda self, name: reads.append(name) or read(self, name)
    )
    monkeypatch.setattr(
        weight_files.hashlib, "file_digest", lambda *args: reads.append("file") or sha256(*args)
    )
    checkpoint = open_checkpoint(str(tmp_path))
    assert len(checkpoint.names) == 22
    assert reads == []
    checkpoint.load("backbone.norm_f.weight")
    assert reads == ["backbone.norm_f.weight"]
    assert checkpoint.digest == checkpoint.digest
    assert checkpoint.weight_files is checkpoint.weight_files
    assert reads == ["backbone.norm_f.weight", "file"]


def test_a_file_larger_than_memory_opens(tmp_path: Path) -> None:
    """A sparse file with an embedding of 256 GiB: one small tensor is read, the rest never touched."""
    huggingface_folder(tmp_path)
    edit_json(
        tmp_path / "config.json", vocab_size=1 << 24, hidden_size=1 << 12, expand=1, intermediate_size=8
    )
    shapes = MambaConfig(
        d_model=1 << 12, n_layer=2, vocab_size=1 << 24, d_state=5, d_conv=4, d_inner=8, dt_rank=3
    ).tensor_shapes()
    header, end = {}, 0
    for name in sorted(shapes, key=lambda name: name == "backbone.embeddings.weight"):
        start, end = end, end + 4 * math.prod(shapes[name])
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config.vocab_size == 1 << 24
    assert torch.equal(checkpoint.load("backbone.norm_f.weight"), torch.zeros(1 << 12))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_writing_to_a_loaded_tensor_changes_neither_file_nor_later_loads(
    tmp_path: Path, weights: str
) -> None:
    folder = tmp_path / "m"
    mamba_ssm_folder(folder, weights=weights)
    before = (folder / weights).read_bytes()
    checkpoint = open_checkpoint(str(folder))
    first = checkpoint.load("backbone.norm_f.weight")
    kept = first.clone()
    first.zero_()
    assert torch.equal(checkpoint.load("backbone.norm_f.weight"), kept)
    assert (folder / weights).read_bytes() == before


def test_digest_is_the_documented_one(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    sha256 = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert checkpoint.weight_files == {"model.safetensors": sha256}
    document = {"config": checkpoint.config.to_dict(), "files": checkpoint.weight_files}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert checkpoint.digest == hashlib.sha256(text.encode()).hexdigest()


def test_digest_follows_weights_and_config_but_not_the_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        huggingface_folder(tmp_path / name)
    first = open_checkpoint(str(tmp_path / "a")).digest
    edit_json(tmp_path / "b" / "config.json", use_cache=False)
    assert open_checkpoint(str(tmp_path / "b")).digest == first
    edit_json(tmp_path / "b" / "config.json", layer_norm_epsilon=1e-6)
    assert open_checkpoint(str(tmp_path / "b")).digest != first
    edit_tensors(tmp_path / "a" / "model.safetensors", backbone__norm_f__weight=torch.ones(32))
    assert open_checkpoint(str(tmp_path / "a")).digest != first


def test_source_is_what_was_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint("model")
    assert checkpoint.source == "model"
    (tmp_path / "demo").mkdir()
    assert open_checkpoint("demo").config.d_model == 256


def test_safetensors_are_preferred_to_a_pickle(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert list(open_checkpoint(str(tmp_path)).weight_files) == ["model.safetensors"]


def test_a_strided_tensor_of_a_pickle_is_made_contiguous(tmp_path: Path) -> None:
    model = huggingface_folder(tmp_path)
    state = dict(model.state_dict())
    name = "backbone.layers.0.mixer.in_proj.weight"
    (tmp_path / "model.safetensors").unlink()
    torch.save({**state, name: state[name].t().contiguous().t()}, tmp_path / "pytorch_model.bin")
    assert_holds(open_checkpoint(str(tmp_path)), expected_tensors(model))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("state-spaces/mamba-130m-hf", HubId("state-spaces/mamba-130m-hf")),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("model", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("/a/b", None),
        ("../b", None),
        ("a/b.", None),
        ("a--b/c", None),
        ("a/b@", None),
        ("a b/c", None),
    ],
)
def test_hub_ids(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected


def test_bundled_data_stays_in_its_folder() -> None:
    for name in ("../pyproject.toml", "/etc/hostname", ""):
        with pytest.raises(DatasetError, match="bad file name"):
            calib_data_path(name)
    with pytest.raises(DatasetError, match=r"`no-such\.jsonl` is missing"):
        calib_data_path("no-such.jsonl")


def test_bundled_data_is_looked_up_in_the_package_then_in_the_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmamba_cli import resources

    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "package")
    monkeypatch.setattr(resources, "_SOURCE_TREE", tmp_path / "tree")
    for root in ("tree", "package"):
        path = tmp_path / root / "calib_data" / "x.txt"
        path.parent.mkdir(parents=True)
        path.write_text(root)
        assert calib_data_path("x.txt") == path
    with pytest.raises(CheckpointError, match="bundled demo model is missing"):
        demo_model_path()


def test_resources_do_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, qmamba_cli.resources; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    model = huggingface_folder(tmp_path)
    state = {name: value.clone() for name, value in expected_tensors(model).items()}
    state["backbone.embedding.weight"] = state["backbone.embeddings.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds `backbone\.embeddings\.weight` twice"):
        open_checkpoint(str(tmp_path))

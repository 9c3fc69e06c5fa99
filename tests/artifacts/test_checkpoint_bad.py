"""Each thing that can be wrong with a source checkpoint has a message of its own, and runs no code."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.errors import CheckpointError


def refusal(source: Path | str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(source))
    assert caught.value.exit_code == 1
    assert "\n" not in caught.value.message
    return caught.value


@pytest.mark.parametrize("source", ["model", "./no/such", "", "a/b/c", "x\0y", "no such/name", "~nobody/x/y"])
def test_no_such_folder(source: str) -> None:
    error = refusal(source)
    assert f"model `{source}` not found: no such folder, and no Hub id by its form" in error.message
    assert "`demo`" in error.hint


def test_empty_folder(tmp_path: Path) -> None:
    assert "is an empty folder, expected model files" in refusal(tmp_path).message


def test_file_instead_of_folder(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    assert "is a file, expected a folder" in refusal(tmp_path / "model.safetensors").message


def test_no_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert f"no config.json in `{tmp_path}`" in refusal(tmp_path).message


@pytest.mark.parametrize(
    "text", [b"{", b"\xff\xfe", b"", b"[" * 100_000], ids=["cut", "not-utf8", "empty", "deep"]
)
def test_config_is_no_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "config.json").write_bytes(text)
    assert f"config.json of `{tmp_path}` is no JSON" in refusal(tmp_path).message


def test_config_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    assert "is no JSON object, got `list`" in refusal(tmp_path).message


def test_config_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    assert "config.json" in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "got `llama (LlamaForCausalLM)`"),
        ({"model_type": "mamba2"}, "got `mamba2`"),
        ({"model_type": "falcon_mamba", "architectures": []}, "got `falcon_mamba`"),
        ({"architectures": ["GPT2LMHeadModel"]}, "got `GPT2LMHeadModel`"),
        ({"model_type": "llama", "d_model": 8, "n_layer": 1}, "got `llama`"),
        ({"model_type": 3}, "got `3`"),
        ({}, "names no architecture"),
    ],
)
def test_other_architecture(tmp_path: Path, config: dict[str, Any], found: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = refusal(tmp_path)
    assert found in error.message
    assert "transformers' `mamba` or an original mamba_ssm checkpoint" in error.hint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "lacks `hidden_size`"),
        ({"hidden_size": "32"}, "bad `hidden_size`, got '32', expected an integer >= 1"),
        ({"num_hidden_layers": 0}, "bad `num_hidden_layers`, got 0"),
        ({"num_hidden_layers": True}, "bad `num_hidden_layers`, got True"),
        (
            {"num_hidden_layers": 2_000_000_000},
            "`n_layer` must be an integer from 1 to 4096, got 2000000000",
        ),
        ({"vocab_size": 10**400}, "bad `vocab_size`"),
        ({"hidden_act": "gelu"}, "bad `hidden_act`, got 'gelu', expected `silu`"),
        ({"layer_norm_epsilon": float("nan")}, "bad `layer_norm_epsilon`, got nan"),
        ({"layer_norm_epsilon": 2}, "`norm_eps` must lie in [0, 1), got 2"),
        ({"conv_kernel": 9}, "`d_conv` must be 2, 3 or 4, got 9"),
        ({"tie_word_embeddings": "yes"}, "bad `tie_word_embeddings`, got 'yes', expected true or false"),
        ({"eos_token_id": -1}, "bad `eos_token_id`, got -1"),
        ({"time_step_rank": "half"}, "bad `time_step_rank`, got 'half'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_value_in_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    huggingface_folder(tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    assert message in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "unsupported layer, got `Mamba2`, expected `Mamba1`"),
        ({"ssm_cfg": {"headdim": 64}}, "bad `headdim`, got 64"),
        ({"ssm_cfg": 3}, "bad `ssm_cfg`, got 3, expected an object"),
        ({"rms_norm": False}, "bad `rms_norm`, got False"),
        ({"attn_layer_idx": [1]}, "bad `attn_layer_idx`, got [1]"),
        ({"d_intermediate": 64}, "bad `d_intermediate`, got 64"),
        ({"pad_vocab_size_multiple": 0}, "bad `pad_vocab_size_multiple`, got 0"),
    ],
)
def test_bad_value_in_mamba_ssm_config(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = tmp_path / "m"
    mamba_ssm_folder(folder, weights="model.safetensors", config=changes)
    assert message in refusal(folder).message


def test_no_weights(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    error = refusal(tmp_path)
    assert f"no weights in `{tmp_path}`, expected one of `model.safetensors`" in error.message


def test_missing_shard(tmp_path: Path) -> None:
    huggingface_folder(tmp_path, shard="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].unlink()
    message = refusal(tmp_path).message
    assert f"1 of {len(shards)} shards of `{tmp_path}` are missing: `{shards[1].name}`" in message


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "model.bin", 3, ""])
def test_shard_index_names_another_place(tmp_path: Path, name: object) -> None:
    huggingface_folder(tmp_path / "m", shard="20KB")
    (tmp_path / "outside.safetensors").write_bytes(b"")
    edit_json(tmp_path / "m" / "model.safetensors.index.json", weight_map={"x": name})
    assert f"bad shard name, got `{name}`" in refusal(tmp_path / "m").message


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "expected JSON"), ("[]", "has no `weight_map`"), ("{}", "has no `weight_map`")],
)
def test_bad_shard_index(tmp_path: Path, text: str, message: str) -> None:
    huggingface_folder(tmp_path, shard="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert message in refusal(tmp_path).message


def test_missing_tensors(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    edit_tensors(
        tmp_path / "model.safetensors", backbone__layers__1__mixer__D=None, backbone__norm_f__weight=None
    )
    message = refusal(tmp_path).message
    assert "lacks 2 tensors" in message
    assert "`backbone.layers.1.mixer.D` (64,), `backbone.norm_f.weight` (32,)" in message


def test_untied_head_missing(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert "lacks 1 tensor, expected `lm_head.weight` (48, 32)" in refusal(tmp_path).message


def test_extra_tensors_are_named_up_to_four(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    extra = {f"extra_{i}": torch.zeros(i + 1) for i in range(6)}
    edit_tensors(tmp_path / "model.safetensors", **extra)
    message = refusal(tmp_path).message
    assert "has 6 tensors that its config has no place for, got `extra_0` (1,), " in message
    assert "`extra_3` (4,), and 2 more" in message
    assert "extra_4" not in message


def test_bias_the_config_denies(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    edit_json(tmp_path / "config.json", use_conv_bias=False)
    message = refusal(tmp_path).message
    assert "`backbone.layers.0.mixer.conv1d.bias` (64,)" in message


def test_mis_shaped_tensors(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    edit_json(tmp_path / "config.json", state_size=6)
    message = refusal(tmp_path).message
    assert "has 4 tensors of a wrong shape" in message
    assert "`backbone.layers.0.mixer.A_log` (64, 5), expected (64, 6)" in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn], ids=str)
def test_tensor_that_is_not_floating(tmp_path: Path, dtype: torch.dtype) -> None:
    huggingface_folder(tmp_path)
    name = "backbone.layers.0.mixer.in_proj.weight"
    edit_tensors(tmp_path / "model.safetensors", **{name: torch.zeros(128, 32).to(dtype)})
    error = refusal(tmp_path)
    assert f"1 tensor of an unsupported dtype, got `{name}`" in error.message
    assert "quantized checkpoint" in error.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_values_that_are_not_finite(tmp_path: Path, value: float, weights: str) -> None:
    name = "backbone.layers.1.mixer.D"
    model = huggingface_folder(tmp_path)
    state = {name: tensor.clone() for name, tensor in expected_tensors(model).items()}
    state[name][5] = value
    (tmp_path / "model.safetensors").unlink()
    (save_file if weights == "model.safetensors" else torch.save)(state, tmp_path / weights)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.load("backbone.layers.0.mixer.D").shape == (64,)
    counts = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
    with pytest.raises(CheckpointError, match=f"`{name}` in `{weights}` of .* is not finite, got {counts}"):
        checkpoint.load(name)


def test_unknown_tensor(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no tensor `lm_head\.weight`"):
        open_checkpoint(str(tmp_path)).load("lm_head.weight")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    huggingface_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    error = refusal(tmp_path)
    assert f"`{name}` of `{tmp_path}` is a Git LFS pointer" in error.message
    assert "git lfs pull" in error.hint


def test_file_that_shrinks_while_open(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    os.truncate(tmp_path / "model.safetensors", 3000)
    with pytest.raises(CheckpointError, match=r"`model\.safetensors` of .* cannot be read, got \d+ bytes"):
        for name in checkpoint.names:
            checkpoint.load(name)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read, got No such file"):
        checkpoint.load("backbone.norm_f.weight")
    with pytest.raises(CheckpointError, match="cannot be read, got `No such file"):
        _ = checkpoint.digest


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.floats(0, 1, exclude_max=True))
def test_truncated_safetensors(tmp_path: Path, keep: float) -> None:
    content = _model_bytes(tmp_path, "model.safetensors")
    (tmp_path / "m" / "model.safetensors").write_bytes(content[: int(keep * len(content))])
    message = refusal(tmp_path / "m").message
    assert "`model.safetensors` of" in message
    assert "expected a whole safetensors file" in message


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keep=st.floats(0, 0.99))
def test_truncated_pickle(tmp_path: Path, keep: float) -> None:
    content = _model_bytes(tmp_path, "pytorch_model.bin")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(content[: int(keep * len(content))])
    assert "`pytorch_model.bin` of" in refusal(tmp_path / "m").message


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_header_or_pickle_never_escapes(tmp_path: Path, data: st.DataObject) -> None:
    """One changed byte among the first 1500: an error of ours, or a model that still opens."""
    name = data.draw(st.sampled_from(["model.safetensors", "pytorch_model.bin"]))
    content = bytearray(_model_bytes(tmp_path, name))
    content[data.draw(st.integers(0, 1499))] ^= data.draw(st.integers(1, 255))
    (tmp_path / "m" / name).write_bytes(content)
    try:
        checkpoint = open_checkpoint(str(tmp_path / "m"))
    except CheckpointError as error:
        assert error.message
    else:
        # One more where the changed byte parts a tied head from the embedding it was stored with.
        assert len(checkpoint.names) in (22, 23)


def _model_bytes(tmp_path: Path, weights: str) -> bytes:
    """Bytes of one random model's weight file; its folder ``m`` then holds the config only."""
    folder, original = tmp_path / "m", tmp_path / f"original-{weights}"
    if not original.exists():
        model = huggingface_folder(folder)
        original.write_bytes((folder / "model.safetensors").read_bytes())
        if weights.endswith(".bin"):
            torch.save(dict(model.state_dict()), original)
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.bin")):
        file.unlink()
    return original.read_bytes()


class _RunsCode:
    """Unpickled without restrictions, creates a file."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("how", ["zip", "old", "bare", "bare-2"])
@pytest.mark.parametrize("kind", ["huggingface", "mamba_ssm"])
def test_pickle_that_runs_code_is_refused(tmp_path: Path, how: str, kind: str) -> None:
    folder, marker = tmp_path / "m", tmp_path / "executed"
    if kind == "huggingface":
        model = huggingface_folder(folder)
        (folder / "model.safetensors").unlink()
    else:
        model = mamba_ssm_folder(folder, weights="pytorch_model.bin")
    payload = {**model.state_dict(), "extra": _RunsCode(f"touch {marker}")}
    path = folder / "pytorch_model.bin"
    if how.startswith("bare"):
        path.write_bytes(pickle.dumps({"extra": payload["extra"]}, protocol=2 if how == "bare-2" else None))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=how == "zip")
    error = refusal(folder)
    assert not marker.exists()
    assert "`pytorch_model.bin` of" in error.message
    assert "is refused because reading it could run code" in error.message
    assert "safetensors" in error.hint
    if how == "zip":
        assert f"got a reference to `{os.system.__module__}.system`" in error.message
    # The payload is real: without restrictions it does create the file.
    if how == "bare":
        pickle.loads(path.read_bytes())
        assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "holds no state dict, got `list`"),
        (
            {"state_dict": {"a": torch.zeros(2)}},
            "bad entry `state_dict`, got `dict`, expected a dense tensor",
        ),
        ({3: torch.zeros(2)}, "bad entry `3`"),
        ({"a": torch.eye(3).to_sparse()}, "bad entry `a`, got `Tensor`, expected a dense tensor"),
    ],
)
def test_pickle_of_something_else(tmp_path: Path, content: object, message: str) -> None:
    huggingface_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert message in refusal(tmp_path).message


def test_random_model_has_no_equal_tensors() -> None:
    """The comparisons with transformers' tensors would notice two names exchanged."""
    tensors = list(expected_tensors(random_model()).values())
    for i, first in enumerate(tensors):
        assert not any(torch.equal(first, second) for second in tensors[i + 1 :])


def test_a_header_beyond_any_model_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tensors, or a header of a claimed hundred megabytes: refused before the library parses them."""
    huggingface_folder(tmp_path)
    monkeypatch.setattr("qmamba_cli.artifacts.weight_files.safe_open", lambda *_, **__: pytest.fail("parsed"))
    row = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    many = b"{" + b",".join(b'"%d":%s' % (number, row) for number in range(5_000)) + b"}"
    for header in (many, b" " * (5 << 20)):
        (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        assert "more than any model has" in refusal(tmp_path).message

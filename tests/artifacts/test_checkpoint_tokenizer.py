"""Tokenizer files: shipped, converted, named elsewhere, missing, damaged or too large for the model."""

import json
from pathlib import Path

import pytest
from checkpoint_models import add_demo_tokenizer, huggingface_folder, mamba_ssm_folder
from tokenizers import Tokenizer

from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.errors import CheckpointError
from qmamba_cli.resources import demo_model_path


def write_gpt2_tokenizer(path: Path) -> None:
    """A byte-level BPE in the older form: three merges over the letters of `hello`."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    symbols = [*sorted(bytes_to_unicode().values()), "he", "ll", "hell", "<|endoftext|>"]
    (path / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(symbols)}))
    (path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\n")
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))


def test_files_are_taken_as_they_are(tmp_path: Path) -> None:
    huggingface_folder(tmp_path, vocab_size=8192)
    add_demo_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    files = open_checkpoint(str(tmp_path)).tokenizer_files
    assert list(files) == ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    for name, content in files.items():
        assert content == (tmp_path / name).read_bytes()


def test_demo_has_its_tokenizer() -> None:
    files = open_checkpoint("demo").tokenizer_files
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.get_vocab_size() == 8192


def test_tokenizer_in_an_older_form_is_converted(tmp_path: Path) -> None:
    huggingface_folder(tmp_path, vocab_size=264)
    write_gpt2_tokenizer(tmp_path)
    files = open_checkpoint(str(tmp_path)).tokenizer_files
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    encoding = Tokenizer.from_str(files["tokenizer.json"].decode()).encode("hello")
    assert encoding.tokens == ["hell", "o"]
    assert not (tmp_path / "tokenizer.json").exists()


def test_tokenizer_from_another_folder(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    mamba_ssm_folder(folder, weights="pytorch_model.bin", config={"vocab_size": 8190}, vocab_size=8192)
    files = open_checkpoint(str(folder), tokenizer=str(demo_model_path())).tokenizer_files
    assert files["tokenizer.json"] == (demo_model_path() / "tokenizer.json").read_bytes()
    assert open_checkpoint(str(folder), tokenizer="demo").tokenizer_files == files


def test_missing_tokenizer_shows_when_it_is_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    mamba_ssm_folder(folder, weights="pytorch_model.bin")
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.load("backbone.norm_f.weight").shape == (32,)
    with pytest.raises(CheckpointError, match=r"no tokenizer in .*, expected `tokenizer\.json`") as caught:
        _ = checkpoint.tokenizer_files
    assert "`--tokenizer`" in caught.value.hint


@pytest.mark.parametrize("name", ["nowhere", ""])
def test_named_tokenizer_is_missing(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"tokenizer `{name}` not found"):
        _ = open_checkpoint("demo", tokenizer=name).tokenizer_files


@pytest.mark.parametrize("text", ["{", "{}", '{"model": 3}'])
def test_damaged_tokenizer(tmp_path: Path, text: str) -> None:
    huggingface_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"`tokenizer\.json` of .* is damaged"):
        _ = open_checkpoint(str(tmp_path)).tokenizer_files


def test_damaged_companion(tmp_path: Path) -> None:
    huggingface_folder(tmp_path, vocab_size=8192)
    add_demo_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"`tokenizer_config\.json` of .* is no JSON"):
        _ = open_checkpoint(str(tmp_path)).tokenizer_files


def test_tokenizer_that_cannot_be_converted(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no sentencepiece model")
    with pytest.raises(CheckpointError, match=r"the tokenizer of .* cannot be converted"):
        _ = open_checkpoint(str(tmp_path)).tokenizer_files


def test_code_beside_a_tokenizer_is_not_run(tmp_path: Path) -> None:
    huggingface_folder(tmp_path, vocab_size=264)
    write_gpt2_tokenizer(tmp_path)
    marker = tmp_path / "executed"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass T: pass\n")
    settings = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        files = open_checkpoint(str(tmp_path)).tokenizer_files
    except CheckpointError as error:
        assert "cannot be converted" in error.message
    else:
        assert "tokenizer.json" in files
    assert not marker.exists()


def test_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    huggingface_folder(tmp_path)
    add_demo_tokenizer(tmp_path)
    with pytest.raises(
        CheckpointError, match="does not fit the model, got token id 8191, expected ids below the 48"
    ):
        _ = open_checkpoint(str(tmp_path)).tokenizer_files

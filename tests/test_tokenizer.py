"""The tokenizer against transformers, and streaming decode against decoding everything at once."""

import json
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors

from qmamba_cli.errors import CheckpointError, DatasetError
from qmamba_cli.resources import demo_model_path
from qmamba_cli.tokenizer import CONFIG_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_FILE, Tokenizer

TEXTS = [
    "",
    " ",
    "Hello world",
    " Hello\n\n  world \t",
    "Ünïcödé 東京 ❄️ 👩‍👩‍👧‍👦",
    "<|endoftext|>Once upon a time<|endoftext|>",
    "a <|endoftext|> b <pad> the one",
]


def demo_files() -> dict[str, bytes]:
    folder = demo_model_path()
    return {name: (folder / name).read_bytes() for name in (TOKENIZER_FILE, CONFIG_FILE)}


def changed(files: Mapping[str, bytes], name: str, **values: Any) -> dict[str, bytes]:
    """The files with some keys of one JSON file replaced; None removes a key."""
    content = json.loads(files.get(name, b"{}"))
    content.update(values)
    content = {key: value for key, value in content.items() if value is not None}
    return {**files, name: json.dumps(content).encode()}


def without_added_tokens(files: Mapping[str, bytes]) -> dict[str, bytes]:
    return changed(files, TOKENIZER_FILE, added_tokens=[])


def with_bos(files: Mapping[str, bytes]) -> dict[str, bytes]:
    backend = BackendTokenizer.from_str(files[TOKENIZER_FILE].decode())
    backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return {**files, TOKENIZER_FILE: backend.to_str().encode()}


def with_truncation(files: Mapping[str, bytes]) -> dict[str, bytes]:
    backend = BackendTokenizer.from_str(files[TOKENIZER_FILE].decode())
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=16)
    return {**files, TOKENIZER_FILE: backend.to_str().encode()}


@cache
def demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_files(demo_files())


@pytest.fixture
def demo() -> Tokenizer:
    return demo_tokenizer()


VARIANTS = {
    "demo": demo_files(),
    "bos-template": with_bos(demo_files()),
    "truncation-and-padding-in-the-file": with_truncation(demo_files()),
    "add_bos_token-is-not-read": changed(demo_files(), CONFIG_FILE, add_bos_token=True),
    "tokens-as-objects": changed(
        demo_files(), CONFIG_FILE, bos_token={"__type": "AddedToken", "content": "the"}
    ),
    "older-file-speaks-last": changed(demo_files(), SPECIAL_TOKENS_FILE, bos_token="a", eos_token="b"),
    "listed-tokens-silence-the-older-file": changed(
        changed(demo_files(), SPECIAL_TOKENS_FILE, eos_token="b"),
        CONFIG_FILE,
        added_tokens_decoder={"0": {"content": "<|endoftext|>", "special": True}},
    ),
    "special-tokens-named-only-by-the-configuration": changed(
        without_added_tokens(demo_files()), CONFIG_FILE, pad_token="<pad>", mask_token="on"
    ),
    "no-bos": changed(demo_files(), CONFIG_FILE, bos_token=None),
    "gpt-neox-names-no-tokens": changed(
        demo_files(), CONFIG_FILE, tokenizer_class="GPTNeoXTokenizer", bos_token=None, eos_token=None
    ),
    "no-limit": changed(demo_files(), CONFIG_FILE, model_max_length=int(1e30)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for file, content in VARIANTS[name].items():
        (tmp_path / file).write_bytes(content)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_files(VARIANTS[name])
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.model_max_length or int(1e30)) == theirs.model_max_length
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]


def test_special_tokens_are_added_only_where_the_file_says_so(demo: Tokenizer) -> None:
    assert not demo.adds_special_tokens
    assert demo.encode("Hello") == demo.encode("Hello", special_tokens=False)
    bos = Tokenizer.from_files(with_bos(demo_files()))
    assert bos.adds_special_tokens
    assert bos.encode("Hello") == [0, *demo.encode("Hello")]
    assert bos.encode("Hello", special_tokens=False) == demo.encode("Hello")


def test_sizes_and_prefix(demo: Tokenizer) -> None:
    assert demo.vocab_size == 8192
    assert demo.model_max_length == 2048
    assert demo.prefix_id == demo.bos_id == 0
    only_eos = Tokenizer.from_files(changed(demo_files(), CONFIG_FILE, bos_token=None, eos_token="the"))
    assert only_eos.bos_id is None
    assert only_eos.prefix_id == only_eos.eos_id == demo.encode("the")[0]
    neither = Tokenizer.from_files({TOKENIZER_FILE: demo_files()[TOKENIZER_FILE]})
    assert neither.prefix_id is None


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, "tokenizer: got no files, expected `tokenizer.json`"),
        ({CONFIG_FILE: b"{}"}, "tokenizer: got `tokenizer_config.json`, expected `tokenizer.json`"),
        ({TOKENIZER_FILE: b""}, "`tokenizer.json` cannot be read"),
        ({TOKENIZER_FILE: b"{}"}, "`tokenizer.json` cannot be read"),
        ({TOKENIZER_FILE: b"\xff\xfe"}, "`tokenizer.json` cannot be read"),
        ({TOKENIZER_FILE: b'{"model": {"type": "no such model"}}'}, "`tokenizer.json` cannot be read"),
        ({**demo_files(), CONFIG_FILE: b"{"}, "`tokenizer_config.json` cannot be read"),
        ({**demo_files(), CONFIG_FILE: b"[" * 100_000}, "`tokenizer_config.json` cannot be read"),
        ({**demo_files(), CONFIG_FILE: b"[]"}, "`tokenizer_config.json` cannot be used, got a JSON list"),
        ({**demo_files(), SPECIAL_TOKENS_FILE: b"1"}, "`special_tokens_map.json` cannot be used"),
    ],
)
def test_unusable_files_are_named(files: dict[str, bytes], said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer.from_files(files)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_half_a_surrogate_pair_is_refused(demo: Tokenizer) -> None:
    with pytest.raises(DatasetError, match="text 1: got a lone surrogate"):
        demo.encode_batch(["fine", "broken \udc80"])


def streamed(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> str:
    decoder = tokenizer.stream_decoder(skip_special_tokens=skip_special_tokens)
    pieces = [decoder.push(token) for token in ids]
    return "".join(pieces) + decoder.flush()


@settings(deadline=None, max_examples=60)
@given(ids=st.lists(st.integers(0, 8191), max_size=40), skip=st.booleans())
def test_stream_of_any_tokens_equals_the_whole(ids: list[int], skip: bool) -> None:
    tokenizer = demo_tokenizer()
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert streamed(tokenizer, ids, skip_special_tokens=skip) == whole


@settings(deadline=None, max_examples=60)
@given(data=st.lists(st.integers(1, 256), max_size=40))
def test_stream_of_any_bytes_equals_the_whole(data: list[int]) -> None:
    """Ids 1 to 256 of the demo model are the single bytes, most sequences of which are no UTF-8."""
    tokenizer = demo_tokenizer()
    assert streamed(tokenizer, data) == tokenizer.decode(data)


def test_stream_gives_whole_characters_as_soon_as_they_are_whole(demo: Tokenizer) -> None:
    decoder = demo.stream_decoder()
    ids = demo.encode("é東!")
    assert len(ids) > 3
    pieces = [decoder.push(token) for token in ids]
    assert [piece for piece in pieces if piece] == ["é", "東", "!"]
    assert pieces[-1] == "!"
    assert decoder.flush() == ""
    assert decoder.push(demo.encode("東")[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert "".join(decoder.push(token) for token in ids) == "é東!"


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("ab é東"), max_size=20), start=st.booleans())
def test_stream_of_a_sentencepiece_vocabulary_equals_the_whole(text: str, start: bool) -> None:
    """Metaspace and byte fallback: the first token loses its space, bytes of one character are one run."""
    vocab = {"<s>": 0, "▁": 1, "a": 2, "b": 3, "ab": 4, "▁a": 5}
    vocab |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    backend = BackendTokenizer(models.BPE(vocab, [("a", "b"), ("▁", "a")], byte_fallback=True))
    backend.add_special_tokens(["<s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer = Tokenizer(backend)
    ids = [0] * start + tokenizer.encode(text)
    assert streamed(tokenizer, ids) == tokenizer.decode(ids)


def test_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, qmamba_cli.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

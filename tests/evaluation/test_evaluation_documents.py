"""Reading the texts and cutting them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmamba_cli.errors import DatasetError, UsageError
from qmamba_cli.evaluation import documents
from qmamba_cli.evaluation.documents import (
    cut_windows,
    last_word_split,
    load_lambada_openai,
    perplexity_windows,
    read_text_documents,
)
from qmamba_cli.evaluation.tasks import TASKS, task_by_name
from qmamba_cli.resources import demo_model_path
from qmamba_cli.tokenizer import TOKENIZER_FILE, Tokenizer


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_texts_come_in_file_order_unchanged(tmp_path: Path) -> None:
    texts = ["one two", "line\nbreak", "line\u2028separator", "", " spaces  kept ", "carriage\r\nreturn"]
    path = write_lines(tmp_path / "a.jsonl", *({"text": text, "id": 1} for text in texts))
    path.write_bytes(path.read_bytes() + b"\n   \n")
    assert read_text_documents(path) == texts


def test_jsonl_column_can_be_named(tmp_path: Path) -> None:
    assert read_text_documents(write_lines(tmp_path / "a.jsonl", {"body": "b"}), column="body") == ["b"]


def test_txt_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\n\nthree".encode())
    assert read_text_documents(tmp_path / "a.txt") == ["one\r\ntwo\n\nthree"]


@pytest.mark.parametrize(
    ("second_line", "said"),
    [
        (b"{", "line 2"),
        (b"[1]", "line 2"),
        (b'{"body": "x"}', "line 2: no field `text`"),
        (b'{"text": 7}', "line 2"),
        (b'{"text": null}', "line 2"),
        (b'{"text": "\\ud800"}', "line 2"),
        (b"\xff", "line 2"),
        (b"[" * 100_000, "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, second_line: bytes, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + second_line + b"\n")
    with pytest.raises(DatasetError) as caught:
        read_text_documents(path)
    assert said in caught.value.message
    assert "bad.jsonl" in caught.value.message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.jsonl", None, "got no such file"),
        ("a.parquet", b"", "expected a .jsonl or .txt file"),
        ("empty.jsonl", b"", "no text"),
        ("empty.txt", b"", "got no text"),
        ("hollow.jsonl", b'{"text": ""}\n', "got no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
    ],
)
def test_an_unusable_file_is_explained(tmp_path: Path, name: str, content: bytes | None, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        read_text_documents(path)
    assert said in caught.value.message
    assert name in caught.value.message


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(DatasetError, match="got a folder"):
        read_text_documents(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("text", "context", "continuation"),
    [
        ("he saw Ann", "he saw", " Ann"),
        ("Ann", "", " Ann"),
        ("", "", " "),
        ("he saw ", "he saw", " "),
        ("he saw  ", "he saw", "  "),
        ("he  saw  Ann", "he  saw", "  Ann"),
        ("he saw\n\n Ann", "he saw", "\n\n Ann"),
        ("he saw\nAnn", "he", " saw\nAnn"),
        (" Ann", "", " Ann"),
        ("  Ann", "", "  Ann"),
        ("he saw\u00a0 Ann", "he saw", "\u00a0 Ann"),
    ],
)
def test_last_word_split(text: str, context: str, continuation: str) -> None:
    assert last_word_split(text) == (context, continuation)


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("ab \n\té"), max_size=12))
def test_last_word_split_keeps_every_character(text: str) -> None:
    context, continuation = last_word_split(text)
    assert context + continuation == (text if " " in text else " " + text)
    assert context == context.rstrip()
    assert continuation.split(" ")[-1] == text.split(" ")[-1]


def test_windows_do_not_overlap_and_the_last_partial_one_is_dropped() -> None:
    windows = cut_windows(range(11), 4)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_windows_need_text_and_a_length() -> None:
    with pytest.raises(DatasetError, match="got 3 tokens, expected at least one window of 4"):
        cut_windows([1, 2, 3], 4)
    with pytest.raises(UsageError, match="got 1, expected at least 2"):
        cut_windows([1, 2, 3], 1)


def test_running_text_is_joined_by_a_blank_line_and_tokenized_whole() -> None:
    tokenizer = Tokenizer.from_files({TOKENIZER_FILE: (demo_model_path() / TOKENIZER_FILE).read_bytes()})
    texts = ["The first text.", "The second one, which is longer."]
    ids = tokenizer.encode("The first text.\n\nThe second one, which is longer.", special_tokens=False)
    assert perplexity_windows(tokenizer, texts, len(ids)).tolist() == [ids]


def test_lambada_asks_for_the_dataset_that_lm_eval_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: str, offline: bool, hint: str) -> dict[str, list[str]]:
        asked.extend([*names, offline])
        assert "--task-data FILE.jsonl" in hint
        assert "lastword" in hint
        return {"text": ["one two", "three four"]}

    monkeypatch.setattr(documents, "load_hub_dataset", load)
    assert load_lambada_openai() == ["one two", "three four"]
    assert asked == ["EleutherAI/lambada_openai", "default", "test", False]


def test_lambada_without_hub_or_cache_names_the_local_ways(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(DatasetError) as caught:
        load_lambada_openai(offline=True)
    assert "`EleutherAI/lambada_openai`" in caught.value.message
    assert "--task-data FILE.jsonl" in caught.value.hint
    assert "--task lastword" in caught.value.hint


def test_an_unknown_task_lists_the_tasks() -> None:
    assert task_by_name("perplexity") is TASKS["perplexity"]
    with pytest.raises(UsageError) as caught:
        task_by_name("hellaswag")
    assert caught.value.message == (
        "unknown task `hellaswag`, expected one of lambada_openai, lastword, perplexity"
    )

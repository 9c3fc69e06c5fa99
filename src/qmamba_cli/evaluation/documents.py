"""Texts to evaluate on: files, the bundled passages and LAMBADA, and how they are cut."""

from collections.abc import Sequence
from pathlib import Path

import torch

from qmamba_cli.errors import DatasetError, UsageError
from qmamba_cli.evaluation.tasks import TASKS
from qmamba_cli.resources import calib_data_path
from qmamba_cli.text.documents import open_documents
from qmamba_cli.text.hub import load_hub_dataset
from qmamba_cli.tokenizer import Tokenizer

_SUFFIXES = (".jsonl", ".txt")
_FILE_HINT = "name a file with `--task-data FILE.jsonl` (a JSON object with a `text` field a line)"
_LOCAL_HINT = f"{_FILE_HINT}, or use the bundled `--task lastword`"


def read_text_documents(path: Path, *, column: str = "text") -> list[str]:
    """The texts of a local file, in file order.

    Args:
        path: a ``.jsonl`` file, one text a line (blank lines are passed over), or a ``.txt`` file, which is
            one text. UTF-8; line ends are kept.
        column: the field of a jsonl line that holds the text.

    Raises:
        DatasetError: the file is missing, unreadable, empty or of another kind, or a line is no JSON object
            or has no such text; the message names the line.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise DatasetError(f"task data: got `{path}`, expected a .jsonl or .txt file", hint=_FILE_HINT)
    if not path.is_file():
        state = "a folder" if path.is_dir() else "no such file"
        raise DatasetError(f"task data `{path}`: got {state}, expected a text file", hint=_FILE_HINT)
    documents = open_documents(str(path), text_column=column)
    texts = [documents[row] for row in range(len(documents))]
    if not any(texts):
        raise DatasetError(
            f"task data `{path}`: got no text, expected at least one document", hint=_FILE_HINT
        )
    return texts


def load_lastword() -> list[str]:
    """The passages that ship with the package, in file order.

    Raises:
        QmambaError: the file is not where the package put it.
    """
    return read_text_documents(calib_data_path("lastword.jsonl"))


def load_lambada_openai(*, offline: bool = False) -> list[str]:
    """The 5 153 passages of LAMBADA in OpenAI's version, from the Hub or its local cache.

    Args:
        offline: use only what is cached.

    Raises:
        DatasetError: the Hub does not answer within ten seconds and no copy is cached.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners", section 3.3; the Hub's
        ``EleutherAI/lambada_openai``, which lm-eval reads too.
    """
    task = TASKS["lambada_openai"]
    assert task.dataset_path is not None and task.test_split is not None
    rows = load_hub_dataset(
        task.dataset_path, task.dataset_name, task.test_split, offline=offline, hint=_LOCAL_HINT
    )
    return [str(text) for text in rows["text"]]


def last_word_split(text: str) -> tuple[str, str]:
    r"""Context and continuation of a passage whose last word is predicted.

    Words are what single spaces separate, so that a text that ends with a space has an empty last word.
    White space at the end of the context moves to the continuation, because tokens begin with their space.
    Either part keeps every character: context + continuation is the text, with a space in front where the
    text is a single word.

    >>> last_word_split("he called out to Ann")
    ('he called out to', ' Ann')
    >>> last_word_split("he called:\n Ann")
    ('he called:', '\n Ann')
    >>> last_word_split("Ann")
    ('', ' Ann')

    Source: lm-eval 0.4.13, ``tasks/lambada/lambada_openai.yaml`` and ``TemplateLM._encode_pair``.
    """
    words = text.split(" ")
    context, continuation = " ".join(words[:-1]), " " + words[-1]
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def cut_windows(tokens: Sequence[int], seqlen: int) -> torch.Tensor:
    """Consecutive non-overlapping windows; the last partial one is dropped.

    Args:
        tokens: the ids of running text.
        seqlen: tokens a window, at least 2, as the first one is not scored.

    Returns:
        (len(tokens) // seqlen, seqlen) int64.

    Raises:
        UsageError: ``seqlen`` is less than 2.
        DatasetError: there is not one window of tokens.
    """
    if seqlen < 2:
        raise UsageError(f"`--seqlen`: got {seqlen}, expected at least 2")
    windows = len(tokens) // seqlen
    if windows == 0:
        raise DatasetError(
            f"text too short: got {len(tokens)} tokens, expected at least one window of {seqlen}",
            hint="give more text, or a smaller `--seqlen`",
        )
    return torch.tensor(tokens[: windows * seqlen], dtype=torch.int64).view(windows, seqlen)


def perplexity_windows(tokenizer: Tokenizer, texts: Sequence[str], seqlen: int) -> torch.Tensor:
    """Windows of running text: the texts joined by a blank line, tokenized whole without special tokens.

    Returns:
        (windows, seqlen) int64.

    Raises:
        UsageError: ``seqlen`` is less than 2.
        DatasetError: the text is shorter than one window.
    """
    return cut_windows(tokenizer.encode("\n\n".join(texts), special_tokens=False), seqlen)

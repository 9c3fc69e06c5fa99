"""The batches of a task, which every command that scores one reads in the same way."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qmamba_cli.errors import UsageError
from qmamba_cli.evaluation.batches import Batch, last_word_requests, request_batches, window_batches
from qmamba_cli.evaluation.documents import (
    load_lambada_openai,
    load_lastword,
    perplexity_windows,
    read_text_documents,
)
from qmamba_cli.evaluation.tasks import Task
from qmamba_cli.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskBatches:
    """What is scored.

    Attributes:
        batches: at least one.
        texts: the documents of a last-word task by their index; empty for windows of running text.
        original: documents (windows) there were before the limit.
    """

    batches: Sequence[Batch]
    texts: Sequence[str]
    original: int


def require_text(task: Task, data: Path | None) -> None:
    """Refuse a task of running text without a text.

    Raises:
        UsageError: it has none.
    """
    if not task.is_last_word and data is None:
        raise UsageError(
            f"`--task {task.name}` needs a text", hint="add `--task-data FILE`, a .txt or a .jsonl"
        )


def task_batches(
    task: Task,
    tokenizer: Tokenizer,
    *,
    data: Path | None,
    text_column: str,
    limit: int | None,
    batch_size: int,
    seqlen: int,
    offline: bool,
) -> TaskBatches:
    """Read a task's texts and make batches of them.

    Args:
        task: the task.
        tokenizer: of the model.
        data: a file in place of the task's own texts.
        text_column: field that holds the text of a .jsonl.
        limit: documents (windows) to score, or None for all.
        batch_size: documents a forward pass.
        seqlen: tokens a window of running text.
        offline: use only the Hub's local cache.

    Raises:
        DatasetError: the texts are missing or malformed.
    """
    if data is not None:
        texts = read_text_documents(data, column=text_column)
    elif task.name == "lastword":
        texts = load_lastword()
    else:
        texts = load_lambada_openai(offline=offline)
    if not task.is_last_word:
        windows = perplexity_windows(tokenizer, texts, seqlen)
        batches = window_batches(windows[:limit], batch_size=batch_size)
        return TaskBatches(batches=batches, texts=(), original=len(windows))
    chosen = texts[:limit]
    batches = request_batches(last_word_requests(tokenizer, chosen), batch_size=batch_size)
    return TaskBatches(batches=batches, texts=chosen, original=len(texts))

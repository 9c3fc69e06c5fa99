"""The built-in tasks: one frozen row each."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qmamba_cli.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task.

    Attributes:
        name: as in ``--task``.
        summary: one line for help.
        output_type: lm-eval's word for what the model is asked.
        higher_is_better: the metrics in the order of the results, and which way is up.
        version: raised when a change makes scores incomparable.
        dataset_path: where the texts come from unless a file is named; None where one must be.
        dataset_name: the configuration of that dataset, or None.
        test_split: the split of that dataset, or None.
    """

    name: str
    summary: str
    output_type: str
    higher_is_better: Mapping[str, bool]
    version: float
    dataset_path: str | None = None
    dataset_name: str | None = None
    test_split: str | None = None

    @property
    def is_last_word(self) -> bool:
        """Whether each text is one document whose last word is predicted."""
        return self.output_type == "loglikelihood"

    def config(self, dataset: str | None = None) -> dict[str, Any]:
        """The task as lm-eval's results file describes it.

        Args:
            dataset: the file that was read in place of the task's own texts, or None.
        """
        own = dataset is None
        values: dict[str, Any] = {
            "task": self.name,
            "dataset_path": self.dataset_path if own else dataset,
            "dataset_name": self.dataset_name if own else None,
            "test_split": self.test_split if own else None,
            "output_type": self.output_type,
            "num_fewshot": 0,
            "metric_list": [
                {"metric": metric, "higher_is_better": up} for metric, up in self.higher_is_better.items()
            ],
            "metadata": {"version": self.version},
        }
        if self.is_last_word:
            values["doc_to_text"] = "{{text.split(' ')[:-1]|join(' ')}}"
            values["doc_to_target"] = "{{' '+text.split(' ')[-1]}}"
        return values


_LAST_WORD_METRICS = MappingProxyType({"perplexity": False, "acc": True})

_ROWS = (
    Task(
        name="lambada_openai",
        summary="last word of a passage, LAMBADA in OpenAI's version, from the Hub or --task-data",
        output_type="loglikelihood",
        higher_is_better=_LAST_WORD_METRICS,
        version=1.0,
        dataset_path="EleutherAI/lambada_openai",
        dataset_name="default",
        test_split="test",
    ),
    Task(
        name="lastword",
        summary="last word of a passage, the bundled passages in LAMBADA's format",
        output_type="loglikelihood",
        higher_is_better=_LAST_WORD_METRICS,
        version=1.0,
        dataset_path="lastword.jsonl",
    ),
    Task(
        name="perplexity",
        summary="perplexity over windows of running text, from --task-data",
        output_type="loglikelihood_rolling",
        higher_is_better=MappingProxyType(
            {"perplexity": False, "bits_per_token": False, "top1_acc": True, "kl": False, "same_top1": True}
        ),
        version=1.0,
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({row.name: row for row in _ROWS})


def task_by_name(name: str) -> Task:
    """The built-in task called ``name``.

    Raises:
        UsageError: there is no such task; the message lists the tasks.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise UsageError(
            f"unknown task `{name}`, expected one of {', '.join(TASKS)}",
            hint="`lambada_openai` reads any file in its format: `--task-data FILE.jsonl`",
        ) from None

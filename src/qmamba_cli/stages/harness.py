"""Tasks of lm-eval beside the built-in ones: a model in one mode to lm-eval's own results."""

import json
import time
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from qmamba_cli.artifacts.manifest import library_versions, tool_version
from qmamba_cli.errors import DatasetError, DeviceError, QmambaError, UsageError
from qmamba_cli.evaluation.results import json_safe
from qmamba_cli.evaluation.tasks import TASKS
from qmamba_cli.model.generate import generate
from qmamba_cli.stages.common import within_gpu_memory
from qmamba_cli.stages.run import LoadedModel, TaskOptions

_EXTRA = "`pip install 'qmamba-cli[lm-eval]'`"


def is_harness_task(name: str) -> bool:
    """Whether a task is lm-eval's rather than built in."""
    return name not in TASKS


def harness_arguments(loaded: LoadedModel, *, seed: int = 0) -> dict[str, Any]:
    """The arguments of `evaluation.harness.HarnessModel` for a loaded model, but for the batch size."""
    tokenizer, model = loaded.tokenizer, loaded.model
    limit = min(tokenizer.vocab_size, model.vocab_size)

    def continue_prompt(prompt: list[int], *, max_new_tokens: int, temperature: float) -> Iterator[int]:
        return generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            eos_id=tokenizer.eos_id,
            vocab_size=limit,
        )

    return {
        "model": model,
        "tokenizer": tokenizer,
        "name": loaded.name,
        "info": {"qmamba": {"mode": model.mode.name, **loaded.provenance}},
        "continue_prompt": continue_prompt,
    }


def run_harness_task(
    loaded: LoadedModel, options: TaskOptions, *, log_samples: bool
) -> tuple[dict[str, Any], list[str]]:
    """Score a task of lm-eval.

    Reads what the task reads, often the Hub; writes nothing.

    Returns:
        lm-eval's results with a ``qmamba`` block, and the lines of its sample log (none unless
        ``log_samples``).

    Raises:
        DeviceError: lm-eval is not installed.
        UsageError: lm-eval has no such task, or an option belongs to the built-in ones.
        DatasetError: the task's data cannot be had.
    """
    _require_harness()
    import lm_eval
    from lm_eval.tasks import TaskManager

    from qmamba_cli.evaluation.harness import HarnessModel

    task, batch_size = options.task, options.batch_size
    if options.data is not None or options.baseline is not None:
        name = "--task-data" if options.data is not None else "--baseline"
        raise UsageError(
            f"`{name}` belongs to the built-in tasks {', '.join(TASKS)}, got it with `--task {task}`"
        )
    manager = TaskManager()
    if task not in manager.all_tasks:
        raise UsageError(
            f"unknown task `{task}`, expected one of {', '.join(TASKS)} or a task of lm-eval",
            hint="`lm-eval ls tasks` lists those",
        )
    started = time.perf_counter()
    with within_gpu_memory(batch_size):
        try:
            results = lm_eval.simple_evaluate(
                model=HarnessModel(**harness_arguments(loaded), batch_size=batch_size),
                tasks=[task],
                limit=options.limit,
                task_manager=manager,
                log_samples=log_samples,
            )
        except (OSError, ConnectionError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise DatasetError(
                f"the data of task `{task}` cannot be had, got: {first}",
                hint="download it where there is a network, or use `--task lambada_openai --task-data FILE`",
            ) from None
    if results is None:
        raise QmambaError(f"lm-eval gave no results for `{task}`")
    samples = results.pop("samples", {})
    lines = [
        json.dumps(json_safe(row), ensure_ascii=False, default=str) + "\n"
        for rows in samples.values()
        for row in rows
    ]
    model = loaded.model
    block: Mapping[str, Any] = {
        "mode": {"name": model.mode.name, **model.mode.columns()},
        "backend": model.backend.name,
        "device": str(model.backend.device),
        **loaded.provenance,
        "tool_version": tool_version(),
        "versions": library_versions() | {"lm_eval": lm_eval.__version__},
        "seconds": round(time.perf_counter() - started, 3),
    }
    return json_safe({**results, "qmamba": dict(block)}), lines


def _require_harness() -> None:
    if find_spec("lm_eval") is None:
        raise DeviceError(
            f"tasks beside {', '.join(TASKS)} need lm-eval, got no such package", hint=f"install it: {_EXTRA}"
        )

"""This program's models inside lm-eval 0.4.13: the built-in scorer's digits, and generation tasks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import done

from qmamba_cli.errors import UsageError
from qmamba_cli.evaluation.results import last_word_metrics
from qmamba_cli.evaluation.scoring import score_last_word
from qmamba_cli.modes import mode_by_name
from qmamba_cli.stages.harness import harness_arguments, run_harness_task
from qmamba_cli.stages.run import LoadedModel, ModelOptions, TaskOptions, load_model

BATCH_SIZE = 3
BOOTSTRAP_ITERS = 2000


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized file of the demo."""
    folder = tmp_path_factory.mktemp("harness")
    done("calibrate", "demo", "--samples", "2", "--seqlen", "64", "--device", "cpu", cwd=folder)
    done("export", "--out", "ckpt.safetensors", cwd=folder)
    return folder / "ckpt.safetensors"


@pytest.fixture(scope="module")
def loaded(artifact: Path) -> LoadedModel:
    return load_model(ModelOptions(mode=mode_by_name("2-4"), checkpoint=artifact, backend="cpu"))


@pytest.fixture(scope="module")
def documents() -> list[str]:
    from qmamba_cli.evaluation.documents import load_lastword

    texts = load_lastword()[:9]
    return [*texts, "word", texts[0], "an unpronounceable antidisestablishmentarianism", "ends in a space "]


def harness_model(loaded: LoadedModel) -> Any:
    from qmamba_cli.evaluation.harness import HarnessModel

    return HarnessModel(**harness_arguments(loaded), batch_size=BATCH_SIZE)


def local_task(folder: Path, texts: list[str], **changes: Any) -> dict[str, Any]:
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
        "metadata": {"version": 1.0},
        **changes,
    }


def evaluate(model: Any, task: dict[str, Any]) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        # Every process of lm-eval's bootstrap pool would import torch again.
        patch.setenv("DISABLE_MULTIPROC", "1")
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=True,
        )
    assert results is not None
    return dict(results)


def test_lambada_in_lm_eval_gives_the_built_in_scorers_digits(
    loaded: LoadedModel, documents: list[str], tmp_path: Path
) -> None:
    results = evaluate(harness_model(loaded), local_task(tmp_path, documents))
    scores = score_last_word(loaded.model, loaded.tokenizer, documents, batch_size=BATCH_SIZE)
    samples = sorted(results["samples"]["local"], key=lambda sample: sample["doc_id"])
    assert [tuple(sample["filtered_resps"][0]) for sample in samples] == [
        (score.ll, score.greedy) for score in scores
    ]
    metrics = last_word_metrics(scores, bootstrap_iters=BOOTSTRAP_ITERS)
    assert metrics == {key: results["results"]["local"][key] for key in metrics}
    assert any(score.tokens > 1 for score in scores)


def test_rolling_perplexity_is_the_sum_over_the_whole_text(loaded: LoadedModel, tmp_path: Path) -> None:
    text = "The captain looked at the lantern and said nothing."
    task = local_task(
        tmp_path,
        [text],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    got = evaluate(harness_model(loaded), task)["results"]["local"]["word_perplexity,none"]
    ids = [loaded.tokenizer.prefix_id, *loaded.tokenizer.encode(text)]
    hidden, _ = loaded.model.forward(torch.tensor([ids[:-1]]))
    logs = torch.log_softmax(loaded.model.logits(hidden[0]), dim=-1)
    total = sum(float(logs[i, token]) for i, token in enumerate(ids[1:]))
    assert got == pytest.approx(math.exp(-total / len(text.split())), rel=1e-5)


def test_generation_tasks_stop_at_their_word_and_ignore_padding(
    loaded: LoadedModel, documents: list[str], tmp_path: Path
) -> None:
    texts = [documents[0], "The"]
    task = local_task(
        tmp_path,
        texts,
        output_type="generate_until",
        doc_to_text="{{text}}",
        doc_to_target="",
        generation_kwargs={"until": ["e"], "max_gen_toks": 6, "do_sample": False},
        metric_list=[{"metric": "exact_match"}],
    )
    samples = evaluate(harness_model(loaded), task)["samples"]["local"]
    answers = {sample["doc"]["text"]: sample["resps"][0][0] for sample in samples}
    for text in texts:
        arguments = harness_arguments(loaded)
        alone: list[int] = []
        for token in arguments["continue_prompt"](
            loaded.tokenizer.encode(text), max_new_tokens=6, temperature=0.0
        ):
            alone.append(token)
            if "e" in loaded.tokenizer.decode(alone):
                break
        assert answers[text] == loaded.tokenizer.decode(alone).split("e")[0]
        assert "e" not in answers[text]


def test_run_takes_any_task_of_lm_eval(
    loaded: LoadedModel, documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.tasks

    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    plain, task = lm_eval.tasks.TaskManager, local_task(tmp_path, documents[:4])

    class OneTask(plain):  # type: ignore[misc, valid-type]
        """lm-eval's index with one task in it, which takes no seconds to build."""

        def __init__(self) -> None:
            super().__init__(include_defaults=False)

        @property
        def all_tasks(self) -> list[str]:
            return ["local"]

        def load(self, _names: Any) -> Any:
            return super().load([task])

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", OneTask)
    options = TaskOptions(task="local", batch_size=BATCH_SIZE, limit=2)
    results, lines = run_harness_task(loaded, options, log_samples=True)
    scores = score_last_word(loaded.model, loaded.tokenizer, documents[:2], batch_size=BATCH_SIZE)
    assert results["results"]["local"]["acc,none"] == last_word_metrics(scores)["acc,none"]
    assert results["qmamba"]["mode"]["name"] == "2-4"
    assert results["qmamba"]["artifact"]["digest"] == loaded.provenance["artifact"]["digest"]
    assert len([json.loads(line) for line in lines]) == 2
    with pytest.raises(UsageError, match=r"--task-data"):
        run_harness_task(
            loaded, TaskOptions(task="local", data=tmp_path / "documents.jsonl"), log_samples=False
        )
    with pytest.raises(UsageError, match="unknown task `nope`"):
        run_harness_task(loaded, TaskOptions(task="nope"), log_samples=False)


@pytest.mark.slow
def test_the_wrapper_is_lm_evals_command_line_with_the_model(
    artifact: Path, documents: list[str], tmp_path: Path
) -> None:
    import yaml

    task = local_task(tmp_path, documents[:3])
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    finished = subprocess.run(
        [
            *(sys.executable, "-m", "qmamba_cli.lm_eval", "run", "--model", "qmamba"),
            *("--model_args", f"checkpoint={artifact},mode=3,backend=cpu", "--tasks", "local"),
            *("--include_path", str(tmp_path), "--batch_size", "2", "--output_path", str(tmp_path / "out")),
        ],
        cwd=tmp_path,
        env={**os.environ, "DISABLE_MULTIPROC": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(report.read_text(encoding="utf-8"))
    model = load_model(ModelOptions(mode=mode_by_name("3"), checkpoint=artifact, backend="cpu"))
    scores = score_last_word(model.model, model.tokenizer, documents[:3], batch_size=2)
    assert written["results"]["local"]["perplexity,none"] == last_word_metrics(scores)["perplexity,none"]


def test_without_lm_eval_an_unknown_task_names_the_extra(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmamba_cli.errors import DeviceError

    monkeypatch.setattr("qmamba_cli.stages.harness.find_spec", lambda _name: None)
    with pytest.raises(DeviceError, match="need lm-eval") as caught:
        run_harness_task(loaded, TaskOptions(task="hellaswag"), log_samples=False)
    assert "qmamba-cli[lm-eval]" in caught.value.hint
    assert caught.value.exit_code == 4

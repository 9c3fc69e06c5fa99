"""The run stage: results in lm-eval's layout, files under exactly the names asked for, text as it is made."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from command_line import Outcome, artifacts, done, tree

from qmamba_cli.modes import MODES
from qmamba_cli.resources import calib_data_path
from qmamba_cli.stages.run import LoadedModel, ModelOptions, TaskOptions, load_model, run_prompt, run_task

QUANTIZED = tuple(name for name in MODES if name != "fp")
LASTWORD = calib_data_path("lastword.jsonl")


def loaded(mode: str, checkpoint: Path | None = None) -> LoadedModel:
    if mode == "fp":
        return load_model(ModelOptions(mode=MODES["fp"], model="demo"))
    return load_model(ModelOptions(mode=MODES[mode], checkpoint=checkpoint or artifacts().w4))


def run(*arguments: object) -> Outcome:
    return done("run", "--checkpoint", artifacts().w4, *arguments, cwd=artifacts().folder)


def metrics_of(mode: str, **options: Any) -> dict[str, Any]:
    results, _ = run_task(loaded(mode), TaskOptions(**options))
    return dict(results["results"][options["task"]])


def without_seconds(results: dict[str, Any]) -> dict[str, Any]:
    seconds = results["qmamba"].pop("seconds")
    assert seconds > 0
    return results


def test_keys_of_a_last_word_task() -> None:
    results, lines = run_task(loaded("2-4"), TaskOptions(task="lambada_openai", data=LASTWORD, limit=3))
    metrics = results["results"]["lambada_openai"]
    expected = {"perplexity,none", "perplexity_stderr,none", "acc,none", "acc_stderr,none"}
    assert {name for name in metrics if name.endswith(",none")} == expected
    assert results["n-samples"] == {"lambada_openai": {"original": 224, "effective": 3}}
    assert set(results["higher_is_better"]["lambada_openai"]) == {"acc", "perplexity"}
    assert set(results["versions"]) == set(results["n-shot"]) == set(results["configs"]) == {"lambada_openai"}
    assert results["config"]["limit"] == 3 and results["config"]["batch_size"] == 16
    block = results["qmamba"]
    assert set(block) == {
        *("mode", "backend", "device", "artifact", "calibration", "model", "weights"),
        *("tool_version", "versions", "threads", "seconds"),
    }
    assert len(block["artifact"]["digest"]) == len(block["calibration"]["digest"]) == 64
    assert len(lines) == 3


def test_running_text_with_a_baseline() -> None:
    options = {"task": "perplexity", "data": LASTWORD, "limit": 2, "seqlen": 64}
    plain = metrics_of("0", **options)
    assert {name for name in plain if "," in name} == {
        "perplexity,none",
        "bits_per_token,none",
        "top1_acc,none",
    }
    assert plain["tokens"] == 2 * 63
    assert plain["bits_per_token,none"] == pytest.approx(math.log2(plain["perplexity,none"]))
    compared = metrics_of("0", baseline="demo", **options)
    assert compared["perplexity,none"] == plain["perplexity,none"]
    assert 0 < compared["kl,none"] < 1
    assert 0.5 < compared["same_top1,none"] < 1


def test_the_float_model_is_its_own_baseline() -> None:
    metrics = metrics_of("fp", task="perplexity", data=LASTWORD, limit=2, seqlen=64, baseline="demo")
    assert metrics["kl,none"] == pytest.approx(0, abs=1e-6)
    assert metrics["same_top1,none"] == 1


def test_scores_document_by_document_follow_the_laws() -> None:
    lines = {mode: run_task(loaded(mode), TaskOptions(task="lastword", limit=4))[1] for mode in QUANTIZED}
    assert lines["0"] == lines["2-0"]
    assert lines["2-1"] == lines["2-2"] == lines["2-3"]
    assert len({tuple(rows) for rows in lines.values()}) >= 3


@pytest.mark.parametrize("name", ["results.json", "no-suffix", "with space.txt", "new/folder/r.json"])
def test_the_output_has_exactly_that_name(tmp_path: Path, name: str) -> None:
    given = ("--task", "lastword", "--limit", 2, "--mode", "3")
    outcome = run(*given, "--output", tmp_path / name)
    assert [path for path, digest in tree(tmp_path).items() if digest != "/"] == [name]
    assert outcome.err == f"results written to {tmp_path / name}\n"
    written = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    printed = run(*given, "--json").json()
    assert without_seconds(written) == without_seconds(printed)


def test_the_sample_log(tmp_path: Path) -> None:
    output = tmp_path / "r.json"
    run("--task", "lastword", "--limit", 5, "--output", output, "--log-samples")
    assert set(tree(tmp_path)) == {"r.json", "r.samples.jsonl"}
    rows = [json.loads(line) for line in (tmp_path / "r.samples.jsonl").read_text("utf-8").splitlines()]
    assert [set(row) for row in rows] == [{"doc_id", "target", "ll", "greedy"}] * 5
    assert [row["doc_id"] for row in rows] == list(range(5))
    passages = [json.loads(line)["text"] for line in LASTWORD.read_text("utf-8").splitlines()]
    assert [row["target"].strip() for row in rows] == [text.split(" ")[-1] for text in passages[:5]]
    metrics = json.loads(output.read_text("utf-8"))["results"]["lastword"]
    assert metrics["acc,none"] == sum(row["greedy"] for row in rows) / 5
    mean = sum(row["ll"] for row in rows) / 5
    assert metrics["perplexity,none"] == pytest.approx(math.exp(-mean))


def test_force_replaces_both_files(tmp_path: Path) -> None:
    for name in ("r.json", "r.samples.jsonl"):
        (tmp_path / name).write_text("old")
    given = ("--task", "lastword", "--limit", 1, "--output", tmp_path / "r.json", "--log-samples", "--force")
    run(*given)
    assert json.loads((tmp_path / "r.json").read_text())["n-samples"]["lastword"]["effective"] == 1
    assert json.loads((tmp_path / "r.samples.jsonl").read_text())["doc_id"] == 0


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_running_text_of_ones_own(tmp_path: Path, suffix: str) -> None:
    """A jsonl is its texts joined by a blank line, so both forms of one text score alike."""
    parts = ["It was late, and the lamp burned low. " * 6, "Nobody had come; the road was empty. " * 6]
    content = "\n\n".join(parts) if suffix == ".txt" else "".join(json.dumps({"t": p}) + "\n" for p in parts)
    path = tmp_path / f"t{suffix}"
    path.write_text(content)
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(parts))
    options = {"task": "perplexity", "seqlen": 32, "text_column": "t"}
    assert metrics_of("0", data=path, **options) == metrics_of("0", data=other, **options)


def test_the_last_export_is_the_one_that_runs() -> None:
    results = done("run", "--task", "lastword", "--limit", 1, "--json", cwd=artifacts().folder).json()
    assert results["qmamba"]["artifact"]["path"] == "w4.safetensors"
    results = done(
        *("run", "--task", "lastword", "--limit", 1, "--json", "--checkpoint", artifacts().w8),
        cwd=artifacts().folder,
    ).json()
    assert results["qmamba"]["weights"] == "W8A8"


@pytest.mark.parametrize("mode", QUANTIZED)
def test_text_comes_in_pieces(mode: str) -> None:
    model = loaded(mode)
    options = {"max_new_tokens": 10, "temperature": 0.0, "seed": 0}
    pieces = list(run_prompt(model, "The old man looked", **options))
    assert 1 < len(pieces) <= 10
    assert "".join(pieces) == "".join(run_prompt(model, "The old man looked", **options))
    # The first piece is there before the rest has been asked for.
    assert next(run_prompt(model, "The old man looked", **options)) == pieces[0]

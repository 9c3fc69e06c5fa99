"""Bad input: the exit code, what, got and expected, a next step, and nothing left behind."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import (
    SCORE,
    SMALL,
    WORKDIR,
    artifacts,
    edit_json,
    model_folder,
    process,
    qmamba,
    refused,
    refused_in,
    tree,
)
from safetensors.torch import load_file, save_file

from qmamba_cli.modes import MODES


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("models") / "healthy")


@pytest.fixture
def model(healthy: Path, tmp_path: Path) -> Path:
    """A model folder to damage, in an otherwise empty working folder."""
    return Path(shutil.copytree(healthy, tmp_path / "model"))


def edit_weights(model: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors, dots in their names written as ``__``; None removes one."""
    path = model / "model.safetensors"
    state: dict[str, torch.Tensor | None] = dict(load_file(path))
    state |= {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in state.items() if value is not None}, path, {"format": "pt"})


CONV = "backbone__layers__1__mixer__conv1d__weight"


def _no_folder(model: Path) -> None:
    shutil.rmtree(model)


def _emptied(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def _not_finite(value: float) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        weight = load_file(model / "model.safetensors")[CONV.replace("__", ".")]
        weight.view(-1)[3] = value
        edit_weights(model, **{CONV: weight})

    return damage


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        pytest.param(_no_folder, ("model `./model` not found", "`demo`"), id="missing-folder"),
        pytest.param(_emptied, ("`./model` is an empty folder, expected model files",), id="empty-folder"),
        pytest.param(
            lambda m: edit_json(m / "config.json", model_type="llama", architectures=["LlamaForCausalLM"]),
            ("got `llama (LlamaForCausalLM)`", "transformers' `mamba`"),
            id="other-architecture",
        ),
        pytest.param(
            lambda m: edit_weights(m, **{CONV: None}),
            ("missing", "backbone.layers.1.mixer.conv1d.weight"),
            id="missing-tensor",
        ),
        pytest.param(lambda m: edit_weights(m, surplus=torch.zeros(2)), ("surplus",), id="extra-tensor"),
        pytest.param(
            lambda m: edit_weights(m, **{CONV: torch.zeros(3, 1, 4)}),
            ("backbone.layers.1.mixer.conv1d.weight", "got", "(3, 1, 4)", "expected", "(64, 1, 4)"),
            id="mis-shaped-tensor",
        ),
        pytest.param(_not_finite(float("nan")), ("backbone.layers.1.mixer.conv1d.weight", "NaN"), id="nan"),
        pytest.param(
            _not_finite(float("inf")), ("backbone.layers.1.mixer.conv1d.weight", "infinit"), id="inf"
        ),
        pytest.param(
            lambda m: (m / "tokenizer.json").unlink(), ("tokenizer", "--tokenizer"), id="no-tokenizer"
        ),
    ],
)
def test_checkpoint(model: Path, damage: Callable[[Path], Any], parts: tuple[str, ...]) -> None:
    damage(model)
    refused_in(model.parent, 1, "calibrate", "./model", *SMALL, parts=parts)


class _RunsCode:
    """Unpickled without restrictions, creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def test_a_pickle_that_would_run_code(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    marker = tmp_path_factory.mktemp("marker") / "executed"
    (model / "model.safetensors").unlink()
    path = model / "pytorch_model.bin"
    torch.save({"weight": _RunsCode(marker)}, path)
    refused_in(model.parent, 1, "calibrate", "./model", *SMALL, parts=("could run code", "safetensors"))
    assert not marker.exists()
    # The payload is real: a careless reader does run it.
    pickle.loads(pickle.dumps(_RunsCode(marker)))
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"text": "one"}\n{"text": "two"\n', ("line 2", "JSON")),
        ('{"text": "one"}\n\n["two"]\n', ("line 3", "expected an object with a field `text`")),
        ('{"text": "one"}\n{"body": "two"}\n', ("line 2", "`text`", "body")),
        ('{"text": 5}\n', ("line 1", "must be a string, got")),
    ],
    ids=["no-json", "no-object", "no-field", "no-string"],
)
def test_line_of_a_jsonl(tmp_path: Path, content: str, parts: tuple[str, ...]) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    refused_in(tmp_path, 1, "calibrate", "demo", *SMALL, "--dataset", "t.jsonl", parts=("t.jsonl", *parts))
    run = ("run", "--task", "lambada_openai", "--task-data", "t.jsonl", "--checkpoint", artifacts().w4)
    refused_in(tmp_path, 1, *run, parts=("t.jsonl", *parts))


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("--samples", 5), 1, ("too few", "got 3", "expected 5", "--samples 3")),
        (("--samples", 1, "--seqlen", 4000), 1, ("too short", "expected at least 4000", "--seqlen")),
        (("--alpha", 0.5), 2, ("alpha", "got 0.5", "(0.5, 1]")),
        (("--alpha", 1.01), 2, ("alpha", "got 1.01", "(0.5, 1]")),
        (("--alpha", "nan"), 2, ("alpha", "got nan", "(0.5, 1]")),
        (("--samples", 0), 2, ("`--samples`", "got 0", "at least 1")),
        (("--batch-size", -2), 2, ("`--batch-size`", "got -2", "at least 1")),
        (("--samples", "many"), 2, ("`--samples`", "got `many`", "integer")),
        (("--seed=-1",), 2, ("`--seed`", "got -1")),
        (("--seed", 1 << 63), 2, ("`--seed`", "got 9223372036854775808")),
        (("--reduction", "median"), 2, ("`median`", "global, mean, ema")),
        (("--dtype", "fp8"), 2, ("`fp8`", "fp32")),
        (("--dtype", "bf16"), 2, ("bf16", "fp32")),
        (("--device", "tpu"), 2, ("`tpu`", "cpu")),
        (("--dataset", "nowhere.txt"), 1, ("nowhere.txt", "no such file", "bundled")),
        (("--tokenizer", "./nowhere"), 1, ("./nowhere",)),
        (("--no-such-option",), 2, ("no such option", "`--no-such-option`", "calibrate --help")),
        (("surplus",), 2, ("unexpected", "surplus")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_calibrate_option(tmp_path: Path, arguments: tuple[object, ...], code: int, parts: Any) -> None:
    text = {"text": "It was a quiet evening by the river, and nobody spoke. " * 10}
    (tmp_path / "t.jsonl").write_text((json.dumps(text) + "\n") * 3)
    given = ("calibrate", "demo", *SMALL, "--dataset", "t.jsonl", *arguments)
    refused_in(tmp_path, code, *given, parts=parts)


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("--w-bits", 3), 2, ("`--w-bits`", "4 or 8", "got 3")),
        (("--embedding-bits", 4), 2, ("`--embedding-bits`", "8 or 16", "got 4")),
        (("--group-size", 0), 2, ("`--group-size`", "at least 1", "got 0")),
        (("--ignore", "("), 2, ("`--ignore`", "`(`", "regular expression")),
        (("--alpha", 0.2), 2, ("alpha", "got 0.2", "(0.5, 1]")),
        (("--calibration", "nowhere"), 1, ("`nowhere`", "qmamba calibrate")),
        (("--workdir", "nowhere"), 1, ("`nowhere`", "no calibration on record", "qmamba calibrate MODEL")),
        (("--model", "./nowhere"), 1, ("`./nowhere` not found",)),
        (("--out", "."), 1, ("`.`", "not a regular file")),
        (("--out", "w4.safetensors"), 1, ("`w4.safetensors` already exists", "--force")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_export_option(arguments: tuple[object, ...], code: int, parts: tuple[str, ...]) -> None:
    refused_in(artifacts().folder, code, "export", "--out", "new.safetensors", *arguments, parts=parts)


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("--mode", "2-5", *SCORE), 2, ("unknown mode `2-5`", ", ".join(MODES))),
        (("--mode", "fp", *SCORE), 2, ("mode fp", "needs `--model`", "`demo`")),
        (("--mode", "0", "--model", "demo", *SCORE), 2, ("`--model` belongs to mode fp", "got mode 0")),
        (("--mode", "fp", "--model", "demo", "--checkpoint", "w4.safetensors", *SCORE), 2, ("got mode fp",)),
        (("--set", "state", *SCORE), 2, ("COLUMN=VALUE", "got `state`")),
        (("--set", "stat=int8", *SCORE), 2, ("unknown column `stat`", "scan_order")),
        (("--set", "state=int4", *SCORE), 2, ("`state`", "`int4`", "int8, fp32")),
        (("--set", "scan_u=true", *SCORE), 2, ("scan_u=true needs conv_output=fp32",)),
        (("--set", "scan_reads=fp32", *SCORE), 2, ("scan_u=int8 is read as int8",)),
        (("--mode", "fp", "--model", "demo", "--set", "state=int8", *SCORE), 2, ("state=int8 needs",)),
        ((), 2, ("`--task` and `--prompt`", "got neither")),
        ((*SCORE, "--prompt", "x"), 2, ("`--task` and `--prompt`", "got both")),
        (("--task", "no-such"), 2, ("unknown task `no-such`", "lastword", "lm-eval")),
        (("--task", "perplexity"), 2, ("needs a text", "--task-data")),
        ((*SCORE, "--baseline", "demo"), 2, ("`--baseline`", "perplexity")),
        (("--task", "lastword", "--limit", 0), 2, ("`--limit`", "got 0", "at least 1")),
        ((*SCORE, "--batch-size", 0), 2, ("`--batch-size`", "got 0", "at least 1")),
        ((*SCORE, "--log-samples"), 2, ("`--log-samples` needs `--output FILE`",)),
        (("--prompt", "x", "--output", "y"), 2, ("`--output`", "got `--prompt`")),
        (("--prompt", ""), 2, ("the prompt has no tokens",)),
        (("--prompt", "x", "--max-new-tokens", 0), 2, ("`--max-new-tokens`", "got 0")),
        (("--prompt", "x", "--temperature=-1"), 2, ("`--temperature`", "got -1.0")),
        (("--prompt", "x", "--temperature", "nan"), 2, ("`--temperature`", "got nan")),
        (("--prompt", "x", "--temperature", "1e-40"), 2, ("`--temperature`", "got 1e-40")),
        (("--prompt", "x", "--seed", 1 << 70), 2, ("`--seed`", f"got {1 << 70}")),
        (("--checkpoint", "nowhere", *SCORE), 1, ("`nowhere` does not exist", "qmamba export")),
        (("--workdir", "nowhere", *SCORE), 1, ("no export on record", "qmamba export --out FILE")),
        (("--task", "lastword", "--task-data", "nowhere.jsonl"), 1, ("nowhere.jsonl", "no such file")),
        (("--task", "lastword", "--task-data", "w4.safetensors"), 1, ("expected a .jsonl or .txt",)),
        ((*SCORE, "--backend", "tpu"), 2, ("unknown backend `tpu`", "cpu")),
        ((*SCORE, "--output", "w4.safetensors"), 1, ("`w4.safetensors` already exists", "--force")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_run_option(arguments: tuple[object, ...], code: int, parts: tuple[str, ...]) -> None:
    refused_in(artifacts().folder, code, "run", *arguments, parts=parts)


def test_text_shorter_than_one_window(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("A few words only.")
    run = ("run", "--checkpoint", artifacts().w4, "--task", "perplexity", "--task-data", "t.txt")
    refused_in(tmp_path, 1, *run, parts=("text too short", "expected at least one window of 512"))


def test_a_missing_device(tmp_path: Path) -> None:
    """Where there is a GPU and CuPy, `cuda` is no error."""
    outcome = qmamba("calibrate", "demo", *SMALL, "--device", "cuda", "--dry-run", cwd=tmp_path)
    if outcome.code == 0:
        pytest.skip("this machine has the device")
    refused(outcome, 4, "cuda", "cpu")
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        (("FLOAT_SIM_ASIC_INT8", "CONV1D_MODE3_FP32"), ("CONV1D_MODE3_FP32, FLOAT_SIM_ASIC_INT8",)),
        (("SSM_USE_PYTORCH_INT8",), ("SSM_USE_PYTORCH_INT8",)),
        (
            ("FLOAT_SIM_ASIC_INT8", "CONV1D_MODE23_FP32", "CONV1D_MODE24_FP32"),
            ("CONV1D_MODE23_FP32, CONV1D_MODE24_FP32, FLOAT_SIM_ASIC_INT8",),
        ),
    ],
)
def test_contradictory_variables(variables: tuple[str, ...], named: tuple[str, ...]) -> None:
    environment = dict.fromkeys(variables, "true")
    parts = ("select no mode together", *named, "2-1: FLOAT_SIM_ASIC_INT8 + SSM_USE_PYTORCH_INT8")
    refused_in(artifacts().folder, 2, "run", *SCORE, parts=parts, **environment)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens where the Hub is looked for."""
    import datasets
    from huggingface_hub import constants

    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", nowhere)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("calibrate", "nobody/no-such-model", *SMALL), ("nobody/no-such-model", "folder")),
        (
            ("calibrate", "demo", *SMALL, "--dataset", "nobody/no-such-text"),
            ("nobody/no-such-text", "cannot be reached", "--dataset bundled"),
        ),
        (
            ("run", "--checkpoint", "w4.safetensors", "--task", "lambada_openai"),
            ("lambada_openai", "cannot be reached", "--task-data FILE.jsonl"),
        ),
    ],
    ids=["model", "text", "task"],
)
@pytest.mark.parametrize("offline", [False, True], ids=["refused", "offline"])
def test_unreachable_hub(tmp_path: Path, arguments: Any, parts: tuple[str, ...], offline: bool) -> None:
    shutil.copy(artifacts().w4, tmp_path)
    refused_in(tmp_path, 1, *arguments, *(["--offline"] if offline else []), parts=parts)


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        (("inspect", "nowhere"), 1, ("`nowhere` does not exist",)),
        (("inspect", WORKDIR), 2, ("is a work folder", "qmamba inspect w4.safetensors")),
        (("inspect", "."), 3, ("is not a calibration",)),
        (("verify", "nowhere"), 1, ("`nowhere` does not exist",)),
        (("verify", "w4.safetensors", "--model", "./nowhere"), 1, ("`./nowhere` not found",)),
        (("calibrate",), 2, ("missing argument", "qmamba calibrate --help")),
        (("export",), 2, ("missing option `--out`", "qmamba export --help")),
        (("nothing",), 2, ("no such command `nothing`", "qmamba --help")),
        (("--bogus",), 2, ("no such option: `--bogus`", "qmamba --help")),
        (("run", "--limit", "few"), 2, ("`--limit`", "got `few`", "integer")),
        (("run", "--limit=few"), 2, ("`--limit`", "got `few`", "integer")),
        (("run", "--task"), 2, ("`--task` requires an argument",)),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_other_commands(arguments: tuple[object, ...], code: int, parts: tuple[str, ...]) -> None:
    refused_in(artifacts().folder, code, *arguments, parts=parts)


def test_the_printed_form_in_a_process(tmp_path: Path) -> None:
    outcome = process("run", "--mode", "7", "--task", "lastword", cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err == (
        "error: unknown mode `7`, expected one of 0, 2-0, 2-1, 2-2, 2-3, 2-4, 3, fp\n\n"
        "hint: `qmamba run --help` lists the options\n"
    )
    assert tree(tmp_path) == {}

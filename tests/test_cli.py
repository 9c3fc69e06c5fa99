"""The command line on good input: the three lines, modes and how they are chosen, what goes where."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from command_line import CALIBRATE, WORKDIR, artifacts, done, environment, process, qmamba, tree

import qmamba_cli
from qmamba_cli import cli, console
from qmamba_cli.errors import ArtifactError, DeviceError, QmambaError, UsageError
from qmamba_cli.modes import COLUMNS, MODES, VARIABLES
from qmamba_cli.progress import silent
from qmamba_cli.resources import calib_data_path

COMMANDS = ("calibrate", "export", "run", "modes", "inspect", "verify", "demo")
QUANTIZED = tuple(name for name in MODES if name != "fp")
SCORE = ("--task", "lastword", "--limit", 2)
# lm-eval 0.4.13's keys of a results file, and this program's own.
RESULT_KEYS = {
    *(
        "results",
        "group_subtasks",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
        "config",
    ),
    "qmamba",
}


def score(*arguments: object, **variables: str) -> dict[str, Any]:
    """``qmamba run ARGUMENTS --json`` on the shared 4-bit export."""
    results = done("run", *arguments, "--json", cwd=artifacts().folder, **variables).json()
    assert isinstance(results, dict)
    return results


def test_the_three_lines(tmp_path: Path) -> None:
    """Typed one after the other in one folder, as processes of their own."""
    passages = calib_data_path("lastword.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "file.jsonl").write_text("".join(passages[:3]), encoding="utf-8")
    lines = (
        CALIBRATE,
        ("export", "--out", "ckpt.safetensors"),
        ("run", "--mode", "2-4", "--task", "lambada_openai", "--task-data", "file.jsonl"),
    )
    for line in lines:
        outcome = process(*line, cwd=tmp_path)
        assert outcome.code == 0, outcome.err
        assert outcome.err == "", "no progress where stderr is no terminal"
        assert outcome.out and "\x1b" not in outcome.out
    assert outcome.out.startswith("lambada_openai: mode 2-4, W4A8, cpu, 3 of 3, ")
    assert {path for path in tree(tmp_path) if "/" not in path} == {"file.jsonl", "ckpt.safetensors", WORKDIR}
    # What another process wrote is what this one writes.
    assert (tmp_path / "ckpt.safetensors").read_bytes() == artifacts().w4.read_bytes()


@pytest.mark.parametrize("mode", QUANTIZED)
def test_each_mode_scores(mode: str) -> None:
    results = score("--mode", mode, *SCORE)
    assert set(results) == RESULT_KEYS
    metrics = results["results"]["lastword"]
    assert 0 <= metrics["acc,none"] <= 1
    assert metrics["perplexity,none"] > 1
    assert results["n-samples"]["lastword"] == {"original": 224, "effective": 2}
    assert results["qmamba"]["mode"] == {"name": mode, **MODES[mode].columns()}
    assert results["qmamba"]["weights"] == "W4A8"
    assert results["qmamba"]["backend"] == "cpu"
    assert results["config"]["model_args"]["mode"] == mode


def test_the_float_model_scores() -> None:
    results = score("--mode", "fp", "--model", "demo", *SCORE)
    assert results["qmamba"]["mode"] == {"name": "fp", **MODES["fp"].columns()}
    assert results["qmamba"]["artifact"] is None
    assert results["qmamba"]["model"]["source"] == "demo"


def test_the_modes_differ_as_the_laws_say() -> None:
    perplexity = {
        mode: score("--mode", mode, *SCORE)["results"]["lastword"]["perplexity,none"] for mode in QUANTIZED
    }
    assert perplexity["2-0"] == perplexity["0"]
    assert perplexity["2-1"] == perplexity["2-2"] == perplexity["2-3"]
    assert len({perplexity["0"], perplexity["2-4"], perplexity["3"]}) == 3


@pytest.mark.parametrize("mode", [*QUANTIZED, "fp"])
def test_each_mode_continues_a_prompt(mode: str) -> None:
    model = ("--model", "demo") if mode == "fp" else ()
    given = ("run", "--mode", mode, *model, "--prompt", "It was a dark night", "--max-new-tokens", 6)
    streamed = done(*given, cwd=artifacts().folder)
    assert streamed.err == ""
    assert streamed.out.endswith("\n") and len(streamed.out) > 6
    whole = done(*given, "--json", cwd=artifacts().folder).json()
    assert whole.pop("first_token_s") > 0 and whole.pop("tokens_per_s") > 0
    assert whole == {"prompt": "It was a dark night", "text": streamed.out[:-1], "mode": mode}


def test_a_prompt_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each piece is on stdout before the next one is computed."""
    monkeypatch.chdir(artifacts().folder)
    monkeypatch.setattr(sys, "argv", ["qmamba", "run", "--prompt", "The old man", "--max-new-tokens", "5"])
    writes: list[str] = []
    with mock.patch.object(sys, "stdout", mock.Mock(wraps=io.StringIO())) as stdout:
        stdout.write.side_effect = writes.append
        assert cli._exit_code() == 0
    assert len(writes) >= 4
    assert writes[-1] == "\n"
    assert stdout.flush.call_count == len(writes)


def test_sampling_follows_the_seed() -> None:
    def text(seed: int) -> str:
        given = ("--prompt", "She", "--temperature", 1, "--max-new-tokens", 8, "--seed", seed)
        return done("run", *given, cwd=artifacts().folder).out

    assert text(0) == text(0)
    assert len({text(seed) for seed in range(3)}) == 3


@pytest.mark.parametrize("mode", [row for row in MODES.values() if row.variables], ids=lambda row: row.name)
def test_variables_select_a_mode(mode: Any) -> None:
    results = score("--task", "lastword", "--limit", 1, **dict.fromkeys(mode.variables, "True"))
    assert results["qmamba"]["mode"]["name"] == mode.name


def test_other_values_of_the_variables_select_nothing() -> None:
    for value in ("false", "1", "yes", ""):
        results = score("--task", "lastword", "--limit", 1, **dict.fromkeys(VARIABLES, value))
        assert results["qmamba"]["mode"]["name"] == "0"


def test_an_explicit_mode_wins_and_says_so() -> None:
    variables = {"FLOAT_SIM_ASIC_INT8": "true", "CONV1D_MODE3_FP32": "true"}
    given = ("run", "--mode", "2-1", "--task", "lastword", "--limit", 1, "--json")
    outcome = done(*given, cwd=artifacts().folder, **variables)
    assert outcome.json()["qmamba"]["mode"]["name"] == "2-1"
    note = "note: `--mode 2-1` wins over the environment's CONV1D_MODE3_FP32, FLOAT_SIM_ASIC_INT8\n"
    assert outcome.err == note
    assert done(*given, cwd=artifacts().folder).err == ""


def test_set_overrides_columns_and_the_results_say_so() -> None:
    results = score("--mode", "2-4", "--set", "conv_input=dynamic", "--set", "scan_order=chunked", *SCORE)
    row = results["qmamba"]["mode"]
    assert row["name"] == "2-4+conv_input=dynamic,scan_order=chunked"
    assert {name: row[name] for name in COLUMNS} == MODES["3"].columns()
    plain = score("--mode", "3", *SCORE)
    assert results["results"]["lastword"] == plain["results"]["lastword"]


def test_set_applies_to_a_mode_of_the_environment() -> None:
    results = score(*SCORE, "--set", "state=fp32", FLOAT_SIM_ASIC_INT8="true", SSM_USE_PYTORCH_INT8="true")
    assert results["qmamba"]["mode"]["name"] == "2-1+state=fp32"


@pytest.mark.parametrize(
    "arguments",
    [
        (*CALIBRATE, "--dry-run"),
        ("export", "--out", "new.safetensors", "--dry-run"),
        ("run", *SCORE),
        ("run", "--prompt", "x", "--max-new-tokens", 1),
        ("modes",),
        ("inspect", "w4.safetensors"),
        ("inspect", f"{WORKDIR}/calibration"),
        ("verify", "w4.safetensors"),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_json_is_one_object_and_nothing_else(arguments: tuple[object, ...], tmp_path: Path) -> None:
    if arguments[0] == "calibrate":
        arguments = (*arguments, "--workdir", tmp_path)
    outcome = done(*arguments, "--json", cwd=artifacts().folder)
    assert isinstance(outcome.json(), dict)
    assert outcome.err == ""
    assert "NaN" not in outcome.out and "Infinity" not in outcome.out
    people = done(*arguments, cwd=artifacts().folder)
    assert people.out and people.out != outcome.out


def test_modes_json_is_the_table() -> None:
    document = done("modes", "--json", cwd=Path()).json()
    assert [row["name"] for row in document["modes"]] == list(MODES)
    assert document["columns"] == {name: [str(value) for value in kind] for name, kind in COLUMNS.items()}
    for row in document["modes"]:
        assert {name: row[name] for name in COLUMNS} == MODES[row["name"]].columns()
        assert row["variables"] == sorted(MODES[row["name"]].variables)


def test_modes_table_holds_every_cell() -> None:
    lines = done("modes", cwd=Path()).out.splitlines()
    for row in MODES.values():
        cells = [row.name, *row.columns().values()]
        assert any(line.split()[: len(cells)] == cells for line in lines), row.name


def test_help_documents_the_exit_codes() -> None:
    text = " ".join(done("--help", cwd=Path()).out.split())
    for error in (QmambaError, UsageError, ArtifactError, DeviceError):
        assert re.search(rf"[ ,]{error.exit_code} [a-z]", text)
    assert "0 done" in text and f"{cli.EXIT_INTERRUPTED} interrupted" in text
    assert all(f"  {command}  " in done("--help", cwd=Path()).out for command in COMMANDS)


def test_no_command_shows_the_help_page() -> None:
    outcome = qmamba(cwd=Path())
    assert (outcome.code, outcome.out) == (UsageError.exit_code, "")
    assert outcome.err == done("--help", cwd=Path()).out


def test_version() -> None:
    assert done("--version", cwd=Path()).out == f"qmamba {qmamba_cli.__version__}\n"


def test_light_commands_import_nothing_heavy() -> None:
    """`--help` of every command, `modes` and `inspect`, in one fresh process."""
    shared = artifacts()
    lines = [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in COMMANDS),
        ["modes"],
        ["modes", "--json"],
        ["inspect", str(shared.w4)],
        ["inspect", str(shared.calibration), "--json"],
    ]
    program = (
        "import json, sys\n"
        "from qmamba_cli import cli\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['qmamba', *line]\n"
        "    assert cli._exit_code() == 0, line\n"
        "    heavy = set('torch cupy transformers datasets huggingface_hub'.split()) & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, json.dumps(lines)],
        env=environment(),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert ended.returncode == 0, ended.stderr


def test_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qmamba_cli.stages.run.load_model", interrupt)
    outcome = qmamba("run", *SCORE, cwd=artifacts().folder)
    assert (outcome.code, outcome.out, outcome.err.strip()) == (130, "", "interrupted")


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhaust(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qmamba_cli.stages.run.run_task", exhaust)
    outcome = qmamba("run", *SCORE, cwd=artifacts().folder)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == "error: out of memory\n\nhint: try a smaller `--batch-size` or `--seqlen`\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("qmamba_cli.stages.run.run_task", fail)
    with pytest.raises(ZeroDivisionError):
        qmamba("run", *SCORE, cwd=artifacts().folder)


def test_a_reader_that_stops_reading() -> None:
    command = [sys.executable, "-m", "qmamba_cli", "inspect", str(artifacts().w4), "--json"]
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        ended = subprocess.run(
            command, stdout=gone, stderr=subprocess.PIPE, env=environment(), encoding="utf-8", check=False
        )
    assert (ended.returncode, ended.stderr) == (0, "")


def on_a_terminal(*arguments: object, cwd: Path, **variables: str) -> str:
    """What a terminal of 100 columns receives, stdout and stderr together."""
    main, terminal = pty.openpty()
    variables = {"TERM": "xterm-256color", "COLUMNS": "100", "OMP_NUM_THREADS": "1", **variables}
    child = subprocess.Popen(
        [sys.executable, "-m", "qmamba_cli", *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    received = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:
            # Linux's way to say that the last writer has closed a terminal.
            break
        if not piece:
            break
        received += piece
    os.close(main)
    assert child.wait() == 0, received.decode()
    return received.decode()


COLOUR = re.compile(r"\x1b\[[\d;]*m")


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    shown = COLOUR.sub("", on_a_terminal(*CALIBRATE, cwd=tmp_path))
    assert re.search(r"calibrating .* 4/8 .* left", shown)
    assert re.search(r"calibrating .* 8/8 .* left", shown)
    # The bar goes when the work is done, and the table stays.
    assert re.search(r"samples +8", shown.rpartition("\x1b[2K")[2])


def test_quiet_on_a_terminal() -> None:
    with mock.patch.object(sys.stderr, "isatty", return_value=True, create=True):
        assert console.progress(quiet=True) is silent
        assert console.progress(quiet=False) is not silent


def test_colour_only_where_it_is_wanted() -> None:
    assert COLOUR.search(on_a_terminal("modes", cwd=Path()))
    # Bold is no colour: NO_COLOR forbids colours, and the underlying library keeps to its letter.
    plain = on_a_terminal("modes", cwd=Path(), NO_COLOR="1")
    assert not re.search(r"\x1b\[[\d;]*(3|4|9|10)\d[;m]", plain)
    assert "\x1b" not in process("modes", cwd=Path(), FORCE_COLOR="1", TERM="xterm-256color").out

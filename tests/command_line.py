"""The command line inside the test's process, and the artifacts that its tests share."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

from random_models import random_checkpoint, small_config
from safetensors.torch import save_file

from qmamba_cli import cli
from qmamba_cli.modes import VARIABLES
from qmamba_cli.resources import demo_model_path

# Small on purpose: what is measured on them are relations, not the demo model's quality.
CALIBRATE = ("calibrate", "demo", "--samples", "8", "--seqlen", "64", "--batch-size", "4")
WORKDIR = "qmamba-artifacts"
SMALL = ("--samples", 4, "--seqlen", 32, "--batch-size", 4)
SCORE = ("--task", "lastword", "--limit", 1)
# Nothing from the tester's own shell selects a mode or colours the output.
_UNSET = {*VARIABLES, "NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "COLUMNS", "LINES", "TERM"}


@dataclass(frozen=True)
class Outcome:
    """What one command did."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """The one JSON object that stdout must hold."""
        return json.loads(self.out)


def environment(**changes: str) -> dict[str, str]:
    """The environment without what changes the program's behaviour, with ``changes`` on top."""
    return {name: value for name, value in os.environ.items() if name not in _UNSET} | changes


def qmamba(*arguments: object, cwd: Path, **variables: str) -> Outcome:
    """``qmamba ARGUMENTS`` in ``cwd``. A traceback the user would see fails the test by itself."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["qmamba", *map(str, arguments)]),
        mock.patch.dict(os.environ, environment(**variables), clear=True),
    ):
        code = cli._exit_code()
    return Outcome(code, out.getvalue(), err.getvalue())


def done(*arguments: object, cwd: Path, **variables: str) -> Outcome:
    """`qmamba`, which must succeed."""
    outcome = qmamba(*arguments, cwd=cwd, **variables)
    assert outcome.code == 0, outcome.err
    return outcome


def process(*arguments: object, cwd: Path, **variables: str) -> Outcome:
    """``python -m qmamba_cli ARGUMENTS`` as a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "qmamba_cli", *map(str, arguments)],
        cwd=cwd,
        env=environment(OMP_NUM_THREADS="1", **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def refused(outcome: Outcome, code: int, *expected: str) -> Outcome:
    """An error in the program's manner: exit code, ``error:``, what is expected in it, ``hint:``."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    error, blank, rest = outcome.err.partition("\n\nhint: ")
    assert error.startswith("error: "), outcome.err
    assert error[7] == "`" or not error[7].isupper(), "messages begin in lower case"
    assert "\n" not in error, "a message is one line"
    assert not error.endswith("."), "no final stop"
    assert blank, "the hint names the next step"
    assert rest.endswith("\n") and len(rest) > 10
    for part in expected:
        assert part in outcome.err, outcome.err
    return outcome


def refused_in(folder: Path, code: int, *arguments: object, parts: tuple[str, ...], **variables: str) -> None:
    """`refused`, with the folder as it was, hidden files and all."""
    before = tree(folder)
    refused(qmamba(*arguments, cwd=folder, **variables), code, *parts)
    assert tree(folder) == before


def tree(folder: Path) -> Mapping[str, str]:
    """Every path below a folder, hidden ones too, with the digest of its content."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest() if path.is_file() else "/"
        for path in sorted(folder.rglob("*"))
    }


@dataclass(frozen=True)
class Artifacts:
    """One calibration of the demo model and its exports; shared, so never to be written to.

    Attributes:
        folder: the working folder; its work folder has the default name.
        calibration: the calibration artifact.
        w4: the last export on record, 4-bit.
        w8: the 8-bit export.
    """

    folder: Path
    calibration: Path
    w4: Path
    w8: Path


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


@cache
def artifacts() -> Artifacts:
    """Made once a test run; the folder goes with the process."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="qmamba-tests-"))
    folder = Path(_KEPT[-1].name).resolve()
    done(*CALIBRATE, cwd=folder)
    done("export", "--out", "w8.safetensors", "--w-bits", 8, cwd=folder)
    done("export", "--out", "w4.safetensors", cwd=folder)
    return Artifacts(
        folder=folder,
        calibration=folder / WORKDIR / "calibration",
        w4=folder / "w4.safetensors",
        w8=folder / "w8.safetensors",
    )


def copied(folder: Path) -> Artifacts:
    """A copy of `artifacts` to damage."""
    source = artifacts()
    shutil.copytree(source.folder, folder, dirs_exist_ok=True)
    parts = (path.relative_to(source.folder) for path in (source.calibration, source.w4, source.w8))
    return Artifacts(folder, *(folder / part for part in parts))


def model_folder(path: Path, **sizes: Any) -> Path:
    """A random Mamba in transformers' form with the demo model's tokenizer, stored at ``path``.

    Written without transformers, whose import takes longer than these tests.
    """
    config = small_config(**{"vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 0, **sizes})
    path.mkdir()
    save_file(random_checkpoint(config), path / "model.safetensors", {"format": "pt"})
    settings = {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "hidden_size": config.d_model,
        "intermediate_size": config.d_inner,
        "num_hidden_layers": config.n_layer,
        "vocab_size": config.vocab_size,
        "state_size": config.d_state,
        "conv_kernel": config.d_conv,
        "time_step_rank": config.dt_rank,
        "use_bias": config.proj_bias,
        "use_conv_bias": config.conv_bias,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
    }
    (path / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model_path() / name, path / name)
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

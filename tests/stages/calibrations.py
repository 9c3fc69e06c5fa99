"""Small calibrations that the tests of resuming, merging and sharing start from."""

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from command_line import environment, model_folder, tree

from qmamba_cli.stages.calibrate import CalibrateOptions, CalibrateReport, calibrate

# Eleven batches of three, the last of them of two.
SMALL: Mapping[str, Any] = {"samples": 32, "seqlen": 16, "batch_size": 3}
_WORDS = "the lamp burned low and she had not written for weeks while a calm sea lay behind"
_FOLDER = tempfile.TemporaryDirectory(prefix="qmamba-tests-")


@cache
def small_model() -> str:
    """Folder of a random model of two layers; it goes with the process."""
    return str(model_folder(Path(_FOLDER.name) / "model"))


@cache
def small_text() -> str:
    """Forty rows of random words: the bundled text takes longer to read than these models to run."""
    path = Path(_FOLDER.name) / "text.jsonl"
    generator = random.Random(11)
    words = _WORDS.split()
    rows = (" ".join(generator.choices(words, k=60)) for _ in range(40))
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(path)


def options(workdir: Path, **changes: Any) -> CalibrateOptions:
    asked = {"model": small_model(), "workdir": workdir, "dataset": small_text(), **SMALL, **changes}
    return CalibrateOptions(**asked)


def command_line(workdir: Path) -> tuple[str, ...]:
    """The arguments that ask for the same calibration."""
    sizes = (f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items())
    return ("calibrate", small_model(), f"--dataset={small_text()}", *sizes, f"--workdir={workdir}")


def calibrated(workdir: Path, **changes: Any) -> CalibrateReport:
    return calibrate(options(workdir, **changes))


@cache
def _whole(reduction: str) -> dict[str, str]:
    from qmamba_cli.quant.observers import Reduction

    folder = Path(_FOLDER.name) / f"whole-{reduction}"
    return dict(tree(calibrated(folder, reduction=Reduction(reduction)).path))


def whole(reduction: str = "global") -> dict[str, str]:
    """File → digest of the calibration that was made in one go."""
    return _whole(str(reduction))


def start(*arguments: object, cwd: Path, **variables: str) -> "subprocess.Popen[str]":
    """``python ARGUMENTS`` in ``cwd``, one thread unless ``variables`` say otherwise."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**{"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **variables}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

"""The same bytes from the same input, whatever the folder, the hash seed and the number of threads."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment, tree

SIZES = ("--samples", 4, "--seqlen", 128, "--batch-size", 2)


def artifacts_of(folder: Path, **variables: str) -> dict[str, str]:
    """Calibrate and export the demo model in processes of their own; every file's digest."""
    folder.mkdir(parents=True)
    for command in (("calibrate", "demo", *SIZES), ("export", "--out", "model.safetensors")):
        ended = subprocess.run(
            [sys.executable, "-m", "qmamba_cli", *map(str, command), "--quiet"],
            cwd=folder,
            env=environment(**variables),
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
    return dict(tree(folder))


@pytest.mark.slow
def test_two_runs_make_the_same_bytes(tmp_path: Path) -> None:
    first = artifacts_of(tmp_path / "a", PYTHONHASHSEED="1", OMP_NUM_THREADS="1")
    second = artifacts_of(
        tmp_path / "another" / "folder",
        PYTHONHASHSEED="2",
        OMP_NUM_THREADS="2",
        TOKENIZERS_PARALLELISM="true",
        TZ="Asia/Kathmandu",
        LC_ALL="C",
    )
    assert first == second
    assert {"model.safetensors", "qmamba-artifacts/calibration/manifest.json"} < first.keys()

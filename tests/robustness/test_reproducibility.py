"""The same bytes from the same input, whatever the folder, the hash seed and the number of threads."""

import subprocess
import sys
from pathlib import Path

import pytest
from command_line import environment, tree

# Tensors that are large enough for several threads, and of odd length; the last batch is short.
SIZES = ("--samples", 5, "--seqlen", 97, "--batch-size", 3)


def artifacts_of(folder: Path, text: Path, **variables: str) -> dict[str, str]:
    """Calibrate and export the demo model in processes of their own; every file's digest."""
    folder.mkdir(parents=True)
    calibrate = ("calibrate", "demo", "--dataset", text, *SIZES)
    for command in (calibrate, ("export", "--out", "model.safetensors")):
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
    text = tmp_path / "text.txt"
    text.write_text("It was late, and the lamp burned low over the sea. " * 120)
    first = artifacts_of(tmp_path / "a", text, PYTHONHASHSEED="1", OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    second = artifacts_of(
        tmp_path / "another" / "folder",
        text,
        PYTHONHASHSEED="2",
        OMP_NUM_THREADS="2",
        MKL_NUM_THREADS="2",
        # Beside other tests the second thread waits often, and need not burn a core meanwhile.
        OMP_WAIT_POLICY="PASSIVE",
        TOKENIZERS_PARALLELISM="true",
        TZ="Asia/Kathmandu",
        LC_ALL="C",
    )
    assert first == second
    assert {"model.safetensors", "qmamba-artifacts/calibration/manifest.json"} < first.keys()

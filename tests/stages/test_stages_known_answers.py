"""Frozen divergences of the demo model through the whole pipeline: a numerics regression shows here.

Measured on 2 x86 cores with torch 2.13 and NumPy 2.4, float32, one thread: 32 samples of 128 tokens of the
bundled text, seed 0, alpha 0.9995; KL (float || quantized, mean nats a token) over the first 8 windows of 128
tokens of the bundled passages, 1 016 scored tokens. To measure them again, print ``measured`` below; a change
is an entry of CHANGELOG.md.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest

from qmamba_cli.model.quantize import Recipe
from qmamba_cli.resources import calib_data_path
from qmamba_cli.stages.calibrate import CalibrateOptions, calibrate
from qmamba_cli.stages.compare import CompareOptions, compare
from qmamba_cli.stages.export import ExportOptions, export

# Bits → mode → KL. Rows that are equal bit for bit in prefill stand once.
KL: Mapping[int, Mapping[str, float]] = {
    8: {"0": 0.007750, "2-1": 0.007750, "2-4": 0.005650, "3": 0.005495},
    4: {"0": 0.04477, "2-1": 0.04477, "2-4": 0.04194, "3": 0.04215},
}
# Rounding of another machine's sums moves single codes by one step.
TOLERANCE = 0.1


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("known")
    calibrate(CalibrateOptions(model="demo", workdir=path, samples=32, seqlen=128))
    return path


@pytest.mark.parametrize("w_bits", KL)
def test_divergence_from_the_float_model(workdir: Path, w_bits: int) -> None:
    out = workdir / f"w{w_bits}"
    export(ExportOptions(out=out, workdir=workdir, recipe=Recipe(w_bits=w_bits)))
    # One pass of the float model for all of them; its numbers are those of `run` to the last digit.
    found = compare(
        CompareOptions(
            checkpoint=out,
            modes=tuple(KL[w_bits]),
            task="perplexity",
            data=calib_data_path("lastword.jsonl"),
            limit=8,
            seqlen=128,
        )
    ).results
    assert found["qmamba"]["tokens"] == 8 * 127
    measured = {mode: found["modes"][mode]["kl_mean"] for mode in KL[w_bits]}
    assert measured == pytest.approx(dict(KL[w_bits]), rel=TOLERANCE)

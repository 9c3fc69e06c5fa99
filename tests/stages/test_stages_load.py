"""Which dtype and device a model is loaded to."""

import re

import pytest

from qmamba_cli.errors import UsageError
from qmamba_cli.modes import MODES
from qmamba_cli.stages.load import DTYPES, ModelOptions, load_model


@pytest.mark.parametrize(
    ("mode", "dtype", "message"),
    [
        ("fp", "fp16", "`--dtype fp16` needs the `cuda` backend, got `cpu`"),
        ("fp", "bf16", "`--dtype bf16` needs the `cuda` backend, got `cpu`"),
        ("0", "fp16", "`--dtype fp16` belongs to the float model, got mode 0"),
        ("fp", "int8", f"`--dtype` must be one of {', '.join(DTYPES)}, got `int8`"),
    ],
)
def test_dtypes_that_are_refused(mode, dtype, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_model(ModelOptions(mode=MODES[mode], model="demo", backend="cpu", dtype=dtype))


def test_the_results_name_the_dtype():
    loaded = load_model(ModelOptions(mode=MODES["fp"], model="demo", backend="cpu"))
    assert loaded.provenance["weights"] == "fp32"
    assert loaded.model.weights.embedding.dtype == DTYPES["fp32"]

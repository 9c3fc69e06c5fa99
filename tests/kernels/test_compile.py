"""Every kernel instance compiles to machine code for every supported architecture, without a GPU."""

import pytest

from qmamba_cli.errors import DeviceError, UsageError
from qmamba_cli.kernels import _compile
from qmamba_cli.kernels._source import target_of

try:
    _compile.require_nvrtc()
    MISSING = ""
except DeviceError as error:
    MISSING = error.message


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "NVRTC is there")
@pytest.mark.parametrize("arch", _compile.ARCHITECTURES)
def test_every_instance_compiles(arch):
    compiled = {row.operator: row for row in _compile.compile_all(arch)}
    left_out = {"linear_narrow", "linear_short", "linear_wide"} if arch != "sm_90" else set()
    assert set(compiled) == set(_compile.OPERATORS) - left_out
    for operator, (_, names) in _compile.entries(arch).items():
        assert compiled[operator].entries == len(set(names)) == len(names) > 0
        assert compiled[operator].bytes > 1000


def test_targets_have_what_their_architecture_alone_has():
    batch, other = "decode_batch/decode_batch.cu", "argmax/argmax.cu"
    assert target_of(batch, "sm_90") == target_of("linear/linear_wide.cu", "sm_90") == "sm_90a"
    assert target_of(batch, "sm_80") == "sm_80" and target_of(batch, "sm_120") == "sm_120"
    assert target_of(other, "sm_90") == "sm_90"


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UsageError, match=r"sm_61.*sm_90"):
        list(_compile.compile_all("sm_61"))


@pytest.mark.skipif(bool(MISSING), reason=MISSING or "NVRTC is there")
def test_a_kernel_that_does_not_compile_names_its_line(monkeypatch):
    monkeypatch.setattr(
        _compile, "kernel_source", lambda path: f'#line 7 "{path}"\n__global__ void f( {{}}\n'
    )
    with pytest.raises(DeviceError, match=r"argmax\.cu\(7\)"):
        list(_compile.compile_all("sm_90"))

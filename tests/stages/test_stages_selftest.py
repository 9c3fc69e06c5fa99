"""`selftest`: its cases, how it judges them, and its two commands on a machine without a GPU."""

import json
from dataclasses import fields, replace

import pytest
import torch
from command_line import qmamba

from qmamba_cli.errors import QmambaError
from qmamba_cli.kernels.backend import CPU, Backend
from qmamba_cli.stages import selftest
from qmamba_cli.stages.common import within_gpu_memory
from qmamba_cli.stages.selftest import Exactness

CASES = [case for case in selftest.cases() if case.inputs and case.bytes < 3_000_000]


def test_every_operator_has_a_case():
    assert {case.operator for case in selftest.cases()} == {
        *(field.name for field in fields(Backend) if field.name not in ("name", "device")),
        "decode_block",
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operator}-{case.variant}")
def test_the_reference_passes_its_own_test(case):
    outcome = selftest.run_case(case, CPU)
    assert outcome.passed and outcome.worst == 0


@pytest.mark.parametrize(
    ("exactness", "error", "share", "passes"),
    [
        (Exactness.EXACT, 1, 0.0001, False),
        (Exactness.GRID, 1, 0.0001, True),
        (Exactness.GRID, 1, 0.01, False),
        (Exactness.GRID, 2, 0.0001, False),
        (Exactness.REAL, 1, 0.0001, False),
    ],
)
def test_a_kernel_that_strays_is_seen(exactness, error, share, passes):
    case = next(case for case in CASES if case.operator == "rms_norm")
    wrong = round(share * case.inputs["x"].numel())

    def strayed(*args, **kwargs):
        out = CPU.rms_norm(*args, **kwargs)
        out.view(-1)[:wrong] += torch.where(out.view(-1)[:wrong] > 0, -error, error).to(out.dtype)
        return out

    budget = 1e-3 if exactness is Exactness.GRID else 1e-6
    outcome = selftest.run_case(
        replace(case, exactness=exactness, budget=budget), replace(CPU, rms_norm=strayed)
    )
    assert outcome.passed is passes


def test_a_case_is_prepared_once_a_backend():
    case = next(case for case in CASES if case.operator == "decode_block")
    prepared = []

    def prepare(ops, inputs):
        prepared.append(ops.name)
        return case.prepare(ops, inputs)

    outcome = selftest.run_case(replace(case, prepare=prepare), CPU)
    assert outcome.passed and outcome.ms is None and outcome.gb_s is None
    assert prepared == ["cpu", "cpu"]


@pytest.mark.parametrize("timing", [True, False])
def test_without_timing_no_time_is_shown(tmp_path, monkeypatch, timing):
    times = {"ms": 0.25, "gb_s": 40.0} if timing else {"ms": None, "gb_s": None}
    row = selftest.Outcome(
        operator="linear", variant="a case", exactness=Exactness.EXACT, worst=0.0, budget_used=0.0, **times
    )
    asked = []

    def run(*, timing, progress):
        asked.append(timing)
        return [row], 80.0 if timing else None

    monkeypatch.setattr(selftest, "selftest", run)
    options = [] if timing else ["--no-timing"]
    outcome = qmamba("selftest", *options, cwd=tmp_path)
    assert outcome.code == 0 and asked == [timing]
    assert ("0.2500" in outcome.out and "50%" in outcome.out) is timing
    values = json.loads(qmamba("selftest", *options, "--json", cwd=tmp_path).out)
    assert values["copy_gb_s"] == (80.0 if timing else None) and values["kernels"][0]["ms"] == times["ms"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_names_the_cpu_backend(tmp_path):
    outcome = qmamba("selftest", cwd=tmp_path)
    assert outcome.code == 4
    assert "needs an NVIDIA GPU" in outcome.err and "--backend cpu" in outcome.err


def test_arch_alone_is_wrong_usage(tmp_path):
    outcome = qmamba("selftest", "--arch", "sm_90", cwd=tmp_path)
    assert outcome.code == 2 and "--compile-only" in outcome.err


def test_compiling_prints_one_json_object(tmp_path, monkeypatch):
    row = selftest.Compiled(operator="linear", arch="sm_90", entries=3, bytes=4096, seconds=0.5)
    monkeypatch.setattr(selftest, "compile_all", lambda arch: iter([replace(row, arch=arch)]))
    outcome = qmamba(
        "selftest", "--compile-only", "--arch", "sm_80", "--arch", "sm_90", "--json", cwd=tmp_path
    )
    assert outcome.code == 0
    assert [entry["arch"] for entry in json.loads(outcome.out)["compiled"]] == ["sm_80", "sm_90"]


def test_a_gpu_without_memory_names_the_batch_size_to_try():
    with pytest.raises(QmambaError) as caught, within_gpu_memory(16):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
    assert "batch size 16" in caught.value.message and "--batch-size 8" in caught.value.hint

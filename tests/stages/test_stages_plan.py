"""What a run will take, told from manifests alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import artifacts

from qmamba_cli.artifacts.quantized import read_quantized, read_quantized_manifest
from qmamba_cli.errors import QmambaError, UsageError
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.model.streaming import preparing_bytes
from qmamba_cli.model.weights import LinearWeights, ModelWeights
from qmamba_cli.modes import MODES
from qmamba_cli.stages.load import ModelOptions, assemble
from qmamba_cli.stages.plan import plan_run
from qmamba_cli.views.plan import show_run_plan


def held(value: object, seen: set[int]) -> int:
    """Bytes of every tensor below a value, each once."""
    if isinstance(value, torch.Tensor):
        fresh = value.data_ptr() not in seen
        seen.add(value.data_ptr())
        return value.nbytes if fresh else 0
    if isinstance(value, tuple):
        return sum(held(item, seen) for item in value)
    if isinstance(value, LinearWeights | ModelWeights) or hasattr(value, "in_proj"):
        return sum(held(getattr(value, name), seen) for name in value.__slots__)  # type: ignore[attr-defined]
    return 0


@pytest.mark.parametrize("path", [artifacts().w4, artifacts().w8], ids=["w4", "w8"])
def test_the_plan_of_a_quantized_model(path: Path) -> None:
    plan = plan_run(ModelOptions(mode=MODES["2-4"], checkpoint=path, backend="cpu"), batch_size=4, seqlen=128)
    manifest = read_quantized_manifest(path)
    assert plan.digest == manifest.content_digest
    assert plan.weights == f"W{manifest.quantization.w_bits}A8"
    assert 0.85 * path.stat().st_size < plan.stored_bytes + 552_000 < path.stat().st_size
    assert plan.bits_per_weight == pytest.approx(8 * plan.stored_bytes / 4.7e6, rel=0.2)
    weights = assemble(read_quantized(path), select_backend("cpu").device)
    assert plan.weight_bytes == pytest.approx(held(weights, set()), rel=0.01)
    assert plan.state_bytes == 6 * 512 * (16 + 3) * 4
    # Of so small a batch the table that is rotated last is the peak.
    assert plan.memory_bytes == plan.weight_bytes + preparing_bytes(plan.config)
    wide = replace(plan, batch=(64, 512), activation_bytes=plan.activation_bytes * 64)
    assert wide.memory_bytes == wide.weight_bytes + wide.activation_bytes + 64 * wide.state_bytes


def test_the_plan_of_a_float_model() -> None:
    options = ModelOptions(mode=MODES["fp"], model="demo", backend="cpu")
    plan = plan_run(options, batch_size=1, seqlen=16)
    assert (plan.weights, plan.bits_per_weight, plan.digest) == ("fp32", 32.0, "")
    # The rotated head is a table of its own.
    assert plan.weight_bytes == plan.stored_bytes + 4 * 8192 * 256


def test_nothing_to_plan(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needs `--model`"):
        plan_run(ModelOptions(mode=MODES["fp"]), batch_size=1, seqlen=1)
    with pytest.raises(QmambaError, match="does not exist"):
        plan_run(ModelOptions(mode=MODES["0"], checkpoint=tmp_path / "q"), batch_size=1, seqlen=1)


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_run(ModelOptions(mode=MODES["0"], checkpoint=artifacts().w4), batch_size=2, seqlen=64)
    show_run_plan(plan, as_json=False)
    text = capsys.readouterr().out
    for part in ("6 layers", "W4A8", "bits per weight", "2 x 64 tokens", "memory", "a batch"):
        assert part in text
    assert plan.batch_seconds > 0
    show_run_plan(plan, as_json=True)
    assert f'"memory_bytes": {plan.memory_bytes}' in capsys.readouterr().out

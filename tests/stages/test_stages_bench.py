"""The bench stage on the CPU: what is timed, how rows compare, what is refused, tables, JSON and chart."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import Outcome, artifacts, qmamba, refused
from html_checks import checked_page

from qmamba_cli.artifacts.quantized import read_quantized
from qmamba_cli.cli import app
from qmamba_cli.commands.bench import bench as command
from qmamba_cli.errors import DeviceError, QmambaError, UsageError
from qmamba_cli.evaluation.results import json_safe
from qmamba_cli.html.bench import bench_page
from qmamba_cli.kernels.backend import CPU
from qmamba_cli.modes import MODES
from qmamba_cli.stages import bench as stage
from qmamba_cli.stages import bench_measure, bench_peer
from qmamba_cli.stages.bench import BenchOptions, bench, shape_config
from qmamba_cli.stages.bench_breakdown import REST, STAGES, _with_rest, breakdown
from qmamba_cli.stages.bench_measure import Counts, Spread, is_out_of_memory, timed
from qmamba_cli.stages.run import ModelOptions, load_model

QUICK: dict[str, Any] = {"prompt_lengths": (8,), "new_tokens": 3, "repeat": 2, "warmup": 0, "backend": "cpu"}
COUNTS = Counts(batch_sizes=(1,), prompt_lengths=(4,), new_tokens=2, repeat=1, warmup=0, breakdown=False)
GIVEN = (
    *("--prompt-length", 8, "--new-tokens", 3, "--repeat", 2, "--warmup", 0),
    *("--backend", "cpu", "--mode", "0"),
)


@pytest.fixture(autouse=True)
def registered() -> None:
    if "bench" not in {info.name or info.callback.__name__ for info in app.registered_commands}:
        app.command()(command)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SHAPES", {"130m": (32, 2)})
    monkeypatch.setattr(stage, "_VOCABULARY", 64)


def run(*arguments: object, cwd: Path | None = None) -> Outcome:
    return qmamba("bench", *arguments, cwd=cwd or artifacts().folder)


def test_a_checkpoint_every_mode_and_length_beside_the_float_model() -> None:
    options = BenchOptions(
        checkpoint=artifacts().w4, batch_sizes=(1, 2), **{**QUICK, "prompt_lengths": (4, 3), "new_tokens": 2}
    )
    report = bench(options)
    cases = [(1, 4), (1, 3), (2, 4), (2, 3)]
    assert [(row.mode, row.batch_size, row.prompt_length) for row in report.rows] == [
        (mode, *case) for mode in ("fp", "0", "2-4", "3") for case in cases
    ]
    for row in report.rows:
        assert row.weights == ("fp32" if row.is_baseline else "W4A8")
        measured = row.measured
        assert measured is not None and row.error is None and row.load_s > 0
        assert (
            0 < measured.first_token_ms.low <= measured.first_token_ms.median <= measured.first_token_ms.high
        )
        assert row.tokens_per_s == pytest.approx(1e3 * row.batch_size / measured.token_ms.median)
        assert measured.generated_tokens_per_s > 0
        assert measured.decode_gpu_bytes is None and not measured.decode_breakdown
    baseline = next(row for row in report.rows if (row.batch_size, row.prompt_length) == (2, 3))
    other = report.rows[-1]
    assert baseline.token_speedup == 1.0
    assert other.token_speedup == baseline.measured.token_ms.median / other.measured.token_ms.median
    assert (
        other.first_token_speedup
        == baseline.measured.first_token_ms.median / other.measured.first_token_ms.median
    )
    assert report.model == str(artifacts().w4) and report.config.d_model == 256
    assert {"device", "torch", "python", "qmamba-cli", "threads"} <= set(report.machine)
    assert "driver" not in report.machine
    assert report.host_bytes is None or report.host_bytes > 10**7
    assert report.notes and "mamba_ssm" in report.notes[0]


def test_the_last_export_is_timed_and_the_float_model_can_be_left_out() -> None:
    options = BenchOptions(
        modes=(MODES["3"],), workdir=artifacts().folder / "qmamba-artifacts", baseline=False, **QUICK
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(artifacts().folder)
        (row,) = bench(options).rows
    assert (row.mode, row.weights, row.token_speedup) == ("3", "W4A8", None)


def test_random_weights_of_a_shape(tiny: None) -> None:
    options = BenchOptions(shape="130m", modes=(MODES["0"], MODES["fp"]), **QUICK)
    report = bench(options)
    assert [(row.mode, row.weights) for row in report.rows] == [("fp", "fp32"), ("0", "W4A8"), ("0", "W8A8")]
    assert report.config == shape_config("130m")


def test_published_shapes() -> None:
    sizes = {name: shape_config(name) for name in stage.SHAPES}
    assert {name: (c.d_model, c.d_inner, c.n_layer, c.dt_rank) for name, c in sizes.items()} == {
        "130m": (768, 1536, 24, 48),
        "370m": (1024, 2048, 48, 64),
        "790m": (1536, 3072, 48, 96),
        "1.4b": (2048, 4096, 48, 128),
        "2.8b": (2560, 5120, 64, 160),
    }
    assert all((c.d_state, c.d_conv, c.vocab_size) == (16, 4, 50280) for c in sizes.values())


@pytest.mark.parametrize("mode", MODES)
def test_the_breakdown_names_every_operator_once(mode: str) -> None:
    floating = mode == "fp"
    options = ModelOptions(
        mode=MODES[mode],
        model="demo" if floating else None,
        checkpoint=None if floating else artifacts().w8,
        backend="cpu",
    )
    model = load_model(options).model
    parts = breakdown(model, torch.ones(1, 6, dtype=torch.int64), prompt_ms=0, step_ms=0)
    for stages in parts:
        assert set(stages) <= set(STAGES)
        assert set(STAGES) - set(stages) <= {"quantize"}
        assert [name for name in STAGES if name in stages] == list(stages)
        assert all(ms > 0 for ms in stages.values())
    assert ("quantize" in parts.step) == (mode in ("2-0", "2-2", "3"))


def test_the_rest_is_what_the_operators_leave() -> None:
    assert _with_rest({"scan": 2.0, "conv": 1.0}, 5.0) == {"scan": 2.0, "conv": 1.0, REST: 2.0}
    assert _with_rest({"scan": 2.0}, 1.5)[REST] == 0


def exhausted_at(batch: int, *, during_capture: bool = False) -> Any:
    """The model of a GPU whose memory ends at some batch size."""
    model = load_model(ModelOptions(mode=MODES["0"], checkpoint=artifacts().w8, backend="cpu")).model

    def refuse() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def linear(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.shape[0] >= batch:
            if during_capture:
                try:
                    refuse()
                except torch.OutOfMemoryError:
                    raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
            refuse()
        return CPU.linear(x, *args, **kwargs)

    model.backend = replace(CPU, linear=linear)
    return model


@pytest.mark.parametrize("during_capture", [False, True])
def test_running_out_of_gpu_memory_is_a_row(during_capture: bool) -> None:
    counts = replace(COUNTS, batch_sizes=(1, 4))
    rows = list(timed(lambda: exhausted_at(3, during_capture=during_capture), torch.device("cpu"), counts))
    assert rows[0].measured is not None and rows[0].error is None
    assert rows[1].measured is None
    assert rows[1].error == "out of GPU memory at batch size 4: try `--batch-size 2`"
    assert "--prompt-length" in bench_measure.out_of_memory(1)


def test_a_model_that_does_not_fit_is_a_row() -> None:
    def make() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    (row,) = timed(make, torch.device("cpu"), COUNTS)
    assert row.measured is None and "--shape" in str(row.error)


def test_other_errors_are_not_taken_for_memory() -> None:
    def make() -> Any:
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="assert"):
        list(timed(make, torch.device("cpu"), COUNTS))
    assert not is_out_of_memory(RuntimeError("x")) and not is_out_of_memory(None)


def test_nothing_timed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_loader", lambda *_: lambda: exhausted_at(1))
    options = BenchOptions(checkpoint=artifacts().w8, baseline=False, **{**QUICK, "batch_sizes": (4,)})
    with pytest.raises(QmambaError, match="nothing could be timed: out of GPU memory") as caught:
        bench(options)
    assert caught.value.hint == "try `--batch-size 2`"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": (1, 0)}, "`--batch-size` must be at least 1, got 0"),
        ({"prompt_lengths": (-1,)}, "`--prompt-length` must be at least 1, got -1"),
        ({"new_tokens": 0}, "`--new-tokens`"),
        ({"repeat": 0}, "`--repeat`"),
        ({"warmup": -1}, "`--warmup` must be at least 0, got -1"),
        ({"shape": "3b"}, "unknown shape `3b`, expected one of 130m, 370m"),
        ({"shape": "130m", "checkpoint": Path("x")}, "`--checkpoint` beside it"),
        ({"shape": "130m", "w_bits": (4, 5)}, "`--w-bits` must be 4 or 8, got 5"),
        ({"modes": (), "baseline": False}, "no mode is left"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        BenchOptions(**changes)


def test_no_gpu_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError):
        bench(BenchOptions(**{**QUICK, "backend": "cuda"}))


def test_quartiles() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([4.0, 1.0, 3.0, 2.0]) == Spread(2.5, 1.75, 3.25)


def test_json_of_the_command() -> None:
    outcome = run(*GIVEN, "--batch-size", 1, "--batch-size", 2, "--breakdown", "--json")
    assert outcome.code == 0, outcome.err
    value = outcome.json()
    assert [(row["mode"], row["batch_size"]) for row in value["rows"]] == [
        *(("fp", 1), ("fp", 2)),
        *(("0", 1), ("0", 2)),
    ]
    assert value["command"].startswith("qmamba bench --prompt-length 8")
    row = value["rows"][-1]
    assert set(row["measured"]["decode_breakdown"]) == set(STAGES) - {"quantize"}
    assert row["tokens_per_s"] > 0 and row["measured"]["token_ms"]["median"] > 0
    assert value["settings"] == {"new_tokens": 3, "repeat": 2, "warmup": 0}


def test_tables_and_chart_of_the_command(tmp_path: Path) -> None:
    chart = tmp_path / "new" / "chart.html"
    outcome = run(*GIVEN, "--breakdown", "--chart", chart)
    assert outcome.code == 0, outcome.err
    assert outcome.err == f"chart written to {chart}\n"
    for part in (
        "w4.safetensors",
        "ms/token",
        "x float",
        "tokens/s",
        "by stage",
        "in_proj",
        "torch",
        "command",
    ):
        assert part in outcome.out
    assert "GPU memory" not in outcome.out
    # A second run must be told to replace it, and is told before it has timed anything.
    again = run(*GIVEN, "--chart", chart)
    refused(again, 1, "chart.html")
    assert run(*GIVEN, "--chart", chart, "--force").code == 0


def test_the_chart_stands_alone_and_escapes_what_it_shows(tiny: None) -> None:
    report = bench(BenchOptions(shape="130m", modes=(MODES["0"],), w_bits=(8,), breakdown=True, **QUICK))
    failed = replace(report.rows[1], mode="2-4", measured=None, error="out of <memory> & time")
    record = {"command": 'qmamba bench "<&>"', **replace(report, rows=[*report.rows, failed]).to_dict()}
    page = checked_page(bench_page(json_safe(record)))
    assert 'Made by: qmamba bench "<&>"' in page.all_text()
    charts = page.find("svg", "chart")
    assert len(charts) == 2, "the first token, and each token after it"
    for chart in charts:
        assert len(chart.find("rect", "fill")) == 2, "the float model and mode 0; mode 2-4 did not run"
    first, *stages = page.find("table")
    assert any(cell.text == "out of <memory> & time" for cell in first.find("td"))
    for table in stages:
        assert REST in [cell.text for cell in table.find("td")]
    assert len(stages) == 2


def test_an_interrupt_shows_the_rows_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stage.timed

    def interrupted(make: Any, device: torch.device, counts: Counts) -> Any:
        for number, timing in enumerate(real(make, device, counts)):
            if number == 1:
                raise KeyboardInterrupt
            yield timing

    monkeypatch.setattr(stage, "timed", interrupted)
    chart = tmp_path / "chart.html"
    outcome = run(*GIVEN, "--prompt-length", 4, "--json", "--chart", chart)
    assert outcome.code == 130 and "partial" in outcome.err
    value = outcome.json()
    assert value["partial"] is True and [row["mode"] for row in value["rows"]] == ["fp"]
    assert ", partial" in chart.read_text()


def test_times_of_a_file_name_its_digests(tiny: None) -> None:
    made = artifacts()
    report = bench(BenchOptions(checkpoint=made.w4, modes=(MODES["0"],), baseline=False, **QUICK))
    own = report.to_dict()["qmamba"]
    manifest = read_quantized(made.w4).manifest
    assert own["artifact"] == {"path": str(made.w4), "digest": manifest.content_digest}
    assert own["calibration"]["digest"] == manifest.calibration.digest
    assert own["model"]["digest"] == manifest.model.digest
    assert "qmamba" not in bench(BenchOptions(shape="130m", modes=(MODES["0"],), **QUICK)).to_dict()


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (("--mode", "9"), 2, "unknown mode `9`"),
        (("--batch-size", 0), 2, "`--batch-size` must be at least 1"),
        (("--w-bits", "4"), 2, "`--w-bits` belongs to `--shape`"),
        (("--shape", "130m", "--w-bits", "4;8"), 2, "got `4;8`"),
        (("--chart", "chart.png"), 2, "got `chart.png`"),
        (("--checkpoint", "no.safetensors"), 1, "no.safetensors"),
    ],
)
def test_refusals_of_the_command(arguments: tuple[object, ...], code: int, part: str) -> None:
    refused(run(*arguments), code, part)


def test_the_peer_is_timed_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Peer:
        def __init__(self, config: Any, **_: Any) -> None:
            self.config = config

        def eval(self) -> "Peer":
            return self

        def __call__(self, ids: torch.Tensor, num_last_tokens: int) -> Any:
            return SimpleNamespace(logits=torch.zeros(ids.shape[0], num_last_tokens, 8))

        def generate(self, *, input_ids: torch.Tensor, max_length: int, **options: Any) -> None:
            assert options["cg"]
            asked.append(max_length - input_ids.shape[1])

    names = ("mamba_ssm", "mamba_ssm.models", "mamba_ssm.models.config_mamba")
    modules = {name: ModuleType(name) for name in (*names, "mamba_ssm.models.mixer_seq_simple")}
    modules["mamba_ssm.models.config_mamba"].MambaConfig = SimpleNamespace  # type: ignore[attr-defined]
    modules["mamba_ssm.models.mixer_seq_simple"].MambaLMHeadModel = Peer  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    model = bench_peer._make(shape_config("130m"), torch.device("cpu"))
    assert model.config.ssm_cfg == {"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": 48}
    (row,) = bench_peer._timed(model, shape_config("130m"), torch.device("cpu"), COUNTS, 1.0)
    assert row.measured is not None and asked == [3, 3, 1]
    assert bench_peer.peer(shape_config("130m"), torch.device("cpu"), COUNTS)[0] == []


def test_the_command_documents_itself() -> None:
    outcome = run("--help")
    assert outcome.code == 0
    for option in ("--shape", "--breakdown", "--chart", "--batch-size", "--prompt-length", "--no-float"):
        assert option in outcome.out


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    options = BenchOptions(
        checkpoint=artifacts().w4,
        batch_sizes=(1, 2),
        breakdown=True,
        **{**QUICK, "backend": "cuda", "prompt_lengths": (64,), "new_tokens": 16, "warmup": 2},
    )
    report = bench(options)
    assert {row.weights for row in report.rows} >= {"fp16", "W4A8"}
    for row in report.rows:
        assert row.measured is not None, row.error
        assert row.measured.prompt_gpu_bytes > 0 and row.measured.decode_gpu_bytes > 0
        if row.mode != "mamba_ssm":
            assert sum(row.measured.decode_breakdown.values()) > 0
    assert json.dumps(report.to_dict())

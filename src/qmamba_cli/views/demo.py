"""The outcome of `demo`."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.console import Column
from qmamba_cli.progress import Progress
from qmamba_cli.views.calibration import show_calibration
from qmamba_cli.views.export import show_export

if TYPE_CHECKING:
    from qmamba_cli.stages.demo import DemoOptions


def show_demo(options: "DemoOptions", *, progress: Progress, as_json: bool) -> None:
    """Run the demo and show each step's outcome and the table of modes."""
    from qmamba_cli.stages import demo

    if not as_json:
        console.note(
            f"$ qmamba calibrate {demo.MODEL} --samples {options.samples} --workdir {options.folder}"
        )
    calibrated, exported = demo.prepare(options, progress=progress)
    if not as_json:
        show_calibration(calibrated, dry_run=False, as_json=False)
        console.note(f"$ qmamba export --out {exported.path} --workdir {options.folder}")
        show_export(exported, dry_run=False, as_json=False)
        console.note(f"$ qmamba run --mode MODE --task lastword --workdir {options.folder}   (each mode)")
    rows = []
    for row in demo.rows(options, progress=progress):
        rows.append(row)
        if not as_json:
            console.note(f"mode {row.mode}: {row.seconds:.1f} s")
    if as_json:
        console.write_json(
            {
                "calibration": str(calibrated.path),
                "checkpoint": str(exported.path),
                "modes": [asdict(row) for row in rows],
            }
        )
        return
    columns = (
        Column("mode"),
        Column("last-word accuracy", True),
        Column("perplexity", True),
        Column("KL to float", True),
        Column("seconds", True),
    )
    cells = [
        (
            row.mode,
            f"{row.acc:.3f} ± "
            + (row.acc_stderr if isinstance(row.acc_stderr, str) else f"{row.acc_stderr:.3f}"),
            f"{row.perplexity:.2f}",
            f"{row.kl:.5f}",
            f"{row.seconds:.1f}",
        )
        for row in rows
    ]
    console.table(
        f"the bundled model, W{options.w_bits}A8, every mode",
        columns,
        cells,
        caption="± is one standard error; KL in nats a token; seconds on this machine",
    )

"""The outcome of `run --dry-run`."""

from typing import TYPE_CHECKING

from qmamba_cli import console
from qmamba_cli.views.calibration import DIGEST_SHOWN, GUESS, duration, shapes

if TYPE_CHECKING:
    from qmamba_cli.stages.plan import RunPlan


def show_run_plan(plan: "RunPlan", *, as_json: bool) -> None:
    """What a run will take."""
    if as_json:
        console.write_json(plan.to_dict())
        return
    digest = f", digest {plan.digest[:DIGEST_SHOWN]}" if plan.digest else ""
    sequences, tokens = plan.batch
    console.facts(
        f"{plan.name} in mode {plan.mode} (dry run)",
        {
            "model": shapes(plan.config),
            "weights": f"{plan.weights}, {console.size(plan.stored_bytes)} stored, "
            f"{plan.bits_per_weight:.2f} bits per weight{digest}",
            "backend": plan.backend,
            "batch": f"{sequences} x {tokens} tokens",
            "memory": f"about {console.size(plan.memory_bytes)} beside the program itself: weights "
            f"{console.size(plan.weight_bytes)}, activations {console.size(plan.activation_bytes)}, "
            f"states {console.size(sequences * plan.state_bytes)}",
            "time": f"about {duration(plan.batch_seconds)} a batch, beside loading {GUESS}",
        },
    )

r"""The ``qmamba`` model of lm-eval, for those who would rather start from lm-eval than from ``qmamba run``.

    python -m qmamba_cli.lm_eval run --model qmamba --model_args checkpoint=ckpt.safetensors,mode=2-4 \
        --tasks lambada_openai

is lm-eval's own command line with the model registered; releases that read the entry point group
``lm_eval.models`` find it by themselves.
"""

from pathlib import Path
from typing import Any

from lm_eval.api.registry import register_model

from qmamba_cli.evaluation.harness import HarnessModel
from qmamba_cli.modes import DEFAULT_MODE, mode_by_name
from qmamba_cli.stages.harness import harness_arguments
from qmamba_cli.stages.run import ModelOptions, load_model


@register_model("qmamba")
class QmambaLM(HarnessModel):
    """lm-eval's ``--model qmamba``.

    Args:
        checkpoint: quantized file; the work folder's last export if left out.
        mode: name of the row.
        model: float model of mode fp.
        workdir: the work folder.
        backend: auto, cpu or cuda.
        batch_size: sequences a forward pass.
        options: what lm-eval passes to every model and this one does not need, as ``device``.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        mode: str = DEFAULT_MODE,
        model: str | None = None,
        workdir: str = "qmamba-artifacts",
        backend: str = "auto",
        batch_size: int | str = 1,
        **options: Any,  # noqa: ARG002 (lm-eval's signature)
    ) -> None:
        loaded = load_model(
            ModelOptions(
                # lm-eval turns a value such as 0 into a number.
                mode=mode_by_name(str(mode)),
                workdir=Path(workdir),
                checkpoint=None if checkpoint is None else Path(checkpoint),
                model=model,
                backend=backend,
            )
        )
        super().__init__(**harness_arguments(loaded), batch_size=int(batch_size))


def main() -> None:
    """lm-eval's command line, with ``--model qmamba``."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()

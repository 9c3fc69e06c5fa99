"""Export holds one layer, however many there are."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from command_line import environment
from random_models import small_config
from safetensors.torch import save_file

from qmamba_cli.artifacts.calibration import write_calibration
from qmamba_cli.artifacts.checkpoint import open_checkpoint
from qmamba_cli.artifacts.checkpoint_config import huggingface_config
from qmamba_cli.artifacts.manifest import CalibrationManifest, DatasetRecord
from qmamba_cli.quant.observers import ObserverSet
from qmamba_cli.resources import demo_model_path
from qmamba_cli.stages.calibrate import site_records
from qmamba_cli.stages.common import model_record

LAYERS = 16
MEASURED = """
import resource
from pathlib import Path
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.stages.export import ExportOptions, export

def peak(name):
    export(ExportOptions(out=Path(f"{name}.out"), calibration=Path(name), recipe=Recipe(w_bits=8)))
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

print(peak("few"), peak("many"))
"""


def calibrated(folder: Path, name: str, n_layer: int) -> None:
    """A model of constant weights and a calibration that saw one value, both made in no time."""
    config = small_config(d_model=512, dt_rank=16, vocab_size=8192, n_layer=n_layer)
    model = folder / f"{name}-model"
    model.mkdir()
    shutil.copy(demo_model_path() / "tokenizer.json", model)
    (model / "config.json").write_text(json.dumps(huggingface_config(config)))
    weights = {key: torch.full(shape, 0.01) for key, shape in config.tensor_shapes().items()}
    save_file(weights, model / "model.safetensors")
    observers = ObserverSet(n_layer)
    for key in observers:
        observers.observe(key, torch.ones(1, 1))
    dataset = DatasetRecord(
        dataset="none", digest="", text_column=None, sample_ids=[0], shuffle=False, seed=0, samples=1,
        seqlen=1, tokens=1, batch_size=1,
    )  # fmt: skip
    manifest = CalibrationManifest(
        tool_version="0", model=model_record(open_checkpoint(str(model))), dataset=dataset, alpha=0.9995,
        reduction="global", dtype="fp32", device="cpu", sites=site_records(observers, 0.9995), created_by={},
    )  # fmt: skip
    write_calibration(
        folder / name, manifest=manifest, scales=observers.scales(), statistics=observers.arrays()
    )


def test_the_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    calibrated(tmp_path, "few", 2)
    calibrated(tmp_path, "many", LAYERS)
    ended = subprocess.run(
        [sys.executable, "-c", MEASURED],
        cwd=tmp_path,
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    few, many = map(int, ended.stdout.split())
    # 14 more layers: 88 MB of float weights and 23 MB of int8 ones pass through.
    assert (tmp_path / "many.out").stat().st_size - (tmp_path / "few.out").stat().st_size > 22 * 10**6
    assert many - few < 8 * 10**6, f"{few} to {many}"

"""A float model read block by block: the bits of the whole one, in a part of its memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_models import random_checkpoint, random_ids, small_config
from safetensors.torch import save_file

from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model
from qmamba_cli.model.streaming import (
    GROUP_BYTES,
    ResidentMamba,
    StreamedMamba,
    is_streamed,
    streamed_bytes,
    weight_bytes,
)
from qmamba_cli.modes import MODES
from qmamba_cli.quant.coverage import Coverage
from qmamba_cli.quant.observers import ObserverSet, Reduction
from qmamba_cli.sites import site_keys

CONFIG = small_config(n_layer=3, proj_bias=True)
TENSORS = random_checkpoint(CONFIG)
CPU = select_backend("cpu")
# Seven windows in batches of two: the last one is short.
BATCHES = [batch for batch in random_ids(CONFIG.vocab_size, 7, 40, seed=1).split(2)]
LARGE = MambaConfig(
    d_model=2560, n_layer=64, vocab_size=50280, d_state=16, d_conv=4, d_inner=5120, dt_rank=160
)


def resident() -> ResidentMamba:
    return ResidentMamba(Mamba(float_model(CONFIG, TENSORS.__getitem__), MODES["fp"], CPU))


def streamed(group_bytes: int = GROUP_BYTES) -> StreamedMamba:
    return StreamedMamba(CONFIG, TENSORS.__getitem__, CPU, group_bytes=group_bytes)


@pytest.mark.parametrize("together", [1, 2, 4])
def test_every_site_sees_the_same_bits_in_the_same_order(together: int) -> None:
    seen: list[dict[str, list[torch.Tensor]]] = []
    for model in (resident(), streamed()):
        by_site: dict[str, list[torch.Tensor]] = {key: [] for key in site_keys(CONFIG.n_layer)}
        for first in range(0, len(BATCHES), together):
            group = BATCHES[first : first + together]
            assert model.observe(group, lambda key, x, to=by_site: to[key].append(x.clone()), lambda _: True)
        seen.append(by_site)
    for key, tensors in seen[0].items():
        assert len(tensors) == len(seen[1][key]) == len(BATCHES)
        for one, other in zip(tensors, seen[1][key], strict=True):
            assert torch.equal(one, other), key


@pytest.mark.parametrize("reduction", list(Reduction))
def test_the_statistics_are_the_same(reduction: Reduction) -> None:
    """Histograms do not depend on the order; an exponential average does, and gets it."""
    states = []
    for model in (resident(), streamed()):
        observers, coverage = ObserverSet(CONFIG.n_layer, reduction=reduction), Coverage(CONFIG.n_layer)

        def hook(key: str, x: torch.Tensor, first=observers, second=coverage) -> None:
            first.observe(key, x)
            second.observe(key, x)

        assert model.observe(BATCHES, hook, lambda _: True)
        states.append({**observers.arrays(), **coverage.arrays()})
    assert states[0].keys() == states[1].keys()
    for name, array in states[0].items():
        assert array.tobytes() == states[1][name].tobytes(), name


def test_a_group_is_a_multiple_of_the_batch() -> None:
    window = 40 * CONFIG.d_model * 4
    assert streamed(group_bytes=7 * window).windows_together(2, 40) == 6
    assert streamed(group_bytes=1).windows_together(2, 40) == 2
    assert resident().windows_together(2, 40) == 2


def test_all_the_work_is_told_and_can_be_stopped() -> None:
    for model in (resident(), streamed()):
        done: list[int] = []
        assert model.observe(BATCHES, lambda *_: None, lambda units, to=done: to.append(units) is None)
        assert sum(done) == 7 * model.ticks
    for model in (resident(), streamed()):
        done = []
        assert not model.observe(
            BATCHES, lambda *_: None, lambda units, to=done: to.append(units) is not None
        )
        assert len(done) == 1


def test_the_largest_mamba_fits_in_six_gigabytes() -> None:
    assert weight_bytes(LARGE) > 11 * 10**9 and is_streamed(LARGE) and not is_streamed(CONFIG)
    windows = StreamedMamba(LARGE, TENSORS.__getitem__, CPU).windows_together(8, 512)
    assert windows == 200
    # Room for the program, the histograms and the activations of a batch.
    assert streamed_bytes(LARGE, windows, 512) < 3 * 10**9


MEASURED = """
import resource, sys
import torch
from pathlib import Path
from safetensors import safe_open
from qmamba_cli.artifacts.weight_files import SafetensorsFile
from qmamba_cli.config import MambaConfig
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.model.streaming import StreamedMamba

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

file = SafetensorsFile(Path(sys.argv[1]), "weights")
config = MambaConfig.from_dict(eval(sys.argv[2]))
# Warmed up by one window of the first two blocks.
small = MambaConfig.from_dict({**config.to_dict(), "n_layer": 2})
ids = torch.zeros(1, 16, dtype=torch.int64)
StreamedMamba(small, file.read, select_backend("cpu")).observe([ids], lambda *_: None, lambda _: True)
before = peak()
StreamedMamba(config, file.read, select_backend("cpu")).observe([ids] * 3, lambda *_: None, lambda _: True)
print(before, peak())
"""


def test_the_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """A checkpoint of 150 MB: after two of its 24 blocks the peak is reached, whatever is still to come."""
    config = small_config(d_model=512, n_layer=24, vocab_size=512, dt_rank=16)
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.full(shape, 0.01) for name, shape in config.tensor_shapes().items()}
    save_file(tensors, path)
    size = path.stat().st_size
    assert size > 150 * 10**6
    del tensors
    command = [sys.executable, "-c", MEASURED, str(path), repr(config.to_dict())]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, ended.stdout.split())
    assert after - before < size / 8

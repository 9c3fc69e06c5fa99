"""Text that a model larger than the memory writes itself: read from disk by blocks, to the same bytes."""

import errno
import gc
import io
import os
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibrations import SMALL, calibrated, options, whole
from command_line import tree
from random_models import random_checkpoint, random_ids, small_config

from qmamba_cli.errors import QmambaError
from qmamba_cli.kernels.backend import select_backend
from qmamba_cli.model import generate, mamba, streaming
from qmamba_cli.model.decode import Decoder
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import MODES
from qmamba_cli.stages import calibrate as stage
from qmamba_cli.stages import spooled
from qmamba_cli.stages.calibrate import calibrate
from qmamba_cli.stages.export import ExportOptions, export

CONFIG = small_config(n_layer=5, proj_bias=True)
TENSORS = random_checkpoint(CONFIG)
SELF = {"dataset": "self", "samples": 5, "seqlen": 12, "batch_size": 2}


@pytest.fixture
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STREAM_ABOVE_BYTES", 0)


@pytest.fixture
def blocks() -> Iterator[spooled.SpooledBlocks]:
    with io.BytesIO() as file:
        yield spooled.SpooledBlocks(CONFIG, TENSORS.__getitem__, file)


def test_a_large_model_writes_the_text_of_a_small_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated(tmp_path / "resident", **SELF)
    monkeypatch.setattr(streaming, "STREAM_ABOVE_BYTES", 0)
    monkeypatch.setattr(spooled, "float_model_on", lambda *_: pytest.fail("the whole model was loaded"))
    calibrated(tmp_path / "spooled", **SELF)
    assert dict(tree(tmp_path / "spooled")) == dict(tree(tmp_path / "resident"))


@pytest.mark.usefixtures("everything_is_large")
def test_a_large_model_is_observed_in_groups_and_resumed_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within its second group of two batches, of which what was seen is given up."""
    group = 6 * SMALL["seqlen"] * 32 * 4
    monkeypatch.setattr(stage, "StreamedMamba", partial(streaming.StreamedMamba, group_bytes=group))
    asked = iter(range(1, 1000))
    # Two batches through two blocks are four steps.
    report = calibrate(options(tmp_path), stop=lambda: next(asked) == 6)
    assert report.stopped_at == 6
    assert calibrated(tmp_path, resume=True).resumed_at == 6
    assert dict(tree(tmp_path / "calibration")) == whole()


@pytest.mark.usefixtures("everything_is_large")
def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[torch.Tensor]] = []
    float_block = spooled.float_block

    def counted(*arguments: Any, **named: Any) -> Any:
        assert not [ref for ref in made if ref() is not None], "the block before is still there"
        block = float_block(*arguments, **named)
        made.append(weakref.ref(block.in_proj.weight))
        return block

    for module in (spooled, streaming):
        monkeypatch.setattr(module, "float_block", counted)
    calibrated(tmp_path, **SELF)
    # Once for its form, each once for the file and once more to observe.
    assert len(made) == 1 + 2 * 2


def test_the_blocks_share_one_memory_and_have_the_bits_of_the_model(blocks: spooled.SpooledBlocks) -> None:
    weights = float_model(CONFIG, TENSORS.__getitem__)
    places = set()
    for mine, theirs in zip(blocks, weights.blocks, strict=True):
        places.add(mine.in_proj.weight.data_ptr())
        found: list[torch.Tensor] = []
        spooled.map_tensors(mine, lambda tensor, to=found: to.append(tensor) or tensor)
        expected: list[torch.Tensor] = []
        spooled.map_tensors(theirs, lambda tensor, to=expected: to.append(tensor) or tensor)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert all(tensor.data_ptr() % 64 == 0 for tensor in found)
    assert len(places) == 1
    with pytest.raises(IndexError):
        blocks[CONFIG.n_layer]


def test_a_model_computes_the_same_from_either(blocks: spooled.SpooledBlocks) -> None:
    weights, ids = float_model(CONFIG, TENSORS.__getitem__), random_ids(CONFIG.vocab_size, 2, 9, seed=3)
    model = Mamba(weights, MODES["fp"], select_backend("cpu"))
    expected, states = model.forward(ids)
    hidden, found = model.forward(ids, blocks=blocks)
    assert torch.equal(hidden, expected)
    for one, other in zip(found, states, strict=True):
        assert torch.equal(one.ssm, other.ssm) and torch.equal(one.conv.values, other.conv.values)


def test_a_batch_leaves_no_state_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the next batch would be written beside the states of the one before."""
    model = Mamba(float_model(CONFIG, TENSORS.__getitem__), MODES["fp"], select_backend("cpu"))
    made: list[weakref.ref[Decoder]] = []

    def kept(*arguments: Any, **named: Any) -> Decoder:
        decoder = Decoder(*arguments, **named)
        made.append(weakref.ref(decoder))
        return decoder

    monkeypatch.setattr(generate, "Decoder", kept)
    gc.disable()
    try:
        generate.sample_sequences(model, np.zeros(2, np.int64), length=3, seed=0)
        assert [ref() for ref in made] == [None]
    finally:
        gc.enable()


def test_a_step_holds_one_state_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer leaves behind is moved into the state before the next layer runs."""
    model = Mamba(float_model(CONFIG, TENSORS.__getitem__), MODES["fp"], select_backend("cpu"))
    plain, decoder = Decoder(model, 3), Decoder(model, 3)
    start = random_ids(CONFIG.vocab_size, 3, 1, seed=4)
    made: list[weakref.ref[torch.Tensor]] = []
    block_forward = mamba.block_forward

    def counted(*arguments: Any, **named: Any) -> Any:
        assert not [ref for ref in made if ref() is not None], "the state of the layer before is still there"
        residual, state = block_forward(*arguments, **named)
        made.append(weakref.ref(state.ssm))
        return residual, state

    expected = [plain.start(start).tolist(), plain.step().tolist(), plain.step().tolist()]
    found = [decoder.start(start).tolist(), decoder.step().tolist()]
    monkeypatch.setattr(mamba, "block_forward", counted)
    found.append(decoder.step().tolist())
    assert len(made) == CONFIG.n_layer
    assert found == expected


@pytest.mark.usefixtures("everything_is_large")
def test_a_disk_that_takes_no_blocks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, _data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spooled.tempfile, "TemporaryFile", lambda **_: Full())
    with pytest.raises(QmambaError, match="No space left on device") as caught:
        calibrate(options(tmp_path / "w", **SELF))
    assert "free some space" in caught.value.hint
    assert not list((tmp_path / "w").iterdir())


def test_a_file_that_lost_its_end_is_no_block(blocks: spooled.SpooledBlocks) -> None:
    blocks._file.truncate(len(blocks._bytes) * 2 - 1)
    assert blocks[0].rotated
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        blocks[1]


def test_the_best_recipe_reads_such_text_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The export's bytes do not depend on where the model was when it wrote the text."""
    calibrated(tmp_path, **SELF)
    recipe, files = Recipe(w_bits=4, method="best"), []
    for large in (False, True):
        if large:
            monkeypatch.setattr(streaming, "STREAM_ABOVE_BYTES", 0)
            monkeypatch.setattr(spooled, "float_model_on", lambda *_: pytest.fail("the model was loaded"))
        files.append(tmp_path / f"{large}.safetensors")
        export(ExportOptions(workdir=tmp_path, out=files[-1], recipe=recipe, force=True))
    assert files[0].read_bytes() == files[1].read_bytes()

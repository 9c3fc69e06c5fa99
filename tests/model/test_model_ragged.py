"""Prompts of different lengths in one batch: each row is what it would be alone, and no token is padding."""

from dataclasses import replace

import pytest
import torch

from qmamba_cli.errors import ShapeError, UsageError
from qmamba_cli.kernels.backend import CPU, select_backend
from qmamba_cli.kernels.ragged import ragged
from qmamba_cli.model.decode import Decoder
from qmamba_cli.model.generate import decode_tokens
from qmamba_cli.modes import MODES

LENGTHS = [5, 150, 1, 64, 33]
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)


def padded(subject, lengths=LENGTHS) -> torch.Tensor:
    """Rows of prompts with tokens behind them that would change the text if they were read."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(subject.model("fp").vocab_size, (len(lengths), max(lengths)), generator=generator)


def texts(model, ids, lengths, *, new_tokens=4, **options) -> list[list[int]]:
    decoder = Decoder(model, len(ids), **options)
    return [list(row) for row in decode_tokens(decoder, ids, lengths=lengths, max_new_tokens=new_tokens)]


# 64: rows of 320 tokens, which cut a prompt; None: one row.
@pytest.mark.parametrize("part_length", [None, 64])
@each_mode
def test_every_row_is_what_it_is_alone(demo, mode, part_length):
    model, ids = demo.model(mode), padded(demo)
    together = texts(model, ids, LENGTHS, part_length=part_length)
    alone = [texts(model, ids[row : row + 1, :length], None) for row, length in enumerate(LENGTHS)]
    assert [[step[row] for step in together] for row in range(len(LENGTHS))] == [
        [step[0] for step in steps] for steps in alone
    ]


@each_mode
def test_a_cut_prompt_goes_on_from_its_own_state(small, mode):
    lengths = [20, 150, 90]
    model, ids = small.model(mode), padded(small, lengths)
    prefill = Decoder(model, 3, part_length=64)._prefill
    got = prefill.ragged(ids, lengths)
    for row, length in enumerate(lengths):
        hidden, state = prefill._model.forward(ids[row : row + 1, :length])
        scale = float(hidden[:, -1].abs().max())
        torch.testing.assert_close(got.hidden[row : row + 1], hidden[:, -1], rtol=0, atol=2e-2 * scale)
        for ours, layer in zip(got.state, state, strict=True):
            assert torch.equal(ours.conv.values[row : row + 1], layer.conv.values) or mode.name == "fp"
            difference = (ours.ssm[row : row + 1] - layer.ssm).abs().max()
            assert difference <= 2e-2 * layer.ssm.abs().max().clamp(min=1e-6)


def test_no_token_is_run_that_is_padding(small):
    model, ids = small.model("0"), padded(small)
    counted = []

    def rms_norm(x, *args, **options):
        counted.append(x.shape[0] * x.shape[1])
        return CPU.rms_norm(x, *args, **options)

    decoder = Decoder(model, len(LENGTHS))
    decoder._prefill._model.backend = replace(CPU, rms_norm=rms_norm)
    decoder.start(ids, lengths=LENGTHS)
    # The norms of all blocks and the last one.
    assert set(counted) == {sum(LENGTHS)} and len(counted) == model.config.n_layer + 1


def test_lengths_that_do_not_fit_are_refused(small):
    decoder = Decoder(small.model("0"), 2)
    ids = padded(small)[:2, :10]
    for lengths in ([3], [3, 0], [3, 11]):
        with pytest.raises(UsageError, match="lengths must be 2 numbers from 1 to 10"):
            decoder.start(ids, lengths=lengths)
    with pytest.raises(ShapeError, match="lengths must be at least 1"):
        ragged(CPU, [2, 0])


@pytest.mark.gpu
@each_mode
def test_rows_on_a_gpu_are_what_they_are_alone(demo, mode):
    model, ids = demo.model(mode, select_backend("cuda")), padded(demo)
    together = texts(model, ids, LENGTHS)
    # Recorded prompts and a ragged one share the tensors that the next steps read.
    decoder = Decoder(demo.model(mode, select_backend("cuda")), len(LENGTHS))
    for _ in range(2):
        decoder.prepare()
        again = [
            list(row) for row in decode_tokens(decoder, ids, lengths=LENGTHS, max_new_tokens=len(together))
        ]
        assert again == together
    cpu = texts(demo.model(mode), ids, LENGTHS)
    same = torch.tensor(together).eq(torch.tensor(cpu)).sum()
    # A rounding that falls the other way may change a text from there on.
    assert same >= 0.8 * len(LENGTHS) * len(together)

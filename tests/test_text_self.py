import hashlib

import numpy as np
import pytest

from qmamba_cli.errors import ShapeError, UsageError
from qmamba_cli.text import sample_from_model


class Model:
    """Stands for a model: tokens that depend on every argument; remembers its calls."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.calls: list[tuple[list[int], int, int]] = []

    def __call__(self, start, *, length: int, seed: int):
        self.calls.append((start.tolist(), length, seed))
        noise = np.random.default_rng(seed).integers(0, self.vocab_size, (len(start), length))
        return (noise + start[:, None]) % self.vocab_size


def sample(model: Model, **changes):
    options = {"samples": 10, "seqlen": 6, "seed": 0, "vocab_size": 50, "start_id": 3, "batch_size": 4}
    return sample_from_model(model, **{**options, **changes})


def test_model_is_asked_in_batches():
    model = Model(50)
    sampled = sample(model)
    assert [(start, length) for start, length, _ in model.calls] == [([3] * 4, 6), ([3] * 4, 6), ([3] * 2, 6)]
    seeds = [seed for _, _, seed in model.calls]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    again = Model(50)
    expected = np.concatenate([again(np.array(start), length=6, seed=seed) for start, _, seed in model.calls])
    assert np.array_equal(sampled.tokens, expected)
    assert sampled.tokens.dtype == np.int32
    assert sampled.ids == list(range(10))
    assert (sampled.dataset, sampled.skipped_short) == ("self", 0)
    assert sampled.digest == hashlib.sha256(sampled.tokens.astype("<i4").tobytes()).hexdigest()


def test_model_samples_repeat_with_their_seed():
    first, again, other = sample(Model(50)), sample(Model(50)), sample(Model(50), seed=1)
    assert np.array_equal(first.tokens, again.tokens)
    assert first.digest == again.digest
    assert first.digest != other.digest


def test_random_start_tokens_where_there_is_no_special_one():
    model, again = Model(50), Model(50)
    sample(model, start_id=None, samples=200, batch_size=64)
    sample(again, start_id=None, samples=200, batch_size=64)
    starts = [token for start, _, _ in model.calls for token in start]
    assert starts == [token for start, _, _ in again.calls for token in start]
    assert len(starts) == 200
    assert set(starts) <= set(range(50))
    assert len(set(starts)) > 30
    assert isinstance(starts[0], int)


@pytest.mark.parametrize("option", ["samples", "seqlen", "vocab_size", "batch_size"])
def test_model_sampling_options_out_of_range(option: str):
    with pytest.raises(UsageError, match=f"`{option}`: out of range, got 0, expected at least 1"):
        sample(Model(50), **{option: 0})


def test_wrong_tokens_of_a_model_are_refused():
    with pytest.raises(ShapeError, match=r"wrong shape, got \(4, 5\), expected \(4, 6\)"):
        sample_from_model(
            lambda start, length, seed: np.zeros((len(start), length - 1), np.int64),
            samples=4, seqlen=6, seed=0, vocab_size=50, start_id=0,
        )  # fmt: skip
    with pytest.raises(ShapeError, match="id out of range, got 0 to 59, expected 0 to 49"):
        sample_from_model(
            lambda start, length, seed: np.arange(60).reshape(10, 6),
            samples=10, seqlen=6, seed=0, vocab_size=50, start_id=0,
        )  # fmt: skip

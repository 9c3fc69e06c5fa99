"""Generation: the decode path of a mode, token by token."""

import numpy as np
import pytest
import torch

from qmamba_cli.errors import UsageError
from qmamba_cli.model.generate import generate, sample_sequences
from qmamba_cli.modes import MODES, State

FLOAT_STATE = [mode for mode in MODES.values() if mode.state is State.FP32]
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)


def prompt_of(subject, length=20):
    return subject.ids[0, :length].tolist()


@pytest.mark.parametrize("mode", FLOAT_STATE, ids=lambda mode: mode.name)
def test_greedy_text_is_what_whole_prefills_would_choose(demo, mode):
    model, prompt = demo.model(mode), prompt_of(demo)
    made = list(generate(model, prompt, max_new_tokens=8))
    for index, token in enumerate(made):
        ids = torch.tensor([prompt + made[:index]])
        assert token == int(model.logits(model.hidden(ids)[:, -1]).argmax())


@each_mode
def test_greedy_text_follows_the_carried_state(demo, mode):
    model, prompt = demo.model(mode), prompt_of(demo)
    made = list(generate(model, prompt, max_new_tokens=6))
    hidden, state = model.forward(torch.tensor([prompt]))
    for token in made:
        assert token == int(model.logits(hidden[:, -1]).argmax())
        hidden, state = model.forward(torch.tensor([[token]]), state)


@each_mode
def test_sampled_text_depends_on_the_seed_alone(small, mode):
    model, prompt = small.model(mode), prompt_of(small)
    first, again, other = (
        list(generate(model, prompt, max_new_tokens=12, temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(first) == 12


def test_a_low_temperature_is_greedy(demo):
    model, prompt = demo.model("0"), prompt_of(demo)
    greedy, cold = (list(generate(model, prompt, max_new_tokens=5, temperature=t)) for t in (0.0, 1e-4))
    assert cold == greedy


def test_tokens_come_as_they_are_made(small):
    calls, inner = [], small.model("fp")
    forward = inner.forward
    inner.forward = lambda *args, **options: calls.append(args[0].shape[1]) or forward(*args, **options)
    stream = generate(inner, prompt_of(small), max_new_tokens=3)
    assert calls == []
    for made in (1, 2, 3):
        next(stream)
        # The prompt once, then one token a step; the last token is not run.
        assert calls == [20, 1, 1][:made]
    assert list(stream) == [] and calls == [20, 1, 1]


def test_the_end_token_ends_and_is_not_returned(demo):
    model, prompt = demo.model("fp"), prompt_of(demo)
    made = list(generate(model, prompt, max_new_tokens=8))
    end = made[3]
    assert list(generate(model, prompt, max_new_tokens=8, eos_id=end)) == made[: made.index(end)]


def test_padding_of_the_vocabulary_is_never_made(small):
    model = small.model("fp")
    made = list(generate(model, prompt_of(small), max_new_tokens=60, temperature=50.0, seed=3, vocab_size=5))
    assert set(made) == set(range(5))


def test_sequences_are_sampled_from_the_model(small):
    model, start = small.model("fp"), np.array([3, 9, 9])
    first, again = (sample_sequences(model, start, length=30, seed=4) for _ in range(2))
    assert first.shape == (3, 30) and first.dtype == np.int64
    assert np.array_equal(first, again)
    # Rows of one start are draws of their own.
    assert not np.array_equal(first[1], first[2])
    assert not np.array_equal(first, sample_sequences(model, start, length=30, seed=5))
    assert sample_sequences(model, start, length=40, seed=4, vocab_size=4).max() == 3


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {"max_new_tokens": 1}, "no tokens"),
        ([1], {"max_new_tokens": 0}, "--max-new-tokens"),
        ([1], {"max_new_tokens": 1, "temperature": -1.0}, "--temperature"),
    ],
)
def test_refusals(small, prompt, options, message):
    with pytest.raises(UsageError, match=message):
        list(generate(small.model("fp"), prompt, **options))

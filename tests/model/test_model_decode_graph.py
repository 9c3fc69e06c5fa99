"""The decoder's buffers: recorded steps make plain steps' tokens, and parts of a prompt are the whole."""

import pytest
import torch
from close import assert_exact
from quantized_models import mean_kl
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qmamba_cli.errors import UsageError
from qmamba_cli.kernels.backend import CPU, select_backend
from qmamba_cli.model import prefill
from qmamba_cli.model.decode import Decoder, ModelStepper
from qmamba_cli.model.generate import GenerationTimes, decode_tokens, generate
from qmamba_cli.model.graphs import Replayed
from qmamba_cli.model.prefill import Prefill, part_length
from qmamba_cli.model.state import assign, clear, float_state_model, on_grid
from qmamba_cli.modes import MODES, State

each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=lambda mode: mode.name)
INT8_STATE = [mode for mode in MODES.values() if mode.state is State.INT8]


class Tape(TorchDispatchMode):
    """Records operators with the very tensors they read and wrote, as a CUDA graph records kernels."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten.item.default, "a recording must not wait for the device"
        assert func is not torch.ops.aten._local_scalar_dense.default
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Generator):
                assert self.generator is not None, "a generator that draws in a recording must be registered"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        with torch.inference_mode():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Tapes:
    """A recorder without a GPU. A recording does not happen: what it computed is undone."""

    def __init__(self):
        self.warmed, self.recorded, self.replayed = 0, 0, 0

    def warm(self, work):
        self.warmed += 1
        work()

    def record(self, work, generator):
        self.recorded += 1
        seen = None if generator is None else generator.get_state()
        tape = Tape(generator)
        before = Snapshot()
        with before, tape:
            work()
        before.restore()
        if generator is not None:
            generator.set_state(seen)

        def replay(_kept=work):
            self.replayed += 1
            tape.replay()

        return replay


class Snapshot(TorchDispatchMode):
    """Keeps what a tensor held before the first operator that writes into it."""

    def __init__(self):
        super().__init__()
        self.held = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    self.held.setdefault(id(tensor), (tensor, tensor.clone()))
        return func(*args, **(kwargs or {}))

    def restore(self):
        with torch.inference_mode():
            for tensor, value in self.held.values():
                tensor.copy_(value)


def tokens_of(decoder, ids, count, **options):
    return [row for row in decode_tokens(decoder, ids, max_new_tokens=count, **options)]


def step_by_step(model, ids, count):
    """Greedy tokens by plain calls of the model."""
    hidden, state = model.forward(ids)
    made = []
    for _ in range(count):
        token = model.logits(hidden[:, -1]).argmax(-1)
        made.append(token.tolist())
        hidden, state = model.forward(token.unsqueeze(1), state)
    return made


@each_mode
def test_a_recorded_decoder_makes_the_tokens_of_plain_steps(small, mode):
    recorder = Tapes()
    decoder = Decoder(small.model(mode), 2, recorder=recorder)
    decoder.prepare()
    assert recorder.recorded == 2, "the step and the hand-over of the state"
    ids = small.ids[:, :70]
    expected = step_by_step(small.model(mode), ids, 9)
    # The first prompt of a length runs as it is, the second is recorded, the third replays.
    for _ in range(3):
        assert tokens_of(decoder, ids, 9) == expected
    assert recorder.recorded == 3
    assert recorder.replayed == 3 * (8 + 1) + 2
    other = small.ids[:, 30:95]
    assert tokens_of(decoder, other, 5) == step_by_step(small.model(mode), other, 5)
    assert tokens_of(decoder, ids, 9) == expected


@each_mode
def test_a_recorded_decoder_without_preparation(small, mode):
    decoder = Decoder(small.model(mode), 2, recorder=Tapes())
    for start in (0, 20):
        ids = small.ids[:, start : start + 40]
        assert tokens_of(decoder, ids, 5) == step_by_step(small.model(mode), ids, 5)


@pytest.mark.parametrize("recorder", [None, Tapes], ids=["plain", "recorded"])
def test_sampling_depends_on_seed_and_temperature_and_not_on_what_ran_before(small, recorder):
    model, ids = small.model("2-4"), small.ids[:1, :40]
    decoder = Decoder(model, 1, recorder=recorder and recorder())
    decoder.prepare(1.0)
    hot = {"temperature": 1.5, "seed": 7}
    first = tokens_of(decoder, ids, 12, **hot)
    greedy = tokens_of(decoder, ids, 12)
    assert greedy == step_by_step(model, ids, 12)
    assert tokens_of(decoder, ids, 12, temperature=1.5, seed=8) != first
    assert tokens_of(decoder, ids, 12, temperature=0.01, seed=8) != first
    assert tokens_of(decoder, ids, 12, **hot) == first
    assert [[token] for token in generate(model, ids[0].tolist(), max_new_tokens=12, **hot)] == first


def test_sampling_on_the_cpu_is_the_multinomial_draw(small):
    """The tokens of a seed stay what they are."""
    model, ids = small.model("fp"), small.ids[:, :30]
    generator = torch.Generator().manual_seed(11)
    hidden, state = model.forward(ids)
    expected = []
    for _ in range(6):
        rates = torch.softmax(model.logits(hidden[:, -1])[:, :40] / 0.7, dim=-1)
        token = torch.multinomial(rates, 1, generator=generator)
        expected.append(token.flatten().tolist())
        hidden, state = model.forward(token, state)
    decoder = Decoder(model, 2, vocab_size=40)
    assert tokens_of(decoder, ids, 6, temperature=0.7, seed=11) == expected


@pytest.mark.parametrize("recorder", [None, Tapes], ids=["plain", "recorded"])
@each_mode
def test_a_prompt_in_parts_is_the_prompt(subject, mode, recorder):
    """Law 4 without the cost of an int8 state: between parts it stays float32 in every mode."""
    model = subject.model(mode)
    whole, state = model.forward(subject.ids)
    whole = whole[:, -1]
    run = Prefill(model, 2, recorder and recorder(), longest=64)
    for _ in range(3 if recorder else 1):
        hidden, carried = run(subject.ids)
        # A part ends where a chunk of the scan does, so that not even float32 order moves in the scan.
        assert mean_kl(model.logits(whole), model.logits(hidden)) < 1e-9
        for one, other in zip(state, on_grid(model, carried), strict=True):
            assert one.ssm.dtype == other.ssm.dtype
            scale = 1.0 if one.ssm.dtype == torch.int8 else float(one.ssm.abs().max()) * 1e-5
            assert float((one.ssm.double() - other.ssm.double()).abs().max()) <= scale
            assert one.conv.values.dtype == other.conv.values.dtype
            assert mean_share_apart(one.conv.values, other.conv.values) < 0.01


def mean_share_apart(one, other):
    apart = (one.double() - other.double()).abs()
    return float((apart > 1e-4 * float(one.double().abs().max())).double().mean())


@pytest.mark.parametrize("mode", INT8_STATE, ids=lambda mode: mode.name)
def test_decode_after_a_prompt_in_parts(demo, mode):
    ids = demo.ids
    cut = Decoder(demo.model(mode), 2, part_length=64)
    assert tokens_of(cut, ids, 6) == step_by_step(demo.model(mode), ids, 6)


@pytest.mark.parametrize("mode", INT8_STATE, ids=lambda mode: mode.name)
def test_a_float_state_put_on_the_grid_is_the_modes_own(small, mode):
    model = small.model(mode)
    hidden, own = model.forward(small.ids)
    free = float_state_model(model)
    assert free.mode.state is State.FP32
    again, state = free.forward(small.ids)
    assert_exact("hidden", again, hidden)
    for layer, expected in zip(on_grid(model, state), own, strict=True):
        assert layer.ssm.dtype == torch.int8
        assert_exact("ssm", layer.ssm, expected.ssm)


@pytest.mark.parametrize("mode", ["0", "3"])
def test_a_cleared_state_is_none_at_all(small, mode):
    model = small.model(mode)
    _, state = model.forward(small.ids)
    clear(state)
    expected, _ = model.forward(small.ids)
    again, last = model.forward(small.ids, state)
    assert_exact("hidden", again, expected)
    assign(state, last)
    for one, other in zip(state, last, strict=True):
        assert_exact("ssm", one.ssm, other.ssm)
        assert_exact("conv", one.conv.values, other.conv.values)
        assert (one.conv.scale is None) == (MODES[mode].name != "3")


def test_only_so_many_lengths_are_kept(small, monkeypatch):
    monkeypatch.setattr(prefill, "_MOST_RECORDINGS", 2)
    recorder = Tapes()
    run = Prefill(small.model("fp"), 1, recorder)
    for length in (3, 4, 5, 3, 3):
        run(small.ids[:1, :length])
    # 3 was put out by 5 and began again.
    assert recorder.recorded == 1 and recorder.warmed == 1 + 4


def test_parts_have_a_length_that_fits():
    for batch in (1, 3, 8, 64, 10_000):
        length = part_length(batch)
        assert length % 64 == 0 and (length == 64 or length * batch <= 16384)


def test_work_is_run_then_recorded_then_replayed():
    recorder, done = Tapes(), torch.zeros(1)
    work = Replayed(lambda: done.add_(1), recorder)
    for count in (1, 2, 3):
        work()
        assert done.item() == count
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (1, 1, 2)
    prepared = Replayed(lambda: done.add_(1), Tapes())
    prepared.prepare()
    assert done.item() == 4
    prepared()
    assert done.item() == 5
    plain = Replayed(lambda: done.add_(1), None)
    plain.prepare()
    assert done.item() == 6


def test_times_of_a_generation(small):
    times = GenerationTimes()
    made = list(generate(small.model("fp"), [1, 2, 3], max_new_tokens=5, times=times))
    assert len(made) == 5 and times.steps == 4
    assert times.first_token_s > 0 and times.tokens_per_s == pytest.approx(4 / times.decode_s)
    alone = GenerationTimes()
    list(generate(small.model("fp"), [1, 2, 3], max_new_tokens=1, times=alone))
    assert alone.steps == 0 and alone.tokens_per_s == 0


def test_a_decoder_refuses_another_number_of_rows(small):
    with pytest.raises(UsageError, match="2 rows, got 1"):
        Decoder(small.model("fp"), 2).start(small.ids[:1])


@pytest.mark.gpu
class TestGpu:
    @pytest.fixture(scope="class")
    def cuda(self):
        return select_backend("cuda")

    @pytest.mark.parametrize("batch", [1, 2])
    @each_mode
    def test_64_recorded_tokens_are_those_of_eager_steps(self, demo, cuda, mode, batch):
        model, ids = demo.model(mode, cuda), demo.ids[:batch]
        decoder = Decoder(model, batch, stepper=ModelStepper(model))
        decoder.prepare()
        expected = step_by_step(model, ids, 64)
        for _ in range(3):
            assert tokens_of(decoder, ids, 64) == expected

    @each_mode
    def test_a_recorded_state_is_that_of_eager_steps_bit_for_bit(self, demo, cuda, mode):
        model, ids = demo.model(mode, cuda), demo.ids[:1]
        decoder = Decoder(model, 1, stepper=ModelStepper(model))
        decoder.prepare()
        made = tokens_of(decoder, ids, 6)
        torch.cuda.synchronize()
        _, state = model.forward(ids)
        for (token,) in made[:-1]:
            _, state = model.forward(torch.tensor([[token]]), state)
        for recorded, eager in zip(decoder._stepper._state, state, strict=True):
            assert_exact("ssm", recorded.ssm.cpu(), eager.ssm.cpu())
            assert_exact("conv", recorded.conv.values.cpu(), eager.conv.values.cpu())

    @pytest.mark.parametrize("longest", [None, 64])
    @each_mode
    def test_a_recorded_prompt_is_the_eager_one(self, demo, cuda, mode, longest):
        model = demo.model(mode, cuda)
        run = Prefill(model, 2, Decoder(model, 2)._recorder, longest)
        first = run(demo.ids)
        hidden, state = first.hidden.cpu(), [layer.ssm.cpu() for layer in first.state]
        for _ in range(3):
            again = run(demo.ids)
            assert_exact("hidden", again.hidden.cpu(), hidden)
            for one, other in zip(again.state, state, strict=True):
                assert_exact("ssm", one.ssm.cpu(), other)
        if longest is None:
            assert_exact("hidden", hidden, model.forward(demo.ids)[0][:, -1].cpu())

    @pytest.mark.parametrize("mode", ["0", "2-4", "3", "fp"])
    def test_sampling_is_reproducible(self, demo, cuda, mode):
        model, ids = demo.model(mode, cuda), demo.ids[:2]
        decoder = Decoder(model, 2, vocab_size=8000)
        decoder.prepare(1.0)
        first, again, other = (tokens_of(decoder, ids, 64, temperature=1.0, seed=seed) for seed in (1, 1, 2))
        assert first == again != other
        assert max(max(row) for row in first) < 8000
        fresh = Decoder(model, 2, vocab_size=8000)
        fresh.prepare(1.0)
        assert tokens_of(fresh, ids, 64, temperature=1.0, seed=1) == first
        greedy = tokens_of(decoder, ids, 8)
        assert greedy == [[min(t, 8191) for t in row] for row in greedy] != first[:8]

    def test_draws_follow_the_distribution(self, demo, cuda):
        model, ids = demo.model("fp", cuda), demo.ids[:1].repeat(512, 1)
        decoder = Decoder(model, 512, vocab_size=4)
        drawn = torch.bincount(torch.tensor(tokens_of(decoder, ids, 1, temperature=1.0)[0]), minlength=4)
        hidden, _ = demo.model("fp", CPU).forward(demo.ids[:1])
        expected = 512 * torch.softmax(demo.model("fp", CPU).logits(hidden[:, -1])[0, :4], 0)
        # Five standard deviations of a count.
        assert ((drawn - expected).abs() <= 5 * expected.sqrt() + 5).all()

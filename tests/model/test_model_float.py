"""The float model, as trained and rotated, against transformers' MambaForCausalLM."""

import math

import pytest
import tolerances
import torch
from close import assert_close, assert_exact
from random_models import DEMO, random_checkpoint, random_ids, small_config, transformers_model
from tokenizers import Tokenizer

from qmamba_cli import sites
from qmamba_cli.kernels.backend import CPU
from qmamba_cli.kernels.hadamard.matrix import plan_for
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.prepare import float_model, rotate_inputs, rotate_outputs
from qmamba_cli.modes import MODES
from qmamba_cli.resources import demo_model_path

FP = MODES["fp"]
CONFIGS = {
    "d96": small_config(d_model=96),
    "d192": small_config(d_model=192),
    "d768": small_config(d_model=768, n_layer=1, d_state=16),
    "d1536": small_config(d_model=1536, n_layer=1, d_state=4),
    # No Hadamard matrix of these orders is constructed: blocks of 2, of 4, and the identity.
    "d90": small_config(d_model=90),
    "d100": small_config(d_model=100),
    "d33": small_config(d_model=33, d_inner=99),
    "rank5": small_config(dt_rank=5),
    "rank1": small_config(d_model=16),
    "conv2": small_config(d_conv=2),
    "conv3": small_config(d_conv=3),
    "no-conv-bias": small_config(conv_bias=False),
    "untied": small_config(tie_embeddings=False),
    "proj-bias": small_config(proj_bias=True),
    "expand3": small_config(d_inner=96),
    "expand1.5": small_config(d_inner=48),
    "state1": small_config(d_state=1),
    "eps": small_config(norm_eps=1e-2),
    "all-at-once": small_config(
        d_model=90, d_inner=270, dt_rank=7, d_conv=3, d_state=5, conv_bias=False, proj_bias=True,
        tie_embeddings=False,
    ),
}  # fmt: skip
PASSAGE = (
    "The ferry was late again, and the three of us sat on our trunks at the end of the pier and watched the "
    "rain come over the water. My aunt said that it would pass before supper. My uncle, who had been to sea, "
    "looked at the sky for a long while and said nothing at all, and from this I understood that it would "
    'not. "When I was a girl," my aunt began, "there was a bridge here." But there had never been a bridge, '
    "and we all knew it, and so nobody answered, and at last the lamp of the ferry showed green beyond the "
    "breakwater."
)

rotation = pytest.mark.parametrize("rotate", [False, True], ids=["as-trained", "rotated"])


def our_logits(config, tensors, ids, *, rotate):
    model = Mamba(float_model(config, tensors.__getitem__, rotate=rotate), FP, CPU)
    return model.logits(model.hidden(ids))


def their_logits(config, tensors, ids):
    with torch.inference_mode():
        return transformers_model(config, tensors)(ids, use_cache=False).logits


def assert_logits(got, expected):
    assert_close("logits", got, expected.double(), tolerances.LOGITS.budget(float(expected.abs().max())))


@rotation
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_random_models_equal_transformers(config, rotate):
    tensors = random_checkpoint(config, seed=7)
    ids = random_ids(config.vocab_size, 2, 8 if config.d_model > 500 else 70, seed=8)
    expected = their_logits(config, tensors, ids)
    assert expected.std() > 0.01, "logits that do not vary prove nothing"
    assert_logits(our_logits(config, tensors, ids, rotate=rotate), expected)


@pytest.fixture(scope="module")
def demo_reference(demo_tensors):
    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(PASSAGE, add_special_tokens=False).ids])
    return ids, their_logits(DEMO, demo_tensors, ids)


@rotation
def test_the_demo_equals_transformers(demo_tensors, demo_reference, rotate):
    ids, expected = demo_reference
    got = our_logits(DEMO, demo_tensors, ids, rotate=rotate)
    assert_logits(got, expected)

    theirs, ours = perplexity(expected, ids), perplexity(got, ids)
    assert 20 < theirs < 400, "the passage must be text to the model"
    assert ours == pytest.approx(theirs, rel=tolerances.PERPLEXITY_RELATIVE)


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    log_p = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
    return math.exp(-float(log_p.mean()))


def test_the_widths_have_the_transforms_they_stand_for():
    assert [plan_for(CONFIGS[name].d_model).order for name in ("d90", "d100", "d33")] == [2, 4, 1]
    assert [plan_for(CONFIGS[name].d_model).core for name in ("d96", "d192", "d768", "d1536")] == [12] * 4


@rotation
def test_prefill_then_steps_equals_one_call(demo, rotate):
    weights = float_model(demo.config, demo.tensors.__getitem__, rotate=rotate)
    model = Mamba(weights, FP, CPU)
    ids = demo.ids[:, :40]
    expected = model.hidden(ids)
    hidden, state = model.forward(ids[:, :30])
    parts = [hidden]
    for t in range(30, 40):
        hidden, state = model.forward(ids[:, t : t + 1], state)
        parts.append(hidden)
    # A sixth of what logits may err by.
    budget = tolerances.LOGITS.budget(float(expected.abs().max())) / 6
    assert_close("hidden", torch.cat(parts, dim=1), expected.double(), budget)


@pytest.mark.parametrize("rotate", [False, True], ids=["as-trained", "rotated"])
def test_a_hook_sees_every_site_and_changes_nothing(small, rotate):
    weights = float_model(small.config, small.tensors.__getitem__, rotate=rotate)
    model = Mamba(weights, FP, CPU)
    seen: dict[str, tuple[int, ...]] = {}

    def hook(key: str, tensor: torch.Tensor) -> None:
        assert key not in seen, f"{key} fires twice"
        seen[key] = tuple(tensor.shape)

    hidden, state = model.forward(small.ids, hook=hook)
    plain, plain_state = model.forward(small.ids)
    assert tuple(seen) == sites.site_keys(2)
    config, (b, l) = small.config, small.ids.shape
    d, n, r = config.d_inner, config.d_state, config.dt_rank
    shapes = {
        sites.IN_PROJ_INPUT: (b, l, config.d_model),
        sites.IN_PROJ_OUTPUT: (b, l, 2 * d),
        # Channels first, as the conv and the scan hold them; an observer takes any order.
        sites.X_PROJ_INPUT: (b, d, l),
        sites.X_PROJ_OUTPUT: (b, l, r + 2 * n),
        sites.DT_PROJ_OUTPUT: (b, l, d),
        # Ends of chunks 64 and 128, and the last token.
        sites.SSM_STATE: (b, 3, d, n),
        sites.OUT_PROJ_INPUT: (b, l, d),
    }
    for layer in range(2):
        for name, shape in shapes.items():
            assert seen[sites.site_key(name, layer)] == shape, name
    assert_exact("hidden", hidden, plain)
    for got, expected in zip(state, plain_state, strict=True):
        assert_exact("state", got.ssm, expected.ssm)


def test_the_state_site_sees_chunk_ends_and_the_last_token(small):
    model = small.model("fp")
    seen = {}
    model.forward(small.ids, hook=seen.__setitem__)
    for index, end in enumerate((64, 128, 150)):
        _, state = model.forward(small.ids[:, :end])
        for layer in range(2):
            states = seen[sites.site_key(sites.SSM_STATE, layer)]
            budget = 1e-5 * float(states.abs().max())
            assert_close(f"state after {end}", states[:, index], state[layer].ssm.double(), budget)


def test_rotations_are_folded_in_float64(small):
    weight = small.tensors["backbone.layers.0.mixer.in_proj.weight"]
    gamma = small.tensors["backbone.layers.0.norm.weight"]
    rotated = rotate_inputs(weight, gamma)
    # Rotating twice would undo a symmetric transform; the Gram matrix shows an orthogonal one of any kind.
    folded = weight.double() * gamma.double()
    gram = folded @ folded.T
    eps = tolerances.EPS
    assert_close("gram", rotated.double() @ rotated.double().T, gram, 2 * eps * float(gram.abs().max()))
    assert_close("both sides", rotate_outputs(weight).T, rotate_inputs(weight.T.contiguous()).double(), eps)


def test_rotation_folds_the_norms_away(small):
    assert small.rotated.norm_f is None
    assert all(block.norm is None and block.rotated for block in small.rotated.blocks)
    trained = float_model(small.config, small.tensors.__getitem__, rotate=False)
    assert trained.norm_f is not None
    assert all(block.norm is not None and not block.rotated for block in trained.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_checkpoints_of_other_dtypes_are_read_as_they_are(dtype):
    config = small_config()
    tensors = {name: value.to(dtype) for name, value in random_checkpoint(config, seed=9).items()}
    ids = random_ids(64, 1, 20, seed=10)
    expected = their_logits(config, tensors, ids)
    for rotate in (False, True):
        assert_logits(our_logits(config, tensors, ids, rotate=rotate), expected)

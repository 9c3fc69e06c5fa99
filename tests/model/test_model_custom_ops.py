"""The operators behind torch's dispatcher: the same numbers, right fakes, and a model that compiles."""

from typing import Any

import pytest
import torch
from close import assert_exact
from quantized_models import Subject, make_subject
from random_models import random_checkpoint, random_ids, small_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qmamba_cli.kernels._flat import OPERATORS
from qmamba_cli.kernels.backend import CPU, Backend, select_backend
from qmamba_cli.kernels.custom_ops import NAMESPACE, as_custom_ops
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.quantize import Recipe, quantized_model, quantized_tensors
from qmamba_cli.modes import MODES

each_mode = pytest.mark.parametrize("mode", list(MODES))


@pytest.fixture(scope="module", params=[False, True], ids=["one scale of u", "one a channel"])
def subject(request: pytest.FixtureRequest) -> Subject:
    config = small_config(d_model=48, proj_bias=True)
    return make_subject(
        config,
        random_checkpoint(config, seed=3),
        calibration=random_ids(64, 2, 40, seed=4),
        ids=random_ids(64, 2, 9, seed=5),
        by_channel=request.param,
    )


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def backend(request: pytest.FixtureRequest) -> Backend:
    return CPU if request.param == "cpu" else select_backend("cuda")


def tensors_of(state: Any) -> list[torch.Tensor]:
    return [
        tensor
        for layer in state
        for tensor in (layer.conv.values, layer.conv.scale, layer.ssm)
        if tensor is not None
    ]


@each_mode
def test_a_model_computes_the_same_numbers(subject: Subject, mode: str, backend: Backend) -> None:
    plain, wrapped = (subject.model(mode, ops) for ops in (backend, as_custom_ops(backend)))
    hidden, state = plain.forward(subject.ids)
    got, got_state = wrapped.forward(subject.ids)
    assert_exact("hidden", got.cpu(), hidden.cpu())
    for one, other in zip(tensors_of(got_state), tensors_of(state), strict=True):
        assert_exact("state", one.cpu(), other.cpu())
    token = subject.ids[:, :1]
    assert_exact("step", wrapped.forward(token, got_state)[0].cpu(), plain.forward(token, state)[0].cpu())


class Calls(TorchDispatchMode):
    """Keeps every call of one of this program's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == NAMESPACE:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@each_mode
def test_every_call_of_a_model_passes_torchs_own_check(subject: Subject, mode: str) -> None:
    model = subject.model(mode, as_custom_ops(CPU))
    hook = (lambda _key, _tensor: None) if mode == "0" else None
    with torch.no_grad(), Calls() as mode_of_dispatch:
        _, state = Mamba.forward.__wrapped__(model, subject.ids, hook=hook)  # type: ignore[attr-defined]
        Mamba.forward.__wrapped__(model, subject.ids[:, :1], state)  # type: ignore[attr-defined]
    for operator, arguments in mode_of_dispatch.calls:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    names = {operator.name().partition("::")[2] for operator, _ in mode_of_dispatch.calls}
    assert {"rms_norm", "embedding", "linear", "causal_conv1d", "selective_scan"} <= names <= set(OPERATORS)
    assert ("linear_split" in names) == (mode == "3")


def test_packed_weights_and_whole_tables_go_through(subject: Subject) -> None:
    recipe = Recipe(w_bits=4, group_size=20)
    stored = dict(
        quantized_tensors(subject.config, subject.tensors.__getitem__, recipe, scales=subject.scales)
    )
    packed = quantized_model(subject.config, stored, subject.scales, group_size=20, packed=True)
    plain, wrapped = (Mamba(packed, MODES["3"], ops) for ops in (CPU, as_custom_ops(CPU)))
    hidden, _ = plain.forward(subject.ids)
    got, _ = wrapped.forward(subject.ids)
    assert_exact("hidden", got, hidden)
    assert_exact("logits", wrapped.logits(got), plain.logits(hidden))


@each_mode
def test_a_fake_model_knows_every_shape(subject: Subject, mode: str) -> None:
    model = subject.model(mode, as_custom_ops(CPU))
    hidden, state = model.forward(subject.ids)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_hidden, fake_state = model.forward(subject.ids)
        logits = model.logits(fake_hidden)
    for one, other in zip([fake_hidden, *tensors_of(fake_state)], [hidden, *tensors_of(state)], strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
    assert logits.shape == (*hidden.shape[:2], subject.config.vocab_size)


@pytest.mark.parametrize("mode", ["0", "2-4", "3"])
def test_torch_compile_takes_a_whole_model(subject: Subject, mode: str) -> None:
    model = subject.model(mode, as_custom_ops(CPU))
    forward = Mamba.forward.__wrapped__  # type: ignore[attr-defined]

    def hidden_of(ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = forward(model, ids)[0]
        return out

    with torch.no_grad():
        compiled = torch.compile(hidden_of, backend="aot_eager", fullgraph=True)
        assert_exact("hidden", compiled(subject.ids), hidden_of(subject.ids))

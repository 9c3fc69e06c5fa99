import pytest
import torch
from quantized_models import Subject, make_subject
from random_models import DEMO, random_checkpoint, random_ids, small_config
from safetensors.torch import load_file

from qmamba_cli.resources import demo_model_path


@pytest.fixture(scope="session")
def demo_tensors() -> dict[str, torch.Tensor]:
    return load_file(demo_model_path() / "model.safetensors")


@pytest.fixture(scope="session")
def demo(demo_tensors: dict[str, torch.Tensor]) -> Subject:
    return make_subject(
        DEMO,
        demo_tensors,
        calibration=random_ids(8192, 4, 96, seed=1),
        ids=random_ids(8192, 2, 72, seed=2),
    )


def small_subject(*, by_channel: bool) -> Subject:
    config = small_config(d_model=48, proj_bias=True, tie_embeddings=False)
    return make_subject(
        config,
        random_checkpoint(config, seed=3),
        calibration=random_ids(64, 4, 140, seed=4),
        ids=random_ids(64, 2, 150, seed=5),
        by_channel=by_channel,
    )


@pytest.fixture(scope="session")
def small() -> Subject:
    return small_subject(by_channel=False)


@pytest.fixture(scope="session")
def by_channel() -> Subject:
    """Like `small`, with a scale for every channel of u."""
    return small_subject(by_channel=True)


@pytest.fixture(params=["small", "demo", "by_channel"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.getfixturevalue(request.param)

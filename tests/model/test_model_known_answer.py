"""Whole quantized models against an independent float64 model, and against numbers it once gave."""

import numpy as np
import pytest
import tolerances
import torch
from quantized_models import make_subject, quantize, run_in_parts
from random_models import random_checkpoint, random_ids, small_config
from reference_model import Grids, Reference

from qmamba_cli.kernels.backend import CPU
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.model.quantize import Recipe
from qmamba_cli.modes import MODES
from qmamba_cli.sites import SITES, site_key

CONFIG = small_config()
GROUP = 16
# Between prefill and steps: where an int8 state is rounded.
CUTS = (60, 80, *range(100, 110))
COLUMNS = {
    "0": {"int8_state": True},
    "2-0": {"int8_state": True},
    "2-1": {"int8_state": True},
    "2-2": {},
    "2-3": {"int8_state": True},
    "2-4": {"true_u": True},
    "3": {"true_u": True, "dynamic_conv": True},
}
# KL(float || mode) that the reference gave, mean nats a token: bits of the projections, mode → (in one call,
# handed over at CUTS).
KNOWN = {
    (8, "0"): (4.4062e-05, 4.4300e-05),
    (8, "2-0"): (4.4062e-05, 4.4300e-05),
    (8, "2-1"): (4.4062e-05, 4.4300e-05),
    (8, "2-2"): (4.4062e-05, 4.4062e-05),
    (8, "2-3"): (4.4062e-05, 4.4300e-05),
    (8, "2-4"): (2.5528e-05, 2.5528e-05),
    (8, "3"): (2.4144e-05, 2.4144e-05),
    (4, "0"): (6.1537e-04, 6.1542e-04),
    (4, "2-0"): (6.1537e-04, 6.1542e-04),
    (4, "2-1"): (6.1537e-04, 6.1542e-04),
    (4, "2-2"): (6.1537e-04, 6.1537e-04),
    (4, "2-3"): (6.1537e-04, 6.1542e-04),
    (4, "2-4"): (5.9005e-04, 5.9005e-04),
    (4, "3"): (5.9228e-04, 5.9228e-04),
}
SITE_NAMES = dict(zip(("norm", "xz", "u", "dbl", "dt", "state", "y"), SITES, strict=False))


class Bench:
    def __init__(self) -> None:
        self.tensors = random_checkpoint(CONFIG, seed=21)
        self.ids = random_ids(CONFIG.vocab_size, 4, 110, seed=22)
        calibration = random_ids(CONFIG.vocab_size, 6, 100, seed=23)
        self.subject = make_subject(CONFIG, self.tensors, calibration=calibration, ids=self.ids)
        real = self.reference(None)
        for ids in calibration.numpy():
            real.logits(ids, Grids(None))
        self.scales = real.scales()
        self.float_logits = self.all_logits(real, Grids(None))
        self.done: dict[tuple, np.ndarray] = {}

    def reference(self, bits: int | None) -> Reference:
        arrays = {name: value.double().numpy() for name, value in self.tensors.items()}
        return Reference(
            arrays, layers=CONFIG.n_layer, rank=CONFIG.dt_rank, states=CONFIG.d_state, bits=bits, group=GROUP
        )

    def all_logits(self, reference: Reference, grids: Grids, cuts: tuple[int, ...] = ()) -> np.ndarray:
        return np.stack([reference.logits(ids, grids, cuts) for ids in self.ids.numpy()])

    def reference_kl(self, bits: int, mode: str, cuts: tuple[int, ...] = ()) -> tuple[float, np.ndarray]:
        # Rows that are one computation to the reference are run once.
        key = (bits, tuple(COLUMNS[mode].items()), cuts)
        if key not in self.done:
            self.done[key] = self.all_logits(self.reference(bits), Grids(self.scales, **COLUMNS[mode]), cuts)
        return kl(self.float_logits, self.done[key]), self.done[key]

    def model_kl(self, bits: int, mode: str, cuts: tuple[int, ...] = ()) -> tuple[float, np.ndarray]:
        recipe = Recipe(w_bits=bits, group_size=GROUP)
        # The same scales, so that the quantile's 0.1 % does not move codes.
        scales = {
            site_key(site, layer): self.scales[layer][short]
            for layer in range(CONFIG.n_layer)
            for short, site in SITE_NAMES.items()
        }
        weights = quantize(CONFIG, self.tensors, scales, recipe)
        model = Mamba(weights, MODES[mode], CPU)
        hidden, _ = run_in_parts(model, self.ids, list(cuts))
        logits = model.logits(hidden).double().numpy()
        fp = self.subject.model("fp")
        return kl(fp.logits(fp.hidden(self.ids)).double().numpy(), logits), logits


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    p, q = (torch.from_numpy(logits).log_softmax(-1) for logits in (reference, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench()


def test_the_float_models_agree(bench):
    fp = bench.subject.model("fp")
    got = fp.logits(fp.hidden(bench.ids)).double().numpy()
    limit = tolerances.LOGITS.budget(float(np.abs(bench.float_logits).max())) / 10
    assert np.abs(got - bench.float_logits).max() < limit


def test_the_scales_agree(bench):
    for layer in range(CONFIG.n_layer):
        for short, site in SITE_NAMES.items():
            # A histogram's quantile is within 2^-10 of the exact one.
            wanted = pytest.approx(bench.scales[layer][short], rel=2**-10)
            assert bench.subject.scales[site_key(site, layer)] == wanted, site


@pytest.mark.parametrize("cuts", [(), CUTS], ids=["one-call", "prefill-and-steps"])
@pytest.mark.parametrize(("bits", "mode"), KNOWN)
def test_known_divergence_from_the_float_model(bench, bits, mode, cuts):
    known = KNOWN[bits, mode][bool(cuts)]
    reference, wanted = bench.reference_kl(bits, mode, cuts)
    assert reference == pytest.approx(known, rel=tolerances.KL_RELATIVE / 10)
    got, logits = bench.model_kl(bits, mode, cuts)
    assert got == pytest.approx(known, rel=tolerances.KL_RELATIVE)
    # The two quantized models are nearer to each other than to the float model by far: the same flips.
    assert kl(wanted, logits) < 0.1 * known

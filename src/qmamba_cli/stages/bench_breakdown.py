"""Time by stage: each operator by itself, on the operands that the model hands it.

On a CPU every call is timed where it happens, and so is the whole. On a GPU a call takes the host longer than
the device, so the calls of one stage are recorded from a forward pass and replayed as one CUDA graph, layer
after layer.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch

from qmamba_cli.kernels.backend import Backend
from qmamba_cli.model.graphs import CudaGraphs, Replayed
from qmamba_cli.model.mamba import Mamba, ModelState

_PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj")
HEAD = "head"
# What no operator of the backend does: sampling, the state's copy, and gaps between kernels.
REST = "rest"
_STAGES = {
    "rms_norm": "norm",
    "causal_conv1d": "conv",
    "causal_conv1d_both": "conv",
    "selective_scan": "scan",
    "hadamard": "hadamard",
    "quantize": "quantize",
    "dequantize": "quantize",
    "quantize_per_token": "quantize",
    "unrotate": HEAD,
}
_PRODUCTS = ("linear", "linear_split")
STAGES = (
    *("embedding", "norm", "in_proj", "conv", "quantize", "x_proj", "dt_proj", "scan", "hadamard"),
    *("out_proj", HEAD, REST),
)
_REPEATS = 7
# Tokens up to which the operands of every layer are kept; beyond, those of a few layers stand for all.
_FEW_TOKENS = 64
_LAYERS_KEPT, _LONG_TOKENS, _LAYERS_KEPT_OF_LONG = 4, 4096, 2


class Breakdown(NamedTuple):
    """Milliseconds by stage.

    Attributes:
        prompt: of a prompt and its first token.
        step: of a one-token step.
    """

    prompt: Mapping[str, float]
    step: Mapping[str, float]


@dataclass(slots=True)
class _Stage:
    """Calls of one stage: how many there were, and those that are kept."""

    calls: int
    kept: list[Callable[[], object]]


@torch.inference_mode()
def breakdown(model: Mamba, ids: torch.Tensor, *, prompt_ms: float, step_ms: float) -> Breakdown:
    """Time each stage of a prompt and of the step after it.

    Args:
        model: the model in its mode.
        ids: (b, l) int64.
        prompt_ms: what the whole prompt takes on a GPU, where the stages are run apart from it.
        step_ms: likewise for the step.
    """
    _, state = model.forward(ids)
    token = ids[:, -1:]
    measure = _on_gpu if model.backend.device.type == "cuda" else _on_cpu
    return Breakdown(
        prompt=_ordered(measure(model, ids, None, prompt_ms)),
        step=_ordered(measure(model, token, state, step_ms)),
    )


def _ordered(stages: Mapping[str, float]) -> dict[str, float]:
    """By the order of the block; operators that it does not name come last."""
    return {name: stages[name] for name in dict.fromkeys((*STAGES, *stages)) if name in stages}


def _with_rest(stages: Mapping[str, float], whole: float) -> dict[str, float]:
    """The stages, and what they leave of the whole, if anything."""
    return {**stages, REST: max(0.0, whole - sum(stages.values()))}


def _on_cpu(model: Mamba, ids: torch.Tensor, state: ModelState | None, _whole: float) -> dict[str, float]:
    runs: list[dict[str, float]] = []

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        runs[-1][stage] += 1e3 * (time.perf_counter() - begin)
        return result

    spied = _spied(model, timed)
    for _ in range(_REPEATS):
        runs.append(defaultdict(float))
        begin = time.perf_counter()
        _forward(spied, ids, state)
        runs[-1] = _with_rest(runs[-1], 1e3 * (time.perf_counter() - begin))
    return {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}


def _on_gpu(model: Mamba, ids: torch.Tensor, state: ModelState | None, whole: float) -> dict[str, float]:
    tokens = ids.numel()
    most = model.config.n_layer + 1
    if tokens > _FEW_TOKENS:
        most = _LAYERS_KEPT if tokens <= _LONG_TOKENS else _LAYERS_KEPT_OF_LONG
    stages: dict[str, _Stage] = {}

    def kept(stage: str, work: Callable[[], Any]) -> Any:
        entry = stages.setdefault(stage, _Stage(0, []))
        entry.calls += 1
        if len(entry.kept) < most:
            entry.kept.append(work)
        return work()

    _forward(_spied(model, kept), ids, state)
    graphs = CudaGraphs(model.backend.device)
    times = {}
    for name in list(stages):
        entry = stages.pop(name)
        times[name] = _replay_ms(entry.kept, graphs) * entry.calls / len(entry.kept)
    return _with_rest(times, whole)


def _replay_ms(calls: list[Callable[[], object]], graphs: CudaGraphs) -> float:
    """Median milliseconds of the calls in one graph."""

    def work() -> None:
        for call in calls:
            call()

    replayed = Replayed(work, graphs)
    replayed.prepare()
    replayed()
    times: list[float] = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        replayed()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def _forward(model: Mamba, ids: torch.Tensor, state: ModelState | None) -> None:
    hidden, _ = model.forward(ids, state)
    model.logits(hidden[:, -1])


def _spied(model: Mamba, around: Callable[[str, Callable[[], Any]], Any]) -> Mamba:
    """The model with every operator's calls handed to ``around`` with the name of their stage."""
    owners: dict[int, str] = {}

    def spy(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def spied(*args: Any, **kwargs: Any) -> Any:
            stage = _STAGES.get(name, name)
            if name in _PRODUCTS:
                # By the weight; not elsewhere, since a tied head's is the embedding's.
                for value in (*args, *kwargs.values()):
                    stage = owners.get(id(value), stage)
            return around(stage, lambda: op(*args, **kwargs))

        return spied

    operators: dict[str, Any] = {
        item.name: spy(item.name, getattr(model.backend, item.name))
        for item in fields(Backend)
        if callable(getattr(model.backend, item.name))
    }
    spied = Mamba(model.weights, model.mode, replace(model.backend, **operators))
    for block in spied.weights.blocks:
        for name in _PROJECTIONS:
            linear = getattr(block, name)
            owners |= {id(linear): name, id(linear.weight): name}
    head = spied.weights.lm_head
    owners |= {id(head): HEAD, id(head.weight): HEAD}
    return spied

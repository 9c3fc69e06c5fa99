"""What the tests of the int8 products by warp groups share."""

from collections.abc import Iterable, Iterator

import torch
from close import assert_exact

from qmamba_cli.kernels.linear import cuda, reference
from qmamba_cli.kernels.linear.int8_cuda import Epilogue, int8_linear
from qmamba_cli.kernels.linear.narrow import NarrowPlan
from qmamba_cli.kernels.linear.operands import HOPPER
from qmamba_cli.kernels.linear.short import ShortPlan


def on_hopper() -> bool:
    return torch.cuda.get_device_capability() == HOPPER


def operands(
    tokens: int, rows: int, k: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x as a part of wider rows, the weight, and its scales."""
    x = torch.randint(-128, 128, (tokens, k + 32), dtype=torch.int8, generator=rng)[:, :k]
    weight = torch.randint(-128, 128, (rows, k), dtype=torch.int8, generator=rng)
    return x, weight, torch.rand(rows, generator=rng) * 1e-3 + 1e-4


def products(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    out_scale: float,
    plans: Iterable[NarrowPlan | ShortPlan],
) -> Iterator[tuple[str, torch.Tensor]]:
    """The outputs of each plan, poisoned before, so that one that is never written shows."""
    codes = torch.empty(x.shape[0], weight.shape[0], dtype=torch.int8, device="cuda")
    end = Epilogue(
        weight_scale=scale.cuda(),
        bias=None,
        residual=None,
        real=None,
        codes=codes,
        x_scale=0.02,
        out_scale=out_scale,
        split=0,
    )
    given = x.cuda(), weight.cuda()
    for plan in plans:
        codes.fill_(77)
        int8_linear(*given, end, plan=plan)
        yield plan.entry, codes.cpu()


def assert_replay_reads_new_tokens(name, choose, x, weight, scale, out_scale):
    """A recorded product of zeros, a part of wider rows, is replayed with ``x`` in their place."""
    wider = torch.zeros(x.shape[0], x.shape[1] + 32, dtype=torch.int8, device="cuda")
    part, moved, moved_scale = wider[:, : x.shape[1]], weight.cuda(), scale.cuda()
    given = {"x_scale": 0.02, "out_scale": out_scale}
    assert (choose(part, moved) is not None) == on_hopper()
    cuda.linear(part, moved, weight_scale=moved_scale, **given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = cuda.linear(part, moved, weight_scale=moved_scale, **given)
    part.copy_(x)
    graph.replay()
    expected = reference.linear(x, weight, weight_scale=scale, **given)
    assert_exact(name, got.cpu(), expected)

"""mamba_ssm's own fp16 model, where it is installed, timed in the same run."""

import importlib
import importlib.util
import time
from collections.abc import Iterator
from typing import Any

import torch

from qmamba_cli.config import MambaConfig
from qmamba_cli.stages.bench_measure import (
    Counts,
    Measured,
    Spread,
    Timed,
    is_out_of_memory,
    out_of_memory,
    peak,
    reset_peak,
    synchronize,
)


def peer(config: MambaConfig, device: torch.device, counts: Counts) -> tuple[list[Timed], str]:
    """Time the peer.

    Returns:
        One outcome a batch size and prompt length, and why there are none: it needs a GPU, is not installed,
        or does not load.
    """
    if device.type != "cuda":
        return [], "mamba_ssm runs on a GPU only and is left out"
    if importlib.util.find_spec("mamba_ssm") is None:
        return [], "mamba_ssm is not installed and is left out"
    reset_peak(device)
    begin = time.perf_counter()
    try:
        model = _make(config, device)
    # A foreign package that was built for another torch fails in whatever way it likes.
    except Exception as error:
        return [], f"mamba_ssm does not load and is left out: {type(error).__name__}"
    synchronize(device)
    return list(_timed(model, config, device, counts, time.perf_counter() - begin)), ""


def _make(config: MambaConfig, device: torch.device) -> Any:
    settings = importlib.import_module("mamba_ssm.models.config_mamba").MambaConfig
    model = importlib.import_module("mamba_ssm.models.mixer_seq_simple").MambaLMHeadModel
    sizes = {
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": config.d_inner // config.d_model,
        "dt_rank": config.dt_rank,
    }
    peer_config = settings(
        d_model=config.d_model, n_layer=config.n_layer, vocab_size=config.vocab_size, ssm_cfg=sizes
    )
    return model(peer_config, device=device, dtype=torch.float16).eval()


def _timed(
    model: Any, config: MambaConfig, device: torch.device, counts: Counts, load_s: float
) -> Iterator[Timed]:
    for batch in counts.batch_sizes:
        for length in counts.prompt_lengths:
            ids = torch.randint(config.vocab_size, (batch, length), device=device)
            measured, problem = None, None
            try:
                measured = _measured(model, ids, counts)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                problem = out_of_memory(batch)
            yield Timed(
                batch_size=batch, prompt_length=length, load_s=load_s, measured=measured, error=problem
            )


@torch.inference_mode()
def _measured(model: Any, ids: torch.Tensor, counts: Counts) -> Measured:
    batch, length = ids.shape
    device = ids.device

    def generate(tokens: int) -> float:
        """Milliseconds of a generation, its prompt included; steps run as one CUDA graph each."""
        synchronize(device)
        begin = time.perf_counter()
        model.generate(
            input_ids=ids,
            max_length=length + tokens,
            cg=True,
            return_dict_in_generate=True,
            output_scores=False,
            enable_timing=False,
        )
        synchronize(device)
        return 1e3 * (time.perf_counter() - begin)

    def first() -> float:
        synchronize(device)
        begin = time.perf_counter()
        model(ids, num_last_tokens=1).logits.argmax(dim=-1).tolist()
        return 1e3 * (time.perf_counter() - begin)

    steps = counts.new_tokens
    for _ in range(1 + counts.warmup):
        first()
        generate(1 + steps)
    reset_peak(device)
    first_ms = [first() for _ in range(counts.repeat)]
    prompt_bytes = peak(device)
    reset_peak(device)
    # The prompt and what surrounds it are in both and cancel.
    step_ms = [(generate(1 + steps) - generate(1)) / steps for _ in range(counts.repeat)]
    token = Spread.of(step_ms)
    return Measured(
        first_token_ms=Spread.of(first_ms),
        token_ms=token,
        generated_tokens_per_s=1e3 * batch / token.median,
        prompt_gpu_bytes=prompt_bytes,
        decode_gpu_bytes=peak(device),
    )

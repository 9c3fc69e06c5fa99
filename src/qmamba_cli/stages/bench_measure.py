"""Timing one model: prompts by the clock, steps by the device's own events."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from qmamba_cli.model.decode import Decoder
from qmamba_cli.model.generate import GenerationTimes, decode_tokens
from qmamba_cli.model.mamba import Mamba
from qmamba_cli.stages.bench_breakdown import breakdown

# A length of prompt is recorded the second time it is run, so the third is the first that is as fast as any.
_LEAST_WARMUP = 2


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated times, milliseconds.

    Attributes:
        median: half of the times are below.
        low: a quarter of the times are below.
        high: a quarter of the times are above.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The quartiles of some values.

        >>> Spread.of([4.0, 1.0, 2.0, 3.0, 5.0])
        Spread(median=3.0, low=2.0, high=4.0)
        """
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """How much is timed.

    Attributes:
        batch_sizes: rows at once.
        prompt_lengths: tokens of a prompt.
        new_tokens: one-token steps.
        repeat: prompts.
        warmup: prompts and steps before them.
        breakdown: whether each operator is timed, too.
    """

    batch_sizes: Sequence[int]
    prompt_lengths: Sequence[int]
    new_tokens: int
    repeat: int
    warmup: int
    breakdown: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured at one batch size and prompt length.

    Attributes:
        first_token_ms: from prompts on the host to their first tokens on the host.
        token_ms: one step, on the device's own clock where it has one.
        generated_tokens_per_s: all rows together, as a reader of the tokens sees it.
        prompt_gpu_bytes: largest memory of tensors on the GPU while prompts ran, the model included; None on
            a CPU.
        decode_gpu_bytes: likewise while steps ran.
        prompt_breakdown: milliseconds of a prompt by stage, if asked for.
        decode_breakdown: milliseconds of a step by stage, if asked for.
    """

    first_token_ms: Spread
    token_ms: Spread
    generated_tokens_per_s: float
    prompt_gpu_bytes: int | None = None
    decode_gpu_bytes: int | None = None
    prompt_breakdown: Mapping[str, float] = field(default_factory=dict)
    decode_breakdown: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One batch size and prompt length of one model.

    Attributes:
        batch_size: rows at once.
        prompt_length: tokens of a prompt.
        load_s: seconds until the model was ready.
        measured: None where it did not run.
        error: why it did not run.
    """

    batch_size: int
    prompt_length: int
    load_s: float
    measured: Measured | None = None
    error: str | None = None


def timed(make: Callable[[], Mamba], device: torch.device, counts: Counts) -> Iterator[Timed]:
    """Make a model and time it at every batch size and prompt length.

    Args:
        make: makes the model.
        device: where it runs.
        counts: how much is timed.

    Yields:
        One outcome a batch size and prompt length, batch size first; running out of GPU memory is one.
    """
    reset_peak(device)
    begin = time.perf_counter()
    model: Mamba | None = None
    problem = ""
    try:
        model = make()
        synchronize(device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        problem = "out of GPU memory while the model was made, expected a smaller `--shape`"
    load_s = time.perf_counter() - begin
    for batch in counts.batch_sizes:
        # A decoder is a cycle of references, so that the last one's memory does not go by itself.
        decoder: Decoder | None = None
        gc.collect()
        for length in counts.prompt_lengths:
            measured = None
            if model is not None:
                problem = ""
                try:
                    decoder = decoder or Decoder(model, batch)
                    measured = _measured(model, decoder, length, counts)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    problem, decoder = out_of_memory(batch), None
                if problem:
                    # After the exception, which holds the frames that hold the tensors.
                    gc.collect()
                    torch.cuda.empty_cache()
            yield Timed(
                batch_size=batch,
                prompt_length=length,
                load_s=load_s,
                measured=measured,
                error=problem or None,
            )


def _measured(model: Mamba, decoder: Decoder, length: int, counts: Counts) -> Measured:
    device = decoder.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (decoder.batch, length), generator=generator)
    decoder.prepare()
    reset_peak(device)
    for _ in range(max(_LEAST_WARMUP, counts.warmup)):
        decoder.start(ids)
    first_token = _wall_ms(lambda: decoder.start(ids).tolist(), counts.repeat, device)
    prompt_bytes = peak(device)
    reset_peak(device)
    steps = _step_ms(decoder, counts)
    times = GenerationTimes()
    for _ in decode_tokens(decoder, ids, max_new_tokens=counts.new_tokens + 1, times=times):
        pass
    decode_bytes = peak(device)
    first, token = Spread.of(first_token), Spread.of(steps)
    parts = breakdown(model, ids, prompt_ms=first.median, step_ms=token.median) if counts.breakdown else None
    return Measured(
        first_token_ms=first,
        token_ms=token,
        generated_tokens_per_s=decoder.batch * times.tokens_per_s,
        prompt_gpu_bytes=prompt_bytes,
        decode_gpu_bytes=decode_bytes,
        prompt_breakdown={} if parts is None else parts.prompt,
        decode_breakdown={} if parts is None else parts.step,
    )


def _wall_ms(work: Callable[[], object], repeat: int, device: torch.device) -> list[float]:
    times = []
    for _ in range(repeat):
        synchronize(device)
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def _step_ms(decoder: Decoder, counts: Counts) -> list[float]:
    """Milliseconds of each step; on a GPU the host runs ahead, as it does in generation."""
    for _ in range(max(_LEAST_WARMUP, counts.warmup)):
        decoder.step()
    if decoder.device.type != "cuda":
        return _wall_ms(decoder.step, counts.new_tokens, decoder.device)
    synchronize(decoder.device)
    marks = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(counts.new_tokens + 1)
    ]
    marks[0].record()
    for mark in marks[1:]:
        decoder.step()
        mark.record()
    marks[-1].synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(marks)]


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Begin to measure the largest memory of tensors on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """The largest memory of tensors on a GPU, bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is a GPU's refusal of memory, or came of one, as it does while a graph is recorded."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def out_of_memory(batch: int) -> str:
    """What a row says that ran out of GPU memory, with the next thing to try."""
    smaller = f"`--batch-size {batch // 2}`" if batch > 1 else "a shorter `--prompt-length`"
    return f"out of GPU memory at batch size {batch}: try {smaller}"

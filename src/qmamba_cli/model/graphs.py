"""Work that is recorded once and replayed, so that the host launches one thing instead of hundreds.

A launch from Python takes longer than most kernels of a decode step. Recorded work reads and writes tensors
at fixed addresses, never waits for the device and decides nothing on the host.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch

Work: TypeAlias = Callable[[], None]


class Recorder(Protocol):
    """Runs and records work; on a GPU `CudaGraphs`."""

    def warm(self, work: Work) -> None:
        """Run the work once, for real, where it would be recorded."""

    def record(self, work: Work, generator: torch.Generator | None) -> Work:
        """Record the work without running it; what is returned replays it.

        Args:
            work: has been run before, so that nothing is left to compile or to allocate for good.
            generator: random numbers that the work draws; each replay draws the next ones. None if it
                draws none.
        """


class CudaGraphs:
    """Records CUDA graphs that share one pool of memory.

    Sharing is safe because no tensor of a recording is read after its replay: results leave it through
    tensors that were there before. Replays must not overlap; they run on the current stream.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Above that of other streams, whose recorded work is then done beside this one's and not before it.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Work) -> None:
        """Run the work on the stream of the recordings, in order with the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Work, generator: torch.Generator | None) -> Work:
        """Capture the work as one graph."""
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with _quiet_capture(), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            work()

        # A graph does not keep the tensors it reads alive; the work does.
        def replay(_kept: Work = work) -> None:
            graph.replay()

        return replay


@contextmanager
def _quiet_capture() -> Iterator[None]:
    """No garbage collection, which may free another graph in mid-capture; no warning for work of no launches.

    Handing a state over is such work where both sides share its tensors.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
            yield
    finally:
        if collecting:
            gc.enable()


class Replayed:
    """Work that is run the first time it is called, recorded the second time, and replayed from then on.

    Args:
        work: what to do.
        recorder: None runs the work every time.
        generator: as for `Recorder.record`.
    """

    def __init__(
        self, work: Work, recorder: Recorder | None, generator: torch.Generator | None = None
    ) -> None:
        self._work = work
        self._recorder = recorder
        self._generator = generator
        self._warm = False
        self._replay: Work | None = None

    def __call__(self) -> None:
        """Do the work once."""
        if self._recorder is None:
            self._work()
        elif not self._warm:
            self._recorder.warm(self._work)
            self._warm = True
        else:
            self._recorded(self._recorder)()

    def prepare(self) -> None:
        """Do the work once and record it, so that no later call has to."""
        self()
        if self._recorder is not None:
            self._recorded(self._recorder)

    def _recorded(self, recorder: Recorder) -> Work:
        if self._replay is None:
            self._replay = recorder.record(self._work, self._generator)
        return self._replay

"""Several processes on one job, as `torchrun` starts them: who does what, and how the parts come together.

Only bytes of our own formats travel between the processes. They meet at a key-value store: a process that
fails says so there, and one that is killed stops beating, so the others end within seconds instead of
waiting for it.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep
from typing import TYPE_CHECKING

import torch

from qmamba_cli.errors import DeviceError, QmambaError, UsageError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_FAILED, _BEAT, _ARRIVED, _LEFT = "failed", "beat", "arrived", "left"
_BEAT_SECONDS = 1.0
# A process that has not beaten for so long is gone.
_SILENT_SECONDS = 15.0
_POLL_SECONDS = 0.1
# How long the process that may hold the store stays for the others to read its last word.
_FAREWELL_SECONDS = 3.0
_JOIN_TIMEOUT = timedelta(seconds=60)
# Everyone is there when data is exchanged, so this is the time of the transfer alone.
_EXCHANGE_TIMEOUT = timedelta(seconds=300)


@dataclass(frozen=True, slots=True)
class World:
    """The processes that share a job.

    Attributes:
        rank: this process, from 0.
        size: processes in all.
        local_rank: this process on its machine, from 0: the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0


SINGLE = World()


def world_of(variables: Mapping[str, str]) -> World:
    """The world that the environment of `torchrun` describes; a single process where there is none.

    Args:
        variables: a copy of the environment.

    Raises:
        UsageError: the variables contradict each other.
    """
    if variables.get("WORLD_SIZE", "1") == "1":
        return SINGLE
    missing = [name for name in VARIABLES if name not in variables]
    if missing:
        raise UsageError(
            f"`WORLD_SIZE` is {variables['WORLD_SIZE']} and `{missing[0]}` is not set, expected both",
            hint="start with `torchrun --nproc-per-node N -m qmamba_cli …`, or unset `WORLD_SIZE`",
        )
    try:
        rank, size, local = (int(variables[name]) for name in VARIABLES[:3])
    except ValueError:
        rank, size, local = -1, 0, -1
    if not 0 <= rank < size or local < 0:
        got = ", ".join(f"{name}={variables[name]}" for name in VARIABLES[:3])
        raise UsageError(f"the processes' numbers make no sense, got {got}, expected 0 <= RANK < WORLD_SIZE")
    return World(rank, size, local)


class Group:
    """The processes of a job, as one of them sees the others. This one is alone.

    Attributes:
        world: who this process is.
    """

    def __init__(self, world: World = SINGLE) -> None:
        self.world = world

    @property
    def leads(self) -> bool:
        """Whether this process writes and prints."""
        return self.world.rank == 0

    def check(self) -> None:
        """Ask whether the others are well; cheap enough for every batch.

        Raises:
            QmambaError: another process has failed or is gone.
        """

    def meet(self) -> None:
        """Wait until everyone has come this far.

        Raises:
            QmambaError: another process has failed or is gone.
        """

    def gather(self, data: bytes) -> list[bytes] | None:
        """Everyone's bytes, by rank, where rank 0 runs; None elsewhere. Waits for all.

        Raises:
            QmambaError: another process has failed or is gone.
        """
        return [data]

    def share(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, by rank, everywhere; waits and raises as `gather` does."""
        return [data]


ALONE = Group()


@contextmanager
def joined(world: World, device: str = "auto") -> Iterator[Group]:
    """Join the other processes of a world for the length of a block.

    An error that leaves the block is told to the others, who end with it.

    Args:
        world: who this process is.
        device: auto, cpu or cuda; what the bytes travel between. NCCL needs a GPU for every process.

    Raises:
        QmambaError: the others cannot be reached, or one of them failed.
    """
    if world.size == 1:
        yield ALONE
        return
    use_gpu = device != "cpu" and torch.cuda.is_available()
    if use_gpu:
        found = torch.cuda.device_count()
        if world.local_rank >= found:
            raise DeviceError(
                f"rank {world.rank} has no GPU, got {found} on its machine, "
                f"expected at least {world.local_rank + 1}",
                hint="start as many processes as there are GPUs, or use the CPU",
            )
        torch.cuda.set_device(world.local_rank)
    group = _open(world, use_gpu)
    try:
        yield group
    except BaseException as error:
        group.fail(error)
        raise
    else:
        group.leave()


def _open(world: World, use_gpu: bool) -> "_ProcessGroup":
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=_JOIN_TIMEOUT))
        store.set_timeout(_JOIN_TIMEOUT)
        dist.init_process_group(
            "nccl" if use_gpu else "gloo",
            store=PrefixStore("exchange", store),
            rank=world.rank,
            world_size=world.size,
            timeout=_EXCHANGE_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise QmambaError(
            f"rank {world.rank} cannot join the other {world.size - 1} processes, got: {_first_line(error)}",
            hint="start all of them with one `torchrun` command",
        ) from None
    device = torch.device("cuda", torch.cuda.current_device()) if use_gpu else torch.device("cpu")
    return _ProcessGroup(world, PrefixStore("qmamba", store), device)


class _ProcessGroup(Group):
    """Several processes, with a store and a process group of torch.distributed between them."""

    def __init__(self, world: World, store: "Store", device: torch.device) -> None:
        super().__init__(world)
        self._store = store
        self._device = device
        self._round = 0
        self._beats: dict[int, tuple[str, float]] = {}
        self._listened_at = 0.0
        self._ended = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="qmamba-beat", daemon=True)
        self._pulse.start()

    def check(self) -> None:
        with self._connected():
            if self._store.check([_FAILED]):
                raise QmambaError(
                    self._store.get(_FAILED).decode(),
                    hint="see that process's own message",
                )
            # The store answers a question a rank; batches may be quicker than that.
            if monotonic() - self._listened_at >= _POLL_SECONDS:
                self._listen()

    def gather(self, data: bytes) -> list[bytes] | None:
        import torch.distributed as dist

        lengths = self._lengths(data)
        parts = [self._tensor(max(lengths)) for _ in lengths] if self.leads else None
        with self._connected():
            dist.gather(self._tensor(max(lengths), data), parts, dst=0)
        return None if parts is None else _cut(parts, lengths)

    def share(self, data: bytes) -> list[bytes]:
        import torch.distributed as dist

        lengths = self._lengths(data)
        parts = [self._tensor(max(lengths)) for _ in lengths]
        with self._connected():
            dist.all_gather(parts, self._tensor(max(lengths), data))
        return _cut(parts, lengths)

    def _lengths(self, data: bytes) -> list[int]:
        """Length of everyone's data. Data travels in equal lengths, which every backend can do."""
        import torch.distributed as dist

        self.meet()
        with self._connected():
            sizes = [self._tensor(8) for _ in range(self.world.size)]
            dist.all_gather(sizes, self._tensor(8, len(data).to_bytes(8, "little")))
        return [int.from_bytes(_bytes(size), "little") for size in sizes]

    def leave(self) -> None:
        """End well: everyone has what it needs."""
        self.meet()
        self._close()

    def fail(self, error: BaseException) -> None:
        """End badly, and let the others know why."""
        reason = getattr(error, "message", "") or _first_line(error) or type(error).__name__
        with suppress(RuntimeError):
            if not self._store.check([_FAILED]):
                self._store.set(_FAILED, f"rank {self.world.rank} failed: {reason}")
        self._close()

    def meet(self) -> None:
        self._round += 1
        keys = [f"{_ARRIVED}/{self._round}/{rank}" for rank in range(self.world.size)]
        with self._connected():
            self._store.set(keys[self.world.rank], "")
            while not self._store.check(keys):
                self.check()
                self._ended.wait(_POLL_SECONDS)

    def _listen(self) -> None:
        """Notice a process that was killed."""
        now = self._listened_at = monotonic()
        for rank in range(self.world.size):
            key = f"{_BEAT}/{rank}"
            beat = self._store.get(key).decode() if self._store.check([key]) else ""
            last, since = self._beats.get(rank, (None, now))
            self._beats[rank] = (beat, since if beat == last else now)
            if beat == last and now - since > _SILENT_SECONDS:
                raise QmambaError(
                    f"rank {rank} is gone, got no sign of it for {_SILENT_SECONDS:.0f} seconds",
                    hint="it was killed or its machine is unreachable; start all of them again",
                )

    def _beat(self) -> None:
        count = 0
        with suppress(RuntimeError):
            while True:
                count += 1
                self._store.set(f"{_BEAT}/{self.world.rank}", str(count))
                if self._ended.wait(_BEAT_SECONDS):
                    return

    def _close(self) -> None:
        import torch.distributed as dist

        with suppress(RuntimeError):
            self._store.set(f"{_LEFT}/{self.world.rank}", "")
            if self.leads:
                self._see_off()
        self._ended.set()
        self._pulse.join(timeout=2 * _BEAT_SECONDS)
        with suppress(RuntimeError):
            dist.destroy_process_group()

    def _see_off(self) -> None:
        """Stay while the others still read: without an agent of torchrun the store is this process's."""
        keys = [f"{_LEFT}/{rank}" for rank in range(self.world.size)]
        deadline = monotonic() + _FAREWELL_SECONDS
        while monotonic() < deadline and not self._store.check(keys):
            sleep(_POLL_SECONDS)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Report a connection that breaks as an error of the job."""
        try:
            yield
        except RuntimeError as error:
            raise QmambaError(
                f"rank {self.world.rank} lost the other processes, got: {_first_line(error)}",
                hint="another process ended; see its own message",
            ) from None

    def _tensor(self, length: int, data: bytes = b"") -> torch.Tensor:
        buffer = bytearray(max(length, 1))
        buffer[: len(data)] = data
        return torch.frombuffer(buffer, dtype=torch.uint8).to(self._device)


def share_of(first: int, end: int, batch_size: int, number: int, count: int) -> tuple[int, int]:
    """One of ``count`` runs of whole batches of the samples ``first`` to ``end - 1``.

    Whole batches, so that every forward pass has the shape it has in a single process, and with it the same
    roundings.

    Args:
        first: first sample; a batch begins there.
        end: behind the last sample.
        batch_size: samples a batch.
        number: which run, from 0.
        count: runs in all.

    Returns:
        Its first sample, and the one behind its last; equal where there are fewer batches than runs.
    """
    batches = -(-(end - first) // batch_size)
    bounds = (min(first + batches * part // count * batch_size, end) for part in (number, number + 1))
    return next(bounds), next(bounds)


def _cut(parts: Sequence[torch.Tensor], lengths: Sequence[int]) -> list[bytes]:
    return [_bytes(part)[:length] for part, length in zip(parts, lengths, strict=True)]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().numpy().tobytes()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

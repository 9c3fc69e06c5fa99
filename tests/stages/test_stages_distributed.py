"""Several processes on one job: the bytes and the scores of a single one, and all end when one fails."""

import json
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from calibrations import command_line, small_model, start, whole
from command_line import done, process, refused, tree
from hypothesis import given
from hypothesis import strategies as st

from qmamba_cli.errors import ArtifactError, QmambaError, UsageError
from qmamba_cli.modes import MODES
from qmamba_cli.resources import calib_data_path
from qmamba_cli.stages.distributed import ALONE, SINGLE, World, joined, share_of, world_of
from qmamba_cli.stages.observe import claimed_path, progress_path
from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task

VARIABLES = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"}


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def both(*arguments: object, cwd: Path, **of_rank_1: Any) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of two processes of one world; rank 1 may be given other arguments."""
    port = free_port()
    children = []
    for rank in (0, 1):
        variables = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        mine = of_rank_1.get("arguments", arguments) if rank == 1 else arguments
        children.append(start(*mine, cwd=cwd, **variables))
    ends = [child.communicate(timeout=100) for child in children]
    return [(child.returncode, *end) for child, end in zip(children, ends, strict=True)]


@given(
    samples=st.integers(1, 60), batch_size=st.integers(1, 9), count=st.integers(1, 9), first=st.integers(0, 5)
)
def test_shares_are_whole_batches_and_all_of_them(samples, batch_size, count, first) -> None:
    first *= batch_size
    end = first + samples
    shares = [share_of(first, end, batch_size, number, count) for number in range(count)]
    assert shares[0][0] == first and shares[-1][1] == end
    for (_, behind), (start_of_next, _) in pairwise(shares):
        assert behind == start_of_next
        assert (behind - first) % batch_size == 0 or behind == end
    sizes = [-(-(behind - start_of) // batch_size) for start_of, behind in shares]
    assert max(sizes) - min(sizes) <= 1


def test_the_world_of_an_environment() -> None:
    assert world_of({}) == SINGLE == world_of({"WORLD_SIZE": "1"})
    assert world_of(VARIABLES) == World(rank=1, size=4, local_rank=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "`RANK` is not set"),
        ({"MASTER_PORT": None}, "`MASTER_PORT` is not set"),
        ({"RANK": "4"}, "RANK=4"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "x"}, "RANK=x"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
    ],
)
def test_a_world_that_makes_no_sense(change: dict[str, str | None], message: str) -> None:
    variables = {name: value for name, value in (VARIABLES | change).items() if value is not None}
    with pytest.raises(UsageError, match=message):
        world_of(variables)


def test_a_single_process_needs_no_others() -> None:
    with joined(SINGLE) as group:
        assert group is ALONE and group.leads
        group.check()
        group.meet()
        assert group.gather(b"x") == group.share(b"x") == [b"x"]


def test_torchrun_makes_the_bytes_of_one_process(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    command = command_line(tmp_path / "w")
    child = start(*torchrun, "-m", "qmamba_cli", *command, "--json", cwd=tmp_path)
    out, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors
    # Only rank 0 prints.
    assert json.loads(out)["samples"] == 32
    assert dict(tree(tmp_path / "w" / "calibration")) == whole()
    assert {path.name for path in (tmp_path / "w").iterdir()} == {"calibration", "workdir.json"}


def test_torchrun_writes_the_results_of_one_process(tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    score = ("run", "--mode=fp", f"--model={small_model()}", "--task=lastword", "--limit=7", "--batch-size=2")
    child = start(*torchrun, "-m", "qmamba_cli", *score, "--output=two.json", "--log-samples", cwd=tmp_path)
    _, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors
    done(*score, "--output=one.json", "--log-samples", cwd=tmp_path)
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert two["qmamba"].pop("processes") == 2
    for document in (one, two):
        del document["qmamba"]["seconds"]
    assert one == two
    one, two = (sorted(tmp_path.glob(f"{name}*samples*")) for name in ("one", "two"))
    assert one[0].read_bytes() == two[0].read_bytes()


SCORE = """
import json, os, sys
from pathlib import Path
from qmamba_cli.modes import MODES
from qmamba_cli.stages.distributed import joined, world_of
from qmamba_cli.stages.run import ModelOptions, TaskOptions, load_model, run_task

world = world_of(os.environ)
with joined(world, "cpu") as group:
    loaded = load_model(ModelOptions(mode=MODES["fp"], model=sys.argv[1], backend="cpu"))
    for options in json.loads(sys.argv[2]):
        options = TaskOptions(**options | {"data": Path(options["data"])})
        results, lines = run_task(loaded, options, group=group)
        print(json.dumps([results["results"], results["n-samples"], lines, results["qmamba"]["processes"]]))
"""


def test_scores_are_those_of_one_process(tmp_path: Path) -> None:
    data = str(calib_data_path("lastword.jsonl"))
    asked: list[dict[str, Any]] = [
        {"task": "perplexity", "data": data, "limit": 5, "seqlen": 24, "batch_size": 2},
        {"task": "perplexity", "data": data, "limit": 1, "seqlen": 24, "baseline": "demo"},
    ]
    ends = both("-c", SCORE, small_model(), json.dumps(asked), cwd=tmp_path)
    assert [code for code, _, _ in ends] == [0, 0], ends
    # Each process has all of the results.
    assert ends[0][1] == ends[1][1]
    loaded = load_model(ModelOptions(mode=MODES["fp"], model=small_model(), backend="cpu"))
    for options, line in zip(asked, ends[0][1].splitlines(), strict=True):
        results, lines = run_task(loaded, TaskOptions(**options | {"data": Path(data)}))
        assert json.loads(line) == [
            json.loads(json.dumps(results["results"])),
            results["n-samples"],
            lines,
            2,
        ]
        assert "processes" not in results["qmamba"]


FAILS = """
import os, signal, sys, time
from qmamba_cli import cli
from qmamba_cli.errors import QmambaError
from qmamba_cli.stages import distributed, observe

distributed._SILENT_SECONDS = 3.0
how, *arguments = sys.argv[1:]

def fail(*_, **__):
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    raise QmambaError("`x`: values are not finite, got 3 NaN, expected none", hint="check the weights")

def work_on(*_, group, **__):
    # Batches that would go on long after the other one is gone.
    for _ in range(600):
        group.check()
        time.sleep(0.1)

if os.environ["RANK"] == "1":
    observe.Run.advance = fail
elif how == "kill":
    observe.Run.advance = work_on
sys.argv = ["qmamba", *arguments]
cli.main()
"""


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_process_that_fails_ends_the_others(tmp_path: Path, how: str) -> None:
    (code, out, errors), (other_code, _, other_errors) = both(
        "-c", FAILS, how, *command_line(tmp_path), cwd=tmp_path
    )
    assert code == 1 and out == "" and "Traceback" not in errors, errors
    if how == "raise":
        assert "error: rank 1 failed: `x`: values are not finite" in errors
        assert other_code == 1 and "error: `x`: values are not finite" in other_errors
    else:
        assert "error: rank 1 is gone" in errors
    assert not (tmp_path / "calibration").exists()


def test_a_process_that_calibrates_something_else(tmp_path: Path) -> None:
    command = ("-m", "qmamba_cli", *command_line(tmp_path))
    ends = both(*command, cwd=tmp_path, arguments=(*command, "--alpha=0.99"))
    assert ends[0][0] == 3
    assert "rank 1" in ends[0][2] and "`--alpha` is 0.99, expected 0.9995" in ends[0][2]
    assert ends[1][0] != 0 and "rank 0 failed" in ends[1][2]
    assert not (tmp_path / "calibration").exists()


def test_a_bad_world_is_a_usage_error(tmp_path: Path) -> None:
    refused(
        process(*command_line(tmp_path), cwd=tmp_path, WORLD_SIZE="2"), 2, "`RANK` is not set", "torchrun"
    )


def test_progress_of_each_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    target = tmp_path / "calibration"
    worlds = [World(rank, 2) for rank in (0, 1)]
    paths = [progress_path(target, world) for world in worlds]
    assert [path.name for path in paths] == ["calibration.partial-1-of-2", "calibration.partial-2-of-2"]
    for path in paths:
        path.touch()
    # A process minds its own: the other keeps its file.
    assert claimed_path(target, worlds[0], resume=True, force=False) == paths[0]
    with pytest.raises(QmambaError, match="partial-2-of-2` is the progress"):
        claimed_path(target, worlds[1], resume=False, force=False)
    claimed_path(target, worlds[1], resume=False, force=True)
    assert paths[0].exists() and not paths[1].exists()
    with pytest.raises(ArtifactError, match="another number of processes, expected 1"):
        claimed_path(target, SINGLE, resume=True, force=False)
    claimed_path(target, SINGLE, resume=False, force=True)
    assert not paths[0].exists()


@pytest.mark.gpu
def test_processes_with_a_gpu_each_make_the_bytes_of_one(tmp_path: Path) -> None:
    """As many processes as GPUs, at most two: NCCL between them, one GPU for each."""
    import torch

    processes = min(torch.cuda.device_count(), 2)
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}")
    for folder, launcher in (("one", ()), ("shared", torchrun)):
        command = (*launcher, "-m", "qmamba_cli", *command_line(tmp_path / folder), "--device=cuda")
        child = start(*command, cwd=tmp_path)
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors
    assert tree(tmp_path / "one" / "calibration") == tree(tmp_path / "shared" / "calibration")

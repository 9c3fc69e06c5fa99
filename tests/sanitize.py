"""Runs the GPU tests of the kernels under compute-sanitizer.

    python tests/sanitize.py [memcheck] [racecheck] [--processes N] [--out FOLDER] [-- arguments of pytest]

All tests of `tests/kernels` that need a GPU take part but those marked `large`. Under memcheck each tensor is
an allocation of its own, so that a kernel cannot reach a neighbour unseen; tests that capture graphs need
torch's pool and run apart. A canary with a fault runs first: a tool that does not report it does not see the
tests.

Each run prints one line. The exit code is 0 if tests ran, all passed, and the tool reported nothing; the
tool's own words are in FOLDER. Where time is short, `-- --part 1/4` takes each fourth of these tests, and
`--part 2/4` to `--part 4/4` the others.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TESTS = Path(__file__).parent / "kernels"
_REPORTED = 86
# Not the line that counts what was not printed.
_SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)s?\b(?! were)")
_OWN_ALLOCATIONS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
# Parts of a block of these kernels meet at barriers of their own, one part more often than another. racecheck
# then reports accesses that a later barrier of the whole block has ordered.
_MISREAD = ("batch_in", "batch_out")
_EXCLUDED = tuple(word for name in _MISREAD for word in ("--kernel-name-exclude", f"kernel_substring={name}"))
# By tool: what is written where, by all threads at once.
_FAULTS = {"memcheck": "out[(1ll << 33) + threadIdx.x]", "racecheck": "held"}
_CANARY = '''
import cupy

CODE = """extern "C" __global__ void canary(int* out) {{
  __shared__ volatile int held;
  {fault} = threadIdx.x;
  out[0] = held;
}}"""


def test_canary():
    cupy.RawKernel(CODE, "canary")((1,), (256,), (cupy.zeros(1, dtype=cupy.int32),))
    cupy.cuda.runtime.deviceSynchronize()
'''


@dataclass(frozen=True, slots=True)
class Run:
    """One run: its name, the tool with its options, which tests take part, and more environment."""

    name: str
    tool: tuple[str, ...]
    marks: str
    environment: dict[str, str]


RUNS = (
    Run("memcheck", ("memcheck",), "gpu and not large and not graph", _OWN_ALLOCATIONS),
    Run("memcheck of graphs", ("memcheck",), "gpu and not large and graph", {}),
    Run(
        "racecheck",
        ("racecheck", *_EXCLUDED),
        "gpu and not large",
        {},
    ),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run went: tests that ran and that failed, and what the tool reported, None if it said nothing."""

    ran: int
    failed: int
    reported: int | None
    code: int

    @property
    def passed(self) -> bool:
        return self.code == 0 and self.ran > 0 and self.failed == 0 and self.reported == 0


def outcome(code: int, log: str, junit: str) -> Outcome:
    """The outcome from the exit code, the tool's log and pytest's report, either of which may be empty."""
    ran = failed = 0
    if junit:
        for suite in ElementTree.fromstring(junit).iter("testsuite"):
            counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
            ran += counts["tests"] - counts["skipped"]
            failed += counts["failures"] + counts["errors"]
    summaries = [int(count) for count in _SUMMARY.findall(log)]
    return Outcome(ran, failed, sum(summaries) if summaries else None, code)


def sanitize(run: Run, processes: int, folder: Path, arguments: list[str], tests: Path = TESTS) -> Outcome:
    """Run tests under a tool."""
    stem = folder / run.name.replace(" ", "-")
    log, junit = stem.with_suffix(".log"), stem.with_suffix(".xml")
    for old in (log, junit):
        old.unlink(missing_ok=True)
    command = [
        *("compute-sanitizer", "--tool", *run.tool, "--target-processes", "all"),
        *("--error-exitcode", str(_REPORTED), "--log-file", str(log)),
        *(sys.executable, "-m", "pytest", str(tests), "-m", run.marks, "-n", str(processes)),
        *("-q", "-p", "no:cacheprovider", f"--junit-xml={junit}", *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **run.environment}
    with stem.with_suffix(".out").open("w") as out:
        code = _run_with_children(command, environment, out)
    return outcome(code, *(path.read_text() if path.is_file() else "" for path in (log, junit)))


def _run_with_children(command: list[str], environment: dict[str, str], out: IO[str]) -> int:
    """Run a command; if this process is told to end, the command's children end, too."""
    with subprocess.Popen(
        command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
    ) as process:
        try:
            return process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def sees_faults(run: Run, folder: Path) -> bool:
    """Whether the tool reports a fault in a process of pytest's."""
    canary = folder / "canary" / "test_canary.py"
    canary.parent.mkdir(exist_ok=True)
    canary.write_text(_CANARY.format(fault=_FAULTS[run.tool[0]]))
    own = Run("canary", run.tool, "", run.environment)
    seen = sanitize(own, 1, folder, [], canary)
    return seen.code == _REPORTED and bool(seen.reported)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tools = ["memcheck", "racecheck"]
    parser.add_argument("tools", nargs="*", choices=[*tools, []], help="both if left out")
    # They take turns on the GPU: 16 had not finished a first test when 8 had finished most.
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=Path("sanitize-out"))
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, arguments = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    if shutil.which("compute-sanitizer") is None:
        print("error: compute-sanitizer is not on the PATH; it is part of the CUDA toolkit", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = options.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    good = True
    for tool in options.tools or tools:
        runs = [run for run in RUNS if run.tool[0] == tool]
        if not sees_faults(runs[0], folder):
            print(f"{tool}: does not report the canary's fault, see {folder}/canary.log and .out", flush=True)
            good = False
            continue
        for run in runs:
            started = time.monotonic()
            got = sanitize(run, options.processes, folder, arguments)
            good &= got.passed
            print(
                f"{run.name}: {'passed' if got.passed else 'FAILED'}, {got.ran} tests ran, "
                f"{got.failed} failed, reported {'no summary' if got.reported is None else got.reported}, "
                f"exit code {got.code}, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

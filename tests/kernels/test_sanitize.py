"""What counts as a clean run under compute-sanitizer."""

import os
import subprocess
import sys
import time
from pathlib import Path

import sanitize

JUNIT = '<testsuites><testsuite errors="0" failures="{failed}" skipped="2" tests="9"/></testsuites>'
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"


def test_a_run_passes_only_if_tests_ran_and_the_tool_was_silent():
    good = sanitize.outcome(0, CLEAN, JUNIT.format(failed=0))
    assert good == sanitize.Outcome(ran=7, failed=0, reported=0, code=0) and good.passed
    for bad in (
        sanitize.outcome(1, CLEAN, JUNIT.format(failed=0)),
        sanitize.outcome(0, CLEAN, JUNIT.format(failed=1)),
        sanitize.outcome(0, CLEAN.replace("0 errors", "3 errors"), JUNIT.format(failed=0)),
        # The tool or pytest did not get as far as their reports.
        sanitize.outcome(0, "", JUNIT.format(failed=0)),
        sanitize.outcome(0, CLEAN, ""),
        sanitize.outcome(0, CLEAN, JUNIT.format(failed=0).replace('tests="9"', 'tests="2"')),
    ):
        assert not bad.passed


def test_hazards_count_as_reports():
    log = "========= RACECHECK SUMMARY: 12 hazards displayed (12 errors, 0 warnings)\n"
    assert sanitize.outcome(86, log, JUNIT.format(failed=0)).reported == 12
    log = (
        "========= ERROR SUMMARY: 259 errors\n"
        "========= ERROR SUMMARY: 159 errors were not printed. Use --print-limit option to adjust\n"
    )
    assert sanitize.outcome(86, log, JUNIT.format(failed=0)).reported == 259
    assert sanitize.outcome(86, "========= ERROR SUMMARY: 1 error\n", "").reported == 1


def test_every_gpu_test_but_the_large_takes_part():
    marks = {run.name: run.marks for run in sanitize.RUNS}
    assert marks["racecheck"] == "gpu and not large"
    assert {marks["memcheck"], marks["memcheck of graphs"]} == {
        "gpu and not large and not graph",
        "gpu and not large and graph",
    }


def test_ending_it_ends_the_tool_and_its_children(tmp_path):
    told = tmp_path / "told"
    script = (
        "import os, signal, sys, sanitize\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        f"tool = ['bash', '-c', 'sleep 600 & echo $! > {told}; wait']\n"
        "sanitize._run_with_children(tool, dict(os.environ), sys.stdout)\n"
    )
    here = {**os.environ, "PYTHONPATH": str(Path(sanitize.__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", script], env=here) as process:
        while not (told.is_file() and told.read_text().strip()):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=30) == 1
    child = Path("/proc") / told.read_text().strip() / "stat"
    deadline = time.monotonic() + 30
    while child.is_file() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)

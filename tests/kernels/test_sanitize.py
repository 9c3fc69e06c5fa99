"""What counts as a clean run under compute-sanitizer."""

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

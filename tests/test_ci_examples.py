"""The pipelines of docs/ci do what they say: their commands run here, job by job, as they are written."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from command_line import environment, qmamba

DOCS = Path(__file__).resolve().parents[1] / "docs"
JOBS = ["calibrate", "export", "run"]
INSTALL = "pip install "


@dataclass(frozen=True)
class Job:
    """One job of a pipeline.

    Attributes:
        takes: name of an artifact → folder it is put in.
        script: shell lines.
        passes: name of an artifact → paths it is made of.
    """

    takes: dict[str, str]
    script: list[str]
    passes: dict[str, list[str]]


def github() -> tuple[dict[str, Job], dict[str, str]]:
    document = yaml.safe_load((DOCS / "ci/github-actions.yml").read_text(encoding="utf-8"))
    jobs = {}
    for name, job in document["jobs"].items():
        takes, passes, script = {}, {}, []
        for step in job["steps"]:
            assert {"run", "uses"} & step.keys(), step
            action, _, version = step.get("uses", "").partition("@")
            assert bool(version) == bool(action), "actions are pinned to a version"
            if action == "actions/download-artifact":
                takes[step["with"]["name"]] = step["with"].get("path", ".")
            elif action == "actions/upload-artifact":
                passes[step["with"]["name"]] = step["with"]["path"].split()
            else:
                assert not action
                script.append(step["run"])
        jobs[name] = Job(takes, script, passes)
        needed = job.get("needs")
        assert takes.keys() <= (jobs[needed].passes.keys() if needed else set())
    return jobs, document["env"]


def gitlab() -> tuple[dict[str, Job], dict[str, str]]:
    document = yaml.safe_load((DOCS / "ci/gitlab-ci.yml").read_text(encoding="utf-8"))
    jobs = {}
    for name in document["stages"]:
        job = document[name]
        assert job["stage"] == name
        takes = dict.fromkeys(job.get("needs", ()), ".")
        script = [*document["default"]["before_script"], *job["script"]]
        jobs[name] = Job(takes, script, {name: job["artifacts"]["paths"]})
    return jobs, document["variables"]


def lines(jobs: Iterable[Job]) -> list[list[str]]:
    """The commands, split as a shell does, without the installation of the package."""
    found = []
    for job in jobs:
        for text in job.script:
            for line in text.replace("\\\n", " ").splitlines():
                if not line.startswith(INSTALL):
                    found.append(shlex.split(line))
    return found


def pass_on(job: Job, folder: Path, store: Path) -> None:
    for name, paths in job.passes.items():
        target = store / name
        target.mkdir()
        for path in paths:
            assert (folder / path).exists(), f"`{path}` was not made"
            if (folder / path).is_dir() and len(paths) == 1:
                # A folder alone: its content is the artifact.
                shutil.copytree(folder / path, target / "content")
            else:
                shutil.copy(folder / path, target)


def take(job: Job, folder: Path, store: Path, *, keeps_folder: dict[str, str]) -> None:
    for name, where in job.takes.items():
        content = store / name / "content"
        place = folder / keeps_folder.get(name, where)
        shutil.copytree(content if content.exists() else store / name, place, dirs_exist_ok=True)


def run_in_shell(job: Job, folder: Path, variables: dict[str, str]) -> None:
    """With bash, as a runner does; the package is the one that is tested."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for text in job.script:
        if not text.startswith(INSTALL):
            ended = subprocess.run(
                ["bash", "-e", "-o", "pipefail", "-c", text],
                cwd=folder,
                env=environment(OMP_NUM_THREADS="1", PATH=path, **variables),
                capture_output=True,
                encoding="utf-8",
                check=False,
                timeout=300,
            )
            assert ended.returncode == 0, f"{text}\n{ended.stdout}\n{ended.stderr}"


def run_in_process(job: Job, folder: Path, variables: dict[str, str]) -> None:
    for words in lines([job]):
        assert words[0] == "qmamba"
        expanded = [variables["MODEL"] if word == "$MODEL" else word for word in words[1:]]
        outcome = qmamba(*expanded, cwd=folder)
        assert outcome.code == 0, (words, outcome.err)


def run_pipeline(jobs: dict[str, Job], tmp_path: Path, run: Any, keeps_folder: dict[str, str]) -> Path:
    """Every job in a folder of its own that holds only what it takes; the folder of the last one."""
    assert list(jobs) == JOBS
    store = tmp_path / "store"
    store.mkdir()
    for name, job in jobs.items():
        folder = tmp_path / name
        folder.mkdir()
        take(job, folder, store, keeps_folder=keeps_folder)
        run(job, folder)
        pass_on(job, folder, store)
    return folder


def require_results(folder: Path) -> None:
    assert "2-4" in json.dumps(json.loads((folder / "results.json").read_text()))
    suite = ElementTree.parse(folder / "gates.xml").getroot()
    assert "gate kl<0.2" in {case.get("name") for case in suite.iter("testcase")}
    assert not list(suite.iter("failure"))


@pytest.mark.slow
def test_the_github_pipeline_runs(tmp_path: Path) -> None:
    jobs, variables = github()
    folder = run_pipeline(jobs, tmp_path, lambda job, where: run_in_shell(job, where, variables), {})
    require_results(folder)


@pytest.mark.slow
def test_the_gitlab_pipeline_runs(tmp_path: Path) -> None:
    jobs, variables = gitlab()
    # There an artifact keeps the names of its folders.
    folder = run_pipeline(
        jobs,
        tmp_path,
        lambda job, where: run_in_process(job, where, variables),
        {"calibrate": "qmamba-artifacts"},
    )
    require_results(folder)


def test_both_pipelines_have_the_same_commands() -> None:
    (hub, hub_variables), (lab, lab_variables) = github(), gitlab()
    assert lines(hub.values()) == lines(lab.values())
    assert hub_variables == lab_variables
    assert len(lines(hub.values())) == 5


@pytest.mark.parametrize("pipeline", [github, gitlab])
def test_the_last_job_has_gates(pipeline: Any) -> None:
    """The gates are what the last job is for: without one, nothing could fail there."""
    jobs, _ = pipeline()
    (command,) = [words for words in lines([jobs["run"]]) if "--gate" in words]
    assert command.count("--gate") == 2
    assert "kl<0.2" in command
    document = (DOCS / "ci.md").read_text(encoding="utf-8")
    for name in jobs:
        assert f"\n| {name} |" in document

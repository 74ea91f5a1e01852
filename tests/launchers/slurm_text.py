"""A Slurm of text: it says what a test has put down, and remembers what it was asked."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrate.launchers.attempts import exit_file, job_file
from orchestrate.launchers.base import LaunchPlan, RunSpec
from orchestrate.launchers.cluster import ClusterConfig
from orchestrate.launchers.slurm import SlurmLauncher
from orchestrate.launchers.slurm_commands import Answer
from orchestrate.launchers.slurm_queue import QUEUE_FORMAT
from orchestrate.runs import RunDir, write_json

TRIAL, NAME = "00112233aabbccdd", "oc-00112233aabbccdd"
NOW = 1_795_449_491.0
WIDTHS = {name: int(width) for name, width in (part.split(":") for part in QUEUE_FORMAT.split(","))}
DEAD = Answer(1, err="squeue: error: Unable to contact slurm controller (connect failure)")
NO_ACCOUNTING = Answer(1, err="Slurm accounting storage is disabled")


def queue_line(job: str, name: str, state: str, **fields: str) -> str:
    """Write a line of squeue; fields by the names of `squeue --Format`."""
    given = {
        "JobArrayID": job,
        "JobID": job.partition("_")[0],
        "Name": name,
        "State": state,
        "RestartCnt": "0",
    } | fields
    return "".join(given.get(field, "N/A")[:width].ljust(width) for field, width in WIDTHS.items())


class TextSlurm:
    """Answers by program; sbatch gives ids from 100 on unless it has an answer."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.scripts: list[str] = []
        self.answers: dict[str, Answer] = {"sacct": NO_ACCOUNTING}

    def run(self, *words: str, text: str = "") -> Answer:
        self.asked.append(words)
        if words[0] == "sbatch":
            self.scripts.append(text or Path(words[-1]).read_text())
        if words[0] in self.answers:
            return self.answers[words[0]]
        return Answer(0, out=f"Submitted batch job {99 + len(self.scripts)}\n" if words[0] == "sbatch" else "")

    def queue(self, lines: Sequence[str]) -> None:
        """Decide what squeue shows from now on."""
        self.answers["squeue"] = Answer(0, out="".join(f"{line}\n" for line in lines))

    def count(self, program: str) -> int:
        """Count the calls of a program."""
        return sum(words[0] == program for words in self.asked)

    def last(self, program: str) -> tuple[str, ...]:
        """Return the words of the last call of a program."""
        return next(words for words in reversed(self.asked) if words[0] == program)


def config(**changes: Any) -> ClusterConfig:
    resources = {"nodes": 2, "ranks_per_node": 2}
    return ClusterConfig.model_validate({"launcher": "slurm", "resources": resources} | changes)


def launcher(runs: Path, slurm: TextSlurm, cluster: ClusterConfig | None = None) -> SlurmLauncher:
    return SlurmLauncher(cluster or config(), runs, commands=slurm, clock=lambda: NOW)


def planned(jobs: SlurmLauncher, runs: Path, trial: str = TRIAL, **more: Any) -> LaunchPlan:
    return jobs.plan(RunSpec(trial, runs / "trials" / trial, 1, sweep="dims", **more))


def kept(runs: Path, number: int, *, job: str, started: float, code: int | None = None, name: str = TRIAL) -> None:
    """Write what the keeper of an attempt leaves; without an exit code it has not ended."""
    run = RunDir(runs / "trials" / name)
    write_json(job_file(run, number), {"job": job, "restart": 0, "started": started, "nodes": ["m1"]})
    if code is not None:
        write_json(exit_file(run, number), {"attempt": number, "ended": started + 10, "exit_code": code})

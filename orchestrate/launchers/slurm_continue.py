"""How a job goes on after it was stopped: by a successor that it submits itself, so that nobody else need be alive."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from orchestrate.launchers.slurm_commands import Answer, Commands

_PAUSE_SECONDS = 5.0
# What Slurm or a site's prolog set for this job alone, besides what clean_environment takes away.
_OF_THIS_JOB = frozenset(
    {"GPU_DEVICE_ORDINAL", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ZE_AFFINITY_MASK", "HOSTNAME", "ENVIRONMENT"}
)


class Successor:
    """Sees to it that a job of this name is queued.

    Args:
        name: of the job that is about to end, and of its successor.
        number: id of the job that is about to end.
        script: what was submitted for it.
        commands: of Slurm, with an environment for a new job.
        wait: sleeps for some seconds; returns True if Slurm asks this job to end meanwhile.
    """

    def __init__(
        self, name: str, number: str, script: Path, *, commands: Commands, wait: Callable[[float], bool]
    ) -> None:
        self._name, self._number, self._script, self._commands, self._wait = name, number, script, commands, wait

    def submit(self, *, exclude: Sequence[str], patience_seconds: float) -> tuple[str, str]:
        """Queue a successor that starts when this job has ended.

        Args:
            exclude: nodes that it must not get, besides those that the script excludes.
            patience_seconds: for a controller of Slurm's that does not answer.

        Returns:
            Id of the successor, or an empty text and why there is none.
        """
        ends = time.monotonic() + patience_seconds
        while True:
            if queued := self._queued():
                return queued, ""
            answer = self._commands.run("sbatch", "--parsable", *self._excluding(exclude), str(self._script))
            if answer.code == 0:
                return answer.out.strip().partition(";")[0], ""
            if not _may_pass(answer) or time.monotonic() >= ends or self._wait(_PAUSE_SECONDS):
                return "", f"sbatch: {answer.complaint}"

    def _queued(self) -> str:
        """Find a job of this name that waits already: one request may have been taken though its answer was lost.

        The same trial may be in another folder too; the comment then ends with the mark of that one.
        """
        mine = ("--user", str(os.getuid()), "--name", self._name, "--states", "PENDING")
        answer = self._commands.run("squeue", "-h", "-o", "%i %k", *mine)
        own = _mark(next(iter(re.findall(r"^#SBATCH --comment=(.*)$", self._script.read_text(), re.MULTILINE)), ""))
        for line in answer.out.splitlines() if answer.code == 0 else ():
            job, _, comment = line.partition(" ")
            if job != self._number and _mark(comment) in ("", own):
                return job
        return ""

    def _excluding(self, exclude: Sequence[str]) -> tuple[str, ...]:
        if not exclude:
            return ()
        from orchestrate.launchers.slurm_script import excluded_nodes

        # The option replaces what the script says.
        before = excluded_nodes(self._script.read_text())
        return (f"--exclude={','.join([*before, *exclude])}",)

    def requeue(self) -> str:
        """Let Slurm start this job again, after it has ended it; return why not, or an empty text."""
        answer = self._commands.run("scontrol", "requeue", self._number)
        return "" if answer.code == 0 else f"scontrol requeue: {answer.complaint}"


def _mark(comment: str) -> str:
    """Return the mark of a folder of runs at the end of a comment; empty if the site or a person changed it."""
    found = re.search(r"@([0-9a-f]{8})\"?$", comment)
    return found[1] if found else ""


def _may_pass(answer: Answer) -> bool:
    """Tell whether a refusal is of the moment: the controller is away, or starts up."""
    passing = ("Unable to contact", "timed out", "Connection refused", "temporarily", "no answer within", "try again")
    return any(word.lower() in answer.complaint.lower() for word in passing)


def environment_of_successor(environment: Mapping[str, str], job: str) -> dict[str, str]:
    """Return the environment without what is of this job alone; Slurm's commands take away more."""
    kept = {key: value for key, value in environment.items() if key not in _OF_THIS_JOB}
    # A temporary folder that a prolog made for this job will be gone.
    if job in kept.get("TMPDIR", ""):
        del kept["TMPDIR"]
    return kept

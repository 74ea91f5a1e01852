"""Run Slurm's commands: the only place that starts squeue, sacct, scontrol, sbatch or scancel on the login side."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

# A dead controller blocks a client for its MessageTimeout, several times over where there is a backup controller.
TIMEOUT_SECONDS = 90.0
TIMED_OUT, CANNOT_RUN, COMMAND_NOT_FOUND = 124, 126, 127
# Variables of a job around us, which Slurm's commands would take for options; how to reach Slurm is none of them.
_OF_SLURM = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SACCT_", "SCANCEL_", "SUBMITIT_")
_OF_RANKS = ("ORCHESTRATE_", "MASTER_", "TORCHELASTIC_", "PMI_", "PMIX_", "OMPI_")
_JOB_VARIABLES = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"})
_NOT_OF_A_JOB = frozenset({"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS"})

# Times as Unix seconds, words in English. What submits does not get them, as it would export them into its job.
_PLAIN = {"SLURM_TIME_FORMAT": "%s", "LC_ALL": "C.UTF-8"}
_SUBMITS = "sbatch"


@dataclass(frozen=True)
class Answer:
    """What a command said.

    Attributes:
        code: exit code; 124 if it did not end in time, 127 if it is not there.
        out, err: its output and its complaints.
    """

    code: int
    out: str = ""
    err: str = ""

    @property
    def complaint(self) -> str:
        """What it said against the request, without the names of the programs, on one line."""
        lines = (line.strip() for line in (self.err or self.out).splitlines())
        said = [line.partition(": error: ")[2] or line.partition(": fatal: ")[2] or line for line in lines if line]
        return "; ".join(dict.fromkeys(said)) or f"exit code {self.code}"


class Commands(Protocol):
    """Slurm as text: what tests replace."""

    def run(self, *words: str, text: str = "") -> Answer:
        """Run a command of Slurm with `text` as its input; never raises for what the command does."""


class SlurmCommands:
    """Slurm of this host.

    Args:
        timeout_seconds: after which a command is ended.
        environment: variables from which those of a surrounding job are removed.
    """

    def __init__(
        self, *, timeout_seconds: float = TIMEOUT_SECONDS, environment: Mapping[str, str] = os.environ
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._environment = environment

    def run(self, *words: str, text: str = "") -> Answer:
        """Run a command of Slurm."""
        try:
            done = subprocess.run(
                words,
                input=text,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self._timeout_seconds,
                env=clean_environment(self._environment) | ({} if words[0] == _SUBMITS else _PLAIN),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
            return Answer(TIMED_OUT, err=f"{said}{words[0]}: error: no answer within {self._timeout_seconds:g} s")
        except FileNotFoundError:
            return Answer(COMMAND_NOT_FOUND, err=f"{words[0]}: error: command not found")
        except OSError as error:
            return Answer(CANNOT_RUN, err=f"{words[0]}: error: {error.strerror}")
        return Answer(done.returncode, done.stdout, done.stderr)


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables of a surrounding job."""
    return {key: value for key, value in environment.items() if not _is_of_a_job(key)}


def _is_of_a_job(key: str) -> bool:
    if key in _NOT_OF_A_JOB:
        return False
    return key in _JOB_VARIABLES or key.startswith(_OF_SLURM + _OF_RANKS)


def why_silent(answer: Answer) -> str:
    """Say in words why a question got no answer."""
    if answer.code == COMMAND_NOT_FOUND:
        return "there is no Slurm on this host; run this on a login node of the cluster"
    return f"Slurm does not answer: {answer.complaint}"

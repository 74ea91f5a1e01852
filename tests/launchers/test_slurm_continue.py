"""How a job queues its successor, against commands that answer as Slurm does."""

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrate.launchers.slurm_commands import Answer, clean_environment
from orchestrate.launchers.slurm_continue import Successor, environment_of_successor

AWAY = Answer(1, err="sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)")


class Slurm:
    """Slurm's commands, of which sbatch gives the answers one after the other."""

    def __init__(self, *answers: Answer, queue: str = "") -> None:
        self.answers, self.queue = list(answers), queue
        self.asked: list[tuple[str, ...]] = []

    def run(self, *words: str, text: str = "") -> Answer:
        self.asked.append(words)
        if words[0] == "squeue":
            return Answer(0, self.queue)
        return self.answers.pop(0)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "submit.sh"
    path.write_text('#!/bin/bash\n#SBATCH --exclude=m[8-9]\n#SBATCH --comment="a b/x@0123abcd"\nexec true\n')
    return path


def successor(slurm: Slurm, script: Path, wait: Callable[[float], bool] = lambda seconds: False) -> Successor:
    return Successor("oc-a", "12", script, commands=slurm, wait=wait)


def test_successor_is_submitted_with_the_same_script(script: Path) -> None:
    slurm = Slurm(Answer(0, "13;mini\n"))
    assert successor(slurm, script).submit(exclude=(), patience_seconds=0) == ("13", "")
    assert slurm.asked[-1] == ("sbatch", "--parsable", str(script))


def test_suspects_are_excluded_beside_those_that_the_script_excludes(script: Path) -> None:
    slurm = Slurm(Answer(0, "13"))
    successor(slurm, script).submit(exclude=("m2",), patience_seconds=0)
    assert "--exclude=m[8-9],m2" in slurm.asked[-1]


def test_job_of_the_name_that_waits_already_is_the_successor(script: Path) -> None:
    slurm = Slurm(queue="12 a b/x@0123abcd\n13 a b/x@0123abcd\n")  # of a request whose answer was lost
    assert successor(slurm, script).submit(exclude=(), patience_seconds=0) == ("13", "")
    assert [words[0] for words in slurm.asked] == ["squeue"]


def test_same_trial_in_another_folder_is_no_successor(script: Path) -> None:
    slurm = Slurm(Answer(0, "14"), queue="13 a b/x@ffffffff\n")
    assert successor(slurm, script).submit(exclude=(), patience_seconds=0) == ("14", "")


def test_controller_that_is_away_is_asked_again(script: Path) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return False

    slurm = Slurm(AWAY, AWAY, Answer(0, "13"))
    assert successor(slurm, script, wait).submit(exclude=(), patience_seconds=60) == ("13", "")
    assert len(waits) == 2


def test_patience_ends(script: Path) -> None:
    job, problem = successor(Slurm(AWAY), script).submit(exclude=(), patience_seconds=0)
    assert (job, "Unable to contact" in problem) == ("", True)


def test_job_that_slurm_ends_meanwhile_asks_no_more(script: Path) -> None:
    assert successor(Slurm(AWAY), script, lambda seconds: True).submit(exclude=(), patience_seconds=60)[0] == ""


def test_refusal_is_final(script: Path) -> None:
    slurm = Slurm(Answer(1, err="sbatch: error: Batch job submission failed: Invalid account"))
    assert successor(slurm, script).submit(exclude=(), patience_seconds=60) == (
        "",
        "sbatch: Batch job submission failed: Invalid account",
    )


def test_requeue_names_the_job_and_tells_a_refusal(script: Path) -> None:
    slurm = Slurm(Answer(0), Answer(1, err="scontrol: error: Requested operation is presently disabled"))
    assert successor(slurm, script).requeue() == ""
    assert slurm.asked[-1] == ("scontrol", "requeue", "12")
    assert "presently disabled" in successor(slurm, script).requeue()


def test_successor_inherits_nothing_of_this_job() -> None:
    mine = {
        "SLURM_JOB_ID": "12",
        "ORCHESTRATE_ATTEMPT": "3",
        "MASTER_PORT": "1",
        "RANK": "0",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    mine |= {"GPU_DEVICE_ORDINAL": "0", "TMPDIR": "/tmp/slurm.12", "SRUN_CPUS_PER_TASK": "2"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "PATH": "/bin", "HOME": "/root"}
    left = clean_environment(environment_of_successor(mine | kept, "12"))
    assert kept.items() <= left.items()
    assert not mine.keys() & left.keys()
    assert environment_of_successor({"TMPDIR": "/scratch"}, "12") == {"TMPDIR": "/scratch"}

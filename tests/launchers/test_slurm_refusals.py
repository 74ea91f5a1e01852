from pathlib import Path

import pytest

from orchestrate.launchers.base import TryLaterError
from orchestrate.launchers.slurm_commands import TIMED_OUT, Answer, SlurmCommands, clean_environment
from orchestrate.launchers.slurm_refusals import refusal

FAILED = "sbatch: error: Batch job submission failed: "
POLICY = FAILED + "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)\n"


@pytest.mark.parametrize(
    "said",
    [
        f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{POLICY}",
        f"sbatch: error: AssocMaxSubmitJobLimit\n{POLICY}",
        f"sbatch: error: AssocGrpSubmitJobsLimit\n{POLICY}",
        POLICY,
        "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\nsbatch: error: no answer",
        FAILED + "Resource temporarily unavailable",
    ],
)
def test_limits_on_the_number_of_jobs_are_waited_for(said: str) -> None:
    error = refusal("oc-a", Answer(1, err=said))
    assert isinstance(error, TryLaterError)
    assert error.full
    assert "Slurm takes no more jobs now" in str(error)


@pytest.mark.parametrize(
    "said",
    [
        FAILED + "Unable to contact slurm controller (connect failure)",
        FAILED + "Socket timed out on send/recv operation",
        FAILED + "Zero Bytes were transmitted or received",
        FAILED + "Slurm backup controller in standby mode",
        FAILED + "Protocol authentication error",
        "sbatch: error: If munged is up, restart with --num-threads=10\nsbatch: error: Munge encode failed: "
        "Failed to access socket: No such file or directory\nsbatch: error: authentication: Munge encode failed",
        "allocation failure: Requested nodes are busy",
    ],
)
def test_silence_of_the_controller_is_waited_for(said: str) -> None:
    error = refusal("oc-a", Answer(1, err=said))
    assert isinstance(error, TryLaterError)
    assert not error.full


def test_command_that_does_not_end_is_waited_for() -> None:
    assert isinstance(refusal("oc-a", Answer(TIMED_OUT, err="sbatch: error: no answer within 90 s")), TryLaterError)


@pytest.mark.parametrize(
    ("said", "fix"),
    [
        ("invalid partition specified: a100\n" + FAILED + "Invalid partition name specified", "slurm.partition"),
        (FAILED + "Invalid account or account/partition combination specified", "slurm.account"),
        (FAILED + "Invalid qos specification", "slurm.qos"),
        (FAILED + "Requested time limit is invalid (missing or exceeds some limit)", "slurm.time_minutes"),
        (FAILED + "Invalid feature specification", "slurm.constraint"),
        (FAILED + "Invalid generic resource (gres) specification", "slurm.gres"),
        (FAILED + "Memory specification can not be satisfied", "slurm.memory_gb"),
        (FAILED + "Requested node configuration is not available", "resources.nodes"),
        (FAILED + "Node count specification invalid", "resources.nodes"),
        (FAILED + "Invalid job array specification", "arrays: false"),
        (FAILED + "Invalid node name specified", "slurm.exclude"),
        (f"sbatch: error: QOSMaxCpuPerUserLimit\n{POLICY}", "slurm.qos"),
        (f"sbatch: error: AssocMaxWallDurationPerJobLimit\n{POLICY}", "slurm.qos"),
        (f"sbatch: error: QOSMinGRES\n{POLICY}", "slurm.qos"),
        ("sbatch: unrecognized option '--foo=1'\nTry \"sbatch --help\" for more information", "slurm.options"),
    ],
)
def test_other_refusals_are_told_in_slurm_s_words_with_the_key_to_change(said: str, fix: str) -> None:
    error = refusal("oc-a", Answer(1, err=said))
    assert not isinstance(error, TryLaterError)
    text = str(error)
    assert text.startswith("oc-a: sbatch refused: ")
    assert said.strip().splitlines()[-1].rpartition(": ")[2] in text
    assert fix in text  # a key of ours


def test_refusal_in_words_of_a_site_is_told_as_it_is() -> None:
    said = "sbatch: error: Please name your cat.\nsbatch: error: Batch job submission failed: Unspecified error"
    error = refusal("oc-a", Answer(1, err=said))
    assert not isinstance(error, TryLaterError)
    assert str(error) == "oc-a: sbatch refused: Please name your cat.; Batch job submission failed: Unspecified error"


def test_missing_command_is_told() -> None:
    told = str(refusal("oc-a", SlurmCommands(environment={"PATH": "/nowhere"}).run("sbatch")))
    assert told == "oc-a: sbatch: no such command; run this on a login node of the cluster"


def test_command_is_ended_when_its_time_is_over() -> None:
    answer = SlurmCommands(timeout_seconds=0.5).run("sh", "-c", "echo >&2 retrying; exec sleep 60")
    assert answer.code == TIMED_OUT
    assert answer.complaint == "retrying; no answer within 0.5 s"


def test_answer_may_hold_any_bytes() -> None:
    assert SlurmCommands().run("printf", r"a\377b").out == "a�b"


def test_commands_of_slurm_do_not_see_the_job_around_them() -> None:
    job = {"SLURM_JOB_ID": "7", "SBATCH_PARTITION": "x", "SQUEUE_FORMAT": "%i", "SRUN_CPUS_PER_TASK": "2"}
    ranks = {"RANK": "0", "MASTER_ADDR": "n1", "ORCHESTRATE_STAGE": "all", "CUDA_VISIBLE_DEVICES": "0", "PMI_RANK": "0"}
    kept = {"SLURM_CONF": "/etc/slurm.conf", "HOME": "/root", "NCCL_DEBUG": "INFO"}
    cleaned = clean_environment({**job, **ranks, **kept})
    assert kept.items() <= cleaned.items()
    assert not (job.keys() | ranks.keys()) & cleaned.keys()


@pytest.mark.parametrize(("command", "plain"), [("squeue", True), ("sbatch", False)])
def test_form_of_answers_is_not_exported_into_jobs(tmp_path: Path, command: str, plain: bool) -> None:
    (tmp_path / command).write_text('#!/bin/sh\necho "$SLURM_TIME_FORMAT $LC_ALL"\n')
    (tmp_path / command).chmod(0o755)
    mine = {"PATH": f"{tmp_path}:/bin:/usr/bin", "LC_ALL": "de_DE.UTF-8"}
    said = SlurmCommands(environment=mine).run(command).out
    assert said == ("%s C.UTF-8\n" if plain else " de_DE.UTF-8\n")

"""Complaints as Slurm 22.05 wrote them, and what they mean."""

import pytest

from orchestrate.launchers.srun_log import SrunLog, TaskEnd, parse_srun_log

CANCELLED = "slurmstepd-m1: error: *** STEP 3.0 ON m1 CANCELLED AT 2026-01-31T10:00:00"

NEWER = "[2026-07-13T18:42:28.765] error: *** JOB 5151058 ON irene4337 CANCELLED AT 2026-07-13T18:42:28"


def parse(*lines: str) -> SrunLog:
    return parse_srun_log(lines)


def test_order_of_the_ends_is_kept_and_cut_where_tasks_were_told_to_end() -> None:
    log = parse(
        "srun: error: m1: task 1: Exited with exit code 1",
        "srun: launch/slurm: _step_signal: Terminating StepId=18.0",
        "srun: error: m1: task 0: Exited with exit code 75",
        "srun: error: m2: tasks 2-3: Killed",
        "srun: Force Terminated StepId=18.0",
    )
    assert log.first == (TaskEnd(1, 1, "m1"),)
    assert log.ends == (TaskEnd(1, 1, "m1"), TaskEnd(0, 75, "m1"), TaskEnd(2, -9, "m2"), TaskEnd(3, -9, "m2"))
    assert (log.hint, log.lost_nodes, log.cancelled) == ("", (), False)


@pytest.mark.parametrize("told", ["srun: Terminating StepId=3.0", "srun: forcing job termination"])
def test_every_wording_of_being_told_to_end_is_known(told: str) -> None:
    end = "srun: error: m1: task 0: Exited with exit code 75"
    assert parse(told, end).first == ()
    assert len(parse(end, told).first) == 1


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("Exited with exit code 137", 137),
        ("Killed", -9),
        ("Terminated", -15),
        ("Segmentation fault (core dumped)", -11),
        ("Aborted", -6),
        ("User defined signal 1", -10),
        ("Out Of Memory", -9),
    ],
)
def test_words_for_ends_become_codes(end: str, code: int) -> None:
    assert parse(f"srun: error: n[1-2]: tasks 0,2-3: {end}").ends == tuple(TaskEnd(r, code, "") for r in (0, 2, 3))


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (f"{CANCELLED} DUE TO TIME LIMIT ***", "time limit"),
        (f"{CANCELLED} DUE TO PREEMPTION ***", "preempted"),
        (f"{CANCELLED} DUE TO JOB REQUEUE ***", "preempted"),
        (f"{CANCELLED} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", "node failure"),
        ("slurmstepd-m2: error: StepId=1.0 exceeded memory limit (148 > 104), being killed", "out of memory"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have", "out of memory"),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0.", "out of memory"),
        ("srun: error: n1: task 0: Out Of Memory", "out of memory"),
        (f"{NEWER} DUE TO TIME LIMIT ***", "time limit"),
        (f"step 7: loss 0.4{NEWER} DUE TO TIME LIMIT ***", "time limit"),
        (f"step 7: loss 0.4{CANCELLED} DUE TO PREEMPTION ***", "preempted"),
        ("[2026-07-13T18:42:28.765] error: Detected 1 oom_kill event in StepId=7.0. Some", "out of memory"),
        ("srun: error: Task launch for StepId=7.0 failed on node m2: Communication failure", "infrastructure"),
        (f"{CANCELLED} DUE TO TASK FAILURE ***", ""),
        (f"{NEWER} DUE to SIGNAL Terminated ***", ""),
        ("[2026-07-13T18:42:28.765] info: exceeded memory limit, said a worker that keeps the time", ""),
        (f"{CANCELLED} ***", ""),
        ("error: StepId=1.0 exceeded memory limit, said a worker that quotes Slurm", ""),
    ],
)  # fmt: skip
def test_hint_says_what_slurm_did(line: str, hint: str) -> None:
    log = parse(line)
    assert log.hint == hint
    assert not hint or log.evidence == line


def test_time_limit_counts_more_than_a_process_that_was_killed_for_memory_before() -> None:
    log = parse("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.0.", f"{CANCELLED} DUE TO TIME LIMIT ***")
    assert log.hint == "time limit"


def test_cancelled_step_is_seen_and_nodes_that_failed_are_named() -> None:
    log = parse(f"{CANCELLED} ***", "srun: error: Node failure on m[2-3]")
    assert log.cancelled
    assert log.lost_nodes == ("m2", "m3")
    assert log.hint == "node failure"


@pytest.mark.parametrize(
    ("line", "cancelled"),
    [
        (f"{NEWER} DUE to SIGNAL Terminated ***", True),
        (f"{NEWER} ***", True),
        (f"{CANCELLED} DUE TO TASK FAILURE ***", False),
    ],
)
def test_cancellation_is_seen_in_the_words_of_newer_slurm(line: str, cancelled: bool) -> None:
    assert parse(line).cancelled is cancelled


def test_nodes_on_which_no_task_could_be_started_are_named() -> None:
    log = parse(
        "srun: error: Task launch for StepId=7.0 failed on node m2: Communication connection failure",
        "srun: error: Task launch for StepId=7.0 failed on node m4: Zero Bytes were transmitted or received",
        "srun: error: Application launch failed: Communication connection failure",
    )
    assert (log.not_launched, log.lost_nodes, log.hint) == (("m2", "m4"), (), "infrastructure")


def test_reason_for_no_step_at_all_is_kept() -> None:
    said = "srun: error: Unable to create step for job 5: Requested node configuration is not available"
    log = parse("srun: Job 5 step creation temporarily disabled, retrying (Requested nodes are busy)", said)
    assert (log.ends, log.evidence) == ((), said)

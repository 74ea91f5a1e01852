"""What the end of a step means: code, cause and suspects."""

from collections.abc import Mapping
from typing import Any

import pytest

from orchestrate.launchers.slurm_end import Ending, StepEnd, judge_end
from orchestrate.launchers.slurm_environment import SlurmJob, expand_counts
from orchestrate.launchers.srun_log import parse_srun_log

PLACES = ("m1", "m1", "m2", "m2")
TOLD = "srun: launch/slurm: _step_signal: Terminating StepId=1.0"
CANCELLED = "slurmstepd-m1: error: *** STEP 1.0 ON m1 CANCELLED AT 2026-01-31T10:00:00"


def judge(
    *lines: str,
    code: int | None = 1,
    records: Mapping[int, Mapping[str, Any]] | None = None,
    stopped_by: str = "",
    places: tuple[str, ...] = PLACES,
) -> Ending:
    return judge_end(StepEnd(code, parse_srun_log(lines), records or {}, stopped_by), places)


def test_good_end_has_no_failure() -> None:
    assert judge(code=0) == Ending(0, (0, 0, 0, 0), None, "", (), "")


def test_all_saved() -> None:
    ending = judge(
        "srun: error: m1: tasks 0-1: Exited with exit code 75",
        TOLD,
        "srun: error: m2: tasks 2-3: Exited with exit code 75",
    )
    assert (ending.exit_code, ending.rank_codes, ending.hint, ending.blamed) == (75, (75,) * 4, "", ())


def test_first_failure_is_the_cause_and_its_node_a_suspect() -> None:
    ending = judge(
        "srun: error: m2: task 2: Killed",
        TOLD,
        "srun: error: m1: tasks 0-1: Exited with exit code 76",
        "srun: error: m2: task 3: Terminated",
    )
    assert (ending.exit_code, ending.failed_rank, ending.blamed) == (137, 2, ("m2",))
    assert ending.rank_codes == (76, 76, 137, 143)
    assert ending.evidence == "rank 2 on m2: SIGKILL"


def test_what_happens_on_all_nodes_at_once_is_the_fault_of_none() -> None:
    ending = judge(
        "srun: error: m1: tasks 0-1: Exited with exit code 1",
        TOLD,
        "srun: error: m2: tasks 2-3: Exited with exit code 1",
    )
    assert (ending.exit_code, ending.blamed) == (1, ())


def test_rank_that_failed_first_by_the_ranks_own_clocks_is_named_with_its_error() -> None:
    records = {
        2: {"exit_code": 1, "time": 5.0, "error": "ValueError: x", "node": "m2"},
        0: {"exit_code": 1, "time": 6.0},
    }
    ending = judge(
        "srun: error: m1: task 0: Exited with exit code 1",
        "srun: error: m2: task 2: Exited with exit code 1",
        TOLD,
        records=records,
    )
    assert ending.failed_rank == 2
    assert ending.evidence == "rank 2 on m2: exit code 1: ValueError: x"


def test_node_of_which_nothing_is_heard_is_lost() -> None:
    ending = judge(
        "srun: error: m1: task 0: Exited with exit code 76",
        TOLD,
        "srun: error: m1: task 1: Exited with exit code 76",
        code=None,
    )
    assert (ending.exit_code, ending.hint, ending.blamed) == (76, "node failure", ("m2",))
    assert ending.rank_codes == (76, 76, None, None)
    assert "nothing was heard of ranks 2, 3" in ending.evidence


def test_silent_rank_beside_one_that_is_heard_loses_no_node() -> None:
    lines = (
        "srun: error: m1: tasks 0-1: Exited with exit code 76",
        "srun: error: m2: task 2: Exited with exit code 76",
        TOLD,
    )
    assert judge(*lines, code=None).hint == ""


def test_node_that_slurm_gave_up_is_lost() -> None:
    ending = judge("srun: error: m1: tasks 0-1: Exited with exit code 76", "srun: error: Node failure on m2", code=137)
    assert (ending.hint, ending.blamed, ending.rank_codes) == ("node failure", ("m2",), (76, 76, None, None))


def test_hanging_ranks_blame_the_one_that_had_to_be_killed() -> None:
    ending = judge(
        "srun: error: m1: tasks 0-1: Exited with exit code 86",
        TOLD,
        "srun: error: m2: task 2: Exited with exit code 86",
        "srun: error: m2: task 3: Killed",
    )
    assert (ending.exit_code, ending.blamed) == (86, ("m2",))


def test_preflight_blames_the_nodes_that_failed_it_and_no_other() -> None:
    records = {rank: {"exit_code": 87, "node": PLACES[rank], "time": 1.0} for rank in range(4)}
    records[2] = {**records[2], "preflight": {"check": "disk", "problem": "full"}}
    ending = judge(
        "srun: error: m1: tasks 0-1: Exited with exit code 87",
        "srun: error: m2: tasks 2-3: Exited with exit code 87",
        records=records,
    )
    assert (ending.exit_code, ending.blamed) == (87, ("m2",))


@pytest.mark.parametrize("code", [74, 88, 89])
def test_faults_of_trial_or_store_blame_no_node(code: int) -> None:
    ending = judge(
        f"srun: error: m2: task 2: Exited with exit code {code}",
        TOLD,
        "srun: error: m1: tasks 0-1: Exited with exit code 76",
    )
    assert (ending.exit_code, ending.blamed) == (code, ())


def test_node_on_which_no_task_started_is_blamed_and_not_the_one_whose_rank_srun_killed() -> None:
    ending = judge(
        "srun: error: Task launch for StepId=1.0 failed on node m2: Communication connection failure",
        "srun: error: Application launch failed: Communication connection failure",
        "srun: error: m1: tasks 0-1: Killed",
        code=137,
    )
    assert (ending.hint, ending.blamed, ending.rank_codes) == ("infrastructure", ("m2",), (137, 137, None, None))


def test_step_of_which_no_task_is_heard_blames_the_node_that_did_not_start_it() -> None:
    ending = judge("srun: error: Task launch for StepId=1.0 failed on node m2: Communication connection failure")
    assert (ending.exit_code, ending.hint, ending.blamed) == (74, "infrastructure", ("m2",))


@pytest.mark.parametrize("other", ["Exited with exit code 76", "Terminated", "Exited with exit code 75"])
def test_input_that_is_bad_on_other_nodes_only_is_their_fault(other: str) -> None:
    ending = judge("srun: error: m2: tasks 2-3: Exited with exit code 2", TOLD, f"srun: error: m1: tasks 0-1: {other}")
    assert (ending.exit_code, ending.failed_rank, ending.blamed) == (87, 2, ("m2",))
    assert ending.rank_codes[2:] == (2, 2)
    assert ending.evidence == "rank 2 on m2: exit code 2"


def test_input_that_is_bad_for_rank_0_is_bad() -> None:
    lines = ("srun: error: m2: tasks 2-3: Exited with exit code 2", TOLD, "srun: error: m1: task 1: Terminated")
    every = judge("srun: error: m[1-2]: tasks 0-3: Exited with exit code 2")
    assert (every.exit_code, every.blamed) == (2, ())
    main = judge(*lines, "srun: error: m1: task 0: Exited with exit code 2")
    assert (main.exit_code, main.blamed) == (2, ())
    written = judge(*lines, "srun: error: m1: task 0: Terminated", records={0: {"exit_code": 2, "node": "m1"}})
    assert (written.exit_code, written.blamed) == (2, ())
    missing = judge(
        "srun: error: m1: tasks 0-1: Exited with exit code 2", "srun: error: m2: tasks 2-3: Exited with exit code 87"
    )
    assert (missing.exit_code, missing.blamed) == (2, ())


def test_all_nodes_that_cannot_write_down_why_they_are_unfit_are_blamed() -> None:
    ending = judge(
        "srun: error: m[2-3]: tasks 2-3: Exited with exit code 87",
        TOLD,
        "srun: error: m1: tasks 0-1: Terminated",
        places=("m1", "m1", "m2", "m3"),
    )
    assert (ending.exit_code, ending.blamed) == (87, ("m2", "m3"))


def test_killed_for_memory_is_told_and_blames_no_node() -> None:
    ending = judge(
        "slurmstepd-m2: error: StepId=1.0 exceeded memory limit (2 > 1), being killed",
        "srun: error: m2: task 2: Killed",
        TOLD,
    )
    assert (ending.exit_code, ending.hint, ending.blamed) == (137, "out of memory", ())


def test_loader_killed_for_memory_does_not_spoil_a_good_save() -> None:
    lines = (
        "slurmstepd-m2: error: Detected 1 oom_kill event in StepId=1.0.",
        "srun: error: m[1-2]: tasks 0-3: Exited with exit code 75",
    )
    assert (judge(*lines).exit_code, judge(*lines).hint) == (75, "")


@pytest.mark.parametrize(
    ("why", "hint"),
    [(" ***", "cancelled"), (" DUE TO JOB REQUEUE ***", "preempted"), (" DUE TO TIME LIMIT ***", "time limit")],
)
def test_end_by_slurm_names_its_reason(why: str, hint: str) -> None:
    saved = judge(CANCELLED + why, "srun: error: m[1-2]: tasks 0-3: Exited with exit code 75", stopped_by="SIGTERM")
    assert (saved.exit_code, saved.hint) == (75, hint)
    killed = judge(CANCELLED + why, code=None, stopped_by="SIGTERM")
    assert (killed.exit_code, killed.hint, killed.blamed) == (137, hint, ())


def test_cancelled_step_of_a_failing_rank_is_no_cancelled_job() -> None:
    assert judge("srun: error: m1: task 0: Exited with exit code 1", TOLD, f"{CANCELLED} ***").hint == ""


def test_signal_from_outside_before_a_rank_could_take_it_means_stop() -> None:
    lines = (
        "srun: error: m1: task 0: User defined signal 1",
        TOLD,
        "srun: error: m1: task 1: Exited with exit code 75",
    )
    assert judge(*lines, "srun: error: m2: tasks 2-3: Terminated").exit_code == 75


def test_step_that_never_was_may_be_tried_again_unless_an_option_is_wrong() -> None:
    refused = judge("srun: error: Unable to create step for job 5: Requested nodes are busy")
    assert (refused.exit_code, refused.hint) == (74, "infrastructure")
    assert "Requested nodes are busy" in refused.evidence
    wrong = judge("srun: unrecognized option '--x'", "srun: error: Invalid option")
    assert (wrong.exit_code, wrong.hint) == (2, "")


def test_ranks_are_placed_in_blocks_as_slurm_counts_them() -> None:
    environment = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "m[1-3]",
        "SLURM_NTASKS": "5",
        "SLURM_TASKS_PER_NODE": "2(x2),1",
    }
    assert SlurmJob.of(environment).places == ("m1", "m1", "m2", "m2", "m3")
    assert SlurmJob.of(environment | {"SLURM_NTASKS": "4"}).places == ("",) * 4
    assert expand_counts("3,2(x2)") == (3, 2, 2)


def test_task_of_an_array_is_named_as_people_name_it() -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    job = SlurmJob.of({"SLURM_JOB_ID": "10", "SLURM_JOB_NODELIST": "m1", "SLURM_RESTART_COUNT": "2", **array})
    assert (job.job, job.number, job.restart) == ("7_3", "10", 2)

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrate.launchers.base import JobState, Phase, Verdict
from orchestrate.launchers.slurm_queue import FINAL_STATES, QUEUED_STATES, RUNNING_STATES, Row, Run
from orchestrate.launchers.slurm_state import PATIENCE_SECONDS, KeptRun, Sight, Submission, job_state, read_records
from orchestrate.runs import RunDir

NOW = 1_000_000.0


def row(state: str, job: str = "12", restarts: int = 0, **more: Any) -> Row:
    return Row(job=job, raw_job=job, name="oc-a", state=state, restarts=restarts, **more)


def run(number: int = 1, job: str = "12", restart: int = 0, *, ago: float = 1000.0, **more: Any) -> KeptRun:
    started = NOW - ago
    return KeptRun(number, job, restart, started, **({"seen": started} | more))


def ended(code: int | None, number: int = 1, job: str = "12", restart: int = 0, **more: Any) -> KeptRun:
    return run(number, job, restart, ended=NOW - 500.0, exit_code=code, **more)


def sight(rows: list[Row], runs: list[KeptRun], **more: Any) -> Sight:
    dropped = [number for number, _ in more.get("dropped", ())]
    last = max([run.number for run in runs] + dropped, default=0)
    return Sight(rows, runs, last + 1, **({"submission": None, "now": NOW} | more))


def state_of(rows: list[Row], runs: list[KeptRun], **more: Any) -> JobState:
    state = job_state(sight(rows, runs, **more))
    assert state is not None
    return state


def test_name_of_which_nothing_is_known_has_no_state() -> None:
    assert job_state(sight([], [])) is None


@pytest.mark.parametrize("state", sorted(RUNNING_STATES))
def test_job_with_processes_runs(state: str) -> None:
    seen = state_of([row(state, nodes=("m1", "m2"))], [run()])
    assert (seen.phase, seen.job, seen.attempt, seen.nodes) == (Phase.RUNNING, "12", 1, ("m1", "m2"))
    assert state in seen.evidence


@pytest.mark.parametrize("state", sorted(QUEUED_STATES))
def test_job_that_waits_is_queued_for_the_next_attempt(state: str) -> None:
    seen = state_of([row(state, restarts=1, reason="Resources")], [run()])
    assert (seen.phase, seen.attempt, seen.held) == (Phase.QUEUED, 2, False)
    assert seen.evidence == f"squeue: job 12 is {state} (Resources)"


@pytest.mark.parametrize("state", sorted(FINAL_STATES))
def test_job_that_slurm_says_is_over_is_finished_with_that_verdict(state: str) -> None:
    seen = state_of([row(state, end=NOW - 100, nodes=("m1",))], [run()])
    assert (seen.phase, seen.exit_code, seen.ended) == (Phase.FINISHED, None, NOW - 100)
    assert seen.verdicts == {1: Verdict(state, "squeue", ("m1",), None, NOW - 100)}


def test_no_state_has_two_meanings() -> None:
    assert not RUNNING_STATES & QUEUED_STATES
    assert not (RUNNING_STATES | QUEUED_STATES) & FINAL_STATES


def test_word_that_is_not_known_concludes_nothing() -> None:
    seen = state_of([row("TELEPORTING")], [run()])
    assert seen.phase is Phase.UNKNOWN
    assert "TELEPORTING" in seen.evidence


def test_preempted_job_is_queued_until_its_nodes_are_clean() -> None:
    assert state_of([row("PREEMPTED", end=NOW - 5)], [run()]).phase is Phase.QUEUED
    assert state_of([row("PREEMPTED", end=NOW - 100)], [run()]).phase is Phase.FINISHED


def test_requeued_job_is_held_only_for_its_begin_time() -> None:
    assert state_of([row("PENDING", restarts=1, reason="BeginTime", start=NOW + 100)], [run()]).held
    assert not state_of([row("PENDING", restarts=1, reason="BeginTime", start=NOW + 3)], [run()]).held  # released
    assert not state_of([row("PENDING", reason="BeginTime")], []).held  # the user's own --begin
    assert not state_of([row("PENDING", restarts=1, reason="Priority")], [run()]).held
    assert not state_of([row("REQUEUE_HOLD", restarts=1, reason="JobHeldUser")], [run()]).held


def test_running_job_is_told_before_its_twin_that_waits() -> None:
    rows = [row("PENDING", "14", submitted=NOW), row("RUNNING"), row("COMPLETED", "11")]
    assert state_of(rows, [run()]).job == "12"


def test_attempt_of_a_job_that_has_not_begun_its_script_is_the_next() -> None:
    assert state_of([row("RUNNING", "13")], [ended(75)]).attempt == 2


def test_requeued_run_that_still_ends_keeps_its_attempt() -> None:
    """Slurm counts the restart as soon as it is decided."""
    seen = state_of([row("COMPLETING", restarts=1)], [run(restart=0)])
    assert (seen.phase, seen.attempt) == (Phase.RUNNING, 1)
    assert not seen.verdicts


def test_end_record_counts_when_slurm_has_forgotten_the_job() -> None:
    seen = state_of([], [ended(0)])
    assert (seen.phase, seen.exit_code, seen.ended) == (Phase.FINISHED, 0, NOW - 500)


def test_end_record_does_not_count_while_the_job_is_there() -> None:
    assert state_of([row("COMPLETING")], [ended(75)]).phase is Phase.RUNNING


def test_job_that_nobody_shows_is_lost_only_after_a_while_without_a_sign_of_life() -> None:
    young = run(ago=5000, seen=NOW - PATIENCE_SECONDS + 1)
    assert state_of([], [young]).phase is Phase.UNKNOWN
    assert state_of([], [replace(young, seen=NOW - PATIENCE_SECONDS - 1)]).phase is Phase.LOST


def test_job_that_was_just_submitted_and_is_not_shown_concludes_nothing() -> None:
    submission = Submission("13", NOW - 5)
    assert state_of([], [], submission=submission).phase is Phase.UNKNOWN
    assert state_of([], [ended(75)], submission=submission).phase is Phase.UNKNOWN
    assert job_state(sight([], [], submission=Submission("13", NOW - 1000))) is None


def test_job_that_was_cancelled_before_it_began_takes_an_attempt_once() -> None:
    gone = row("CANCELLED", "13", end=NOW - 10)
    seen = state_of([gone], [ended(75)])
    assert (seen.phase, seen.attempt, seen.verdicts[2].state) == (Phase.FINISHED, 2, "CANCELLED")
    again = state_of([gone], [ended(75)], dropped=[(2, seen.verdicts[2])])
    assert (again.phase, again.attempt) == (Phase.FINISHED, 2)
    assert 3 not in again.verdicts
    forgotten = state_of([], [ended(75)], dropped=[(2, seen.verdicts[2])])
    assert (forgotten.phase, forgotten.attempt) == (Phase.FINISHED, 2)


def test_requeued_job_that_was_cancelled_while_it_waited_takes_an_attempt() -> None:
    seen = state_of([row("CANCELLED", restarts=1, end=NOW - 10)], [ended(75)])
    assert (seen.attempt, seen.verdicts[2].state) == (2, "CANCELLED")


def test_twin_that_was_cancelled_long_ago_says_nothing_of_a_later_end() -> None:
    seen = state_of([row("CANCELLED", "9", end=NOW - 900)], [ended(75)])
    assert (seen.phase, seen.attempt, seen.exit_code) == (Phase.FINISHED, 1, 75)


def test_cancelled_while_pending_is_found_in_accounting_when_squeue_forgot_it() -> None:
    accounting = [Run("13", "13", "CANCELLED", None, NOW - 400)]
    seen = state_of([], [ended(75)], submission=Submission("13", NOW - 450), accounting=accounting)
    assert (seen.phase, seen.attempt, seen.verdicts[2].source) == (Phase.FINISHED, 2, "sacct")


def test_requeued_job_that_was_cancelled_while_it_waited_has_a_verdict_on_its_run_too() -> None:
    """Accounting gives it a start at which it did not start."""
    accounting = [
        Run("12", "12", "NODE_FAIL", NOW - 1000, NOW - 990, ("m1",)),
        Run("12", "12", "CANCELLED", NOW - 980, NOW - 980),
    ]
    seen = state_of([], [run()], accounting=accounting)
    assert seen.verdicts[1].state == "NODE_FAIL"


def test_job_whose_script_failed_before_its_ranks_is_told_with_its_log() -> None:
    seen = state_of([row("FAILED", end=NOW - 1, nodes=("m1",))], [], submission=Submission("12", NOW - 50))
    assert (seen.phase, seen.attempt, seen.verdicts[1].state) == (Phase.FINISHED, 1, "FAILED")
    assert seen.evidence == "squeue: job 12 was FAILED before its ranks were started; see logs/slurm-12.log"


def test_end_before_the_ranks_is_that_of_the_last_submission() -> None:
    over = row("CANCELLED", submitted=NOW - 40, end=NOW - 1)
    assert job_state(sight([over], [])) is None
    assert job_state(sight([over], [], submission=Submission("13", NOW - 200))) is None
    assert state_of([over], [], submission=Submission("", NOW - 50)).phase is Phase.FINISHED  # its answer was lost
    assert job_state(sight([replace(over, submitted=NOW - 4000)], [], submission=Submission("", NOW - 50))) is None


def test_verdicts_go_to_the_runs_they_are_about() -> None:
    """A job that was requeued twice has three entries in accounting, all with its id."""
    runs = [run(1, restart=0, ago=3000), run(2, restart=1, ago=2000), run(3, restart=2, ago=1000)]
    accounting = [
        Run("12", "12", "NODE_FAIL", NOW - 3010, NOW - 2500, ("m1",)),
        Run("12", "12", "PREEMPTED", NOW - 2010, NOW - 1500, ("m2",)),
        Run("12", "12", "TIMEOUT", NOW - 1010, NOW - 500, ("m3",)),
        Run("99", "99", "FAILED", NOW - 1000, NOW - 500, ("m4",)),
    ]
    seen = state_of([], runs, accounting=accounting)
    assert {number: verdict.state for number, verdict in seen.verdicts.items()} == {
        1: "NODE_FAIL",
        2: "PREEMPTED",
        3: "TIMEOUT",
    }
    assert seen.phase is Phase.FINISHED


def test_final_row_is_about_the_last_run_of_the_job_only() -> None:
    seen = state_of([row("TIMEOUT", restarts=1, end=NOW - 5)], [run(1, ago=2000), run(2, restart=1)])
    assert seen.verdicts.keys() == {2}


def test_job_that_ended_in_the_grace_of_a_preemption_was_preempted() -> None:
    for state in ("COMPLETED", "FAILED", "TIMEOUT"):
        over = row(state, start=NOW - 300, end=NOW - 90, preempted=NOW - 100)
        assert state_of([over], [ended(75)]).verdicts[1].state == "PREEMPTED"
    cancelled = row("CANCELLED", start=NOW - 300, end=NOW - 90, preempted=NOW - 100)
    assert state_of([cancelled], [ended(75)]).verdicts[1].state == "CANCELLED"


def test_element_of_an_array_is_known_by_either_of_its_ids() -> None:
    element = Row(job="40_2", raw_job="43", name="oc-a", state="RUNNING", restarts=0)
    assert state_of([element], [run(job="43")]).attempt == 1
    assert state_of([element], [run(job="40_2")]).attempt == 1


@pytest.mark.parametrize(
    ("last", "is_open"),
    [
        (run(), True),  # no end was recorded
        (ended(None), True),  # a later keeper found no end
        (ended(137), True),
        (ended(76), True),
        (ended(75), True),  # stopped, and nobody goes on
        (ended(0), False),
        (ended(1), False),
        (ended(86), False),
        (ended(137, verdict=Verdict("NODE_FAIL", "sacct")), False),
    ],
)
def test_accounting_is_asked_about_ends_that_the_files_do_not_explain(last: KeptRun, is_open: bool) -> None:
    assert sight([], [last]).open_runs == ([last] if is_open else [])


def test_accounting_is_not_asked_about_a_job_that_lives_or_that_squeue_explains() -> None:
    assert not sight([row("RUNNING")], [run()]).open_runs
    assert not sight([row("PENDING", "13")], [ended(75)]).open_runs  # somebody goes on
    assert not sight([row("NODE_FAIL")], [run()]).open_runs
    assert sight([row("PENDING", restarts=1)], [run()]).open_runs  # why was it requeued?


def write(path: Path, **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def test_records_are_read_as_keepers_workers_and_controllers_write_them(tmp_path: Path) -> None:
    jobs = tmp_path / "jobs"
    write(jobs / "1.start.json", job="12", restart=0, started=100.0, nodes=["m1"])
    write(jobs / "1.end.json", ended=200.0, exit_code=75, next="job 13 goes on")
    write(jobs / "2.start.json", job="13", restart=0, started=201.0, nodes=["m2"])
    write(jobs / "3.verdict.json", state="CANCELLED", source="squeue", ended=300.0)
    write(jobs / "submitted.json", job="14", time=250.0)
    write(tmp_path / "attempts" / "2.json", last_seen=240.0)
    records = read_records(RunDir(tmp_path), settled=())
    assert [(run.number, run.job, run.ended, run.seen) for run in records.runs] == [
        (1, "12", 200.0, 100.0),
        (2, "13", None, 240.0),
    ]
    assert records.dropped == ((3, Verdict("CANCELLED", "squeue", (), None, 300.0)),)
    assert (records.next_attempt, records.submission) == (4, Submission("14", 250.0))
    assert [run.number for run in read_records(RunDir(tmp_path), settled={1, 2}).runs] == [2]


def test_verdict_on_a_job_that_had_the_number_before_is_not_one_on_the_attempt(tmp_path: Path) -> None:
    write(tmp_path / "jobs" / "1.start.json", job="12", restart=0, started=100.0)
    write(tmp_path / "jobs" / "1.verdict.json", state="CANCELLED", source="squeue", ended=50.0)
    assert read_records(RunDir(tmp_path), settled=()).runs[0].verdict is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": null}', "null"])
def test_damaged_records_do_not_stop_a_poll(text: str, tmp_path: Path) -> None:
    for name in ("1.start.json", "1.end.json", "1.verdict.json", "submitted.json"):
        (tmp_path / "jobs").mkdir(exist_ok=True)
        (tmp_path / "jobs" / name).write_text(text)
    records = read_records(RunDir(tmp_path), settled=())
    assert job_state(sight([], list(records.runs), submission=records.submission)).phase is Phase.LOST  # type: ignore[union-attr]


def test_folder_that_does_not_exist_has_no_records(tmp_path: Path) -> None:
    records = read_records(RunDir(tmp_path / "none"), settled=())
    assert (records.runs, records.next_attempt, records.submission) == ((), 1, None)


@pytest.mark.parametrize("reason", ["launch failed requeued held", "launch_failed_requeued_held"])
def test_job_that_a_node_could_not_launch_is_released_so_many_times(reason: str) -> None:
    def held(restarts: int, *runs: KeptRun) -> tuple[bool, str, bool]:
        seen = state_of([row("PENDING", restarts=restarts, reason=reason)], list(runs))
        assert seen.phase is Phase.QUEUED
        return seen.held, seen.hold, seen.given_up

    assert held(1) == held(5) == (True, "", False)
    assert held(6) == (False, "scontrol release 12", True)
    assert held(6, run(restart=3)) == (True, "", False)  # three restarts were of runs that had begun


@pytest.mark.parametrize(
    ("state", "reason"),
    [("PENDING", "JobHeldUser"), ("PENDING", "JobHeldAdmin"), ("REQUEUE_HOLD", "None"), ("SPECIAL_EXIT", "None")],
)
def test_job_that_somebody_holds_waits_for_a_person(state: str, reason: str) -> None:
    seen = state_of([row(state, reason=reason)], [run()])
    assert (seen.phase, seen.held, seen.hold, seen.given_up) == (Phase.QUEUED, False, "scontrol release 12", False)

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from orchestrate.errors import ConfigError, DataError
from orchestrate.launchers.attempts import exit_file, job_file
from orchestrate.launchers.base import Phase
from orchestrate.runs import RunDir, read_json, write_json
from orchestrate.store import open_store, store_path
from orchestrate.sweep.adopt import adopt, refuse_while_controlled
from orchestrate.sweep.interventions import cancel_trials, forgive_trials
from orchestrate.sweep.lease import LeaseHeldError, lease
from orchestrate.sweep.observe import observe
from orchestrate.sweep.record import SweepRecord, load_record, record_path
from orchestrate.sweep.standing import State, assess
from orchestrate.sweep.status import status_json, sweep_status
from tests.launchers.jobs import kill, rank_pids, start, state, supervisor_pid, trial_dir, wait_for_end, wait_until
from tests.sweep.sweeps import Bench, CountingLauncher, bench, record_of, script_all, store_rows, write_sweep

ROOT = Path(__file__).parents[2]
RESUME = partial(forgive_trials, diverged_too=False)


def states(made: Bench, record: SweepRecord) -> list[State]:
    seen = observe(made.runs, record.trial_ids, made.launcher)
    return [assess(seen[trial_id]).state for trial_id in record.trial_ids]


def test_sweep_trains_every_trial_once_and_writes_the_report(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0, 1, 2)), parallel=2)
    assert made.session.make_true(record)
    assert sorted(made.launcher.submitted) == sorted(f"{trial}.1" for trial in record.trial_ids)
    assert made.reports == [runs / "sweeps" / "study" / "report" / "index.html"]
    assert "all 3 trials are done" in made.display.lines
    assert made.display.lines[-1] == f"report: {made.reports[0]}"


def test_finished_sweep_starts_nothing_and_keeps_its_report(runs: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    assert bench(runs).session.make_true(record_of(file))
    again = bench(runs)
    assert again.session.make_true(record_of(file))
    assert again.launcher.submitted == []
    assert again.reports == []
    assert again.display.lines == ["all 2 trials are done", f"report: {runs}/sweeps/study/report/index.html"]


def test_killed_attempt_is_retried(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    script_all(runs, record, {"0": "wait", "1": "crash"}, {"*": "done"})
    assert made.session.make_true(record)
    assert made.launcher.submitted == [f"{record.trial_ids[0]}.1", f"{record.trial_ids[0]}.2"]
    with open_store(store_path(runs)) as store:
        told = [(event.what, event.cause) for event in store.events(record.trial_ids[0]) if event.attempt is None]
    assert ("INTERRUPTED", "infrastructure") in told
    assert told[-1] == ("COMPLETED", None)


@pytest.mark.parametrize(("code", "expected"), [(89, State.FAILED), (2, State.FAILED), (88, State.DIVERGED)])
def test_what_would_fail_again_is_not_retried(runs: Path, tmp_path: Path, code: int, expected: State) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path))
    script_all(runs, record, {"*": "done"})
    trial_dir(runs, record.trial_ids[0], {"*": f"exit:{code}"})
    assert not made.session.make_true(record)
    assert states(made, record) == [expected, State.COMPLETED]
    assert len(made.launcher.submitted) == 2
    assert len(made.reports) == 1  # of what there is


@pytest.mark.parametrize("moment", ["before", "after"])
def test_controller_killed_at_a_submission_starts_nothing_twice(runs: Path, tmp_path: Path, moment: str) -> None:
    file = write_sweep(tmp_path, seeds=(0,))
    record = record_of(file)
    script_all(runs, record, {"*": "wait"})
    (trial,) = record.trial_ids
    command = (sys.executable, "-m", "tests.sweep.drive", str(runs), str(file), moment)
    assert subprocess.run(command, cwd=ROOT, timeout=120).returncode == -9
    with open_store(store_path(runs)) as store:
        assert store.open_attempts() == {trial: 1}  # the intent survives
    made = bench(runs)
    made.session.make_true(record, once=True)
    rank_pids(runs, trial)
    made.session.make_true(record, once=True)
    assert state(made.launcher, trial).attempt == 1
    assert made.launcher.submitted == ([f"{trial}.1"] if moment == "before" else [])


def test_second_command_on_a_sweep_only_reads(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    made = bench(runs)
    with lease(record_path(runs, record.name).parent), pytest.raises(LeaseHeldError, match=f"process {os.getpid()} on"):
        made.session.make_true(record)
    assert made.launcher.submitted == []
    assert not record_path(runs, record.name).exists()


def test_stopping_the_controller_leaves_the_jobs_running(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    script_all(runs, record, {"*": "wait"})

    def interrupt(current: object) -> None:
        rank_pids(runs, record.trial_ids[0])
        raise KeyboardInterrupt

    made.display.each = interrupt
    with pytest.raises(KeyboardInterrupt):
        made.session.make_true(record)
    assert state(made.launcher, record.trial_ids[0]).phase is Phase.RUNNING
    kill(supervisor_pid(runs, record.trial_ids[0]))


def test_limits_of_sweep_and_cluster_bound_the_jobs_at_once(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0, 1, 2)), parallel=2)
    script_all(runs, record, {"*": "wait"})
    made.session.make_true(record, once=True)
    made.session.make_true(record, once=True)
    assert len(made.launcher.submitted) == 2
    other = record_of(write_sweep(tmp_path, seeds=(7,), name="other"), parallel=2)
    made.session.make_true(other, once=True)  # the cluster is full of the first sweep's jobs
    assert len(made.launcher.submitted) == 2


def test_cancelled_trial_saves_and_rests_until_resumed(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    script_all(runs, record, {"*": "wait"}, {"*": "done"})
    (trial,) = record.trial_ids
    made.session.make_true(record, once=True)
    rank_pids(runs, trial)
    cancel_trials(runs, record.trials, made.launcher, patience_seconds=60, say=made.display.line)
    assert made.display.lines[-1].endswith("cancelled; checkpoint at step 1")
    assert not made.session.make_true(record)
    assert states(made, record) == [State.CANCELLED]
    assert len(made.launcher.submitted) == 1
    assert made.session.make_true(record, forgive=RESUME)
    assert f"{record.trials[0].label}: taken up again" in made.display.lines
    assert states(made, record) == [State.COMPLETED]


def test_cancelling_what_is_done_or_not_started(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    made.session.make_true(record)
    both = record_of(write_sweep(tmp_path, seeds=(0, 1)))
    cancel_trials(runs, both.trials, made.launcher, patience_seconds=0, say=made.display.line)
    assert states(made, both) == [State.COMPLETED, State.CANCELLED]
    assert "is done already" in made.display.lines[-2]


def test_resume_takes_up_failures_but_not_what_was_named_by_nobody(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0, 1)))
    trial_dir(runs, record.trial_ids[0], {"*": "exit:1"}, {"*": "done"})
    trial_dir(runs, record.trial_ids[1], {"*": "exit:88"}, {"*": "done"})
    made.session.make_true(record)
    made.session.make_true(record, forgive=RESUME)
    assert states(made, record) == [State.COMPLETED, State.DIVERGED]
    forgive_diverged = partial(forgive_trials, diverged_too=True)
    assert made.session.make_true(record, only=[record.trial_ids[1]], forgive=forgive_diverged)


def test_resume_that_is_refused_changes_nothing(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0, 1)))
    trial_dir(runs, record.trial_ids[0], {"*": "exit:1"})
    cancel_trials(runs, record.trials[1:], made.launcher, patience_seconds=0, say=made.display.line)
    made.session.make_true(record)

    def refuse(url: str) -> None:
        raise DataError(f"{url}: missing")

    before = states(made, record)
    with pytest.raises(ConfigError, match="missing"):
        replace(made.session, check_data=refuse).make_true(record, forgive=RESUME)
    with lease(record_path(runs, record.name).parent), pytest.raises(LeaseHeldError):
        made.session.make_true(record, forgive=RESUME)
    assert states(made, record) == before == [State.FAILED, State.CANCELLED]
    assert not list(runs.glob("trials/*/resumed.json"))


def test_page_of_a_command_that_was_killed_before_it_reported_is_written_by_the_next(
    runs: Path, tmp_path: Path
) -> None:
    made = bench(runs)
    made.session.make_true(record_of(write_sweep(tmp_path)))

    def die(sweep_dir: Path, trials_dir: Path) -> Path:
        raise KeyboardInterrupt

    edited = record_of(write_sweep(tmp_path, seeds=(0,)))
    with pytest.raises(KeyboardInterrupt):
        replace(made.session, write_report=die).make_true(edited)
    made.session.make_true(edited)
    assert len(made.reports) == 2


def test_crowded_cores_are_told_once(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    made = bench(runs)
    record = record_of(write_sweep(tmp_path))
    made.session.make_true(record)
    warning = "warning: 2 ranks x 1 CPU x 1 trial on 1 core: they will slow each other down"
    assert made.display.lines.count(warning) == 1
    again = bench(runs)
    again.session.make_true(record)
    assert warning not in again.display.lines


def test_edited_sweep_keeps_what_was_removed_and_says_so(runs: Path, tmp_path: Path) -> None:
    first = bench(runs)
    before = record_of(write_sweep(tmp_path, seeds=(0, 1)))
    first.session.make_true(before)
    second = bench(runs)
    assert second.session.make_true(record_of(write_sweep(tmp_path, seeds=(1, 2))))
    assert len(second.launcher.submitted) == 1
    assert len(second.reports) == 1
    assert any("no longer in the sweep, kept" in line for line in second.display.lines)
    assert (runs / "trials" / before.trial_ids[0] / "results" / "done.json").exists()
    assert [trial.id for trial in load_record(runs, "study").removed] == [before.trial_ids[0]]
    third = bench(runs)
    assert third.session.make_true(record_of(write_sweep(tmp_path, seeds=(0, 1, 2))))
    assert third.launcher.submitted == []
    assert load_record(runs, "study").removed == ()


def test_finished_sweep_keeps_the_commit_it_was_trained_at(runs: Path, tmp_path: Path) -> None:
    record = replace(record_of(write_sweep(tmp_path)), commit="a" * 40)
    bench(runs).session.make_true(record)
    again = bench(runs)
    assert again.session.make_true(replace(record, commit="b" * 40))
    assert load_record(runs, "study").commit == "a" * 40
    assert again.reports == []


def test_same_trial_in_two_sweeps_is_trained_once(runs: Path, tmp_path: Path) -> None:
    assert bench(runs).session.make_true(record_of(write_sweep(tmp_path, name="one")))
    other = bench(runs)
    assert other.session.make_true(record_of(write_sweep(tmp_path, name="two")))
    assert other.launcher.submitted == []


def test_change_outside_of_the_identity_reaches_the_run_config(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    script_all(runs, record, {"*": "exit:75"}, {"*": "done"})
    bench(runs).session.make_true(record, once=True)
    made = bench(runs)
    wait_for_end(made.launcher, record.trial_ids[0])
    assert made.session.make_true(record_of(write_sweep(tmp_path, seeds=(0,), workers=3)))
    assert made.launcher.submitted == [f"{record.trial_ids[0]}.2"]
    assert "workers: 3" in (runs / "trials" / record.trial_ids[0] / "run.yaml").read_text()


def test_spent_gpu_hours_end_the_sweep_and_not_the_results(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0, 1, 2), gpu_hours=10.05 / 3600))  # ten looks of two ranks
    assert not made.session.make_true(record)
    assert len(made.launcher.submitted) == 1
    assert any("limits.gpu_hours" in line for line in made.display.lines)
    assert len(made.reports) == 1


def test_status_is_the_same_after_the_store_was_deleted(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, seeds=(0, 1, 2)))
    script_all(runs, record, {"*": "done"})
    trial_dir(runs, record.trial_ids[1], {"*": "exit:75"}, {"*": "exit:1"})
    made.session.make_true(record)

    def status() -> object:
        return status_json(record, sweep_status(record, runs, observe(runs, record.trial_ids, CountingLauncher(runs))))

    def index() -> object:
        with open_store(store_path(runs)) as store:
            last = {trial: store.events(trial)[-1] for trial in record.trial_ids}
            words = {key: (e.what, e.cause, e.reason) for key, e in last.items()}
            return store.sweeps(), store.open_attempts(), words, store_rows(runs)

    before = status(), index()
    for path in runs.glob("store.sqlite*"):
        path.unlink()
    with open_store(store_path(runs)) as store:
        assert adopt(runs, store) == (1, 3)
    assert (status(), index()) == before
    again = bench(runs)
    again.session.make_true(record)
    assert again.launcher.submitted == []


def test_missing_store_is_rebuilt_by_itself(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    bench(runs).session.make_true(record)
    store_path(runs).unlink()
    made = bench(runs)
    assert made.session.make_true(record)
    assert made.launcher.submitted == []
    with open_store(store_path(runs)) as store:
        assert any(event.what == "ENDED" for event in store.events(record.trial_ids[0]))


def test_store_is_not_rebuilt_under_a_controller(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    bench(runs).session.make_true(record)
    with lease(record_path(runs, "study").parent), pytest.raises(Exception, match="controls this sweep"):
        refuse_while_controlled(runs)


def test_job_started_by_another_controller_is_found(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    script_all(runs, record, {"*": "wait"}, {"*": "done"})
    other = CountingLauncher(runs)
    start(other, runs, record.trial_ids[0])
    rank_pids(runs, record.trial_ids[0])
    made = bench(runs)
    made.session.make_true(record, once=True)
    assert made.launcher.submitted == []
    kill(supervisor_pid(runs, record.trial_ids[0]))
    wait_until(lambda: not state(other, record.trial_ids[0]).live, "the job is gone")
    assert made.session.make_true(record)


def test_sweep_json_holds_what_the_report_needs(runs: Path, tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    record = record_of(file)
    bench(runs).session.make_true(record)
    values = read_json(record_path(runs, "study")) or {}
    assert values["sweep_yaml"] == file.read_text()
    assert values["objective"] == {"metric": "knn.top1", "goal": "max"}
    assert [trial["assignment"] for trial in values["trials"]] == [{"train.seed": 0}, {"train.seed": 1}]
    assert values["trials"][0]["config"]["train"]["global_batch"] == 8
    assert values["trials"][0]["total_steps"] == 10
    assert load_record(runs, "study") == record


def test_typing_the_command_again_gives_a_fresh_set_of_retries_for_machine_faults_only(
    runs: Path, tmp_path: Path
) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path))
    unlucky, wrong = record.trial_ids
    trial_dir(runs, unlucky, {"*": "exit:75"})  # and nothing saved
    trial_dir(runs, wrong, {"*": "exit:2"})
    assert not made.session.make_true(record)
    assert states(made, record) == [State.FAILED, State.FAILED]
    trial_dir(runs, unlucky, {"*": "done"})
    trial_dir(runs, wrong, {"*": "done"})
    assert not made.session.make_true(record)
    assert states(made, record) == [State.COMPLETED, State.FAILED]


def test_resuming_one_trial_does_not_bypass_the_hours_of_the_sweep(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, gpu_hours=1.0))
    first, second = record.trial_ids
    write_json(job_file(RunDir(runs / "trials" / first), 1), {"started": 1e9, "ranks": 2})
    write_json(exit_file(RunDir(runs / "trials" / first), 1), {"ended": 1e9 + 3600, "exit_code": 75})
    assert not made.session.make_true(record, only=[second])
    assert made.launcher.submitted == []
    assert any("limits.gpu_hours: 1 allowed, 2.00 spent" in line for line in made.display.lines)
    removed = replace(record, trials=record.trials[1:])
    assert not made.session.make_true(removed)
    assert made.launcher.submitted == []


def test_allowance_is_written_before_the_job_starts_and_taken_away_with_the_limit(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, gpu_hours=1.0, seeds=(0,)))
    script_all(runs, record, {"*": "wait"})
    allowance = runs / "trials" / record.trial_ids[0] / "jobs" / "allowance.json"
    made.session.make_true(record, once=True)
    assert read_json(allowance) == {"rank_seconds": 3600.0}
    rank_pids(runs, record.trial_ids[0])
    made.session.make_true(replace(record, limits=record.limits | {"gpu_hours": 0.0}), once=True)
    assert not allowance.exists()


def test_pass_of_a_timer_looks_ahead_to_the_next_one(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path, gpu_hours=0.9, seeds=(0,)))
    script_all(runs, record, {"*": "wait"})
    made.session.make_true(record, once=True)
    rank_pids(runs, record.trial_ids[0])
    made.session.make_true(record, once=True)  # a moment later: the next pass will be as soon
    assert not any("asked to save" in line for line in made.display.lines)
    half_an_hour_ago = time.time() - 1800
    os.utime(record_path(runs, record.name).parent / "last_look", (half_an_hour_ago, half_an_hour_ago))
    made.session.make_true(record, once=True)  # two ranks would spend an hour until the next pass
    assert any("asked to save and stop: limits.gpu_hours" in line for line in made.display.lines)

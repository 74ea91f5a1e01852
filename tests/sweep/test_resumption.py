"""Trials that a person takes up again: elsewhere, with the code of now, after somebody else cancelled them."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrate.errors import RunDirError
from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase, RunSpec, Verdict
from orchestrate.runs import RunDir, read_json, write_json
from orchestrate.sweep.code import code_of
from orchestrate.sweep.interventions import cancel_trials, forgive_trials
from orchestrate.sweep.observe import observe, run_dir_of
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.record import SweepRecord, find_record
from orchestrate.sweep.resumption import Departure, Resumption, leaves
from orchestrate.sweep.standing import State, assess
from tests.launchers.jobs import cluster, rank_pids, state, wait_until
from tests.sweep.sweeps import Bench, CountingLauncher, bench, record_of, script_all, write_sweep

pytestmark = pytest.mark.usefixtures("runs")  # which ends the jobs that a test leaves

FAST: Callable[[float], None] = lambda seconds: time.sleep(0.01)  # noqa: E731


def started(tmp_path: Path, *script: dict[str, str], seeds: tuple[int, ...] = (0,)) -> tuple[SweepRecord, Bench]:
    """Start the trials of a sweep with two ranks each and leave them."""
    record = record_of(write_sweep(tmp_path, seeds=seeds), parallel=2)
    runs = tmp_path / "runs"
    script_all(runs, record, *script)
    made = bench(runs)
    made.session.make_true(record, once=True)
    for trial_id in record.trial_ids:
        rank_pids(runs, trial_id)
    return record, made


def moved(record: SweepRecord, made: Bench, *, patience_seconds: float = 60.0) -> tuple[SweepRecord, Bench, Departure]:
    """Prepare to go on with one rank a trial."""
    now = record.with_cluster(cluster(ranks=1, parallel=2), "")
    there = bench(made.runs)
    launcher = CountingLauncher(made.runs, ranks=1)
    departure = Departure(
        record,
        made.launcher,
        launcher,
        say=there.display.line,
        patience_seconds=patience_seconds,
        wait=FAST,
    )
    return now, replace(there, session=replace(there.session, launcher=launcher)), departure


def test_trial_that_runs_saves_and_stops_before_it_goes_on_with_other_resources(tmp_path: Path) -> None:
    record, made = started(tmp_path, {"*": "wait"}, {"*": "done"})
    now, there, departure = moved(record, made)
    assert leaves(record, now)
    assert there.session.make_true(now, leave=departure.move)
    run = run_dir_of(made.runs, record.trial_ids[0])
    first, second = (json.loads((run.path / "jobs" / f"{number}.start.json").read_text()) for number in (1, 2))
    end = json.loads((run.path / "jobs" / "1.end.json").read_text())
    assert (first["ranks"], end["exit_code"], second["ranks"]) == (2, 75, 1)
    assert end["ended"] <= second["started"]
    assert any("has stopped where it was; its newest checkpoint is of step 1" in line for line in there.display.lines)


def test_sweep_whose_jobs_do_not_stop_stays_where_it_is(tmp_path: Path) -> None:
    record, made = started(tmp_path, {"*": "deaf"})
    now, there, departure = moved(record, made, patience_seconds=0.3)
    with pytest.raises(RunDirError, match="its job is still saving"):
        there.session.make_true(now, leave=departure.move)
    kept = find_record(made.runs, record.name)
    assert kept is not None
    assert kept.ranks == 2
    assert state(made.launcher, record.trial_ids[0]).live


def test_limits_are_no_other_place(tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    assert not leaves(record, record.with_cluster(cluster(parallel=7), ""))
    assert leaves(record, record.with_cluster(cluster(OMP_NUM_THREADS="2"), ""))


def test_cancel_stops_training_and_evaluation(tmp_path: Path) -> None:
    record, made = started(tmp_path, {"*": "wait"})
    trial = record.trial_ids[0]
    run = run_dir_of(made.runs, trial)
    (run.path / "ready" / "1-0").unlink()
    made.launcher.submit(made.launcher.plan(RunSpec(trial, run.path, 1, stage="evaluate")))
    rank_pids(made.runs, trial)
    count = cancel_trials(
        made.runs, record.trials, made.launcher, patience_seconds=60, say=made.display.line, wait=FAST
    )
    assert count == 1
    seen = observe(made.runs, [trial], made.launcher)[trial]
    assert seen.live_jobs == ()
    assert [json.loads(path.read_text())["exit_code"] for path in run.path.rglob("1.end.json")] == [75, 75]
    assert assess(seen).state is State.CANCELLED


def test_successor_that_was_on_its_way_is_stopped_too(tmp_path: Path) -> None:
    record, made = started(tmp_path, {"*": "wait"})
    trial = record.trial_ids[0]
    run = run_dir_of(made.runs, trial)

    def wait(seconds: float) -> None:
        if not (run.path / "jobs" / "2.start.json").exists():
            wait_until(lambda: (run.path / "jobs" / "1.end.json").exists(), "the first attempt ends")
            made.launcher.submit(made.launcher.plan(RunSpec(trial, run.path, 2)))
            rank_pids(made.runs, trial, attempt=2)
        time.sleep(0.01)

    cancel_trials(made.runs, record.trials, made.launcher, patience_seconds=60, say=made.display.line, wait=wait)
    assert json.loads((run.path / "jobs" / "2.end.json").read_text())["exit_code"] == 75


def held() -> Observed:
    verdict = Verdict("CANCELLED", "squeue", started=1.0, ended=2.0)
    return Observed(attempts=(AttemptRecord(1, 1.0, 2.0, 2, None, verdict=verdict),))


def test_trial_that_somebody_else_cancelled_is_taken_up_again(tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    runs = tmp_path / "runs"
    trial = record.trials[0]
    run_dir_of(runs, trial.id).path.mkdir(parents=True)
    assert assess(held()).state is State.HELD
    assert forgive_trials(runs, record.trials, {trial.id: held()}, diverged_too=False) == [trial]
    resumed = read_json(run_dir_of(runs, trial.id).path / "resumed.json")
    assert (resumed or {})["after_attempt"] == 1


def test_resumed_trial_runs_the_code_of_now_and_says_so(tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    runs = tmp_path / "runs"
    run = RunDir(runs / "trials" / record.trial_ids[0])
    (runs / "code" / "0123456789ab" / "tree").mkdir(parents=True)
    write_json(run.code_file, {"digest": "0123456789ab", "commit": "c" * 40, "dirty": False})
    said = list[str]()
    resumption = Resumption(renews_code=True, diverged_too=False, say=said.append)
    assert resumption(runs, record.trials, {trial.id: Observed() for trial in record.trials}) == []
    code = code_of(run)
    assert code is not None
    assert code.digest != "0123456789ab"
    assert said == [f"1 trial will run the code of now ({code}), not that of before (0123456789ab, commit {'c' * 10})"]
    assert resumption(runs, record.trials, {trial.id: Observed() for trial in record.trials}) == []
    assert len(said) == 1


def test_code_that_a_live_job_runs_stays_on_record(tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    runs = tmp_path / "runs"
    run = RunDir(runs / "trials" / record.trial_ids[0])
    (runs / "code" / "0123456789ab" / "tree").mkdir(parents=True)
    write_json(run.code_file, {"digest": "0123456789ab", "commit": None, "dirty": False})
    said = list[str]()
    resumption = Resumption(renews_code=True, diverged_too=False, say=said.append)
    for phase in (Phase.RUNNING, Phase.QUEUED):
        live = Observed(job=JobState(phase, "7", 1, ""), attempts=(AttemptRecord(1, 1.0, 2.0, 2, None),))
        assert resumption(runs, record.trials, {record.trial_ids[0]: live}) == []
        assert (read_json(run.code_file) or {})["digest"] == "0123456789ab"
        assert said.pop().startswith("1 trial keeps the code of before, as its job runs it")


def test_resumed_trials_that_never_began_need_no_copy_yet(tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    resumption = Resumption(renews_code=True, diverged_too=False, say=pytest.fail)
    assert resumption(tmp_path / "runs", record.trials, {trial.id: Observed() for trial in record.trials}) == []
    assert not (tmp_path / "runs" / "code").exists()

"""Jobs that have to stop, at places that answer and at places that do not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrate.errors import RunDirError
from orchestrate.launchers.attempts import exit_file, job_file, submission_file
from orchestrate.launchers.base import TryLaterError
from orchestrate.launchers.slurm import SlurmLauncher
from orchestrate.launchers.slurm_commands import Answer
from orchestrate.runs import RunDir, write_json
from orchestrate.sweep.interventions import cancel_trials, move_away
from orchestrate.sweep.observe import run_dir_of
from orchestrate.sweep.record import SweepRecord, find_record, save_record
from orchestrate.sweep.resumption import Departure
from tests.launchers.jobs import cluster
from tests.launchers.slurm_text import DEAD, TextSlurm, queue_line
from tests.launchers.test_slurm import config
from tests.sweep.sweeps import CountingLauncher, bench, record_of, write_sweep

NOW = 1_795_449_491.0
STOPPED = {"exit_code": 75, "ended": NOW - 50}


@pytest.fixture
def slurm() -> TextSlurm:
    slurm = TextSlurm()
    slurm.answers |= dict.fromkeys(("squeue", "scancel", "sbatch", "scontrol"), DEAD)
    return slurm


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def launcher(runs: Path, slurm: TextSlurm) -> SlurmLauncher:
    return SlurmLauncher(config(), runs, commands=slurm, clock=lambda: NOW)


def trials(tmp_path: Path, number: int = 1) -> SweepRecord:
    return record_of(write_sweep(tmp_path, seeds=range(number)))


def began(run: RunDir, number: int = 1, *, job: str = "100", **end: Any) -> None:
    """Write what the keeper of an attempt leaves; without facts of its end it may live."""
    started = NOW - 1000 + number
    write_json(job_file(run, number), {"job": job, "ranks": 2, "restart": 0, "started": started, "nodes": ["m1"]})
    if end:
        write_json(exit_file(run, number), {"attempt": number} | end)


def submitted(run: RunDir, *, job: str, time: float = NOW - 10) -> None:
    write_json(submission_file(run), {"job": job, "time": time})


def test_cancel_reaches_running_jobs_although_the_scheduler_is_silent(
    tmp_path: Path, runs: Path, slurm: TextSlurm
) -> None:
    record = trials(tmp_path, 4)
    running, waiting, ended, fresh = (run_dir_of(runs, trial_id) for trial_id in record.trial_ids)
    began(running)
    began(running.evaluation, job="101")
    submitted(waiting, job="102")
    began(ended, **STOPPED)
    said = list[str]()
    count = cancel_trials(runs, record.trials, launcher(runs, slurm), patience_seconds=0, say=said.append)
    assert count == 4
    assert all(run.cancelled_file.exists() for run in (running, waiting, ended, fresh))
    assert [run.stop_file.exists() for run in (running, running.evaluation, waiting, ended, fresh)] == [
        True,
        True,
        True,
        False,
        False,
    ]
    told = {trial.label: next(line for line in said if line.startswith(trial.label)) for trial in record.trials}
    for trial in record.trials[:2]:
        assert "Slurm does not answer: Unable to contact slurm controller" in told[trial.label]
        assert "one that runs stops by itself; run the same command again" in told[trial.label]
    for trial in record.trials[2:]:
        assert "it was not running" in told[trial.label]


def test_stop_files_are_there_even_if_only_the_request_to_stop_fails(tmp_path: Path, runs: Path) -> None:
    record = trials(tmp_path)
    run = run_dir_of(runs, record.trial_ids[0])
    began(run)

    class Leaving(TextSlurm):  # after the trials are marked and looked at
        def run(self, *words: str, text: str = "") -> Answer:
            return DEAD if self.count("squeue") >= 2 else super().run(*words, text=text)

    leaving = Leaving()
    leaving.queue([queue_line("100", f"oc-{record.trial_ids[0]}", "RUNNING")])
    with pytest.raises(TryLaterError, match="the same command again drops those that wait"):
        cancel_trials(runs, record.trials, launcher(runs, leaving), patience_seconds=0, say=lambda text: None)
    assert run.stop_file.exists()


MAY_LIVE: dict[str, list[dict[str, Any]]] = {
    "no end": [{}],
    "a successor": [STOPPED | {"next": "job 101 goes on"}],
    "requeued": [STOPPED | {"next": "requeued"}],
    "ended by the scheduler": [STOPPED | {"stopped_by": "SIGTERM"}],
    "went on": [STOPPED | {"next": "job 101 goes on"}, {}],
}


@pytest.mark.parametrize("ends", MAY_LIVE.values(), ids=MAY_LIVE)
def test_trial_that_may_have_a_job_is_not_moved_unless_a_person_abandons_it(
    tmp_path: Path, runs: Path, slurm: TextSlurm, ends: list[dict[str, Any]]
) -> None:
    record = trials(tmp_path)
    run = run_dir_of(runs, record.trial_ids[0])
    for number, end in enumerate(ends, start=1):
        began(run, number, job=str(99 + number), **end)
    place, said = launcher(runs, slurm), list[str]()
    with pytest.raises(RunDirError, match=r"Slurm does not answer.*\n.*--abandon-jobs goes on without asking"):
        move_away(runs, record.trials, place, say=said.append, patience_seconds=0)
    assert run.stop_file.exists()
    move_away(runs, record.trials, place, say=said.append, patience_seconds=0, abandons=True)
    assert said[-1].startswith(f"{record.trials[0].label}: goes on although nobody can tell whether it has a job")


def test_trial_whose_last_job_left_its_end_is_moved_without_asking(
    tmp_path: Path, runs: Path, slurm: TextSlurm
) -> None:
    record = trials(tmp_path, 3)
    first, second, _ = (run_dir_of(runs, trial_id) for trial_id in record.trial_ids)
    began(first, **STOPPED)
    submitted(first, job="100", time=NOW - 1000)
    began(second, 1, **STOPPED, next="job 101 goes on")
    began(second, 2, job="101", **STOPPED)
    move_away(runs, record.trials, launcher(runs, slurm), say=pytest.fail, patience_seconds=0)
    submitted(first, job="105")
    with pytest.raises(RunDirError, match="not moved"):
        move_away(runs, record.trials, launcher(runs, slurm), say=pytest.fail, patience_seconds=0)


def test_silent_place_is_asked_until_the_stop_file_has_ended_the_job(
    tmp_path: Path, runs: Path, slurm: TextSlurm
) -> None:
    record = trials(tmp_path)
    run = run_dir_of(runs, record.trial_ids[0])
    began(run)

    def wait(seconds: float) -> None:
        assert run.stop_file.exists()
        began(run, **STOPPED)

    said = list[str]()
    move_away(runs, record.trials, launcher(runs, slurm), say=said.append, patience_seconds=60, wait=wait)
    assert said == [f"{record.trials[0].label}: has stopped where it was; its newest checkpoint is of step 0"]


@pytest.mark.parametrize("answers", [True, False])
def test_sweep_with_another_launcher_is_refused_while_jobs_may_live(
    tmp_path: Path, runs: Path, slurm: TextSlurm, answers: bool
) -> None:
    record = trials(tmp_path)
    before = record.with_cluster(config(), "")
    save_record(runs, before)
    began(run_dir_of(runs, record.trial_ids[0]))
    if answers:
        slurm.queue([queue_line("100", f"oc-{record.trial_ids[0]}", "RUNNING")])
    made = bench(runs)
    departure = Departure(before, launcher(runs, slurm), made.launcher, say=made.display.line)
    with pytest.raises(RunDirError, match="orchestrate resume study --cluster FILE") as error:
        made.session.make_true(record, leave=departure.refuse)
    assert ("has a job" if answers else "Slurm does not answer") in str(error.value)
    assert find_record(runs, "study") == before
    assert made.launcher.submitted == []


def test_sweep_goes_elsewhere_once_nothing_lives_where_it_was(tmp_path: Path, runs: Path, slurm: TextSlurm) -> None:
    record = trials(tmp_path)
    began(run_dir_of(runs, record.trial_ids[0]), **STOPPED)
    there = CountingLauncher(runs)
    Departure(record, launcher(runs, slurm), there, say=pytest.fail).refuse(runs, record.trials)


def test_command_that_is_killed_while_jobs_stop_leaves_the_sweep_where_it_was(tmp_path: Path, runs: Path) -> None:
    record = trials(tmp_path)
    save_record(runs, record)
    now = record.with_cluster(cluster(ranks=1), "")
    seen = list[SweepRecord | None]()

    def leave(folder: Path, leaving: object) -> None:
        seen.append(find_record(folder, record.name))
        raise SystemExit(129)  # SIGHUP

    with pytest.raises(SystemExit):
        bench(runs).session.make_true(now, leave=leave)
    assert seen == [record]
    assert find_record(runs, record.name) == record


def test_one_trial_does_not_leave_the_others_behind(tmp_path: Path, runs: Path, slurm: TextSlurm) -> None:
    record = trials(tmp_path, 2)
    moving, staying = record.trials
    began(run_dir_of(runs, staying.id))
    departure = Departure(record, launcher(runs, slurm), CountingLauncher(runs), say=pytest.fail, patience_seconds=0)
    with pytest.raises(RunDirError, match="resume the whole sweep"):
        departure.move(runs, [moving])
    replace(departure, abandons=True).move(runs, [moving])

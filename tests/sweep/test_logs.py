"""Which logs a person gets to see, and how long they are followed."""

from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path

import pytest

from orchestrate.errors import ConfigError, RunDirError
from orchestrate.launchers.base import JobState, Phase
from orchestrate.runs import RunDir, write_json
from orchestrate.sweep.lease import lease
from orchestrate.sweep.logs import TrialLogs, liveness, retries
from orchestrate.sweep.record import TrialEntry, record_path, save_record
from tests.sweep.sweeps import CountingLauncher, record_of, write_sweep

TRIAL = TrialEntry("0123456789abcdef", {}, {})


class Script(CountingLauncher):
    """A launcher that gives answers from a list, and does something before each."""

    poll_seconds = 0.0

    def __init__(self, runs: Path, phases: Iterable[Phase | None]) -> None:
        super().__init__(runs)
        self.phases: Iterator[Phase | None] = iter(phases)
        self.asked = 0

    def poll(self, names: Iterable[str]) -> dict[str, JobState]:
        self.asked += 1
        phase = next(self.phases)
        return {} if phase is None else {name: JobState(phase, "1", 1, "") for name in names}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "trials" / TRIAL.id)


def begin(folder: RunDir, attempt: int, **logs: str) -> None:
    """Leave what the start of an attempt leaves, and some logs."""
    write_json(folder.path / "jobs" / f"{attempt}.start.json", {"attempt": attempt, "job": str(100 + attempt)})
    for name, text in logs.items():
        path = folder.log_file(attempt, 0).with_name(f"{name.replace('_', '-')}.log")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def logs(run: RunDir, *, rank: str = "0", attempt: int = 0, stage: str = "pretrain") -> TrialLogs:
    return TrialLogs(run.path.parents[1], TRIAL, stage=stage, rank=rank, attempt=attempt)


def test_one_rank_is_shown_as_it_is_and_all_with_their_numbers(run: RunDir) -> None:
    begin(run, 1, **{f"rank_{rank}": f"old\nrank {rank}\n" for rank in range(11)})
    assert list(logs(run, rank="10").last_lines(1)) == ["rank 10"]
    assert list(logs(run, rank="all").last_lines(1)) == [f"[{rank}] rank {rank}" for rank in range(11)]


def test_last_attempt_that_has_a_log_is_shown_unless_one_is_named(run: RunDir) -> None:
    begin(run, 1, rank_0="first\n")
    begin(run, 2, rank_0="second\n")
    begin(run, 3)  # begun a moment ago
    assert list(logs(run).last_lines(5)) == ["second"]
    assert list(logs(run, attempt=1).last_lines(5)) == ["first"]


def test_logs_of_launcher_and_scheduler_are_in_reach(run: RunDir) -> None:
    begin(run, 1, srun="srun: error\n", supervisor="asked to stop\n", rank_0="")
    (run.path / "logs" / "slurm-101.log").write_text("batch\n")
    (run.path / "logs" / "slurm-102.log").write_text("of another job\n")
    told = ["[supervisor] asked to stop", "[srun] srun: error", "[slurm-101] batch"]
    assert list(logs(run, rank="job").last_lines(5)) == told


def test_evaluation_has_logs_of_its_own(run: RunDir) -> None:
    begin(run, 1, rank_0="training\n")
    with pytest.raises(RunDirError, match="has no job that only evaluates"):
        logs(run, stage="evaluate")
    begin(run.evaluation, 1, rank_0="evaluation\n")
    assert list(logs(run, stage="evaluate").last_lines(5)) == ["evaluation"]


def test_what_does_not_exist_is_told_with_what_does(run: RunDir) -> None:
    with pytest.raises(RunDirError, match="was never started"):
        logs(run)
    begin(run, 1, rank_0="", srun="")
    with pytest.raises(RunDirError, match=r"there are: logs/attempt-1/rank-0.log, logs/attempt-1/srun.log"):
        logs(run, rank="1")
    with pytest.raises(ConfigError, match="--rank first"):
        logs(run, rank="first")


def test_following_goes_on_through_new_ranks_and_attempts(run: RunDir, tmp_path: Path) -> None:
    begin(run, 1, rank_0="known\n")
    found = logs(run, rank="all")
    assert list(found.last_lines(9)) == ["[0] known"]

    def phases() -> Iterator[Phase | None]:
        begin(run, 1, rank_0="known\nmore\n", rank_1="late\n")
        yield Phase.RUNNING
        begin(run, 2)
        yield Phase.QUEUED
        begin(run, 2, rank_0="again\n")
        yield Phase.UNKNOWN
        begin(run, 2, rank_0="again\nthe end\n")
        yield Phase.FINISHED

    lines = found.follow(Script(tmp_path, phases()), wait=lambda seconds: None)
    assert list(lines) == ["[0] more", "[1] late", "--- attempt 2", "[0] again", "[0] the end"]


def test_attempt_that_was_named_is_followed_alone(run: RunDir, tmp_path: Path) -> None:
    begin(run, 1, rank_0="known\n")
    begin(run, 2, rank_0="later\n")
    found = logs(run, attempt=1)
    list(found.last_lines(9))
    assert list(found.follow(Script(tmp_path, [None]), wait=lambda seconds: None)) == []


def test_launcher_is_not_asked_more_often_than_it_bears(tmp_path: Path) -> None:
    launcher = Script(tmp_path, [Phase.RUNNING, Phase.LOST])
    launcher.poll_seconds = 30.0
    times = iter([0.0, 0.0, 1.0, 29.0, 31.0, 31.0, 32.0])
    may_write = liveness(launcher, "oc-x", clock=lambda: next(times))
    assert [may_write() for _ in range(5)] == [True, True, True, False, False]
    assert launcher.asked == 2


def test_following_waits_for_a_retry_while_somebody_controls_the_sweep(tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=(0,)))
    runs, trial = tmp_path / "runs", record.trials[0]
    save_record(runs, record)
    run = RunDir(runs / "trials" / trial.id)
    start = {"attempt": 1, "job": "101", "ranks": 2, "started": 1.0}
    write_json(run.path / "jobs" / "1.start.json", start)
    write_json(run.path / "jobs" / "1.end.json", {"attempt": 1, "exit_code": 75, "ended": 2.0})
    launcher = Script(runs, repeat(None))
    is_due = retries(runs, trial, launcher, stage="pretrain")
    assert not is_due()
    with lease(record_path(runs, record.name).parent):
        assert is_due()
        assert liveness(launcher, "oc-x", is_awaited=is_due)()
        write_json(run.path / "jobs" / "1.end.json", {"attempt": 1, "exit_code": 2, "ended": 2.0})  # nothing helps
        assert not is_due()


def test_following_goes_on_through_the_pause_before_a_retry(run: RunDir, tmp_path: Path) -> None:
    begin(run, 1, rank_0="known\n")
    found = logs(run)
    list(found.last_lines(9))
    due = iter([True, False])

    def is_awaited() -> bool:
        begin(run, 2, rank_0="again\n")
        return next(due)

    lines = found.follow(Script(tmp_path, repeat(None)), is_awaited=is_awaited, wait=lambda seconds: None)
    assert list(lines) == ["--- attempt 2", "again"]

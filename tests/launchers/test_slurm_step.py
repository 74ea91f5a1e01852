"""Waiting for srun, which here is a script that says what srun says."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrate.launchers import slurm_step
from orchestrate.launchers.slurm_commands import Answer
from orchestrate.launchers.slurm_step import WATCHED, Step


class Slurm:
    """Slurm that gives tasks a second between SIGTERM and SIGKILL; notes what it was asked, and when."""

    def __init__(self, kill_wait_seconds: int = 1) -> None:
        self.asked: list[tuple[str, ...]] = []
        self._kill_wait_seconds = kill_wait_seconds

    def run(self, *words: str, text: str = "") -> Answer:
        self.asked.append(words)
        return Answer(0, f"KillWait                = {self._kill_wait_seconds} sec\n")


@pytest.fixture(autouse=True)
def signals_wait() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    yield
    while signal.sigtimedwait(WATCHED, 0) is not None:
        """Take what a test left, which would end this process."""
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def slurm_sends(number: signal.Signals, *, after_seconds: float) -> None:
    """Send a signal to the thread of the test: others of this process, which run the tests, do not block it."""
    threading.Timer(after_seconds, signal.pthread_kill, (threading.get_ident(), number)).start()


def beat_nothing() -> None:
    """Stand in for a heartbeat."""


def test_file_system_that_does_not_answer_ends_no_step(tmp_path: Path) -> None:
    def beat() -> None:
        raise OSError(116, "Stale file handle")

    log = tmp_path / "srun.log"
    words = ("bash", "-c", f"rm '{log}'; sleep 0.2; exit 75")
    assert Step(Slurm(), beat=beat).run(words, environment={}, log=log) == 75


def test_step_without_a_log_complains_in_the_output_of_the_job(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "missing" / "srun.log"
    assert Step(Slurm(), beat=beat_nothing).run(("bash", "-c", "echo no step >&2"), environment={}, log=log) == 0
    out, err = capfd.readouterr()
    assert (str(log) in out, err) == (True, "no step\n")


def test_end_of_the_job_leaves_time_for_the_record_although_slurm_is_silent(tmp_path: Path) -> None:
    slurm = Slurm(2)
    step = Step(slurm, beat=beat_nothing)
    began = time.monotonic()
    words = ("bash", "-c", "trap '' USR1; exec sleep 60")
    slurm_sends(signal.SIGTERM, after_seconds=0.1)
    assert step.run(words, environment={}, log=tmp_path / "srun.log") is None
    assert time.monotonic() - began < 2
    assert (step.stopped_by, len(slurm.asked)) == ("SIGTERM", 1)


def test_end_of_the_job_limits_the_time_of_a_stop_that_was_asked_for_before(tmp_path: Path) -> None:
    words = ("bash", "-c", "trap '' USR1; exec sleep 60")
    slurm_sends(signal.SIGUSR1, after_seconds=0.1)
    slurm_sends(signal.SIGTERM, after_seconds=0.3)
    step = Step(Slurm(), beat=beat_nothing)
    assert step.run(words, environment={}, log=tmp_path / "srun.log") is None
    assert step.stopped_by == "SIGUSR1"


def test_srun_that_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Step(Slurm(), beat=beat_nothing).run((str(tmp_path / "srun"),), environment={}, log=tmp_path / "srun.log")


def test_first_bad_end_is_looked_for_until_the_log_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_step, "_SLACK_SECONDS", 0.0)
    monkeypatch.setattr(slurm_step, "_LOOK_EVERY_SECONDS", 0.05)
    log = tmp_path / "srun.log"
    aside = tmp_path / "aside"
    said = "srun: error: m1: task 0: Exited with exit code 76"
    script = f"echo '{said}' >&2; mv '{log}' '{aside}'; mkdir '{log}'; sleep 0.2; rmdir '{log}'; mv '{aside}' '{log}'"
    words = ("bash", "-c", f"{script}; exec sleep 60")
    assert Step(Slurm(), beat=beat_nothing).run(words, environment={}, log=log) is None

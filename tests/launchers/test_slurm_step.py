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


class Sender:
    """Sends signals to the thread of the test, a fifth of a second apart, once a file is there.

    Other threads of this process, which run the tests, do not block signals.
    """

    def __init__(self) -> None:
        self._receiver = threading.get_ident()
        self._threads: list[threading.Thread] = []
        self.began = 0.0

    def send(self, *numbers: signal.Signals, once: Path) -> None:
        thread = threading.Thread(target=self._send, args=(numbers, once))
        self._threads.append(thread)
        thread.start()

    def _send(self, numbers: tuple[signal.Signals, ...], once: Path) -> None:
        deadline = time.monotonic() + 60
        while not once.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.began = time.monotonic()
        for number in numbers:
            signal.pthread_kill(self._receiver, number)
            time.sleep(0.2)

    def join(self) -> None:
        for thread in self._threads:
            thread.join()


@pytest.fixture
def sender(signals_wait: None) -> Iterator[Sender]:
    sender = Sender()
    yield sender
    sender.join()


def deaf_srun(ready: Path) -> tuple[str, ...]:
    """A step that no SIGUSR1 ends, from when `ready` is there."""
    return ("bash", "-c", f"trap '' USR1; touch '{ready}'; exec sleep 60")


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


def test_end_of_the_job_leaves_time_for_the_record_although_slurm_is_silent(tmp_path: Path, sender: Sender) -> None:
    slurm = Slurm(2)
    step = Step(slurm, beat=beat_nothing)
    sender.send(signal.SIGTERM, once=tmp_path / "ready")
    assert step.run(deaf_srun(tmp_path / "ready"), environment={}, log=tmp_path / "srun.log") is None
    assert time.monotonic() - sender.began < 2
    assert (step.stopped_by, len(slurm.asked)) == ("SIGTERM", 1)


def test_end_of_the_job_limits_the_time_of_a_stop_that_was_asked_for_before(tmp_path: Path, sender: Sender) -> None:
    step = Step(Slurm(), beat=beat_nothing)
    sender.send(signal.SIGUSR1, signal.SIGTERM, once=tmp_path / "ready")
    assert step.run(deaf_srun(tmp_path / "ready"), environment={}, log=tmp_path / "srun.log") is None
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

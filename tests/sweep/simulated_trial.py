"""What a job does to the RunDir of its trial: the keeper and the worker, played from start to end in an instant."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from orchestrate.exits import Exit
from orchestrate.launchers.attempts import attempt_numbers, checkpoint_step
from orchestrate.launchers.rank_allowance import seconds_left
from orchestrate.runs import RunDir

STEPS = 100
STEP_SECONDS = 3.0
STARTUP_SECONDS = 30.0
CHECKPOINT_EVERY = 20
EVALUATION_SECONDS = 90.0
# Heartbeats come every few seconds; what is lost with a node has been silent for so long at most.
BEAT_SECONDS = 16.0


@dataclass(frozen=True)
class Fate:
    """What happens to a run of a job, and when.

    `kind` is one of: nothing, saves, killed, node lost, time limit, error, cancelled, hangs, bad input, diverges,
    allowance spent.
    """

    kind: str = "nothing"
    after_seconds: float = float("inf")


@dataclass(frozen=True)
class Script:
    """What a batch script says."""

    name: str
    folder: RunDir
    ranks: int
    exclude: frozenset[str]
    stage: str

    @classmethod
    def read(cls, path: Path) -> Self:
        text = path.read_text()
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", text, re.MULTILINE))
        assert asked["dependency"] == "singleton"
        ranks = int(asked["nodes"]) * int(asked["ntasks-per-node"])
        exclude = frozenset(filter(None, asked.get("exclude", "").split(",")))
        stage = re.findall(r"^export ORCHESTRATE_STAGE=(.*)$", text, re.MULTILINE)[0]
        return cls(asked["job-name"], RunDir(path.parent.parent), ranks, exclude, stage)

    @property
    def is_evaluation(self) -> bool:
        return self.stage == "evaluate"

    @property
    def trial(self) -> RunDir:
        return RunDir(self.folder.path.parent) if self.is_evaluation else self.folder


@dataclass
class PlayedRun:
    """One run of a job. The record of its start is written at once, all else when it ends."""

    script: Script
    job: str
    restart: int
    node: str
    started: float
    fate: Fate
    attempt: int = 0
    before: int = 0
    _files: RunDir = field(init=False)

    def __post_init__(self) -> None:
        run = self._files = self.script.folder
        if self._nothing_to_do():
            self.fate = Fate()
            return
        self.attempt = max(attempt_numbers(run), default=0) + 1
        self.before = checkpoint_step(run)
        self._close_earlier()
        start = {
            "name": self.script.name,
            "job": self.job,
            "restart": self.restart,
            "ranks": self.script.ranks,
            "nodes": [self.node],
            "started": self.started,
            "checkpoint_step": self.before,
        }
        write(run.path / "jobs" / f"{self.attempt}.start.json", start)
        allowed = max(0.0, seconds_left(run, self.attempt, ranks=self.script.ranks, now=self.started))
        if allowed < self.seconds:
            self.fate = Fate("allowance spent", allowed)

    def _nothing_to_do(self) -> bool:
        trial = self.script.trial
        return trial.done_file.exists() or (not self.script.is_evaluation and trial.trained_file.exists())

    def _close_earlier(self) -> None:
        """Write the ends that were not written, as the keeper does."""
        folder = self._files.path / "jobs"
        for number in range(self.attempt - 1, 0, -1):
            if (folder / f"{number}.end.json").exists():
                return
            worker = read(self._files.attempt_file(number)) or read(folder / f"{number}.start.json")
            if worker:
                seen = worker.get("last_seen", worker["started"])
                end = {"attempt": number, "ended": seen, "exit_code": None, "next": f"job {self.job} goes on"}
                write(folder / f"{number}.end.json", end)

    @property
    def _work_seconds(self) -> float:
        if self.script.is_evaluation:
            return EVALUATION_SECONDS
        return (STEPS - self.before) * STEP_SECONDS

    @property
    def seconds(self) -> float:
        """How long it runs, if nothing happens to it from outside."""
        if not self.attempt:
            return 0.0
        return min(self.fate.after_seconds, STARTUP_SECONDS + self._work_seconds)

    def cut_short(self, at: float, kind: str) -> None:
        """Let it end earlier, and otherwise, than it was fated to."""
        if self.attempt and at - self.started < STARTUP_SECONDS + self._work_seconds:
            self.fate = Fate(kind, at - self.started)

    def play(self, now: float, submit: Callable[[], int]) -> str:
        """Write what the run left behind; return Slurm's word for its end. `submit` queues a successor."""
        if not self.attempt:
            return "COMPLETED"
        worked = max(0.0, now - self.started - STARTUP_SECONDS)
        if worked >= self._work_seconds:
            self._complete(now)
            return "COMPLETED"
        step = self.before if self.script.is_evaluation else self.before + int(worked / STEP_SECONDS)
        return self._interrupt(self.fate.kind, step, now, submit)

    def _complete(self, now: float) -> None:
        trial = self.script.trial
        assert not trial.done_file.exists(), f"{trial.path.name}: trained twice"
        if not self.script.is_evaluation:
            self._write_worker(STEPS, now)
            write(trial.trained_file, {"fingerprint": trial.path.name})
        if self.script.stage != "pretrain":
            write(trial.done_file, {"fingerprint": trial.path.name, "finished": now})
        self._write_end(Exit.DONE, now)

    def _interrupt(self, kind: str, step: int, now: float, submit: Callable[[], int]) -> str:
        if kind in ("killed", "node lost"):
            self._write_worker(step, now - random.Random(self.started).uniform(0, BEAT_SECONDS))
            self._save(step - step % CHECKPOINT_EVERY)
            return "PREEMPTED" if kind == "killed" else "NODE_FAIL"
        self._write_worker(step, now)
        if kind in ("saves", "time limit", "asked to stop", "cancelled", "allowance spent"):
            self._save(step)
            goes_on = kind in ("saves", "time limit") and not self._files.stop_file.exists()
            following = f"job {submit()} goes on" if goes_on else ""
            hint = {"cancelled": "cancelled", "time limit": "time limit"}.get(kind, "")
            self._write_end(Exit.CONTINUE, now, next=following, hint=hint)
            return "CANCELLED" if kind == "cancelled" else "COMPLETED"
        self._save(step - step % CHECKPOINT_EVERY)
        codes = {"error": 1, "hangs": Exit.HANG, "bad input": Exit.BAD_INPUT, "diverges": Exit.DIVERGED}
        self._write_end(codes[kind], now, blamed=[self.node] if kind == "hangs" else [])
        return "FAILED"

    def _save(self, step: int) -> None:
        if step > self.before:
            (self._files.checkpoints / f"step-{step:08}").mkdir(parents=True, exist_ok=True)

    def _write_worker(self, step: int, seen: float) -> None:
        worked = max(0.0, seen - self.started - STARTUP_SECONDS)
        record = {
            "started": self.started,
            "last_seen": max(seen, self.started),
            "world_size": self.script.ranks,
            "first_step": self.before,
            "last_step": step,
            "startup_seconds": STARTUP_SECONDS,
            "train_seconds": worked,
        }
        write(self._files.attempt_file(self.attempt), record)

    def _write_end(self, code: int, now: float, **more: Any) -> None:
        end = {"attempt": self.attempt, "ended": now, "exit_code": int(code)} | more
        write(self._files.path / "jobs" / f"{self.attempt}.end.json", end)


def write(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}

"""RunDir: the folder of one trial, and every path in it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrate.errors import RunDirError


@dataclass(frozen=True)
class RunDir:
    """The truth about one trial, as files with one writer each.

    run.yaml                     the resolved config; written once, by whoever creates the folder
    status.json                  heartbeat; rank 0
    metrics.jsonl                a line a step; rank 0
    damaged_samples.jsonl        training samples in whose place others stand; rank 0; absent if there are none
    checkpoints/<step>/          whole or absent; `checkpoints/latest.json` moves last
    results/<encoder>.<key>.json one probe of one encoder; results/done.json proves completion; rank 0
    results/trained.json         proves that the training is over; rank 0
    results/step-<n>/            probes of the checkpoint of step n, with a done.json of its own; rank 0 that evaluates
    evaluation/                  of the jobs that only evaluate: stop, lock, status.json, attempts/, jobs/, logs/
    code.json                    which frozen copy of the code the trial runs; the controller
    logs/attempt-<n>/rank-<r>.log
    attempts/<n>.json            one job that worked on the trial; rank 0 of that attempt
    stop                         its existence asks the ranks to save and stop
    cancelled.json               its existence says that a person cancelled the trial
    lock                         held by rank 0 while it lives
    """

    path: Path

    @property
    def config_file(self) -> Path:
        """The resolved RunConfig."""
        return self.path / "run.yaml"

    @property
    def status_file(self) -> Path:
        """The heartbeat."""
        return self.path / "status.json"

    @property
    def metrics_file(self) -> Path:
        """A JSON line for each optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def damaged_file(self) -> Path:
        """A JSON line for each damaged training sample."""
        return self.path / "damaged_samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def results(self) -> Path:
        """Folder of what the probes found."""
        return self.path / "results"

    @property
    def done_file(self) -> Path:
        """The only proof of completion."""
        return self.results / "done.json"

    @property
    def trained_file(self) -> Path:
        """The only proof that the training is over, where another job evaluates."""
        return self.results / "trained.json"

    @property
    def evaluation(self) -> "RunDir":
        """Folder of the jobs that only evaluate; results and checkpoints stay in this one."""
        return RunDir(self.path / "evaluation")

    @property
    def code_file(self) -> Path:
        """Says which frozen copy of the code the trial runs."""
        return self.path / "code.json"

    @property
    def weights_file(self) -> Path:
        """Final weights and buffers of the whole method."""
        return self.results / "weights.safetensors"

    @property
    def events(self) -> Path:
        """Folder of the TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def attempts(self) -> Path:
        """Folder of the attempt records."""
        return self.path / "attempts"

    @property
    def stop_file(self) -> Path:
        """Asks the ranks to save and stop."""
        return self.path / "stop"

    @property
    def cancelled_file(self) -> Path:
        """Says that a person cancelled the trial."""
        return self.path / "cancelled.json"

    @property
    def lock_file(self) -> Path:
        """Held by rank 0 while it lives."""
        return self.path / "lock"

    def attempt_file(self, attempt: int) -> Path:
        """Record of one attempt, counted from 1."""
        return self.attempts / f"{attempt}.json"

    def log_file(self, attempt: int, rank: int) -> Path:
        """Output of one rank of one attempt."""
        return self.path / "logs" / f"attempt-{attempt}" / f"rank-{rank}.log"


def create_run_dir(path: Path, config_yaml: str) -> RunDir:
    """Make the folder of a trial; a run.yaml that is there already is left alone.

    Raises:
        RunDirError: the folder cannot be written.
    """
    run = RunDir(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not run.config_file.exists():
            write_text(run.config_file, config_yaml)
    except OSError as error:
        raise RunDirError(f"{path}: cannot be written: {error.strerror}; choose another folder with --runs") from error
    return run


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: written aside, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step; see `write_text`."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if the file does not exist or is not whole."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None

"""Time of one pass of a sweep's controller over 10,000 trials on Slurm: ask, read files, decide, act.

    python benchmarks/reconcile.py [--json] [--trials N]

Slurm is a stand-in that answers at once with text of the right size, so that what is measured is ours: reading the
answer and the files (on this disk, warm), deciding, and writing what is news. No peer does this work: submitit asks
about all jobs at once too, but reads no files, decides nothing and starts nothing again. Ends with 1 if a pass over
10,000 trials takes 5 s or more.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from orchestrate.launchers.cluster import ClusterConfig
from orchestrate.launchers.slurm import SlurmLauncher
from orchestrate.launchers.slurm_commands import Answer
from orchestrate.store import open_store, store_path
from orchestrate.sweep.controller import Controller
from orchestrate.sweep.record import SweepRecord, TrialEntry

PARALLEL = 64
LIMIT_SECONDS = 5.0
NOW = 1.7e9
# Ended jobs that squeue still shows, of every five minutes.
SHOWN = 500


class StandIn:
    """Answer as Slurm does for jobs that run, and take every submission."""

    def __init__(self, running: list[str], ended: list[str]) -> None:
        self.calls: Counter[str] = Counter()
        self._running, self._ended = running, ended

    def run(self, *words: str, text: str = "") -> Answer:
        """Answer a command."""
        self.calls[words[0]] += 1
        if words[0] == "squeue":
            fields = [field.split(":") for field in words[-1].partition("=")[2].split(",")]
            rows = [self._row(number, name, "RUNNING") for number, name in enumerate(self._running)]
            rows += [self._row(10**6 + number, name, "COMPLETED") for number, name in enumerate(self._ended)]
            lines = ["".join(row.get(key, "").ljust(int(width)) for key, width in fields) for row in rows]
            return Answer(0, "\n".join(lines))
        if words[0] == "sacct":
            lines = [f"{10**6 + n}|{10**6 + n}|COMPLETED|{NOW - 9e3:.0f}|{NOW - 10:.0f}|n1" for n in range(20_000)]
            return Answer(0, "\n".join(lines))
        return Answer(0, f"Submitted batch job {2 * 10**6 + self.calls['sbatch']}")

    def _row(self, job: int, name: str, state: str) -> dict[str, str]:
        times = {"StartTime": f"{NOW - 9e3:.0f}", "EndTime": f"{NOW - 10:.0f}", "SubmitTime": f"{NOW - 9.1e3:.0f}"}
        known = {"JobArrayID": str(job), "JobID": str(job), "State": state, "RestartCnt": "0", "Name": name}
        return {"Reason": "None", "PreemptTime": "N/A", "NodeList": "n[1-2]", **times, **known}


def sweep_of(count: int) -> SweepRecord:
    """Make the record of a sweep of small trials."""
    values = {"launcher": "slurm", "code": "live", "resources": {"nodes": 2}, "limits": {"parallel": PARALLEL}}
    place = ClusterConfig.model_validate(values)
    trials = tuple(TrialEntry(f"{number:016x}", {"seed": number}, {"seed": number}, 100) for number in range(count))
    return SweepRecord(
        name="study",
        file="study.yaml",
        sha="",
        sweep_yaml="",
        cluster_yaml="",
        cluster=place.model_dump(mode="json"),
        limits={"parallel": 0, "gpu_hours": 1e6},
        objective={"metric": "loss", "goal": "min"},
        command=(),
        commit=None,
        dirty=False,
        created=0.0,
        trials=trials,
    )


def live_through(runs: Path, record: SweepRecord) -> StandIn:
    """Write what trials leave after two attempts each: one of a hundred waits for a third, 64 run, others are done."""
    running, ended = [], []
    for number, trial in enumerate(record.trials):
        name, folder = f"oc-{trial.id}", runs / "trials" / trial.id
        is_running = number < PARALLEL
        attempts = (1, 2)
        write(folder / "run.yaml", {"seed": number})
        (folder / "checkpoints" / "step-00000050").mkdir(parents=True)
        for attempt in attempts:
            job = number if is_running and attempt == 2 else 10**6 + 2 * number + attempt
            start = {"job": str(job), "ranks": 2, "started": NOW - 9e3, "checkpoint_step": 0, "nodes": ["n1", "n2"]}
            write(folder / "jobs" / f"{attempt}.start.json", start)
            seen = {"first_step": 0, "last_step": 50, "last_seen": NOW - 10, "train_seconds": 8e3}
            write(folder / "attempts" / f"{attempt}.json", seen)
            if not (is_running and attempt == 2):
                done = attempt == 2 and number % 100 > 0
                end = {"attempt": attempt, "ended": NOW - 10, "exit_code": 0 if done else 75}
                write(folder / "jobs" / f"{attempt}.end.json", end)
        if is_running:
            running.append(name)
        elif number % 100 > 0:
            write(folder / "results" / "done.json", {"fingerprint": trial.id, "finished": NOW - 10})
            ended.append(name)
    return StandIn(running, ended[:SHOWN])


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, in no particular care."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def measure(count: int) -> dict[str, float]:
    """Time passes over sweeps that never began, and over one that has lived, in seconds."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        fresh, lived = Path(folder) / "fresh", Path(folder) / "lived"
        record = sweep_of(count)
        found["first pass, no trial has begun"], *_ = passes(fresh, record, StandIn([], []))
        slurm = live_through(lived, record)
        first, second, calls = passes(lived, record, slurm)
        found["first pass, all trials have two attempts"] = first
        found["next pass, all trials have two attempts"] = second
        found["calls of squeue and sacct, each pass"] = calls
    return found


def passes(runs: Path, record: SweepRecord, slurm: StandIn) -> tuple[float, float, float]:
    """Return the seconds of the first pass of a new controller, of the next, and the questions that one asked."""
    runs.mkdir(parents=True, exist_ok=True)
    launcher = SlurmLauncher(record.cluster_config(), runs, commands=slurm, clock=lambda: NOW)
    times = []
    with open_store(store_path(runs)) as store:
        controller = Controller(record, runs, launcher, store, clock=lambda: NOW)
        for _ in range(2):
            before = slurm.calls["squeue"] + slurm.calls["sacct"]
            began = time.perf_counter()
            controller.reconcile()
            times.append(time.perf_counter() - began)
            questions = slurm.calls["squeue"] + slurm.calls["sacct"] - before
    return times[0], times[1], questions


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--trials", type=int, default=10_000)
    options = parser.parse_args()
    import submitit  # noqa: F401  its import is paid once a process, by whatever submits first

    found = measure(options.trials)
    for name, value in found.items():
        unit = "calls" if "calls" in name else "s"
        title = f"{name}, {options.trials} trials"
        row = {"name": title, "ours": round(value, 3), "peer": None, "ratio": None, "unit": unit}
        print(json.dumps(row) if options.json else f"{title}: {row['ours']} {unit}")
    slow = [name for name, value in found.items() if "pass," in name and value >= LIMIT_SECONDS]
    for name in slow:
        print(f"{name}: takes {LIMIT_SECONDS:g} s or more (load {os.getloadavg()[0]:.1f})", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())

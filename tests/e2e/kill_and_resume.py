"""Kill a sweep at random moments, take it up again, and compare it with an undisturbed one.

    python tests/e2e/kill_and_resume.py sweeps/tiny/every_state.yaml --cluster cluster_configs/local.yaml --kills 100
    python tests/e2e/kill_and_resume.py sweeps/tiny/every_method.yaml --cluster cluster_configs/local.yaml --each

Runs the sweep twice: once undisturbed, once with `--kills` SIGKILLs, or with one in `--each` trial. Each is one of
- anytime: controller and every process it started, at a random time after the start, also while they start;
- training: the same, after a random number of new steps;
- save: the same, while the next checkpoint is being written;
- one rank: a single rank; the others and the controller must notice.
After each of the first three, `orchestrate resume` is typed. In the end, for each trial: metrics.jsonl has every step
exactly once, batches and losses are the same, and the final weights are byte-identical.
Prints a JSON line for each trial; exits 1 if any differs.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import yaml

KINDS = ("anytime", "training", "save", "one rank")
PATIENCE_SECONDS = 90.0  # for a sign of training, or a save
STEP_SECONDS, SAVE_SECONDS = 0.02, 0.0005  # between looks for a step, and for a save, which is short


def main() -> int:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--cluster", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--each", action="store_true", help="kill each trial once, whatever --kills says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/kill_and_resume"), help="holds both runs; reused")
    parser.add_argument("--longest", type=float, default=15.0, help="seconds from a start to a kill at any time")
    parser.add_argument("--steps", type=int, default=40, help="steps from a start to a kill of another kind")
    options = parser.parse_args()
    quiet, disturbed = options.runs.resolve() / "undisturbed", options.runs.resolve() / "disturbed"
    subprocess.run(sweep_command(options.sweep, options.cluster, quiet), check=True)
    rng = random.Random(options.seed)
    disturbance = Disturbance(options.sweep, options.cluster, disturbed, rng)
    if options.each:
        kills = disturbance.run_each(steps=options.steps)
    else:
        kills = disturbance.run(rng.choices(KINDS, k=options.kills), longest=options.longest, steps=options.steps)
    rows = compare(quiet, disturbed)
    for row in rows:
        print(json.dumps(row))
    same = all(row["same"] for row in rows)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(kills.items()))
    print(f"{len(rows)} trials, {sum(kills.values())} kills: {'all' if same else 'NOT all'} the same")
    print(f"({counts}; {disturbance.cut_saves} left a save unfinished)")
    return 0 if same and rows else 1


def sweep_command(sweep: Path, cluster: Path, runs: Path) -> list[str]:
    """Return the command a person types."""
    command = [sys.executable, "-m", "orchestrate", "sweep", str(sweep), "--cluster", str(cluster)]
    return [*command, "--runs", str(runs)]


def resume_command(sweep: Path, runs: Path) -> list[str]:
    """Return the command a person types when something broke; it forgives spent retries."""
    name = yaml.safe_load(sweep.read_text())["name"]
    return [sys.executable, "-m", "orchestrate", "resume", name, "--runs", str(runs)]


class Disturbance:
    """A sweep that is killed again and again."""

    def __init__(self, sweep: Path, cluster: Path, runs: Path, rng: random.Random) -> None:
        self._sweep, self._cluster, self._runs, self._rng = sweep, cluster, runs, rng
        self.cut_saves = 0

    def run(self, kinds: Sequence[str], *, longest: float, steps: int) -> Counter[str]:
        """Run to the end through kills of these kinds, one after the other.

        Args:
            kinds: of the kills.
            longest: seconds from a start to a kill at any time, at most.
            steps: optimizer steps from a start to a kill of another kind, at most.

        Returns:
            How many kills of each kind there was time for.
        """
        done: Counter[str] = Counter()
        controller = subprocess.Popen(sweep_command(self._sweep, self._cluster, self._runs))
        for kind in kinds:
            while not self._wait_for_moment(kind, controller, longest, steps):
                if controller.poll() == 0:
                    return done
                controller = self._resume(controller)
            killed = self._kill_a_rank() if kind == "one rank" else self._kill_all(controller)
            done[kind] += bool(killed)
            print(f"kill {done.total()}, {kind}: {killed} processes", flush=True)
            if kind != "one rank":
                controller = self._resume(controller)
        while controller.wait() != 0:
            controller = self._resume(controller)
        return done

    def run_each(self, *, steps: int) -> Counter[str]:
        """Run to the end, and kill each trial once in its first `steps` steps; kinds take turns, but for `anytime`.

        Trials must run one at a time, and each for more than `steps` steps and a save.
        """
        done: Counter[str] = Counter()
        killed: set[str] = set()
        controller = subprocess.Popen(sweep_command(self._sweep, self._cluster, self._runs))
        while controller.poll() != 0:
            kind = KINDS[1 + done.total() % 3]
            log = Growth(self._runs, but=killed)
            lines = self._rng.randint(1, steps)
            if not self._until(lambda log=log, lines=lines: log.new_lines() >= lines, controller):
                if controller.poll() != 0:
                    controller = self._resume(controller)
                continue
            if kind == "save":
                self._until(lambda: bool(unfinished_saves(self._runs)), controller, every=SAVE_SECONDS)
            (trial,) = log.grown
            hit = self._kill_a_rank() if kind == "one rank" else self._kill_all(controller)
            killed.add(trial)
            done[kind] += bool(hit)
            print(f"kill {done.total()}, {trial}, {kind}: {hit} processes", flush=True)
            if kind != "one rank":
                controller = self._resume(controller)
        return done

    def _resume(self, controller: "subprocess.Popen[bytes]") -> "subprocess.Popen[bytes]":
        if controller.poll() is None:  # it waits for something that will not come
            controller.kill()
            controller.wait()
        started = (self._runs / "sweeps").exists() and any((self._runs / "sweeps").iterdir())
        again = resume_command(self._sweep, self._runs)
        return subprocess.Popen(again if started else sweep_command(self._sweep, self._cluster, self._runs))

    def _wait_for_moment(self, kind: str, controller: "subprocess.Popen[bytes]", longest: float, steps: int) -> bool:
        """Wait for a moment of a kind; tell whether the sweep still runs then."""
        if kind == "anytime":
            self._until(lambda: False, controller, self._rng.uniform(0, longest))
            return controller.poll() is None
        log = Growth(self._runs)
        lines = self._rng.randint(1, steps)
        if not self._until(lambda: log.new_lines() >= lines, controller):
            return False
        return kind != "save" or self._until(lambda: bool(unfinished_saves(self._runs)), controller, every=SAVE_SECONDS)

    def _until(
        self,
        condition: Callable[[], bool],
        controller: "subprocess.Popen[bytes]",
        patience: float = PATIENCE_SECONDS,
        *,
        every: float = STEP_SECONDS,
    ) -> bool:
        ends = time.monotonic() + patience
        while controller.poll() is None and time.monotonic() < ends:
            if condition():
                return True
            time.sleep(every)
        return False

    def _kill_all(self, controller: "subprocess.Popen[bytes]") -> int:
        """SIGKILL the controller and every process that works below `runs`; half the time supervisors are spared."""
        controller.kill()
        spare = self._rng.random() < 0.5
        mine = [
            (pid, command) for pid, command in processes_on(self._runs) if "orchestrate.worker" in command or not spare
        ]
        killed = 1 + sum(kill(pid) for pid, _ in mine)
        controller.wait()
        self.cut_saves += bool(unfinished_saves(self._runs))
        return killed

    def _kill_a_rank(self) -> int:
        ranks = [pid for pid, command in processes_on(self._runs) if "orchestrate.worker" in command]
        return kill(self._rng.choice(sorted(ranks))) if ranks else 0


def kill(pid: int) -> int:
    """SIGKILL a process; return 1 if it was there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return 1
    return 0


class Growth:
    """How many steps were logged since this began to look, in trials but for some."""

    def __init__(self, runs: Path, *, but: Collection[str] = ()) -> None:
        self._runs, self._but = runs, frozenset(but)
        self._lines = 0
        self.grown: set[str] = set()
        self._sizes = self._look()

    def new_lines(self) -> int:
        """Count them; a resume cuts steps off, which does not count."""
        sizes = self._look()
        for path, size in sizes.items():
            if size > (before := self._sizes.get(path, 0)):
                self._lines += path.read_bytes()[before:size].count(b"\n")
                self.grown.add(path.parent.name)
        self._sizes = sizes
        return self._lines

    def _look(self) -> dict[Path, int]:
        files = [path for path in self._runs.glob("trials/*/metrics.jsonl") if path.parent.name not in self._but]
        return {path: path.stat().st_size for path in files}


def unfinished_saves(runs: Path) -> list[str]:
    """List the checkpoints that are being written, or whose writing was cut."""
    names = []
    for trial in (runs / "trials").glob("*/checkpoints"):
        with contextlib.suppress(FileNotFoundError):
            names += [entry.name for entry in os.scandir(trial) if entry.name.startswith(".tmp-")]
    return names


def processes_on(runs: Path) -> list[tuple[int, str]]:
    """List the processes of ours that work below `runs`: it stands in their command line, or they log into it."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if "orchestrate" in command and f"{runs}/" in command + str((folder / "fd" / "1").readlink()):
                    found.append((int(folder.name), command))
    return found


def compare(quiet: Path, disturbed: Path) -> list[dict[str, Any]]:
    """Compare every trial of two runs folders."""
    rows = []
    for trial in sorted((quiet / "trials").iterdir()):
        other = disturbed / "trials" / trial.name
        first, second = steps_of(trial), steps_of(other)
        facts = {
            "every_step_once": [step["step"] for step in second] == list(range(1, len(first) + 1)),
            "same_batches": [step["batch"] for step in second] == [step["batch"] for step in first],
            "same_losses": [step["loss"] for step in second] == [step["loss"] for step in first],
            "same_weights": weights_of(trial) == weights_of(other) != b"",
        }
        attempts = len(
            list((other / "attempts").glob("[0-9].json")) + list((other / "attempts").glob("[0-9][0-9].json"))
        )
        rows.append({"trial": trial.name, "attempts": attempts, **facts, "same": all(facts.values())})
    return rows


def steps_of(trial: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl; empty if there is none."""
    path = trial / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights_of(trial: Path) -> bytes:
    """Read the final weights; empty if there are none."""
    path = trial / "results" / "weights.safetensors"
    return path.read_bytes() if path.exists() else b""


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(code)

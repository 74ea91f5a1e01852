"""Kill a sweep at random moments, start it again, and compare it with an undisturbed one.

    python tests/e2e/kill_and_resume.py sweeps/quickstart.yaml --cluster cluster_configs/local.yaml --kills 10

Runs the sweep twice with `orchestrate sweep`: once undisturbed, once with SIGKILL of the controller and of every
process it started, `--kills` times at random moments; after each the same command is typed again. Then, for each trial:
metrics.jsonl has every step exactly once, batches and losses are the same, and the final weights are byte-identical.
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
from pathlib import Path
from typing import Any


def main() -> int:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--cluster", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/kill_and_resume"), help="holds both runs; reused")
    parser.add_argument("--between", type=float, nargs=2, default=(3.0, 40.0), metavar=("MIN", "MAX"), help="seconds")
    options = parser.parse_args()
    quiet, disturbed = options.runs.resolve() / "undisturbed", options.runs.resolve() / "disturbed"
    subprocess.run(sweep_command(options.sweep, options.cluster, quiet), check=True)
    kills = disturb(
        options.sweep, options.cluster, disturbed, options.kills, options.between, random.Random(options.seed)
    )
    rows = compare(quiet, disturbed)
    for row in rows:
        print(json.dumps(row))
    same = all(row["same"] for row in rows)
    print(f"{len(rows)} trials, {kills} kills: " + ("all the same" if same else "NOT all the same"))
    return 0 if same and rows else 1


def sweep_command(sweep: Path, cluster: Path, runs: Path) -> list[str]:
    """Return the command a person types."""
    command = [sys.executable, "-m", "orchestrate", "sweep", str(sweep), "--cluster", str(cluster)]
    return [*command, "--runs", str(runs)]


def disturb(
    sweep: Path, cluster: Path, runs: Path, kills: int, between: tuple[float, float], rng: random.Random
) -> int:
    """Run a sweep to its end through `kills` kills; return how many there was time for."""
    for number in range(kills):
        controller = subprocess.Popen(sweep_command(sweep, cluster, runs))
        pause = rng.uniform(*between)
        with contextlib.suppress(subprocess.TimeoutExpired):
            controller.wait(timeout=pause)
            return number
        killed = kill_all(runs, controller, spare_supervisors=rng.random() < 0.5)
        print(f"kill {number + 1} after {pause:.1f} s: {killed} processes", flush=True)
    subprocess.run(sweep_command(sweep, cluster, runs), check=True)
    return kills


def kill_all(runs: Path, controller: "subprocess.Popen[bytes]", *, spare_supervisors: bool) -> int:
    """SIGKILL the controller and every process that works below `runs`; return how many there were."""
    controller.kill()
    controller.wait()
    killed = 1
    for pid, command in processes_on(runs):
        if spare_supervisors and "orchestrate.worker" not in command:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            killed += 1
    return killed


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

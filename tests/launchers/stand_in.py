"""A job that keeps the worker's contract without training: `python stand_in.py RUN_DIR`.

`RUN_DIR/script.json` holds what each attempt does, as `[{"0": "done", "1": "wait"}, ...]`; the last entry serves for
all later attempts, `*` for all other ranks. Without the file every rank is `done`.

    done          write the results and exit 0
    exit:N        exit with that code
    wait          take a step, tell that it is ready, then wait for a stop request: save and exit 75
    deaf          as `wait`, but ignore stop requests
    parent        as `wait`, with a child that outlives its parent unless it is killed
    crash         end by SIGKILL
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from orchestrate.runs import RunDir, read_json, write_json

STOP = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


class StandIn:
    def __init__(self, path: Path) -> None:
        self.run = RunDir(path)
        self.rank = int(os.environ["RANK"])
        self.attempt = int(os.environ["ORCHESTRATE_ATTEMPT"])
        self.started = time.time()

    def action(self) -> str:
        path = self.run.path / "script.json"
        script = json.loads(path.read_text()) if path.exists() else [{"*": "done"}]
        entry = script[min(self.attempt, len(script)) - 1]
        return str(entry.get(str(self.rank), entry.get("*", "wait")))

    def say(self, state: str, step: int, exit_code: int | None = None) -> None:
        if self.rank != 0:
            return
        facts = {"attempt": self.attempt, "pid": os.getpid(), "world_size": int(os.environ["WORLD_SIZE"])}
        status = {"state": state, "step": step, "total_steps": 10, "images": step * 8, "loss": 1.0, "time": time.time()}
        write_json(self.run.status_file, {**facts, **status, "images_per_second": 100.0, "data_wait_percent": 1.0})
        life = {"started": self.started, "last_seen": time.time(), "exit_code": exit_code}
        write_json(self.run.attempt_file(self.attempt), {**facts, **life, "first_step": 0, "last_step": step})

    def save(self) -> int:
        """Move the checkpoint on by a step and return the step."""
        step = 1 + max((int(path.name[5:]) for path in self.run.checkpoints.glob("step-*")), default=0)
        (self.run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
        return step

    def ready(self) -> None:
        folder = self.run.path / "ready"
        folder.mkdir(exist_ok=True)
        (folder / f".{self.attempt}-{self.rank}").write_text(str(os.getpid()))
        (folder / f".{self.attempt}-{self.rank}").rename(folder / f"{self.attempt}-{self.rank}")

    def done(self) -> int:
        if self.rank == 0:
            number = int(self.run.path.name[:4], 16) / 0xFFFF if self.run.path.name.isalnum() else 0.5
            cost = {"train_seconds": 0.8, "rank_seconds": 1.6, "world_size": 2, "device": "cpu"}
            size = {"step": 10, "images": 80, "epochs": 1.0, "num_train_samples": 80}
            rest = {"metrics": {"knn_k20.top1": number}, "finished": time.time()}
            self.say("done", 10, 0)
            write_json(self.run.done_file, {"fingerprint": self.run.path.name, **cost, **size, **rest})
        return 0

    def wait(self) -> int:
        self.say("training", 3)
        self.ready()
        signal.sigwait(STOP)
        step = self.save() if self.rank == 0 else 0
        self.say("stopped", step, 75)
        return 75

    def work(self) -> int:
        action = self.action()
        print(f"rank {self.rank} attempt {self.attempt}: {action}", flush=True)
        if action == "done" or read_json(self.run.done_file):
            return self.done()
        if action.startswith("exit:"):
            return int(action.removeprefix("exit:"))
        if action == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "deaf":
            self.ready()
            while True:
                signal.sigwait(STOP)
        if action == "parent" and os.fork() == 0:
            (self.run.path / "child").write_text(str(os.getpid()))
            signal.pause()
        return self.wait()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    sys.exit(StandIn(Path(sys.argv[1])).work())

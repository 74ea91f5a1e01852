"""What goes wrong on a cluster, done to a trial while it trains."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.slurm.cluster import wait_for
from tests.slurm.pace import hang_file
from tests.slurm.studies import Attempt, Trial

# Long enough for several looks at the queue to fail; scripts/soak takes a minute.
OUTAGE_SECONDS = 12.0

Fault = Callable[[Trial, Attempt], None]


def lose_rank(trial: Trial, attempt: Attempt) -> None:
    """SIGKILL rank 1."""
    assert trial.cluster.signal_rank(attempt.job, 1)


def requeue(trial: Trial, attempt: Attempt) -> None:
    """`scontrol requeue`."""
    trial.cluster.requeue(attempt.job)


def send(name: str) -> Fault:
    """Return a fault that is a signal to all ranks."""
    return lambda trial, attempt: trial.cluster.signal(attempt.job, name)


def preempt(trial: Trial, attempt: Attempt) -> None:
    """Give the nodes of the trial to somebody with a higher priority for a moment."""
    trial.cluster.preempt(attempt.nodes)


def lose_node(index: int) -> Fault:
    """Return a fault that lets a node of the trial vanish, all its processes at once, until Slurm has missed it."""

    def fault(trial: Trial, attempt: Attempt) -> None:
        node = attempt.nodes[index]
        trial.cluster.kill_node(node)
        try:
            wait_for(lambda: "down" in trial.cluster.run("sinfo", "-h", "-n", node, "-o", "%T"), f"{node} is missed")
        finally:
            trial.cluster.revive_node(node)

    return fault


def freeze_rank(trial: Trial, attempt: Attempt) -> None:
    """SIGSTOP rank 1: rank 0 waits for it in a collective."""
    assert trial.cluster.signal_rank(attempt.job, 1, signal.SIGSTOP)


def freeze_all(trial: Trial, attempt: Attempt) -> None:
    """SIGSTOP all ranks: nobody sees a request to stop, until Slurm kills them."""
    for pid in trial.cluster.ranks(attempt.job).values():
        os.kill(pid, signal.SIGSTOP)


def hang_loader(trial: Trial, attempt: Attempt) -> None:
    """Let the loader of rank 1 never return, while all its threads live."""
    hang_file(trial.run.path, 1).touch()


def damage_checkpoint(trial: Trial, attempt: Attempt) -> None:
    """Lose all ranks, and let the latest checkpoint be damaged, while there is one before it."""

    def checkpoints() -> list[Path]:
        return sorted(trial.run.checkpoints.glob("step-*"))

    wait_for(lambda: len(checkpoints()) >= 2, f"two checkpoints of {trial.id}")
    ranks = trial.cluster.ranks(attempt.job).values()
    for pid in ranks:  # nothing newer is saved while we damage the latest
        os.kill(pid, signal.SIGSTOP)
    damage(max((path for path in checkpoints()[-1].rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
    for pid in ranks:
        os.kill(pid, signal.SIGKILL)


def damage(path: Path) -> None:
    """Turn over a byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def lose_controller(seconds: float = OUTAGE_SECONDS) -> Fault:
    """Return a fault that takes slurmctld away for a while, in which all ranks are asked to stop."""

    def fault(trial: Trial, attempt: Attempt) -> None:
        with trial.cluster.without_controller():
            ends = time.monotonic() + seconds
            for pid in trial.cluster.ranks(attempt.job).values():
                os.kill(pid, signal.SIGUSR1)
            wait_for(lambda: time.monotonic() > ends, "the outage is over")

    return fault


def nothing(trial: Trial, attempt: Attempt) -> None:
    """Leave a trial alone."""

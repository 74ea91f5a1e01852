"""The job that this process is part of, as Slurm's variables describe it on the first node."""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrate.launchers.host_list import expand_hosts


@dataclass(frozen=True)
class SlurmJob:
    """A job, in one of its runs.

    Attributes:
        job: id that Slurm's commands take; `12_3` for a task of an array.
        number: id of its own, also for a task of an array.
        restart: how often Slurm has started it again.
        node: name that Slurm gives to this host.
        nodes: all of the job's, the first first.
        ranks: tasks of the step that is to be started.
        partition: where it runs.
    """

    job: str
    number: str
    restart: int
    node: str
    nodes: tuple[str, ...]
    ranks: int
    tasks_per_node: tuple[int, ...]
    partition: str

    @staticmethod
    def of(environment: Mapping[str, str]) -> "SlurmJob":
        """Read the variables of a batch script.

        Raises:
            KeyError: this is no job of Slurm's.
        """
        number, array = environment["SLURM_JOB_ID"], environment.get("SLURM_ARRAY_JOB_ID", "")
        nodes = expand_hosts(environment["SLURM_JOB_NODELIST"])
        per_node = expand_counts(environment.get("SLURM_TASKS_PER_NODE", ""))
        return SlurmJob(
            job=f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '')}" if array else number,
            number=number,
            restart=int(environment.get("SLURM_RESTART_COUNT") or 0),
            node=environment.get("SLURMD_NODENAME") or socket.gethostname(),
            nodes=nodes,
            ranks=int(environment.get("SLURM_NTASKS") or sum(per_node) or len(nodes)),
            tasks_per_node=per_node,
            partition=environment.get("SLURM_JOB_PARTITION", ""),
        )

    @property
    def places(self) -> tuple[str, ...]:
        """Node of every rank; empty texts if the counts do not say it. Our scripts distribute ranks in blocks."""
        placed = [node for node, count in zip(self.nodes, self.tasks_per_node, strict=False) for _ in range(count)]
        return tuple(placed) if len(placed) == self.ranks else ("",) * self.ranks


def expand_counts(text: str) -> tuple[int, ...]:
    """Return every count of a list such as `2(x3),1`."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return tuple(int(count) for count, times in found for _ in range(int(times or 1)))

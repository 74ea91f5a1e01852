"""What srun's complaints say of the end of a step: which task ended how, in which order, and what Slurm did to it.

srun: error: m1: tasks 0-1: Exited with exit code 75
srun: launch/slurm: _step_signal: Terminating StepId=3.0        from here on tasks were told to end
srun: error: m2: task 2: Killed
srun: error: Node failure on m2
srun: error: Task launch for StepId=3.0 failed on node m2: Communication connection failure
slurmstepd-m1: error: *** STEP 3.0 ON m1 CANCELLED AT 2026-01-31T10:00:00 DUE TO TIME LIMIT ***
[2026-01-31T10:00:00.765] error: *** JOB 3 ON m1 CANCELLED AT 2026-01-31T10:00:00 DUE TO TIME LIMIT ***    newer Slurm
"""

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrate.launchers.host_list import expand_hosts, expand_numbers

# Causes, in the words of the sweep's table of causes; the first that is found counts.
OUT_OF_MEMORY, TIME_LIMIT, PREEMPTED = "out of memory", "time limit", "preempted"
NODE_FAILURE, CANCELLED, INFRASTRUCTURE = "node failure", "cancelled", "infrastructure"
_HINTS = (
    (re.compile(r"DUE TO TIME LIMIT"), TIME_LIMIT),
    (re.compile(r"DUE TO PREEMPTION"), PREEMPTED),
    (re.compile(r"DUE TO NODE FAILURE|error: Node failure on|(?i:node_fail)"), NODE_FAILURE),
    (re.compile(r"DUE TO JOB REQUEUE"), PREEMPTED),  # by a person or a scheduler: Slurm starts it again by itself
    (re.compile(r"exceeded memory limit|[Oo]om[-_ ][Kk]ill|: Out Of Memory$"), OUT_OF_MEMORY),
    (re.compile(r"error: Task launch for \S+ failed on node"), INFRASTRUCTURE),
)
# Older step daemons begin with their name, newer ones with the time; a worker's last line may be unfinished before it.
_SLURMS = re.compile(r"^\s*(?:srun:|slurmstepd)|slurmstepd\S*: error: |\[\d{4}-\d\d-\d\dT[\d:.]+\] error: ")
_TASKS = re.compile(r"^srun: error: (?P<nodes>[^\s:]+): tasks? (?P<tasks>[\d,-]+): (?P<end>.*)$")
_EXITED = re.compile(r"^Exited with exit code (\d+)")
_TOLD_TO_END = re.compile(r"Terminating (?:StepId|JobId|job step)|[Ff]orcing job termination|Job step aborted")
_LOST_NODE = re.compile(r"error: Node failure on (\S+)")
_NOT_LAUNCHED = re.compile(r"error: Task launch for \S+ failed on node ([^\s:]+)")
# Newer daemons add the signal. DUE TO TASK FAILURE is what srun itself does after the first bad end.
_CANCELLED = re.compile(r"\*\*\* (?:JOB|STEP) \S+ ON \S+ CANCELLED AT \S+ (?:DUE to SIGNAL .*)?\*\*\*")
_NO_STEP = re.compile(r"^srun: (?:error|fatal): (.*)$")
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}


@dataclass(frozen=True)
class TaskEnd:
    """How a task ended.

    Attributes:
        rank: of the task in its step.
        code: exit code; negative for a signal.
        node: where it ran; empty if the line names several nodes.
    """

    rank: int
    code: int
    node: str


@dataclass(frozen=True)
class SrunLog:
    """What the complaints say.

    Attributes:
        ends: of the tasks that did not end with 0, in order.
        first: those of `ends` that came before tasks were told to end.
        hint: what Slurm did: one of the causes above, or empty.
        cancelled: whether it says that job or step was cancelled, and not why; a failing task causes that too.
        lost_nodes: nodes that Slurm says have failed.
        not_launched: nodes on which no task could be started.
        evidence: line that `hint` is from, or the last complaint of srun itself.
    """

    ends: tuple[TaskEnd, ...] = ()
    first: tuple[TaskEnd, ...] = ()
    hint: str = ""
    cancelled: bool = False
    lost_nodes: tuple[str, ...] = ()
    not_launched: tuple[str, ...] = ()
    evidence: str = ""


def parse_srun_log(lines: Iterable[str]) -> SrunLog:
    """Read the complaints of srun and of Slurm's step daemons; other lines are passed over."""
    ends: list[TaskEnd] = []
    first: list[TaskEnd] | None = None
    told = [line.strip() for line in lines if _is_slurms(line)]
    for line in told:
        ends += _task_ends(line)
        if first is None and _TOLD_TO_END.search(line):
            first = [*ends]
    hint, evidence = _find_hint(told)
    return SrunLog(
        ends=tuple(ends),
        first=tuple(ends if first is None else first),
        hint=hint,
        cancelled=any(_CANCELLED.search(line) for line in told),
        lost_nodes=_nodes(_LOST_NODE, told),
        not_launched=_nodes(_NOT_LAUNCHED, told),
        evidence=evidence or _last_complaint(told),
    )


def _is_slurms(line: str) -> bool:
    return _SLURMS.search(line) is not None


def _nodes(pattern: re.Pattern[str], lines: list[str]) -> tuple[str, ...]:
    named = [name for line in lines for found in pattern.finditer(line) for name in expand_hosts(found[1])]
    return tuple(dict.fromkeys(named))


def _task_ends(line: str) -> list[TaskEnd]:
    found = _TASKS.match(line)
    code = _code(found["end"]) if found else None
    if found is None or code is None:
        return []
    nodes = expand_hosts(found["nodes"])
    node = nodes[0] if len(nodes) == 1 else ""
    return [TaskEnd(int(rank), code, node) for rank in expand_numbers(found["tasks"])]


def _code(end: str) -> int | None:
    if exited := _EXITED.match(end):
        return int(exited[1])
    words = end.removesuffix(" (core dumped)").strip()
    if words == "Out Of Memory":
        return -int(signal.SIGKILL)
    return -int(_SIGNALS[words]) if words in _SIGNALS else None


def _find_hint(lines: list[str]) -> tuple[str, str]:
    for pattern, hint in _HINTS:
        for line in lines:
            if pattern.search(line):
                return hint, line
    return "", ""


def _last_complaint(lines: list[str]) -> str:
    """Return srun's own last complaint, which says why there was no step at all."""
    said = [found[0] for line in lines if (found := _NO_STEP.match(line)) and not _TASKS.match(line)]
    return said[-1] if said else ""

"""Read what squeue and sacct print. Pure: text in, rows out."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrate.launchers.base import Verdict
from orchestrate.launchers.host_list import expand_hosts

# Fixed widths, which every version of squeue knows; separators came later. What users choose is last, so that a name
# in a wide alphabet moves no field of ours; a list of nodes that fills its field was cut and is not used.
_NODES_WIDTH = 160
_WIDTHS = {
    "JobArrayID": 40,
    "JobID": 20,
    "State": 24,
    "RestartCnt": 12,
    "Reason": 48,
    "StartTime": 24,
    "EndTime": 24,
    "SubmitTime": 24,
    "PreemptTime": 24,
    "NodeList": _NODES_WIDTH,
    "Name": 80,
    "Comment": 200,
}
QUEUE_FORMAT = ",".join(f"{field}:{width}" for field, width in _WIDTHS.items())
ACCOUNTING_FORMAT = "JobID,JobIDRaw,State,Start,End,NodeList"

# What a job is in while processes of it may exist, and while it waits for a place; all else is an end or unheard of.
RUNNING_STATES = frozenset(
    {"RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "UPDATE_DB"}
)
QUEUED_STATES = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
    | {"POWER_UP_NODE"}
)
FINAL_STATES = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
    | {"PREEMPTED", "REVOKED", "LAUNCH_FAILED", "RECONFIG_FAIL"}
)
# What keeps a job from starting until somebody releases it; Slurm says so itself where a node could not launch it.
_LAUNCH_FAILED = "launch_failed_requeued_held"
_HELD_REASONS = frozenset({"jobhelduser", "jobheldadmin", _LAUNCH_FAILED})
_HELD_STATES = frozenset({"REQUEUE_HOLD", "SPECIAL_EXIT"})
# A requeued job is released to begin so much later: Slurm revokes the credentials of the second in which it requeues,
# and a job that begins in that second fails on nodes that it had: "Job credential revoked".
RELEASE_SECONDS = 3.0
# A preempted job that is to come back is shown so until its nodes are clean.
_REQUEUE_SECONDS = 60.0


@dataclass(frozen=True)
class Row:
    """A job as squeue shows it.

    Attributes:
        job: id; of an element of an array `<array>_<index>`.
        raw_job: id of its own, which elements of an array have once they run.
        name, reason, comment: as given; the reason is `None` if there is none.
        state: word in capitals.
        restarts: how often it was requeued.
        start, end, submitted, preempted: unix times; None if not known; `submitted` is that of the last requeue.
        nodes: where it runs or ran.
    """

    job: str
    raw_job: str
    name: str
    state: str
    restarts: int
    reason: str = ""
    start: float | None = None
    end: float | None = None
    submitted: float | None = None
    preempted: float | None = None
    nodes: tuple[str, ...] = ()
    comment: str = ""

    @property
    def running(self) -> bool:
        """Whether processes of it may exist."""
        return self.state in RUNNING_STATES

    def held(self, now: float) -> bool:
        """Whether it only waits for the begin time that a requeue has set, two minutes away, and was not released."""
        far = self.start is None or self.start - now > 2 * RELEASE_SECONDS
        return self.state == "PENDING" and self.reason == "BeginTime" and self.restarts > 0 and far

    @property
    def launch_failed(self) -> bool:
        """Whether Slurm holds it because a node could not launch it."""
        return self.state == "PENDING" and _plain(self.reason) == _LAUNCH_FAILED

    @property
    def on_hold(self) -> bool:
        """Whether it does not start before somebody releases it."""
        return self.state in _HELD_STATES or (self.state == "PENDING" and _plain(self.reason) in _HELD_REASONS)

    def queued(self, now: float) -> bool:
        """Whether it waits for a place."""
        coming_back = self.state == "PREEMPTED" and now - (self.end or now) < _REQUEUE_SECONDS
        return self.state in QUEUED_STATES or coming_back

    def final(self, now: float) -> bool:
        """Whether it has ended and will not come back."""
        return self.state in FINAL_STATES and not self.queued(now)

    def is_job(self, job: str) -> bool:
        """Tell whether a record with this id is about the same job."""
        return job in (self.job, self.raw_job)

    @property
    def verdict(self) -> Verdict:
        """What the row says of the end of the job's last run.

        A job that ends by itself within the grace of a preemption is COMPLETED, FAILED or TIMEOUT to Slurm.
        """
        was_preempted = self.preempted is not None and self.preempted >= (self.start or self.preempted)
        ended_itself = self.state in ("COMPLETED", "FAILED", "TIMEOUT")
        state = "PREEMPTED" if was_preempted and ended_itself else self.state
        return Verdict(state, "squeue", self.nodes, self.start, self.end)


def _plain(reason: str) -> str:
    """Write a reason as all versions of Slurm might: some print `launch failed requeued held`."""
    return reason.strip("()").replace(" ", "_").lower()


def parse_queue(text: str) -> list[Row]:
    """Read the answer to `squeue --noheader --Format=QUEUE_FORMAT`.

    Lines that are no rows are left out: a job's name may hold a line break.

    Raises:
        ValueError: there is text, but no row in it.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    rows = [row for line in lines if (row := _row(line)) is not None]
    if lines and not rows:
        raise ValueError(f"squeue printed what is no row: {lines[0][:200]!r}")
    return rows


def _row(line: str) -> Row | None:
    fields, offset = {}, 0
    for name, width in _WIDTHS.items():
        fields[name] = line[offset : offset + width].strip()
        offset += width
    restarts = fields["RestartCnt"]
    if not re.fullmatch(r"\d+(_\d+)?", fields["JobArrayID"]) or not restarts.isdigit() or not fields["Name"]:
        return None
    nodes = fields["NodeList"]
    return Row(
        job=fields["JobArrayID"],
        raw_job=fields["JobID"],
        name=fields["Name"],
        state=state_word(fields["State"]),
        restarts=int(restarts),
        reason=fields["Reason"].strip("()"),
        start=parse_time(fields["StartTime"]),
        end=parse_time(fields["EndTime"]),
        submitted=parse_time(fields["SubmitTime"]),
        preempted=parse_time(fields["PreemptTime"]),
        nodes=node_list(nodes) if len(nodes) < _NODES_WIDTH - 1 else (),
        comment=fields["Comment"],
    )


@dataclass(frozen=True)
class Run:
    """One run of a job, as accounting shows it; a job that was requeued has several."""

    job: str
    raw_job: str
    state: str
    start: float | None
    end: float | None
    nodes: tuple[str, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """What accounting says of the end of the run."""
        return Verdict(self.state, "sacct", self.nodes, self.start, self.end)


def parse_accounting(text: str) -> list[Run]:
    """Read the answer to `sacct -n -P -D -X --format=ACCOUNTING_FORMAT`; lines that are no rows are left out."""
    runs = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|")]
        if len(fields) != len(ACCOUNTING_FORMAT.split(",")) or not re.fullmatch(r"\d+(_\d+)?", fields[0]):
            continue
        job, raw, state, start, end, nodes = fields
        runs.append(Run(job, raw, state_word(state), parse_time(start), parse_time(end), node_list(nodes)))
    return runs


# A node starts a batch script some time after accounting says that the job runs, and its clock may be off.
_CLOCK_SECONDS = 60.0


def run_of(runs: Iterable[Run], job: str, started: float | None) -> Run | None:
    """Find the run of a job in accounting.

    Args:
        runs: all that accounting has shown.
        job: id of the job, in either form.
        started: unix time at which a process of the run noted its start; None for a job that noted nothing.

    Returns:
        The run that began nearest to the time, but not much after it; or for a job that noted nothing its last entry.
        None if it lives.
    """
    own = [run for run in runs if job in (run.job, run.raw_job)]
    if started is None:
        found = max(own, key=lambda run: run.start or run.end or 0.0, default=None)
    else:
        # A job that is cancelled while it waits gets a start, but no node.
        ran = [(started - run.start, run) for run in own if run.start is not None and run.nodes]
        possible = [(abs(delay), run) for delay, run in ran if delay >= -_CLOCK_SECONDS]
        found = min(possible, key=lambda each: each[0], default=(0.0, None))[1]
    return found if found is not None and found.state not in RUNNING_STATES | {"PENDING"} else None


def state_word(text: str) -> str:
    """Return a state without what follows it, as in `CANCELLED by 0` or `CANCELLED+`."""
    words = text.split()
    return words[0].rstrip("+*").upper() if words else ""


def parse_time(text: str) -> float | None:
    """Read a time as Unix seconds or in the local zone; None for `N/A`, `Unknown` and the like."""
    if text.isdigit():
        return float(text) or None
    if not text[:1].isdigit():
        return None
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


_NODES = r"[A-Za-z0-9._-]+(\[[0-9,-]+\][A-Za-z0-9._-]*)*"


def node_list(text: str) -> tuple[str, ...]:
    """List the nodes of a short form such as `gpu[01-03,7],login`; none if it is no such form, as `None assigned`."""
    return expand_hosts(text) if re.fullmatch(rf"{_NODES}(,{_NODES})*", text) else ()

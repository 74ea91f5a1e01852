"""What the end of a step means: the job's exit code, its cause, and the nodes that are suspects."""

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrate.exits import SIGNAL_BASE, STOP_SIGNALS, Exit, group_exit_code
from orchestrate.launchers.srun_log import (
    CANCELLED,
    INFRASTRUCTURE,
    NODE_FAILURE,
    OUT_OF_MEMORY,
    SrunLog,
    TaskEnd,
)

# Codes that say nothing against a node, whoever says them.
_BLAMELESS = (Exit.DONE, Exit.CONTINUE, Exit.LATER, Exit.BAD_INPUT, Exit.DIVERGED, Exit.OUT_OF_MEMORY, Exit.PEER_LOST)
_SAVED = (Exit.DONE, Exit.CONTINUE)
_OUTSIDE = tuple(-int(number) for number in STOP_SIGNALS)


@dataclass(frozen=True)
class StepEnd:
    """What was seen of the end of a step.

    Attributes:
        code: of srun; None if it had to be killed, as it waited for tasks that will never be heard of.
        log: what srun and Slurm's step daemons said.
        records: what ranks wrote about their ends, by rank.
        stopped_by: signal that Slurm sent to the batch script, such as SIGTERM; empty if none.
    """

    code: int | None
    log: SrunLog
    records: Mapping[int, Mapping[str, Any]]
    stopped_by: str = ""


@dataclass(frozen=True)
class Ending:
    """What the end means; see the record of a job's end."""

    exit_code: int
    rank_codes: tuple[int | None, ...]
    failed_rank: int | None
    hint: str
    blamed: tuple[str, ...]
    evidence: str


def judge_end(end: StepEnd, places: Sequence[str]) -> Ending:
    """Decide what the end of a step means.

    Args:
        end: what was seen.
        places: node of every rank; empty text where it is not known.
    """
    ends = _last_words(end)
    codes = [_code_of(rank, ends, end) for rank in range(len(places))]
    known = [code for code in codes if code is not None]
    if not ends and end.code != 0:
        return _no_step(end, len(places))
    first = [each.code for each in end.log.first]
    stopping = bool(end.stopped_by) or bool({*first} & {*_OUTSIDE})
    said = group_exit_code(known, first, stopping=stopping)
    nodes = _nodes(ends, places)
    misled = _misled_nodes(said, codes, end, nodes)
    code = Exit.PREFLIGHT if misled else Exit.BAD_INPUT if _is_bad_for_main(said, codes, end) else said
    failed = _failed_rank(Exit.BAD_INPUT if misled else code, codes, end)
    silent = tuple(rank for rank, each in enumerate(codes) if each is None)
    lost = _lost_nodes(end, silent, places)
    hint = _hint(code, end, lost)
    return Ending(
        exit_code=code,
        rank_codes=tuple(None if each is None else _plain(each) for each in codes),
        failed_rank=failed,
        hint=hint,
        blamed=misled or _blame(code, hint, codes, end, nodes, lost),
        evidence=_tell(Exit.BAD_INPUT if misled else code, failed, end, nodes, silent),
    )


def _last_words(end: StepEnd) -> dict[int, TaskEnd]:
    """Return what is known of each rank: srun's word, or what the rank wrote itself if srun was killed before."""
    written = {
        rank: TaskEnd(rank, int(each["exit_code"]), str(each.get("node", ""))) for rank, each in end.records.items()
    }
    heard = {each.rank: each for each in end.log.ends}
    return written | heard


def _code_of(rank: int, ends: Mapping[int, TaskEnd], end: StepEnd) -> int | None:
    if rank in ends:
        return ends[rank].code
    # srun names only tasks that end with another code than 0, and none that it waits for.
    return None if end.code is None or end.log.lost_nodes or end.log.not_launched else 0


def _says_bad_input(rank: int, codes: Sequence[int | None], end: StepEnd) -> bool:
    return Exit.BAD_INPUT in (codes[rank], end.records.get(rank, {}).get("exit_code"))


def _is_bad_for_main(said: int, codes: Sequence[int | None], end: StepEnd) -> bool:
    """Tell whether nodes were called unfit for what the first node, on which this runs, says of the trial itself."""
    return said == Exit.PREFLIGHT and _says_bad_input(0, codes, end)


def _misled_nodes(said: int, codes: Sequence[int | None], end: StepEnd, nodes: Sequence[str]) -> tuple[str, ...]:
    """Name the nodes that call the trial's input bad, if rank 0's node and others do not: a mount is missing there."""
    heard = [rank for rank, each in enumerate(codes) if each is not None]
    complaining = {nodes[rank] for rank in heard if _says_bad_input(rank, codes, end)}
    everybody = all(_says_bad_input(rank, codes, end) for rank in heard)
    if said != Exit.BAD_INPUT or everybody or nodes[0] in complaining:
        return ()
    return tuple(sorted(complaining - {""}))


def _no_step(end: StepEnd, ranks: int) -> Ending:
    """Judge a step of which no rank was heard: srun could not start it, or Slurm ended the job before."""
    said, code = end.log.evidence, int(Exit.LATER)
    if end.stopped_by:
        said, code = f"{said or 'no rank ended by itself'}; {end.stopped_by} received", SIGNAL_BASE + signal.SIGKILL
        hint = end.log.hint or (CANCELLED if end.log.cancelled else "")
    elif "option" in said:
        hint, code = "", Exit.BAD_INPUT
    else:
        hint = end.log.hint or INFRASTRUCTURE
    said = said or f"srun ended with {end.code}, and no rank was heard of"
    return Ending(code, (None,) * ranks, None, hint, _given_up(end.log), said)


def _plain(code: int) -> int:
    return SIGNAL_BASE - code if code < 0 else code


def _failed_rank(code: int, codes: Sequence[int | None], end: StepEnd) -> int | None:
    """Find the rank whose end decided: by the clocks of the ranks if they wrote, else in srun's order."""
    if code == Exit.DONE:
        return None
    times = {r: float(each.get("time", 0)) for r, each in end.records.items() if each.get("exit_code") == code}
    if times:
        return min(times, key=lambda rank: (times[rank], rank))
    heard = [each.rank for each in end.log.first if _plain(each.code) == code]
    silent = [rank for rank, each in enumerate(codes) if each is not None and _plain(each) == code]
    return next(iter([*heard, *silent]), None)


def _lost_nodes(end: StepEnd, silent: Sequence[int], places: Sequence[str]) -> tuple[str, ...]:
    """Name nodes that Slurm gave up, or of which nothing was heard in the time in which all ranks must have ended."""
    if given_up := _given_up(end.log):
        return given_up
    heard = {places[rank] for rank in range(len(places)) if rank not in silent}
    return tuple(dict.fromkeys(places[rank] for rank in silent if places[rank] and places[rank] not in heard))


def _given_up(log: SrunLog) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*log.lost_nodes, *log.not_launched)))


def _hint(code: int, end: StepEnd, lost: Sequence[str]) -> str:
    if end.log.hint and not (end.log.hint == OUT_OF_MEMORY and code in _SAVED):
        return end.log.hint  # a loader's process may be killed for memory and the ranks end well
    if lost and code not in _SAVED:
        return NODE_FAILURE
    if end.stopped_by == signal.SIGTERM.name and end.log.cancelled:
        return CANCELLED
    return ""


def _nodes(ends: Mapping[int, TaskEnd], places: Sequence[str]) -> list[str]:
    return [ends[rank].node if rank in ends and ends[rank].node else place for rank, place in enumerate(places)]


def _blame(
    code: int, hint: str, codes: Sequence[int | None], end: StepEnd, nodes: Sequence[str], lost: Sequence[str]
) -> tuple[str, ...]:
    """Name the nodes that may be at fault."""
    if code == Exit.PREFLIGHT and (unfit := _unfit_nodes(codes, end, nodes)):
        return unfit
    if lost:
        return tuple(lost)
    if hint or code in _BLAMELESS:
        return ()
    decisive = [rank for rank, each in enumerate(codes) if each is not None and _plain(each) == code]
    if code == Exit.HANG:  # those that hang in a collective notice it all; the culprit may have no voice
        decisive = [rank for rank, each in enumerate(codes) if each is None or each < 0] or []
    suspects = {nodes[rank] for rank in decisive if nodes[rank]}
    # What happens on several nodes at once is not the fault of one.
    return tuple(suspects) if len(suspects) == 1 else ()


def _unfit_nodes(codes: Sequence[int | None], end: StepEnd, nodes: Sequence[str]) -> tuple[str, ...]:
    """Name the nodes that say what is wrong with them, or those that have no file system to write it to."""
    written = {str(each["node"]) for each in end.records.values() if each.get("preflight")}
    if written:
        return tuple(sorted(written))
    said = {nodes[rank] for rank, each in enumerate(codes) if each == Exit.PREFLIGHT and nodes[rank]}
    return () if len(said) > 1 and nodes[0] in said else tuple(sorted(said))


def _tell(code: int, failed: int | None, end: StepEnd, nodes: Sequence[str], silent: Sequence[int]) -> str:
    """Say in words what was seen."""
    said = []
    if failed is not None and code != Exit.CONTINUE:
        error = str(end.records.get(failed, {}).get("error", ""))
        where = f" on {nodes[failed]}" if nodes[failed] else ""
        said.append(f"rank {failed}{where}: {_named(code)}{f': {error}' if error else ''}")
    if silent and end.code is None:
        ranks = ", ".join(map(str, silent[:8])) + (", ..." if len(silent) > 8 else "")
        said.append(f"nothing was heard of {'rank' if len(silent) == 1 else 'ranks'} {ranks}")
    if end.log.hint:
        said.append(end.log.evidence)
    if end.stopped_by:
        said.append(f"{end.stopped_by} received")
    return "; ".join(said)


def _named(code: int) -> str:
    if code <= SIGNAL_BASE:
        return f"exit code {code}"
    number = code - SIGNAL_BASE
    return signal.Signals(number).name if number in signal.valid_signals() else f"signal {number}"

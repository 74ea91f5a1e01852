"""How a report was made: enough to make it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable

from orchestrate.report import wording
from orchestrate.report.queries import STATES, Sweep, flatten
from orchestrate.report.tables import count_states, plain
from orchestrate.report.wording import NONE, plural


def command_line(sweep: Sweep) -> str:
    """Write the command that made the sweep, ready to paste into a shell."""
    return shlex.join(sweep.command)


def origins(sweep: Sweep) -> tuple[tuple[str, str], ...]:
    """List commit, hardware, software, data and cost as (name, text)."""
    done = [trial for trial in sweep.trials if trial.is_done]
    seconds = sum(trial.spent_seconds for trial in sweep.trials)
    rank_seconds = sum(trial.spent_rank_seconds for trial in sweep.trials)
    entries = (
        ("sweep file", sweep.file or NONE),
        ("commit", _commit(sweep)),
        ("created", wording.moment(sweep.created)),
        (
            "hardware",
            _joined(f"{trial.device} {wording.TIMES} {plural(trial.world_size or 0, 'rank')}" for trial in done),
        ),
        ("software", _versions(sweep)),
        ("data digests", _joined(_digests(sweep))),
        (
            "cost",
            f"{wording.duration(seconds)} of wall-clock time, {wording.duration(rank_seconds)} as {wording.RANK_TIME},"
            " probes and lost attempts too",
        ),
    )
    return tuple((name, text) for name, text in entries if text)


def states(sweep: Sweep) -> str:
    """Count the trials by state: `12 done, 2 failed, 1 not started`."""
    counts = count_states(sweep.trials)
    return ", ".join(f"{counts[state]} {state}" for state in sorted(counts, key=_state_order))


def _state_order(state: str) -> tuple[int, str]:
    return (STATES.index(state) if state in STATES else len(STATES), state)


def _commit(sweep: Sweep) -> str:
    """Name the commits that trials ran, or that of the command where no trial says."""
    changes = ", with changes that were not committed"
    ran = [f"{trial.commit}{changes if trial.is_dirty else ''}" for trial in sweep.trials if trial.commit]
    asked = [f"{sweep.commit}{changes if sweep.is_dirty else ''}"] if sweep.commit else []
    return _joined(ran or asked) or "unknown: the code was not a git checkout"


def _versions(sweep: Sweep) -> str:
    return _joined(f"{name} {version}" for trial in sweep.trials for name, version in sorted(trial.versions.items()))


def _digests(sweep: Sweep) -> Iterable[str]:
    for trial in sweep.trials:
        flat = flatten(trial.config)
        for split in ("train", "val"):
            if digest := plain(flat.get(f"data.{split}_digest")):
                yield f"{split} {digest}"


def _joined(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts))

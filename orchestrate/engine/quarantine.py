"""Samples that turned out damaged: agreed between the ranks, listed in the RunDir, bounded."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrate.data.reader import Damage
from orchestrate.engine.metrics import whole_lines
from orchestrate.engine.ranks import Ranks
from orchestrate.errors import DataError, RunDirError
from orchestrate.runs import write_text

_LISTED = 20


class Quarantine:
    """The ledger of one trial: `damaged_samples.jsonl`, written by rank 0, known to every rank.

    A sample in it is not read again, so that what took its place stays there after a resume.
    """

    def __init__(self, file: Path, ranks: Ranks, *, num_samples: int, max_fraction: float) -> None:
        """Read what earlier attempts found.

        Args:
            file: the ledger; it need not exist.
            ranks: every rank must make the same calls.
            num_samples: of the training set.
            max_fraction: share of them that may be damaged; at least one may, unless this is 0.

        Raises:
            DataError: more samples are damaged than may be; see `add`.
        """
        self._file, self._ranks = file, ranks
        self._bound = max(int(max_fraction * num_samples), 1) if max_fraction > 0 else 0
        known: list[dict[str, Any]] = ranks.on_main(lambda: _read(file))
        self._known = {int(entry["sample_id"]): entry for entry in known}
        self._check_bound()

    @property
    def sample_ids(self) -> frozenset[int]:
        """Ids of all samples in the ledger."""
        return frozenset(self._known)

    def add(self, step: int, damaged: Sequence[Damage]) -> None:
        """Enter what the ranks found in one step's batch; every rank calls it, with its own.

        Raises:
            DataError: more samples are damaged than may be; lists them, on every rank.
            RunDirError: the ledger cannot be written.
        """
        found = self._ranks.gather_to_main([damage.as_facts() for damage in damaged])
        entries = self._ranks.on_main(lambda: self._write(step, [each for rank in found for each in rank]))
        self._known |= {int(entry["sample_id"]): entry for entry in entries}
        self._check_bound()

    def _write(self, step: int, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        new = {entry["sample_id"]: {"step": step, **entry} for entry in found if entry["sample_id"] not in self._known}
        try:
            with self._file.open("a") as ledger:
                ledger.writelines(json.dumps(entry) + "\n" for entry in new.values())
                ledger.flush()
                os.fsync(ledger.fileno())
        except OSError as error:
            raise RunDirError(f"{self._file}: cannot be written: {error.strerror}; free space and resume") from error
        for entry in new.values():
            print(f"damaged: {entry['shard']}: sample {entry['index']}, key {entry['key']!r}: {entry['reason']}")
        return list(new.values())

    def _check_bound(self) -> None:
        if len(self._known) > self._bound:
            raise DataError(self._report())

    def _report(self) -> str:
        shards = Counter(entry["shard"] for entry in self._known.values())
        histogram = "".join(f"\n  {count} in {shard}" for shard, count in shards.most_common(_LISTED))
        samples = [f"{e['shard']} {e['key'] or e['index']}: {e['reason']}" for e in self._known.values()]
        listed = "".join(f"\n  {sample}" for sample in samples[:_LISTED])
        more = f"\n  and {len(samples) - _LISTED} more in {self._file}" if len(samples) > _LISTED else ""
        return (
            f"{len(samples)} samples are damaged, system.max_damaged allows {self._bound}; copy the dataset again and "
            f"remove {self._file}, or raise system.max_damaged:{histogram}\nThese are:{listed}{more}"
        )


def _read(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    lines = whole_lines(file)
    write_text(file, "".join(f"{line}\n" for line in lines))  # without what a kill left half written
    return [json.loads(line) for line in lines]

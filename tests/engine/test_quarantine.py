import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrate.data.reader import Damage
from orchestrate.engine.quarantine import Quarantine
from orchestrate.engine.ranks import Ranks
from orchestrate.errors import DataError
from tests.distributed import run_on_ranks


def damage(sample_id: int) -> Damage:
    return Damage(sample_id, "s3://photos/train-000001.tar", sample_id % 10, f"cat{sample_id}", "CRC32 is 0")


def ledger(folder: Path, **changes: Any) -> Quarantine:
    options: dict[str, Any] = {"num_samples": 1000, "max_fraction": 0.002}  # two samples
    return Quarantine(folder / "damaged_samples.jsonl", Ranks(0, 1, 0, torch.device("cpu")), **(options | changes))


def test_each_damaged_sample_is_listed_once_and_known_after_a_restart(tmp_path: Path) -> None:
    quarantine = ledger(tmp_path)
    quarantine.add(7, [damage(23)])
    quarantine.add(9, [damage(23), damage(24)])
    lines = [json.loads(line) for line in (tmp_path / "damaged_samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["sample_id"], line["key"]) for line in lines] == [(7, 23, "cat23"), (9, 24, "cat24")]
    assert quarantine.sample_ids == ledger(tmp_path).sample_ids == {23, 24}


def test_more_than_the_bound_stops_the_training_with_a_list_by_shard(tmp_path: Path) -> None:
    quarantine = ledger(tmp_path)
    quarantine.add(1, [damage(1), damage(2)])
    with pytest.raises(DataError, match="3 samples are damaged") as error:
        quarantine.add(2, [damage(3)])
    with pytest.raises(DataError, match="3 samples are damaged"):  # a restart is no way around the bound
        ledger(tmp_path)
    assert ledger(tmp_path, max_fraction=0.003).sample_ids == {1, 2, 3}
    for part in (
        "3 samples are damaged, system.max_damaged allows 2",
        "3 in s3://photos/train-000001.tar",
        "cat2: CRC32",
    ):
        assert part in str(error.value)


def test_one_sample_may_always_be_damaged_unless_none_may(tmp_path: Path) -> None:
    ledger(tmp_path, max_fraction=1e-4).add(1, [damage(1)])
    with pytest.raises(DataError, match=r"system\.max_damaged allows 0"):
        ledger(tmp_path, max_fraction=0.0).add(1, [damage(2)])


def test_a_torn_last_line_is_not_read(tmp_path: Path) -> None:
    ledger(tmp_path).add(1, [damage(1)])
    with (tmp_path / "damaged_samples.jsonl").open("a") as file:
        file.write('{"step": 2, "sample_')
    quarantine = ledger(tmp_path)
    quarantine.add(3, [damage(5)])
    assert ledger(tmp_path).sample_ids == {1, 5}


def _found_by_both(folder: str) -> list[Any]:
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), 0, torch.device("cpu"))
    quarantine = Quarantine(Path(folder) / "ledger.jsonl", ranks, num_samples=1000, max_fraction=0.001)
    first = [damage(4)] if ranks.rank == 1 else []
    quarantine.add(1, first)
    try:
        quarantine.add(2, [damage(ranks.rank + 5)])
    except DataError as error:
        return [sorted(quarantine.sample_ids), str(error).splitlines()[0]]
    return []


def test_all_ranks_know_what_any_rank_found_and_stop_together(tmp_path: Path) -> None:
    found = run_on_ranks(2, _found_by_both, str(tmp_path))
    assert found[0] == found[1]
    assert found[0][0] == [4, 5, 6]
    assert "3 samples are damaged, system.max_damaged allows 1" in found[0][1]

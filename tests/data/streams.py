"""Streams of a small dataset, for tests that compare them pixel by pixel."""

from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orchestrate.data.source import Loading
from orchestrate.data.stream import Batch, TrainStream
from ssl_methods.views import recipe

GLOBAL_BATCH = 12
VIEWS = recipe("simclr", 16)


def stream(url: str, *, workers: int = 0, loading: Loading | None = None, **options: Any) -> TrainStream:
    """Open a labelled stream of one rank unless told otherwise."""
    defaults = {"seed": 3, "global_batch": GLOBAL_BATCH, "rank": 0, "world_size": 1, "with_labels": True}
    return TrainStream(url, recipe=VIEWS, loading=loading or Loading(workers=workers), **(defaults | options))


def batches(url: str, num_steps: int, **options: Any) -> list[Batch]:
    with closing(stream(url, **options)) as opened:
        return list(islice(opened, num_steps))


def assert_same(found: Batch, expected: Batch) -> None:
    np.testing.assert_array_equal(found.sample_ids, expected.sample_ids)
    assert found.fingerprint == expected.fingerprint
    assert all(torch.equal(a, b) for a, b in zip(found.views, expected.views, strict=True))
    assert found.labels is not None
    assert expected.labels is not None
    assert torch.equal(found.labels, expected.labels)


def joined(parts: list[Batch]) -> Batch:
    """Put the parts of all ranks together."""
    return Batch(
        np.concatenate([part.sample_ids for part in parts]),
        [torch.cat(same) for same in zip(*(part.views for part in parts), strict=True)],
        torch.cat([part.labels for part in parts]),
        parts[0].fingerprint,
    )


def flip(path: Path, place: int) -> None:
    """Damage one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def byte_of_sample(url: Path, shard: str, index: int) -> int:
    """Find a byte within the image of a sample: past its first header."""
    lengths = np.fromfile(url / f"{shard}.idx", "<u4")[::2]
    return int(lengths[:index].sum()) + 512 * 2 + 100

"""What a rank will read, and when: the future is known, so bytes are fetched before they are asked for.

A block of the order draws on whole chunks of neighbouring samples. The rank that owns a lane uses every sample of the
lane's chunks, so each chunk is one read. Only the last, short block of an epoch spreads chunks over all ranks: where a
rank uses little of one, its samples are read one by one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from orchestrate.data.order import Block, Order

WORTH_WHOLE = 0.25  # of a chunk's samples: one long range costs less than so many short ones


@dataclass(frozen=True, slots=True)
class Read:
    """Neighbouring samples to be read at once.

    Attributes:
        epoch: in which they are used.
        ids: of the samples.
        uses: how many of them the rank asks for, each once.
        position: where the first of these stands in the order.
    """

    epoch: int
    ids: range
    uses: int
    position: int


def plan_reads(order: Order, *, rank: int, world_size: int, start_step: int) -> Iterator[list[Read]]:
    """List a rank's reads from a step on, block by block without end, each list in order of first use.

    Raises:
        ValueError: the ranks do not divide the global batch, or there is no such rank.
    """
    order.rank_run(rank, world_size)  # refuses numbers that do not fit
    position = start_step * order.global_batch
    while True:
        block = order.block_at(position)
        yield _reads_of(order, block, position, rank, world_size)
        position = block.stop


def _reads_of(order: Order, block: Block, start: int, rank: int, world_size: int) -> list[Read]:
    """Plan the part of a block from position `start` on."""
    positions = np.arange(start, block.stop)
    positions = positions[order.rank_of(positions, world_size) == rank]
    ids = block.ids[positions - block.start]
    chunks, first, uses = np.unique(order.chunk_of(block.epoch, ids), return_index=True, return_counts=True)
    reads = []
    for chunk, index, count in zip(chunks.tolist(), first.tolist(), uses.tolist(), strict=True):
        whole = order.chunk_range(block.epoch, chunk)
        if count >= WORTH_WHOLE * len(whole):
            reads.append(Read(block.epoch, whole, count, int(positions[index])))
        else:
            used = np.flatnonzero((ids >= whole.start) & (ids < whole.stop))
            reads += [Read(block.epoch, range(int(ids[i]), int(ids[i]) + 1), 1, int(positions[i])) for i in used]
    return sorted(reads, key=lambda read: read.position)

"""In which order a run sees its samples: a closed formula, so that the whole state is one number, samples seen.

Positions count the samples of all steps and never end; epoch `e` is positions `[e * N, (e + 1) * N)`. In each epoch:

1. The ids are cut into chunks of `chunk` neighbours, on a grid shifted by a keyed phase (neighbours part ways).
2. A keyed bijection puts the chunks into slots: a Feistel network, so no array of epoch length exists.
3. `lanes * window` slots are a block; each lane owns `window` of them and mixes their samples by a keyed permutation.
   The last block is narrower.
4. Position `p` belongs to lane `p % lanes`. A batch takes the same number of samples from every lane.
5. What fills no block (less than one chunk per lane, and the two ends of the grid) is permuted as a whole.

Nothing depends on the number of ranks, nodes or workers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from typing import Literal

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

MAX_LANES = 512
_WORD = (1 << 64) - 1
_PHASE, _CHUNKS, _LANE, _TAIL, _SHUFFLE, _SUBSTITUTE = range(1, 7)  # what a random word is for: no two uses share a key
# Four rounds make a Feistel network pseudo-random (Luby and Rackoff 1988); six, because the halves may be small.
_ROUNDS = 6


class Order:
    """Order the samples of a dataset for a run; cheap to build for any size, safe to share between threads."""

    def __init__(
        self,
        num_samples: int,
        seed: int,
        *,
        global_batch: int,
        lanes: int | Literal["auto"] = "auto",
        chunk: int = 32,
        window: int = 16,
    ) -> None:
        """Fix the plan; the same arguments give the same order for ever.

        Args:
            num_samples: samples of the dataset.
            seed: key of every permutation, any integer.
            global_batch: samples of one step over all ranks.
            lanes: independent streams that a batch draws from equally; "auto" is the largest divisor of the global
                batch up to 512.
            chunk: neighbouring samples that are read together.
            window: chunks that a lane mixes at a time.

        Raises:
            ValueError: a number below one, or lanes that do not divide the global batch.
        """
        self.lanes = _largest_divisor(global_batch, MAX_LANES) if lanes == "auto" else lanes
        sizes = {"num_samples": num_samples, "global_batch": global_batch, "lanes": self.lanes}
        for name, value in (sizes | {"chunk": chunk, "window": window}).items():
            if value < 1:
                raise ValueError(f"{name}: {value}, must be at least 1")
        if global_batch % self.lanes:
            raise ValueError(f"lanes: {self.lanes} does not divide the global batch of {global_batch}")
        self.num_samples, self.global_batch = num_samples, global_batch
        self.chunk, self.window, self.seed = chunk, window, seed & _WORD
        # A step touches one block, two at a border, four at most where epochs are longer than a batch.
        self._block = lru_cache(maxsize=4)(self._build_block)
        self._grid = lru_cache(maxsize=64)(self._build_grid)
        # Cuts the global batch lane by lane: neighbours in it share a lane, hence chunks.
        self._lane_major = np.arange(global_batch, dtype=np.int64).reshape(-1, self.lanes).T.ravel()

    def sample_ids(self, positions: npt.ArrayLike) -> Ids:
        """Find the sample at each position of the endless stream.

        Raises:
            ValueError: a negative position.
        """
        wanted = np.asarray(positions, dtype=np.int64)
        by_position = np.argsort(wanted, axis=None, kind="stable")
        flat = wanted.ravel()[by_position]
        if flat.size and flat[0] < 0:
            raise ValueError(f"position {flat[0]}: positions count from 0")
        ids = np.empty(flat.size, dtype=np.int64)
        done = 0
        while done < flat.size:
            block = self.block_at(int(flat[done]))
            end = int(np.searchsorted(flat, block.stop))
            ids[by_position[done:end]] = block.ids[flat[done:end] - block.start]
            done = end
        return ids.reshape(wanted.shape)

    def epochs(self, positions: npt.ArrayLike) -> Ids:
        """Count the whole epochs before each position."""
        return np.asarray(positions, dtype=np.int64) // self.num_samples

    def batch(self, step: int) -> tuple[Ids, Ids]:
        """List the global batch of a step in lane order: sample ids, and the epoch that each is seen in.

        Step `s` holds positions `[s * B, (s + 1) * B)`; it may straddle epochs and is always full.
        """
        positions = step * self.global_batch + self._lane_major
        return self.sample_ids(positions), self.epochs(positions)

    def rank_slice(self, step: int, rank: int, world_size: int) -> tuple[Ids, Ids]:
        """Cut a rank's run out of the global batch; the runs of all ranks, end to end, are `batch(step)`.

        Raises:
            ValueError: the ranks do not divide the global batch, or there is no such rank.
        """
        run = self.rank_run(rank, world_size)
        ids, epochs = self.batch(step)
        return ids[run], epochs[run]

    def rank_run(self, rank: int, world_size: int) -> slice:
        """Say which part of every global batch is a rank's.

        Raises:
            ValueError: the ranks do not divide the global batch, or there is no such rank.
        """
        if world_size < 1 or self.global_batch % world_size:
            raise ValueError(
                f"a global batch of {self.global_batch} cannot be cut into {world_size} equal parts; "
                f"nearest rank counts: {' and '.join(map(str, _nearest_divisors(self.global_batch, world_size)))}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank}: must be from 0 to {world_size - 1}")
        size = self.global_batch // world_size
        return slice(rank * size, (rank + 1) * size)

    def block_at(self, position: int) -> Block:
        """Find the block that holds a position: neighbours in it are read together."""
        epoch, offset = divmod(position, self.num_samples)
        num_bulk, full = self._grid(epoch).num_bulk, self.lanes * self.window * self.chunk
        start = offset // full * full if offset < num_bulk else num_bulk
        return Block(epoch, epoch * self.num_samples + start, self._block(epoch, start))

    def chunk_of(self, epoch: int, sample_ids: npt.ArrayLike) -> Ids:
        """Number the chunks that samples lie in, as an epoch cuts them."""
        return (np.asarray(sample_ids, dtype=np.int64) - self._grid(epoch).phase) // self.chunk

    def chunk_around(self, epoch: int, sample_id: int) -> range:
        """List the sample ids of the chunk that a sample lies in."""
        return self.chunk_range(epoch, (sample_id - self._grid(epoch).phase) // self.chunk)

    def chunk_range(self, epoch: int, number: int) -> range:
        """List the sample ids of a chunk; the first (-1) and the last of an epoch may be short."""
        start = self._grid(epoch).phase + number * self.chunk
        return range(max(start, 0), min(start + self.chunk, self.num_samples))

    def substitute(self, epoch: int, sample_id: int, attempt: int) -> int:
        """Name the sample that stands in for one that cannot be used: a neighbour in its chunk, the same on every rank.

        Attempt 1 is the first choice. A choice may be unusable too, or the sample itself: ask for the next. After as
        many attempts as a chunk is long, neighbours are taken in turn, so that every sample is named at last.
        """
        chunk = self.chunk_around(epoch, sample_id)
        if attempt <= self.chunk:
            return chunk[int(_hash(self.seed, _SUBSTITUTE, epoch, sample_id, attempt)[0]) % len(chunk)]
        return (sample_id + attempt - self.chunk) % self.num_samples

    def rank_of(self, positions: npt.ArrayLike, world_size: int) -> Ids:
        """Say which rank's part of its global batch each position is; `rank_run` says the same the other way round."""
        wanted = np.asarray(positions, dtype=np.int64)
        lane, time = wanted % self.lanes, wanted % self.global_batch // self.lanes
        return (lane * (self.global_batch // self.lanes) + time) // (self.global_batch // world_size)

    def _build_grid(self, epoch: int) -> _Grid:
        phase = min(int(_hash(self.seed, _PHASE, epoch)[0]) % self.chunk, self.num_samples)
        num_chunks = (self.num_samples - phase) // self.chunk
        return _Grid(phase, num_chunks, num_bulk=num_chunks // self.lanes * self.lanes * self.chunk)

    def _build_block(self, epoch: int, start: int) -> Ids:
        """List the ids of the block that starts `start` samples into an epoch."""
        grid = self._grid(epoch)
        ids = self._tail(epoch, grid) if start == grid.num_bulk else self._bulk(epoch, start, grid)
        ids.flags.writeable = False
        return ids

    def _bulk(self, epoch: int, start: int, grid: _Grid) -> Ids:
        width = min(self.window, (grid.num_bulk - start) // (self.lanes * self.chunk))
        first_slot = start // self.chunk
        slots = np.arange(first_slot, first_slot + self.lanes * width).reshape(self.lanes, width)
        chunks = self._chunks(slots, epoch, grid)
        keys = _hash(self.seed, _LANE, epoch, first_slot, np.arange(self.lanes))
        mixed = _permutations(keys, width * self.chunk)
        ids = np.take_along_axis(chunks, mixed // self.chunk, axis=1) * self.chunk + mixed % self.chunk + grid.phase
        # Time-major; the roll ties a lane to the position in the run, not in the epoch, so that ranks keep their lanes.
        by_time: Ids = np.roll(ids.T, -((epoch * self.num_samples + start) % self.lanes), axis=1).ravel()
        return by_time

    def _tail(self, epoch: int, grid: _Grid) -> Ids:
        slots = np.arange(grid.num_bulk // self.chunk, grid.num_chunks)
        whole = self._chunks(slots, epoch, grid)[:, None] * self.chunk + grid.phase + np.arange(self.chunk)
        grid_end = grid.phase + grid.num_chunks * self.chunk
        ids: Ids = np.concatenate([whole.ravel(), np.arange(grid.phase), np.arange(grid_end, self.num_samples)])
        return ids[_permutation(_hash(self.seed, _TAIL, epoch), len(ids))]

    def _chunks(self, slots: Ids, epoch: int, grid: _Grid) -> Ids:
        return _bijection(slots, grid.num_chunks, int(_hash(self.seed, _CHUNKS, epoch)[0]))


@dataclass(frozen=True)
class Block:
    """Samples that an epoch mixes with each other: their ids by position, of which `start` is the first."""

    epoch: int
    start: int
    ids: Ids

    @property
    def stop(self) -> int:
        """The first position after the block."""
        return self.start + len(self.ids)


@dataclass(frozen=True)
class _Grid:
    """How an epoch cuts the ids: chunk `i` starts at `phase + i * chunk`; the first `num_bulk` positions use lanes."""

    phase: int
    num_chunks: int
    num_bulk: int


def shuffled(num_items: int, seed: int) -> Ids:
    """Permute `range(num_items)` in memory, the same on every machine and numpy version."""
    return _permutation(_hash(seed & _WORD, _SHUFFLE), num_items)


def fingerprint(ids: npt.ArrayLike) -> str:
    """Hash the ids of a global batch *in order* to 64 bits, as 16 hex digits: equal for every number of ranks."""
    return hashlib.blake2b(np.asarray(ids).astype("<i8").tobytes(), digest_size=8).hexdigest()


def _bijection(values: Ids, size: int, key: int) -> Ids:
    """Permute `range(size)` by a keyed Feistel network on a nearly square grid, walking the few cycles that leave it.

    Halves are residues, not bits, so that the grid holds less than `size + 2 sqrt(size)` values and walks are rare.
    """
    rows = isqrt(max(size - 1, 0)) + 1
    columns = -(-size // rows) or 1
    result = _feistel(values.ravel(), rows, columns, key)
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _feistel(result[outside], rows, columns, key)
        outside = outside[result[outside] >= size]
    return result.reshape(values.shape)


def _feistel(values: Ids, rows: int, columns: int, key: int) -> Ids:
    row, column = (half.astype(np.uint64) for half in np.divmod(values, columns))
    for turn in range(0, _ROUNDS, 2):
        row = (row + _hash(key, turn, column) % rows) % rows
        column = (column + _hash(key, turn + 1, row) % columns) % columns
    return (row * columns + column).astype(np.int64)


def _permutation(key: Words, size: int) -> Ids:
    return _permutations(key, size).reshape(size)


def _permutations(keys: Words, size: int) -> Ids:
    """Permute `range(size)` once for each key, as rows: sort hashes that carry the index in their low bits."""
    low = (1 << size.bit_length()) - 1
    index = np.arange(size, dtype=np.uint64)
    words = (_hash(keys[:, None], index) & np.uint64(_WORD ^ low)) | index
    words.sort(axis=1)
    return (words & np.uint64(low)).astype(np.int64)


def _hash(*parts: int | npt.NDArray[np.generic]) -> Words:
    """Hash integers, broadcast against each other, to random words: splitmix64 (Steele et al. 2014) over each part."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        word = np.asarray(part).astype(np.uint64) if isinstance(part, np.ndarray) else np.uint64(part)
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def _largest_divisor(number: int, limit: int) -> int:
    return next((d for d in range(min(number, limit), 0, -1) if number % d == 0), 1)


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < wanted][-1:]
    return below + [d for d in divisors if d > wanted][:1]

"""What a start costs: planning a billion samples, and the first batch after a resume somewhere in an epoch."""

from __future__ import annotations

import importlib
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
from loader_contestants import stock_views
from loader_photos import Images, build_images
from loader_rows import KINDS, Options, Row, alternate, compared
from order import cost

from orchestrate.data.index import Manifest, Shard, write_manifest
from orchestrate.data.order import Order
from orchestrate.data.reader import Reader
from orchestrate.data.readplan import plan_reads
from orchestrate.data.sample_source import Loading
from orchestrate.data.stream import TrainStream
from ssl_methods.views import recipe

_SAMPLES, _SHARDS, _BATCH, _RANKS = 10**9, 100_000, 4096, 32
_PEER_SAMPLES = 10**7  # at a billion the peer's arrays take some 30 GB
_POSITIONS = {"the start": 0.0, "1/4 of an epoch": 0.25, "3/4 of an epoch": 0.75, "3.5 epochs": 3.5}


def measure_planning(options: Options) -> Iterator[Row]:
    """Plan an epoch of a billion samples in 100,000 shards, and of ten million beside MosaicML Streaming."""
    url = _write_billion()
    yield from _cost("opening: manifest of 100,000 shards, parsed and summed", lambda: Reader(url))
    find = Reader(url).number_of
    title = f"planning: 1e9 samples, order, batch with its shards, block of reads of rank 0 of {_RANKS}"
    yield from _cost(f"{title}, at the start", partial(_plan, _SAMPLES, 0, find))
    yield from _cost(f"{title}, in mid-epoch", partial(_plan, _SAMPLES, _SAMPLES // _BATCH // 2, find))
    try:
        peer = _streaming_plan(options)
    except ImportError as error:
        print(f"planning: MosaicML Streaming left out ({error})", file=sys.stderr)
        return
    ends = list(range(10_000, _PEER_SAMPLES + 1, 10_000))  # shards as large as the peer's
    ours_cost, peer_cost = _measure(partial(_plan, _PEER_SAMPLES, 0, partial(bisect_right, ends))), _measure(peer)
    title = "planning: 1e7 samples, beside MosaicML Streaming"
    yield Row(f"{title}, time", ours_cost[0], peer_cost[0], "ms")
    yield Row(f"{title}, peak memory", ours_cost[1], peer_cost[1], "MB")


def measure_resume(options: Options) -> Iterator[Row]:
    """Wait for the first batch of a training that goes on; the peer reads what it has seen and drops it."""
    for kind in KINDS:
        images = build_images(options.folder, kind, options.samples_of(kind))
        contestants: dict[str, Callable[[], float]] = {}
        for where, epochs in _POSITIONS.items():
            steps = int(epochs * options.samples_of(kind) / options.batch)
            contestants[f"ours {where}"] = partial(_seconds_to_first_batch, images, steps, options, "never")
            contestants[f"chunks {where}"] = partial(_seconds_to_first_batch, images, steps, options, "always")
            contestants[f"peer {where}"] = partial(_stock_seconds_to_first_batch, images, steps, options)
        found = alternate(contestants, options.passes)
        for where in _POSITIONS:
            title = f"resume: {kind}, first batch after {where}"
            yield compared(f"{title}, beside webdataset skipping", found[f"ours {where}"], found[f"peer {where}"], "s")
            yield Row(f"{title}, fetched in chunks", median(found[f"chunks {where}"]), None, "s")


def _plan(num_samples: int, step: int, find_shard: Callable[[int], int]) -> None:
    """Plan what a start needs: a global batch with the shards of its samples, and one rank's reads from there on."""
    order = Order(num_samples, 0, global_batch=_BATCH)
    for sample_id in order.batch(step)[0].tolist():
        find_shard(sample_id)
    for read in next(plan_reads(order, rank=0, world_size=_RANKS, start_step=step)):
        find_shard(read.ids.start)


def _write_billion() -> str:
    """Write the manifest of shards that nobody has, to a store in memory: a local set would be checked file by file."""
    shards = tuple(
        Shard(f"train-{number:06d}.tar", _SAMPLES // _SHARDS, 10**9, f"{number:064x}") for number in range(_SHARDS)
    )
    write_manifest("memory://billion", Manifest(shards))
    return "memory://billion"


def _streaming_plan(options: Options) -> Callable[[], object]:
    """Do what its dataset does at the start of every epoch and after every resume."""
    if options.peers:
        sys.path.append(options.peers)
    partition = importlib.import_module("streaming.base.partition").get_partitions
    shuffle = importlib.import_module("streaming.base.shuffle").get_shuffle
    shards = np.full(_PEER_SAMPLES // 10_000, 10_000)

    def plan() -> object:
        ids = partition("relaxed", _PEER_SAMPLES, 1, 1, _RANKS, 1, _BATCH // _RANKS, 0)
        return np.where(ids != -1, shuffle("py1e", shards, 1, 0, 0, 262_144)[ids], -1)

    return plan


def _seconds_to_first_batch(images: Images, step: int, options: Options, ahead: Any) -> float:
    began = time.perf_counter()
    stream = TrainStream(
        images.url,
        recipe=recipe(*KINDS[images.kind]),
        seed=0,
        global_batch=options.batch,
        rank=0,
        world_size=1,
        start_step=step,
        loading=Loading(workers=options.workers, ahead=ahead),
    )
    next(stream)
    seconds = time.perf_counter() - began
    stream.close()
    return seconds


def _stock_seconds_to_first_batch(images: Images, step: int, options: Options) -> float:
    import webdataset as wds

    began = time.perf_counter()
    stock = wds.WebDataset(list(images.tars), shardshuffle=len(images.tars)).shuffle(1000).repeat()
    seen = step * options.batch
    rest = wds.DataPipeline(
        lambda: islice(iter(stock), seen, None),
        wds.decode("pill" if images.kind == "small" else "pil"),
        wds.to_tuple(images.extension, "cls"),
    )
    views = stock_views(recipe(*KINDS[images.kind]))
    for image, _ in islice(iter(rest), options.batch):
        views(image)
    return time.perf_counter() - began


def _cost(name: str, work: Callable[[], object]) -> Iterator[Row]:
    milliseconds, megabytes = _measure(work)
    yield Row(f"{name}, time", milliseconds, None, "ms")
    yield Row(f"{name}, peak memory", megabytes, None, "MB")


def _measure(work: Callable[[], object]) -> tuple[float, float]:
    """Return the median milliseconds of 5 runs, and the peak megabytes of another."""
    seconds, peak_bytes = cost(work)
    return seconds * 1e3, peak_bytes / 1e6

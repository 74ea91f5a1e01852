"""Turn images into a packed dataset: checked, shuffled once, in shards whose bytes depend on the images alone."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrate.data import storage
from orchestrate.data.fashion_mnist import fashion_mnist
from orchestrate.data.images import check_image
from orchestrate.data.index import (
    FORMAT,
    MANIFEST_NAME,
    Manifest,
    Shard,
    check_shards,
    load_manifest,
    write_atomically,
    write_manifest,
)
from orchestrate.data.order import shuffled
from orchestrate.data.shards import pack_sample, recover_shard, write_shard
from orchestrate.data.sources import Item, Source, image_folder, listing, problems_error, relabel
from orchestrate.errors import DataError
from orchestrate.runs import sync_folder

FASHION_MNIST = "fashion-mnist"
# Marks a folder as ours before the manifest is there, and says which pack goes on in it.
_UNFINISHED = "unfinished-pack.txt"
_OURS = re.compile(r"[A-Za-z0-9_-]+-\d{6}\.tar(\.idx)?(\.part)?")
_TAR_BYTES_PER_SAMPLE = 4 * 512  # at most: two headers, one block of label, padding of the image

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Job:
    """One shard to write; plain data, so that it can go to another process."""

    path: Path
    items: Sequence[Item]
    read: Callable[[Item], bytes]
    label: dict[str, int]
    skip_bad: bool


@dataclass(frozen=True)
class _Written:
    """What came of a job: the shard, or no shard where bad images are not to be skipped."""

    shard: Shard | None
    bad: list[str] = field(default_factory=list)


class _BadImagesError(Exception):
    """Abandon a shard: its bad images are listed by the job, and none are to be skipped."""


def pack(
    source: str,
    dest: str,
    *,
    split: str = "train",
    limit: int | None = None,
    samples_per_shard: int = 10_000,
    shuffle_seed: int | None = 0,
    classes: Sequence[str] | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Pack images into WebDataset shards with an index, and check each image by decoding it.

    A pack that was interrupted goes on where it stopped. Where `dest` holds this very pack already, nothing is done.

    Args:
        source: folder of images (its sub-folders are classes), CSV or TSV file with columns `path` and perhaps `label`,
            or `fashion-mnist` (a folder of that name is given as `./fashion-mnist`).
        dest: folder to write to: new, empty, or one that holds a pack.
        split: name of the shards; for fashion-mnist also which images: train, val or test.
        limit: pack only that many images, after shuffling.
        samples_per_shard: images in one tar.
        shuffle_seed: order of the images in the shards; None keeps the order of the source.
        classes: names in order of their labels, such as those of the training split, which this one may lack.
        workers: processes, by default one for each usable core; does not change the bytes.
        skip_bad: leave out images that cannot be decoded; the manifest's `info["skipped"]` counts them.
        overwrite: replace another dataset in `dest`; it is gone even if this pack fails.
        progress: called with (images done, images in all) now and then; never if there is nothing to do.

    Raises:
        DataError: lists what is wrong with the source, or says why `dest` cannot be written; leaves nothing behind.
    """
    folder = _check_request(dest, split, limit, samples_per_shard)
    listed = _open_source(source, split, folder)
    if classes is not None:
        listed = relabel(listed, classes)
    recipe = _recipe(listed, [split, limit, samples_per_shard, shuffle_seed, skip_bad])
    existing = _existing_pack(folder, recipe, overwrite)
    if existing is not None:
        return existing
    items = _choose(listed.items, limit, shuffle_seed)
    _check_space(folder, sum(item.num_bytes + _TAR_BYTES_PER_SAMPLE for item in items))
    _prepare(folder, recipe)
    jobs = _plan_jobs(folder, split, samples_per_shard, items, listed, skip_bad)
    results = _run(folder, jobs, workers or len(os.sched_getaffinity(0)), progress or (lambda done, total: None))
    shards = _whole_shards(folder, results)
    info = {"source": source, "recipe": recipe, "skipped": sum(len(result.bad) for result in results)}
    return _finish(folder, Manifest(tuple(shards), listed.classes, split, info))


def _check_request(dest: str, split: str, limit: int | None, samples_per_shard: int) -> Path:
    folder = storage.local_path(dest)
    if folder is None:
        raise DataError(f"{dest}: packing writes to a local folder; pack there and copy the folder to the store")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", split):
        raise DataError(f"split `{split}`: use letters, digits, - and _")
    for name, value in {"limit": limit, "samples_per_shard": samples_per_shard}.items():
        if value is not None and value < 1:
            raise DataError(f"{name}: {value}, must be at least 1")
    return folder


def _open_source(source: str, split: str, dest: Path) -> Source:
    if source == FASHION_MNIST:
        return fashion_mnist(split)
    path = storage.local_path(source)
    if path is not None and path.is_dir():
        if dest.resolve().is_relative_to(path.resolve()):
            raise DataError(f"{dest}: lies in the source folder {source}; choose a folder outside of it")
        return image_folder(path)
    if path is not None and path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        return listing(path)
    reason = "no such file or folder" if path is None or not path.exists() else "not a folder, .csv or .tsv file"
    raise DataError(f"{source}: {reason}; give a folder of images, a .csv or .tsv listing, or {FASHION_MNIST}")


def _recipe(source: Source, settings: list[Any]) -> str:
    """Name what a pack will hold, before it is made."""
    return hashlib.sha256(json.dumps([FORMAT, source.identity, settings]).encode()).hexdigest()


def _existing_pack(folder: Path, recipe: str, overwrite: bool) -> Manifest | None:
    """Return the pack in `folder` if it is this one and whole; refuse a folder with anything else."""
    if (folder / MANIFEST_NAME).exists():
        try:
            manifest = load_manifest(str(folder))
        except DataError:
            if overwrite:
                return None
            raise
        if manifest.info.get("recipe") == recipe:
            return manifest if _is_whole(folder, manifest) else None
        if not overwrite:
            raise DataError(
                f"{folder}: holds another dataset ({manifest.num_samples:,} samples, split {manifest.split}, digest "
                f"{manifest.digest[:16]}); choose another folder, or replace it with --overwrite"
            )
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / _UNFINISHED).exists():
        raise DataError(f"{folder}: not empty, and holds no packed dataset; choose another folder")
    return None


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    try:
        check_shards(str(folder), manifest)
    except DataError:
        return False
    return True


def _choose(items: Sequence[Item], limit: int | None, shuffle_seed: int | None) -> list[Item]:
    order = range(len(items)) if shuffle_seed is None else shuffled(len(items), shuffle_seed).tolist()
    return [items[number] for number in order[:limit]]


def _check_space(folder: Path, num_bytes: int) -> None:
    """Check that `folder` can be written and has room, without leaving anything behind."""
    parent = next(path for path in [folder, *folder.absolute().parents] if path.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {parent}: {error.strerror}") from error
    if num_bytes > free:
        raise DataError(
            f"{folder}: needs up to {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; choose another disk"
        )


def _prepare(folder: Path, recipe: str) -> None:
    """Make the folder ours for this recipe. In this order: a crash in between must not pass old shards as new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    if recipe not in (_recipe_of_manifest(folder), _recipe_of_unfinished(folder)):
        _remove_shards(folder, keep=set())
    write_atomically(folder / _UNFINISHED, recipe.encode())
    (folder / MANIFEST_NAME).unlink(missing_ok=True)


def _recipe_of_manifest(folder: Path) -> object:
    try:
        return load_manifest(str(folder)).info.get("recipe")
    except DataError:
        return None


def _recipe_of_unfinished(folder: Path) -> str | None:
    mark = folder / _UNFINISHED
    return mark.read_text() if mark.exists() else None


def _remove_shards(folder: Path, keep: set[str]) -> None:
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in keep:
            path.unlink()


def _plan_jobs(
    folder: Path, split: str, samples_per_shard: int, items: list[Item], source: Source, skip_bad: bool
) -> list[_Job]:
    label = {name: number for number, name in enumerate(source.classes)}
    starts = range(0, len(items), samples_per_shard)
    return [
        _Job(
            folder / f"{split}-{number:06d}.tar", items[start : start + samples_per_shard], source.read, label, skip_bad
        )
        for number, start in enumerate(starts)
    ]


def _run(folder: Path, jobs: list[_Job], workers: int, progress: Progress) -> list[_Written]:
    total = sum(len(job.items) for job in jobs)
    progress(0, total)
    try:
        if min(workers, len(jobs)) > 1:
            return _run_processes(jobs, min(workers, len(jobs)), lambda done: progress(done, total))
        return _run_inline(jobs, lambda done: progress(done, total))
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}; run again to go on from here") from error
    except BrokenProcessPool as error:
        raise DataError(
            f"{folder}: a packing process died (out of memory, or the calling script has no file or no "
            "`if __name__ == '__main__'`); run again with fewer workers to go on from here"
        ) from error


def _run_inline(jobs: list[_Job], progress: Callable[[int], None]) -> list[_Written]:
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        if done % 100 == 0:
            progress(done)

    results = [_write(job, count) for job in jobs]
    progress(sum(len(job.items) for job in jobs))
    return results


def _run_processes(jobs: list[_Job], workers: int, progress: Callable[[int], None]) -> list[_Written]:
    # Spawned, not forked: the caller may run threads (torch does), whose locks a fork would copy in any state.
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (counter, stop)) as pool:
        futures = [pool.submit(_write_in_worker, job) for job in jobs]
        try:
            _follow(futures, lambda: progress(counter.value))
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


def _follow(futures: list[Future[_Written]], report: Callable[[], None]) -> None:
    waiting = set(futures)
    while waiting:
        done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        report()


# A pool hands shared counters to its processes only through an initializer, and that only through a global.
_worker: dict[str, Any] = {}


def _start_worker(counter: Any, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which says stop
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker.update(counter=counter, stop=stop)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()  # returns when the parent is gone, killed or not; a pool's processes would wait for ever
        os._exit(1)


def _write_in_worker(job: _Job) -> _Written:
    def count() -> None:
        if _worker["stop"].is_set():
            raise KeyboardInterrupt
        with _worker["counter"].get_lock():
            _worker["counter"].value += 1

    return _write(job, count)


def _write(job: _Job, count: Callable[[], None]) -> _Written:
    """Write one shard, unless an earlier run did; `count` is called after each image."""
    recovered = recover_shard(job.path)
    if recovered is not None and recovered.samples == len(job.items):
        for _ in job.items:
            count()
        return _Written(recovered)
    bad: list[str] = []
    try:
        return _Written(write_shard(job.path, _samples(job, bad, count)), bad)
    except _BadImagesError:
        return _Written(None, bad)


def _samples(job: _Job, bad: list[str], count: Callable[[], None]) -> Iterator[bytes]:
    for item in job.items:
        problem, data = _read_checked(job, item)
        count()
        if problem is not None:
            bad.append(f"{item.where}: {problem}")
        elif job.skip_bad or not bad:
            label = {"cls": str(job.label[item.class_name]).encode()} if item.class_name else {}
            yield pack_sample(item.key, label | {item.extension: data})
    if bad and not job.skip_bad:
        raise _BadImagesError


def _read_checked(job: _Job, item: Item) -> tuple[str | None, bytes]:
    try:
        data = job.read(item)
    except OSError as error:
        return f"cannot be read: {error.strerror}", b""
    return check_image(data), data


def _whole_shards(folder: Path, results: list[_Written]) -> list[Shard]:
    """List the shards; if any image was bad and none may be skipped, remove all that was written and say which."""
    bad = [name for result in results for name in result.bad]
    shards = [result.shard for result in results if result.shard is not None and result.shard.samples]
    if shards and all(result.shard is not None for result in results):
        return shards
    _remove_shards(folder, keep=set())
    (folder / _UNFINISHED).unlink()
    if not any(folder.iterdir()):
        folder.rmdir()
    raise problems_error("images that cannot be packed (they can be left out with --skip-bad)", bad)


def _finish(folder: Path, manifest: Manifest) -> Manifest:
    keep = {name for shard in manifest.shards for name in (shard.name, shard.sidecar)}
    _remove_shards(folder, keep)
    sync_folder(folder)
    write_manifest(folder, manifest)
    (folder / _UNFINISHED).unlink()
    return manifest

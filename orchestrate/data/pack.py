"""Turn images into a packed dataset: checked, shuffled once, in shards whose bytes depend on the images alone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from orchestrate.data import storage
from orchestrate.data.fashion_mnist import fashion_mnist
from orchestrate.data.index import (
    MANIFEST_NAME,
    Manifest,
    Shard,
    check_shards,
    load_manifest,
    write_manifest,
)
from orchestrate.data.order import shuffled
from orchestrate.data.pack_jobs import Job, Progress, Written, run_jobs
from orchestrate.data.pack_shrink import Shrink
from orchestrate.data.pack_sources import Item, Source, image_folder, listing, problems_error, relabel
from orchestrate.data.pack_tars import holds_tars, tar_source
from orchestrate.errors import DataError
from orchestrate.runs import sync_folder

FASHION_MNIST = "fashion-mnist"
# Marks a folder as ours before the manifest is there, and says which pack goes on in it.
_UNFINISHED = "unfinished-pack.txt"
_OURS = re.compile(r"[A-Za-z0-9_-]+-\d{6}\.tar(\.idx)?(\.part)?")
# Part of a recipe's name; raise it when the same settings make other bytes.
_RECIPE_FORMAT = 1
_TAR_BYTES_PER_SAMPLE = 4 * 512  # at most: two headers, one block of label, padding of the image


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
    shrink: Shrink | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Pack images into WebDataset shards with an index, and check each image by decoding it.

    A pack that was interrupted goes on where it stopped. Where `dest` holds this very pack already, nothing is done.

    Args:
        source: folder of images (its sub-folders are classes), CSV or TSV file with columns `path` and perhaps `label`,
            WebDataset tars, compressed or not, on any store (a folder, one tar or a pattern), or `fashion-mnist` (a
            folder of that name is given as `./fashion-mnist`). Members of tars other than image and label are kept.
        dest: folder to write to: new, empty, or one that holds a pack.
        split: name of the shards; for fashion-mnist also which images: train, val or test.
        limit: pack only that many images, after shuffling.
        samples_per_shard: images in one tar.
        shuffle_seed: order of the images in the shards; None keeps the order of the source.
        classes: names in order of their labels, such as those of the training split, which this one may lack. What has
            class names (folders, listings, tars beside a manifest with names) is numbered anew by them; labels of other
            tars are taken for numbers of this list.
        workers: processes, by default one for each usable core; does not change the bytes.
        skip_bad: leave out images that cannot be decoded, and samples of tars that cannot be packed (no image, two, no
            label where others have one, a key met before); the manifest's `info["skipped"]` counts them.
        overwrite: replace another dataset in `dest`; it is gone even if this pack fails.
        shrink: scale larger images down and encode them anew.
        progress: called with (images done, images in all) now and then; never if there is nothing to do.

    Raises:
        DataError: lists what is wrong with the source, or says why `dest` cannot be written; leaves nothing behind.
    """
    folder = _check_request(dest, split, limit, samples_per_shard)
    with ExitStack() as stack:  # keeps what compressed tars unpack to until the end
        listed = _open_source(source, split, folder, classes, skip_bad, stack)
        settings = [split, limit, samples_per_shard, shuffle_seed, skip_bad, *(vars(shrink).items() if shrink else ())]
        recipe = _recipe(listed, settings)
        existing = _existing_pack(folder, recipe, overwrite)
        if existing is not None:
            return existing
        items = _choose(listed.items, limit, shuffle_seed)
        _check_space(folder, sum(item.num_bytes + _TAR_BYTES_PER_SAMPLE for item in items))
        _prepare(folder, recipe)
        jobs = _plan_jobs(folder, split, samples_per_shard, items, listed, skip_bad, shrink)
        results = run_jobs(
            folder, jobs, workers or len(os.sched_getaffinity(0)), progress or (lambda done, total: None)
        )
        shards = _whole_shards(folder, results)
    counts = sum((result.class_counts for result in results), Counter[str]())
    info = {
        "source": source,
        "recipe": recipe,
        "skipped": listed.skipped + sum(len(result.bad) for result in results),
        "class_counts": [counts[name] for name in listed.classes],
    }
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


def _open_source(
    source: str, split: str, dest: Path, classes: Sequence[str] | None, skip_bad: bool, stack: ExitStack
) -> Source:
    if source == FASHION_MNIST:
        listed = fashion_mnist(split)
    elif holds_tars(source):
        _check_outside(source, dest)
        return tar_source(source, classes=classes, scratch=_scratch_folder(dest, stack), skip_bad=skip_bad)
    else:
        listed = _open_files(source, dest)
    return listed if classes is None else relabel(listed, classes)


def _scratch_folder(dest: Path, stack: ExitStack) -> Callable[[], Path]:
    """Make a folder beside `dest` when it is needed; it is gone with the pack."""
    parent = next(path for path in dest.absolute().parents if path.exists())
    return lambda: Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".unpacked-")))


def _open_files(source: str, dest: Path) -> Source:
    path = storage.local_path(source)
    if path is not None and path.is_dir():
        _check_outside(source, dest)
        return image_folder(path)
    if path is not None and path.suffix.lower() in (".csv", ".tsv") and path.is_file():
        return listing(path)
    reason = "no such file or folder" if path is None or not path.exists() else "not a folder, .csv, .tsv or tar file"
    raise DataError(f"{source}: {reason}; give a folder of images or tars, a .csv or .tsv listing, or {FASHION_MNIST}")


def _check_outside(source: str, dest: Path) -> None:
    """Refuse to write among what is read: a folder's own sub-folders, or beside chosen tars."""
    path = storage.local_path(storage.base_folder(source))
    if path is None:
        return
    target, folder = dest.resolve(), path.resolve()
    if target == folder or (storage.base_folder(source) == source and target.is_relative_to(folder)):
        raise DataError(f"{dest}: lies in the source folder {path}; choose a folder outside of it")


def _recipe(source: Source, settings: list[Any]) -> str:
    """Name what a pack will hold, before it is made."""
    return hashlib.sha256(json.dumps([_RECIPE_FORMAT, source.identity, settings]).encode()).hexdigest()


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
    storage.write(str(folder / _UNFINISHED), recipe.encode())
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
    folder: Path,
    split: str,
    samples_per_shard: int,
    items: list[Item],
    source: Source,
    skip_bad: bool,
    shrink: Shrink | None,
) -> list[Job]:
    label = {name: number for number, name in enumerate(source.classes)}
    read_members = source.read_members or partial(_only_image, source.read)
    return [
        Job(
            path=folder / f"{split}-{number:06d}.tar",
            items=items[start : start + samples_per_shard],
            read_members=read_members,
            label=label,
            skip_bad=skip_bad,
            shrink=shrink,
        )
        for number, start in enumerate(range(0, len(items), samples_per_shard))
    ]


def _only_image(read: Callable[[Item], bytes], item: Item) -> dict[str, bytes]:
    return {item.extension: read(item)}


def _whole_shards(folder: Path, results: list[Written]) -> list[Shard]:
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

r"""Loaders side by side: each gives batches of augmented views of the same packed images, without end.

Run by `loader.py` as a process of its own, one loader at a time:

    python benchmarks/loader_contestants.py TASK    # TASK is JSON; prints JSON

The peers do to pixels what the recipe says, with torchvision's transforms on PIL images and, as users do, in two
DataLoader processes; DALI has operators of its own. They give normalised float32, we and DALI give uint8 and leave the
normalisation to the device. `webdataset uint8` shows what that part of the difference is. Grey images stay of one
channel in all of them but DALI; we make three of it at the end.

Peers that lie in a folder of their own, made by one command so that they bring no second torch:

    pip install --no-deps --target FOLDER mosaicml-streaming litdata nvidia-dali-cuda120 nvidia-nvimgcodec-cu12 \
        transformers tokenizers regex catalogue xxhash zstd Brotli python-snappy cramjam lightning-utilities obstore \
        tifffile optree nvtx makefun astunparse gast wheel
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ssl_methods.view_plan import ViewSpec
from ssl_methods.views import ViewRecipe, recipe, view_sides

Views = Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Task:
    """What to load, and for how long: `warm_batches` come before the clock starts."""

    contestant: str
    url: str
    tars: list[str]
    extension: str
    recipe: str
    size: int
    batch: int
    workers: int
    seconds: float
    warm_batches: int
    scratch: str

    def views(self) -> ViewRecipe:
        """Return the recipe."""
        return recipe(self.recipe, self.size)


def main() -> None:
    """Time one loader; print images, seconds and CPU seconds of all its processes."""
    task = Task(**json.loads(sys.argv[1]))
    try:
        batches = CONTESTANTS[task.contestant](task)
        for _ in islice(batches, task.warm_batches):
            pass
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    images, cpu_began, began = 0, cpu_seconds(), time.perf_counter()
    while time.perf_counter() - began < task.seconds:
        images += next(batches)
    facts = {"images": images, "seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - cpu_began}
    print(json.dumps(facts), flush=True)
    batches.close()  # type: ignore[attr-defined]


def ours(task: Task, pixels: Any = "fast") -> Iterator[int]:
    """Read with worker threads."""
    from orchestrate.data.sample_source import Loading
    from orchestrate.data.stream import TrainStream

    stream = TrainStream(
        task.url,
        recipe=task.views(),
        seed=0,
        global_batch=task.batch,
        rank=0,
        world_size=1,
        with_labels=True,
        pixels=pixels,
        loading=Loading(workers=task.workers),
    )
    try:
        for batch in stream:
            yield len(batch.sample_ids)
    finally:
        stream.close()


def webdataset(task: Task, *, as_float: bool) -> Iterator[int]:
    """Read with stock webdataset: shards shuffled, then a buffer of 1,000 samples."""
    import webdataset as wds

    dataset = (
        wds.WebDataset(task.tars, shardshuffle=len(task.tars))
        .shuffle(1000)
        .decode("pill" if is_grey(task.recipe) else "pil")
        .to_tuple(task.extension, "cls")
        .map_tuple(stock_views(task.views(), as_float=as_float), int)
        .repeat()
    )
    yield from _batches(dataset, task)


def streaming(task: Task) -> Iterator[int]:
    """Read with MosaicML Streaming, from shards of its own format."""
    library = importlib.import_module("streaming")
    folder = Path(task.scratch, f"mds-{Path(task.url).name}")
    if not (folder / "index.json").exists():
        with library.MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
            for data, label in _members(task):
                writer.write({"image": data, "label": label})
    views = stock_views(task.views())

    class Images(library.StreamingDataset):  # type: ignore[name-defined, misc]
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            return views(opened(sample["image"])), sample["label"]

    yield from _batches(Images(local=str(folder), shuffle=True, batch_size=task.batch), task)


def litdata(task: Task) -> Iterator[int]:
    """Read with LitData, from chunks of its own format."""
    library = importlib.import_module("litdata")
    folder = Path(task.scratch, f"litdata-{Path(task.url).name}")
    if not (folder / "index.json").exists():
        writer = importlib.import_module("litdata.streaming.writer").BinaryWriter(str(folder), chunk_bytes="64MB")
        for index, (data, label) in enumerate(_members(task)):
            writer.add_item(index, {"image": data, "label": label})
        writer.done()
        writer.merge()
    views = stock_views(task.views())

    class Images(library.StreamingDataset):  # type: ignore[name-defined, misc]
        def __getitem__(self, index: Any) -> Any:
            sample = super().__getitem__(index)
            return views(opened(sample["image"])), sample["label"]

    yield from _batches(Images(str(folder), shuffle=True), task, library.StreamingDataLoader)


def dali(task: Task) -> Iterator[int]:
    """Read, decode and augment with DALI's CPU operators; hue turns by another formula than torchvision's."""
    pipeline = importlib.import_module("loader_dali").build_pipeline(
        task.tars,
        task.extension,
        task.views(),
        view_sides(task.views()),
        batch=task.batch,
        threads=task.workers,
    )
    while True:
        views = pipeline.run()
        yield len(views[0].as_array())


def stock_views(recipe: ViewRecipe, *, as_float: bool = True) -> Views:
    """Build a recipe from torchvision's transforms (v1) on PIL images."""
    built = [
        _stock_view(spec, side, recipe, as_float=as_float)
        for spec, side in zip(recipe.views, view_sides(recipe), strict=True)
    ]
    return lambda image: [view(image) for view in built]


def _stock_view(spec: ViewSpec, side: int, recipe: ViewRecipe, *, as_float: bool) -> Any:
    from torchvision import transforms as T  # noqa: N812 (the name everybody uses)

    jitter = (spec.brightness, spec.contrast, spec.saturation, spec.hue)
    steps: list[Any] = [
        T.RandomResizedCrop(side, spec.crop_scale, spec.crop_ratio, T.InterpolationMode(spec.interpolation)),
        T.RandomHorizontalFlip(spec.flip_p),
    ]
    if spec.jitter_p:
        steps.append(T.RandomApply([T.ColorJitter(*jitter)], spec.jitter_p))
    if spec.grayscale_p:
        steps.append(T.RandomGrayscale(spec.grayscale_p))
    if spec.blur_p:
        steps.append(T.RandomApply([_Blur(*spec.blur_sigma)], spec.blur_p))
    if spec.solarise_p:
        steps.append(T.RandomSolarize(128, spec.solarise_p))
    if as_float:
        channels = slice(1 if is_grey(recipe.name) else 3)
        steps += [T.ToTensor(), T.Normalize(recipe.mean[channels], recipe.std[channels])]
    else:
        steps.append(T.PILToTensor())
    return T.Compose(steps)


class _Blur:
    """Pillow's Gaussian blur of a random width, as the authors of SimCLR's and BYOL's ports to torch wrote it."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high

    def __call__(self, image: Any) -> Any:
        import random

        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


def _batches(dataset: Any, task: Task, loader: Any = None) -> Iterator[int]:
    """Go through a dataset again and again with one set of worker processes."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    build = loader or DataLoader
    batches = build(dataset, batch_size=task.batch, num_workers=task.workers, persistent_workers=task.workers > 0)
    while True:
        for _, labels in batches:
            yield len(labels)


def _members(task: Task) -> Iterator[tuple[bytes, int]]:
    import webdataset as wds

    for data, label in wds.WebDataset(task.tars, shardshuffle=False).to_tuple(task.extension, "cls"):
        yield data, int(label)


def is_grey(recipe_name: str) -> bool:
    """Tell whether a recipe is used on the benchmark's small images, which are grey."""
    return recipe_name.startswith("small")


def opened(data: bytes) -> Any:
    """Decode with PIL, in the image's own mode."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def cpu_seconds() -> float:
    """Sum the CPU time of this process, of its descendants, and of those of them that have ended."""
    import os

    ticks, parents = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(stat.parent.name)
        ticks[pid], parents[pid] = sum(map(int, fields[11:15])), int(fields[1])
    family = {os.getpid()}
    while children := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= children
    return sum(ticks[pid] for pid in family) / os.sysconf("SC_CLK_TCK")


SAME_OUTPUT = "webdataset uint8"
CONTESTANTS: dict[str, Callable[[Task], Iterator[int]]] = {
    "ours": ours,
    "ours, reference pixels": lambda task: ours(task, "reference"),
    "ours, colour left to the device": lambda task: ours(task, "device"),
    "webdataset float32 normalised (as users write it)": lambda task: webdataset(task, as_float=True),
    SAME_OUTPUT: lambda task: webdataset(task, as_float=False),
    "MosaicML Streaming": streaming,
    "LitData": litdata,
    "DALI CPU": dali,
}

if __name__ == "__main__":
    main()

"""Single stages of loading, on one core: making views, decoding, and what the loader adds to them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from loader_contestants import opened, stock_views
from loader_photos import Images, build_images
from loader_rows import KINDS, Kind, Options, Row, alternate, compared, cpu_ms
from PIL import Image

from orchestrate.data.images import decode
from orchestrate.data.order import Order
from orchestrate.data.reader import Reader
from orchestrate.data.sample_source import Loading, Source
from orchestrate.data.stream import TrainStream
from orchestrate.data.view_maker import Job, Maker, Rows
from ssl_methods.views import ViewRecipe, make_views, recipe

_IMAGES = 64  # that a stage goes through again and again
_RECIPES = {"photos": (("barlow_twins", 224), ("simclr", 224), ("dino", 224)), "small": (("small_grey", 28),)}


def measure_pixels(options: Options) -> Iterator[Row]:
    """Make all views of a decoded image: ours fast, ours as torchvision does, and torchvision on PIL images."""
    torch.set_num_threads(1)
    for kind, recipes in _RECIPES.items():
        files = _files(options, kind)
        pixels, pictures = [decode(data) for data in files], [opened(data) for data in files]
        for name, size in recipes:
            views = recipe(name, size)
            works = {mode: partial(_make, pixels, views, mode) for mode in ("fast", "reference")}
            works["stock"] = partial(_make_stock, pictures, stock_views(views))
            works["uint8"] = partial(_make_stock, pictures, stock_views(views, as_float=False))
            found = _cpu(works, options)
            title = f"pixels: {len(views.views)} views, {name} {size}"
            peers = {"torchvision on PIL, float32 normalised": "stock", "torchvision on PIL, uint8": "uint8"}
            for peer, work in peers.items():
                yield compared(f"{title}, fast beside {peer}", found["fast"], found[work], "CPU ms")
            yield compared(f"{title}, reference beside {peer}", found["reference"], found["uint8"], "CPU ms")


def _make(images: list[Any], views: ViewRecipe, pixels: Any, number: int) -> object:
    return make_views(images[number % _IMAGES], views, seed=0, epoch=0, sample_id=number, pixels=pixels)


def _make_stock(images: list[Image.Image], make: Any, number: int) -> object:
    return make(images[number % _IMAGES])


def measure_decode(options: Options) -> Iterator[Row]:
    """Decode an image, beside PIL and beside what no decoder can avoid: undoing the entropy coding."""
    for kind in KINDS:
        names = ["ours", "pillow", *(["entropy"] if kind == "photos" else [])]
        found = alternate({name: partial(_decoder_ms, name, kind, options) for name in names}, options.passes)
        yield compared(f"decode: {kind}, beside PIL", found["ours"], found["pillow"], "CPU ms")
        if all(found.get("entropy", [0.0])):
            yield compared("decode: photos, beside entropy decoding alone", found["ours"], found["entropy"], "CPU ms")


def measure_overhead(options: Options) -> Iterator[Row]:
    """Time the loader without the images: reading, checking and unpacking samples in the order of a training."""
    torch.set_num_threads(1)
    for kind in KINDS:
        images = build_images(options.folder, kind, options.samples_of(kind))
        works = {"as needed": _reading(images, options, "never"), "in chunks": _reading(images, options, "always")}
        works["stock"] = _stock_reading(images)
        found = _cpu({name: lambda _, it=it: next(it) for name, it in works.items()}, options)
        for name in ("as needed", "in chunks"):
            title = f"overhead: {kind}, bytes read {name}, checked, unpacked, beside webdataset's unchecked"
            yield compared(title, found[name], found["stock"], "CPU ms")
        for iterator in works.values():
            iterator.close()  # type: ignore[attr-defined]
    # With photos it would be the small difference of two large numbers.
    whole, pixels = _whole_loader(build_images(options.folder, "small", options.samples_of("small")), options)
    beside = sorted(mine - its for mine, its in zip(whole, pixels, strict=True))
    yield Row("overhead: small, whole loader beside decoding and views", beside[len(beside) // 2], None, "CPU ms")


def _reading(images: Images, options: Options, ahead: Any) -> Iterator[object]:
    reader = Reader(images.url)
    order = Order(reader.num_samples, 0, global_batch=options.batch)
    loading = Loading(ahead=ahead, memory_bytes=512 << 20)
    source = Source(reader, order, loading, rank=0, world_size=1, start_step=0)
    try:
        for step in range(1 << 40):
            for sample_id, epoch in zip(*(each.tolist() for each in order.batch(step)), strict=True):
                yield source.read(epoch, sample_id, planned=True)
    finally:
        source.close()


def _stock_reading(images: Images) -> Iterator[object]:
    import webdataset as wds

    stock = wds.WebDataset(list(images.tars), shardshuffle=len(images.tars)).shuffle(1000)
    yield from stock.to_tuple(images.extension, "cls").repeat()


def _whole_loader(images: Images, options: Options) -> tuple[list[float], list[float]]:
    """Return the CPU ms per sample of a stream, and of decoding and views alone, pass by pass."""
    views = recipe(*KINDS["small"])
    stream = TrainStream(images.url, recipe=views, seed=0, global_batch=options.batch, rank=0, world_size=1)
    reader, maker = Reader(images.url), Maker(views, 0)
    ids = stream.order.batch(0)[0].tolist()
    jobs = [Job(row, reader.read(sample_id).image, 0, sample_id) for row, sample_id in enumerate(ids)]
    rows = Rows.allocate(maker, len(jobs))
    found = _cpu({"whole": lambda _: next(stream), "pixels": lambda _: maker.make(jobs, rows)}, options)
    stream.close()
    whole, pixels = ([each / len(jobs) for each in found[name]] for name in ("whole", "pixels"))
    return whole, pixels


def _cpu(works: Any, options: Options) -> dict[str, list[float]]:
    return alternate({name: _timed(work, options) for name, work in works.items()}, options.passes)


def _timed(work: Any, options: Options) -> Any:
    return lambda: cpu_ms(work, options.seconds)


def _files(options: Options, kind: Any) -> list[bytes]:
    reader = Reader(build_images(options.folder, kind, options.samples_of(kind)).url)
    return [reader.read(number % reader.num_samples).image for number in range(_IMAGES)]


def _decoder_ms(name: str, kind: Kind, options: Options) -> float:
    """Return the CPU ms of one image in a process of its own, or 0 where Pillow's libjpeg cannot be called."""
    tar = build_images(options.folder, kind, options.samples_of(kind)).tars[0]
    script = str(Path(__file__).with_name("loader_decoders.py"))
    command = [sys.executable, script, name, tar, str(options.seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return float(json.loads(done.stdout))
    if name != "entropy":
        sys.exit(f"decoder {name} failed:\n{done.stderr[-2000:]}")
    return 0.0

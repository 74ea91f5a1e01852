"""Images delivered to an accelerator, and how long a ResNet-50 waits for them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import torch
from loader_photos import build_images
from loader_rows import KINDS, Options, Row, alternate, compared
from torch import Tensor

from orchestrate.data.sample_source import Loading
from orchestrate.data.stream import Batch, TrainStream
from ssl_methods.device_views import finish_views
from ssl_methods.views import ViewRecipe, normalise, recipe

_PATHS = {"all on the CPU": "fast", "colour on the device": "device"}


def measure_device(options: Options) -> Iterator[Row]:
    """Deliver normalised photos both ways, then train on them; `peer` is the way with all work on the CPU."""
    if options.device == "cuda" and not torch.cuda.is_available():
        print("device: left out (no CUDA device)", file=sys.stderr)
        return
    cpu, split = _PATHS
    delivered = alternate({path: _with_stream(path, options, _deliver) for path in _PATHS}, options.passes)
    yield compared(
        "device: normalised photos delivered, colour there beside here", delivered[split], delivered[cpu], "images/s"
    )
    if options.device == "cpu":
        print("device: ResNet-50 left out (minutes a step without an accelerator)", file=sys.stderr)
        return
    step = _Step(options)
    yield Row(f"device: ResNet-50 step, 2 views of {options.batch} photos, bf16", step.seconds() * 1e3, None, "ms")
    waited = alternate({path: _with_stream(path, options, step.waiting) for path in _PATHS}, options.passes)
    yield compared("device: share of a step spent waiting for data", waited[split], waited[cpu], "%")


def _with_stream(path: str, options: Options, measure: Callable[[TrainStream, Options], float]) -> Callable[[], float]:
    def run() -> float:
        images = build_images(options.folder, "photos", options.samples_of("photos"))
        stream = TrainStream(
            images.url,
            recipe=_views(),
            seed=0,
            global_batch=options.batch,
            rank=0,
            world_size=1,
            pixels=_PATHS[path],  # type: ignore[arg-type]
            loading=Loading(workers=options.workers, pinned=options.device == "cuda"),
        )
        with closing(stream):
            for _ in range(3):
                _arrive(next(stream), options)
            return measure(stream, options)

    return run


def _deliver(stream: TrainStream, options: Options) -> float:
    """Return images per second, each with all its views."""
    images, began = 0, time.perf_counter()
    while time.perf_counter() - began < options.seconds:
        _arrive(next(stream), options)
        _wait(options)
        images += options.batch
    return images / (time.perf_counter() - began)


class _Step:
    """A training step without a method: both views through a ResNet-50, a loss of its features, SGD."""

    def __init__(self, options: Options) -> None:
        from torchvision.models import resnet50

        self._options = options
        self._model: Any = resnet50().to(options.device, memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-3)

    def run(self, views: list[Tensor]) -> None:
        """Take one step and wait for the device."""
        with torch.autocast(self._options.device, torch.bfloat16):
            features = self._model(torch.cat(views))
        features.float().var(dim=0).mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        _wait(self._options)

    def seconds(self) -> float:
        """Return the time of a step on views that are there."""
        size = KINDS["photos"][1]
        views = [torch.randn(self._options.batch, 3, size, size, device=self._options.device) for _ in range(2)]
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
        self.run(views)
        steps, began = 0, time.perf_counter()
        while time.perf_counter() - began < self._options.seconds or not steps:
            self.run(views)
            steps += 1
        return (time.perf_counter() - began) / steps

    def waiting(self, stream: TrainStream, options: Options) -> float:
        """Return the percentage of the time that steps wait for a batch; the device stands still meanwhile."""
        waited, began = 0.0, time.perf_counter()
        while time.perf_counter() - began < options.seconds:
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            self.run(_arrive(batch, options))
        return 100 * waited / (time.perf_counter() - began)


def _arrive(batch: Batch, options: Options) -> list[Tensor]:
    """Copy a batch to the device, finish its views there if they are not, and normalise them."""
    views = [view.to(options.device, non_blocking=True) for view in batch.views]
    if batch.parameters:
        views = [finish_views(view, rows) for view, rows in zip(views, batch.parameters, strict=True)]
    return [normalise(view, _views()) for view in views]


def _views() -> ViewRecipe:
    return recipe(*KINDS["photos"])


def _wait(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()

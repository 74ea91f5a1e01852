"""Features of a whole dataset under a frozen encoder, computed by all ranks, each sample once."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from orchestrate.data.evaluation_stream import EvalStream
from orchestrate.data.sample_source import Loading
from orchestrate.evaluation.probe import Features

_BATCH = 256
_RAW_PIXELS_SIDE = 32


def raw_pixels(images: Tensor) -> Tensor:
    """Flatten uint8 images (batch, height, width, 3) to features in 0..1; larger than 32 px, they are averaged to 32.

    A baseline needs no more detail, and 224 px would take 600 kB an image.
    """
    pixels = images.permute(0, 3, 1, 2).float() / 255
    side = _RAW_PIXELS_SIDE
    return (adaptive_avg_pool2d(pixels, side) if max(pixels.shape[2:]) > side else pixels).flatten(1)


def encode_with(
    encoder: nn.Module, normalise: Callable[[Tensor], Tensor], device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Make a function from uint8 images to the features of an encoder in evaluation mode."""
    encoder = encoder.to(device).eval()

    def encode(images: Tensor) -> Tensor:
        features: Tensor = encoder(normalise(images.to(device)))
        return features.float().cpu()

    return encode


@torch.no_grad()
def extract(
    encode: Callable[[Tensor], Tensor],
    url: str,
    *,
    size: int,
    rank: int,
    world_size: int,
    device: torch.device,
    loading: Loading = Loading(),  # noqa: B008 (frozen)
    damaged: Literal["refuse", "leave out"] = "refuse",
) -> Features | None:
    """Compute the features of a dataset; every rank must call it.

    Args:
        encode: uint8 images (batch, size, size, 3) -> features (batch, dim).
        url: a labelled dataset.
        size: side of the square evaluation view, in pixels.
        rank, world_size: each rank computes a contiguous run of samples.
        device: where the ranks' collectives work.
        loading: threads that read ahead, cache.
        damaged: what to do with damaged samples.

    Returns:
        The features in sample order on rank 0, None elsewhere.
    """
    values, labels = [], []
    place: dict[str, Any] = {"rank": rank, "world_size": world_size}
    stream = EvalStream(url, size=size, batch_size=_BATCH, damaged=damaged, loading=loading, **place)
    for _, images, classes in stream:
        assert classes is not None, "datasets without labels are refused before a trial starts"
        values.append(encode(images))
        labels.append(classes)
    part = Features(
        torch.cat(values) if values else torch.empty(0, 0), torch.cat(labels) if labels else torch.empty(0).long()
    )
    if world_size == 1:
        return part
    return _gather(part, rank=rank, world_size=world_size, device=device)


def _gather(part: Features, *, rank: int, world_size: int, device: torch.device) -> Features | None:
    shapes: list[Any] = [None] * world_size
    dist.all_gather_object(shapes, tuple(part.values.shape))
    rows, dim = max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)
    values = torch.zeros(rows, dim, device=device)
    labels = torch.zeros(rows, dtype=torch.long, device=device)
    if len(part.labels):
        values[: len(part.labels)] = part.values.to(device)
        labels[: len(part.labels)] = part.labels.to(device)
    all_values = [torch.empty_like(values) for _ in range(world_size)] if rank == 0 else None
    all_labels = [torch.empty_like(labels) for _ in range(world_size)] if rank == 0 else None
    dist.gather(values, all_values, dst=0)
    dist.gather(labels, all_labels, dst=0)
    if all_values is None or all_labels is None:
        return None
    counts = [shape[0] for shape in shapes]
    return Features(
        torch.cat([entry[:count].cpu() for entry, count in zip(all_values, counts, strict=True)]),
        torch.cat([entry[:count].cpu() for entry, count in zip(all_labels, counts, strict=True)]),
    )

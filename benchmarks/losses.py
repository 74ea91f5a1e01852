"""Time and peak memory of each loss, forward and backward, beside lightly's on the same input.

    python benchmarks/losses.py [--only barlow_twins vicreg ...] [--rounds N] [--device cuda] [--json]

Sizes are those of a recipe's rank. Rounds of ours and the peer's alternate; a time is the median of all rounds, a ratio
the median of the rounds' ratios, ours / peer. Memory is what one pass allocates beside its input. Truncated triplet
has no peer in lightly: it stands beside the loop over anchors that its authors wrote. Needs the extra `parity`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from lightly import loss as lightly
from torch import Tensor

from ssl_methods.losses.barlow_twins import barlow_twins_loss
from ssl_methods.losses.dino import dino_loss, updated_centre
from ssl_methods.losses.info_nce import info_nce_loss
from ssl_methods.losses.negative_cosine import negative_cosine_loss
from ssl_methods.losses.nt_xent import nt_xent_loss
from ssl_methods.losses.swav import sinkhorn, swav_loss
from ssl_methods.losses.truncated_triplet import truncated_triplet_loss
from ssl_methods.losses.vicreg import vicreg_loss
from ssl_methods.queue import NegativeQueue

Loss = Callable[..., Tensor]
SECONDS = 0.3  # of one contestant in one round, at least one pass


@dataclass(frozen=True)
class Contest:
    """Two losses of the same tensors; each side is built for a device, then called with all of them."""

    name: str
    num_inputs: int
    shape: tuple[int, ...]
    ours: Callable[[torch.device], Loss]
    peer: Callable[[torch.device], Loss]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], choices=sorted({each.name for each in CONTESTS}))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for contest in CONTESTS:
        if not options.only or contest.name in options.only:
            for row in measure(contest, options.rounds, torch.device(options.device)):
                show(row, as_json=options.json)


def measure(contest: Contest, rounds: int, device: torch.device) -> Iterator[dict[str, Any]]:
    """Yield a row of times and one of memory."""
    draws = torch.randn(contest.num_inputs, *contest.shape, generator=torch.Generator().manual_seed(0))
    views = [draw.to(device).requires_grad_() for draw in draws]
    ours, peer = contest.ours(device), contest.peer(device)
    torch.testing.assert_close(ours(*views).squeeze(), peer(*views).squeeze(), rtol=1e-3, atol=1e-5)
    times = [(seconds(ours, views), seconds(peer, views)) for _ in range(rounds)]
    size = " x ".join(str(axis) for axis in contest.shape)
    medians = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
    ratio = statistics.median(mine / its for mine, its in times)
    yield row_of(f"{contest.name} {size}, time", *medians, "ms", ratio)
    memory = [peak_bytes(loss, views) / 1e6 for loss in (ours, peer)]
    yield row_of(f"{contest.name} {size}, peak memory", *memory, "MB", memory[0] / memory[1])


def row_of(name: str, ours: float, peer: float, unit: str, ratio: float) -> dict[str, Any]:
    return {"name": name, "ours": round(ours, 3), "peer": round(peer, 3), "ratio": round(ratio, 3), "unit": unit}


def one_pass(loss: Loss, views: Sequence[Tensor]) -> None:
    """Forward and backward; gradients are new tensors."""
    forget_gradients(views)
    loss(*views).squeeze().backward()


def forget_gradients(views: Sequence[Tensor]) -> None:
    for view in views:
        view.grad = None


def seconds(loss: Loss, views: Sequence[Tensor]) -> float:
    """Return the mean seconds of a pass, after a first one that counts only if it takes long."""
    first, calls = seconds_of_one(loss, views), 0
    if first > SECONDS:
        return first
    total = 0.0
    while total < SECONDS:
        total += seconds_of_one(loss, views)
        calls += 1
    return total / calls


def seconds_of_one(loss: Loss, views: Sequence[Tensor]) -> float:
    began = time.perf_counter()
    one_pass(loss, views)
    synchronise(views[0].device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(loss: Loss, views: Sequence[Tensor]) -> float:
    """Return the most bytes of tensors that one pass holds at a time, its input left out."""
    one_pass(loss, views)
    forget_gradients(views)
    if views[0].device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        one_pass(loss, views)
        return float(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(profile_memory=True) as profile:
        one_pass(loss, views)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = [each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]"]
    return float(max(accumulate(each.nbytes() for each in sorted(changes, key=lambda each: each.start_ns()))))


def show(row: dict[str, Any], *, as_json: bool) -> None:
    """Print a row; ratio is ours / peer."""
    text = f"{row['name']}: {row['ours']} {row['unit']}, peer {row['peer']} {row['unit']}, ratio {row['ratio']}"
    print(json.dumps(row) if as_json else text, flush=True)


# The contests.


def our_moco(device: torch.device) -> Loss:
    queue = NegativeQueue(128, 65536).to(device)
    queue.keys.copy_(peer_bank().to(device))

    def loss(z1: Tensor, z2: Tensor) -> Tensor:
        keys = z2.detach()
        value = info_nce_loss(z1, keys, queue.negatives(), temperature=0.1).loss
        queue.enqueue(keys)
        return value

    return loss


def their_moco(device: torch.device) -> Loss:
    loss = lightly.NTXentLoss(0.1, memory_bank_size=(65536, 128))
    loss.memory_bank.bank.copy_(peer_bank())
    loss.to(device)
    return lambda z1, z2: loss(z1, z2.detach())


def peer_bank() -> Tensor:
    return F.normalize(torch.randn(65536, 128, generator=torch.Generator().manual_seed(1)), dim=1)


def our_dino(device: torch.device) -> Loss:
    centre = torch.zeros(65536, device=device)

    def loss(crops: Tensor) -> Tensor:
        teacher = crops[:2].detach()
        terms = dino_loss(crops, teacher, centre=centre, student_temperature=0.1, teacher_temperature=0.04)
        centre.copy_(updated_centre(centre, teacher, momentum=0.9))
        return terms.loss

    return loss


def their_dino(device: torch.device) -> Loss:
    loss = lightly.DINOLoss(output_dim=65536, teacher_temp=0.04, student_temp=0.1).to(device)
    return lambda crops: loss(list(crops[:2].detach()), list(crops))


def our_swav(scores: Tensor) -> Tensor:
    scores = scores / 5  # in the range of cosines
    codes = sinkhorn(scores[:2].detach(), epsilon=0.05, iterations=3)
    return swav_loss(scores, codes, temperature=0.1)


def their_swav(scores: Tensor) -> Tensor:
    scores = scores / 5
    value: Tensor = lightly.SwaVLoss(temperature=0.1)(list(scores[:2]), list(scores[2:]))
    return value


def triplet_loop(anchors: Tensor, targets: Tensor) -> Tensor:
    """An anchor at a time: sort its negatives, average those from the second to the tenth."""
    anchors, targets = F.normalize(anchors, dim=1), F.normalize(targets.detach(), dim=1)
    total = anchors.new_zeros(())
    for index, anchor in enumerate(anchors):
        distances = -2 * (targets @ anchor)
        negatives = torch.cat([distances[:index], distances[index + 1 :]]).sort().values
        total = total + F.relu(2 * distances[index] - negatives[1:10].mean() + 100)
    return total / len(anchors)


def anywhere(loss: Callable[..., Any]) -> Callable[[torch.device], Loss]:
    """Make a contestant of a loss that keeps nothing on a device, and may return terms beside it."""
    return lambda device: lambda *views: getattr(value := loss(*views), "loss", value)


def build_contests() -> Iterator[Contest]:
    """List what is measured."""
    barlow, vicreg = lightly.BarlowTwinsLoss(lambda_param=0.0051), lightly.VICRegLoss()
    for dim in (2048, 8192):
        yield Contest("barlow_twins", 2, (256, dim), anywhere(barlow_twins_loss), anywhere(barlow))
        yield Contest("vicreg", 2, (256, dim), anywhere(vicreg_loss), anywhere(vicreg))
    yield Contest("barlow_twins", 2, (1024, 1024), anywhere(barlow_twins_loss), anywhere(barlow))
    yield Contest("vicreg", 2, (1024, 1024), anywhere(vicreg_loss), anywhere(vicreg))
    nt_xent, cosine = partial(nt_xent_loss, temperature=0.5), lightly.NegativeCosineSimilarity()
    yield Contest("nt_xent", 2, (512, 128), anywhere(nt_xent), anywhere(lightly.NTXentLoss(temperature=0.5)))
    yield Contest("moco", 2, (256, 128), our_moco, their_moco)
    theirs = anywhere(lambda z1, z2: cosine(z1, z2.detach()))
    yield Contest("negative_cosine", 2, (512, 2048), anywhere(negative_cosine_loss), theirs)
    yield Contest("dino", 1, (10, 32, 65536), our_dino, their_dino)
    yield Contest("swav", 1, (8, 64, 3000), anywhere(our_swav), anywhere(their_swav))
    yield Contest("truncated_triplet", 2, (196, 256), anywhere(truncated_triplet_loss), anywhere(triplet_loop))


CONTESTS = tuple(build_contests())

if __name__ == "__main__":
    main()

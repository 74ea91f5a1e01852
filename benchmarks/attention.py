"""Sparse attention against attention to all tokens: operations and time of one attention, and of whole networks.

    python benchmarks/attention.py [--part attention network] [--device cuda] [--batch 8] [--json]

attention: on the grids of the first stage at 224, 448 and 896 px, of width 96 in 3 heads. Windows of 7 and 14 tokens,
shifted windows, and windows with their neighbours (Vision Longformer), each with its biases. The peer is
`scaled_dot_product_attention` of all tokens to all, without biases.
network: our CvT-T and ViL-T at 224 px with windows of 7, and the same networks with one window over the whole grid.

Time is the median of forward and backward passes, operations are those of the forward pass: multiplications and
additions of matrix products and convolutions, as torch counts them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_methods.backbones.cvt_tiny import CvTTiny
from ssl_methods.backbones.vil_tiny import ViLTiny
from ssl_methods.local_attention import RelativeBias, local_attention

HEADS, DIM, ROUNDS = 3, 32, 5
GRIDS = {224: 56, 448: 112, 896: 224}
KINDS: dict[str, dict[str, int]] = {
    "windows of 7": {"window": 7},
    "shifted windows of 7": {"window": 7, "shift": 3},
    "windows of 14": {"window": 14},
    "windows of 7 and neighbours": {"window": 7, "halo": 7},
}
PARTS = ("attention", "network")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--sizes", nargs="+", type=int, choices=tuple(GRIDS), default=(224, 448))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for part in options.part:
        {"attention": compare_attention, "network": compare_networks}[part](options)


def compare_attention(options: argparse.Namespace) -> None:
    """Compare each kind of window with attention to all."""
    for size in options.sizes:
        side = GRIDS[size]
        shape = (3, options.batch, side, side, HEADS, DIM)
        peer = Work(attend_to_all, shape, options.device)
        for kind, sizes in KINDS.items():
            with torch.device(options.device):
                bias = RelativeBias(HEADS, sizes["window"] - 1 + sizes.get("halo", 0))
            ours = Work(partial(attend, bias=bias, **sizes), shape, options.device)
            show(f"{kind}, {size} px", ours, peer, options)


def compare_networks(options: argparse.Namespace) -> None:
    """Compare networks with windows of 7 with themselves when each window is the grid."""
    for network in (CvTTiny, ViLTiny):
        with torch.device(options.device):
            # the grid of the first stage is 56 tokens wide
            made = {who: network(window=window).eval() for who, window in (("ours", 7), ("peer", 56))}
        works = {who: Work(made[who], (options.batch, 3, 224, 224), options.device) for who in made}
        show(f"{network.__name__}, windows of 7, 224 px", works["ours"], works["peer"], options)


def attend(grids: Tensor, **sizes: Any) -> Tensor:
    query, key, value = grids
    return local_attention(query, key, value, **sizes)


def attend_to_all(grids: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(each.flatten(1, 2).transpose(1, 2) for each in grids))


class Work:
    """A function of one random tensor: what it costs."""

    def __init__(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...], device: str) -> None:
        self.function, self.device = function, device
        self.x = torch.randn(shape, device=device, requires_grad=True)

    def giga_operations(self) -> float:
        """Count those of the forward pass of one image, with the plain kernel: not every fused one is counted."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.function((self.x[:, :1] if self.x.ndim == 6 else self.x[:1]).detach())
        return counter.get_total_flops() / 1e9

    def milliseconds(self) -> float:
        """Time one forward and backward pass."""
        begin = self.now()
        self.function(self.x).sum().backward()
        return 1000 * (self.now() - begin)

    def megabytes(self) -> float:
        """Return how much more GPU memory is taken inside such a pass."""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.milliseconds()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def now(self) -> float:
        """Return the time, seconds, once the device has done what it was given."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def show(name: str, ours: Work, peer: Work, options: argparse.Namespace) -> None:
    """Print operations of an image, time of a batch in alternating rounds, and on GPUs its peak memory."""
    report(f"{name}: operations of an image", ours.giga_operations(), peer.giga_operations(), "GFLOP", options)
    rounds = [(ours.milliseconds(), peer.milliseconds()) for _ in range(ROUNDS + 1)][1:]  # the first warms up
    times = [statistics.median(row[who] for row in rounds) for who in (0, 1)]
    report(f"{name}: forward and backward of {options.batch}", *times, "ms", options)
    if options.device.startswith("cuda"):
        report(f"{name}: memory of {options.batch}", ours.megabytes(), peer.megabytes(), "MB", options)


def report(name: str, ours: float, peer: float, unit: str, options: argparse.Namespace) -> None:
    facts = {"name": name, "ours": round(ours, 4), "peer": round(peer, 4), "ratio": round(ours / peer, 3), "unit": unit}
    print(json.dumps(facts) if options.json else f"{name:75} {ours:10.3f} {peer:10.3f} {unit:6} {ours / peer:6.2f}")


if __name__ == "__main__":
    main()

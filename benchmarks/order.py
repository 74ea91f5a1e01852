"""Time and memory to plan an epoch: our closed formula beside numpy's permutation of all sample ids.

    python benchmarks/order.py [--json]

`ours` and `peer` are measured at the same number of samples; the rows at a billion samples have no peer, because the
permutation alone would take 8 GB.
"""

import argparse
import json
import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from orchestrate.data.order import Order

SAMPLES, BILLION = 10**7, 10**9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    as_json = parser.parse_args().json
    ours, peer = cost(lambda: first_batch(SAMPLES)), cost(lambda: np.random.default_rng(0).permutation(SAMPLES))
    show("plan 1e7 samples, time", ours[0] * 1e3, peer[0] * 1e3, "ms", as_json=as_json)
    show("plan 1e7 samples, peak memory", ours[1] / 1e6, peer[1] / 1e6, "MB", as_json=as_json)
    billion = cost(lambda: first_batch(BILLION))
    show("plan 1e9 samples, time", billion[0] * 1e3, None, "ms", as_json=as_json)
    show("plan 1e9 samples, peak memory", billion[1] / 1e6, None, "MB", as_json=as_json)
    for batch in (4096, 32_768):
        show(f"next global batch of {batch} of 1e9 samples", next_batch(batch) * 1e3, None, "ms", as_json=as_json)


def first_batch(num_samples: int) -> None:
    """Plan, and find the first global batch."""
    Order(num_samples, 0, global_batch=4096).batch(0)


def next_batch(global_batch: int) -> float:
    """Return the mean seconds of a step's global batch, over 20 steps in the middle of an epoch of a billion."""
    order = Order(BILLION, 0, global_batch=global_batch)
    began = time.perf_counter()
    for step in range(1000, 1020):
        order.batch(step)
    return (time.perf_counter() - began) / 20


def cost(work: Callable[[], object]) -> tuple[float, float]:
    """Return the median seconds of 5 runs and the peak bytes of another."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return sorted(seconds)[2], float(peak)


def show(name: str, ours: float, peer: float | None, unit: str, *, as_json: bool) -> None:
    """Print a row; ratio is ours / peer."""
    ratio = None if peer is None else round(ours / peer, 5)
    row = {
        "name": name,
        "ours": round(ours, 3),
        "peer": None if peer is None else round(peer, 3),
        "ratio": ratio,
        "unit": unit,
    }
    print(
        json.dumps(row)
        if as_json
        else f"{name}: {row['ours']} {unit}" + (f", numpy {row['peer']} {unit}" if peer else "")
    )


if __name__ == "__main__":
    main()

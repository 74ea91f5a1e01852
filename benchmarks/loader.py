"""The data plane beside other loaders, on images that it makes itself: photo-sized JPEGs and small PNGs.

    python benchmarks/loader.py [--part loader decode ...] [--samples N] [--seconds S] [--peers FOLDER] [--json]

pixels    all views of a decoded image on one core, beside torchvision's transforms on PIL images
decode    beside PIL, and beside entropy decoding alone; each a process of its own that does nothing else
loader    tars to batches of views with 2 workers, beside stock webdataset with PIL and torchvision, MosaicML Streaming,
          LitData and DALI; each a process of its own, the passes of all alternate. Beside webdataset there are two
          rows: as users write it (float32, normalised, 4 times the bytes between processes), and giving uint8 as we do
overhead  what the loader takes beside decoding and views, on one core
planning  1e9 samples in 100,000 shards, time and memory. Rows "planning" are what the target of < 50 ms covers: the
          order, the first batch with its shards and the rank's first block of reads, of an opened set. Rows "opening"
          are not part of it: the manifest is read once at a start, and its shards' samples are summed
resume    time to the first batch from several positions
device    photos delivered to a GPU, and how long a ResNet-50 waits for them; needs as many --workers as there are cores

A ratio is ours / peer, the median over passes. Peers that are not installed are named and left out; they may lie in a
folder of their own (`loader_contestants.py` says how to make one).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from loader_contestants import CONTESTANTS, SAME_OUTPUT, Task
from loader_device import measure_device
from loader_photos import Images, build_images, photograph_names
from loader_plans import measure_planning, measure_resume
from loader_rows import KINDS, Options, Row, alternate, compared
from loader_stages import measure_decode, measure_overhead, measure_pixels

_SECONDS_TO_START = 600  # with the conversion to a peer's own format
Facts = dict[str, Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--samples", type=int, default=4000, help="photos to make; there are 10 small images for each")
    parser.add_argument("--seconds", type=float, default=10, help="of one contestant in one pass")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("data/loader-benchmark"), help="where the images are kept")
    parser.add_argument("--peers", default="", help="folder with packages of other loaders")
    parser.add_argument("--only", nargs="+", default=[], choices=list(CONTESTANTS), help="of part loader; default: all")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="of part device; cpu only tries it")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    given = vars(parser.parse_args())
    parts, as_json = given.pop("part"), given.pop("json")
    print(f"images are made from {', '.join(photograph_names())}", file=sys.stderr)
    for part in parts:
        for row in PARTS[part](Options(**given)):
            show(row, as_json=as_json)


def measure_loaders(options: Options) -> Iterator[Row]:
    """Run every loader that is there on both kinds of images."""
    for kind in KINDS:
        images = build_images(options.folder, kind, options.samples_of(kind))
        runs: dict[str, Callable[[], Facts]] = {}
        for name in options.only or CONTESTANTS:
            # The first run also converts the images to the formats of others.
            if missing := _run(_task(name, images, options, seconds=0), options.peers).get("missing"):
                print(f"loader: {name} left out ({missing})", file=sys.stderr)
            else:
                runs[name] = partial(_run, _task(name, images, options, seconds=options.seconds), options.peers)
        yield from _loader_rows(kind, alternate(runs, options.passes))


def _loader_rows(kind: str, found: dict[str, list[Facts]]) -> Iterator[Row]:
    """Set our fast path beside every peer, and our other paths beside webdataset with the same output as ours."""
    units: dict[str, Callable[[Facts], float]] = {
        "images/s": lambda facts: facts["images"] / facts["seconds"],
        "images/s per core": lambda facts: facts["images"] / max(facts["cpu_seconds"], 0.01),
        "CPU ms per image": lambda facts: facts["cpu_seconds"] / facts["images"] * 1e3,
    }
    for name in found:
        mine, peer = (name, SAME_OUTPUT) if name.startswith("ours,") else ("ours", name)
        if mine == peer or not {mine, peer} <= found.keys():
            continue
        for unit, value in units.items():
            ours, its = ([value(facts) for facts in found[who]] for who in (mine, peer))
            yield compared(f"loader: {kind}, {mine} beside {peer}", ours, its, unit)


def _task(name: str, images: Images, options: Options, *, seconds: float) -> Task:
    recipe, size = KINDS[images.kind]
    return Task(
        contestant=name,
        url=images.url,
        tars=list(images.tars),
        extension=images.extension,
        recipe=recipe,
        size=size,
        batch=options.batch,
        workers=options.workers,
        seconds=seconds,
        # What lies ready when the clock starts must be replaced by as much when it stops.
        warm_batches=4 * options.workers,
        scratch=str(options.folder),
    )


def _run(task: Task, peers: str) -> Facts:
    """Run one loader in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("loader_contestants.py")), json.dumps(asdict(task))]
    own = task.contestant.startswith(("ours", "webdataset"))
    paths = [path for path in (os.environ.get("PYTHONPATH", ""), "" if own else peers) if path]
    # One thread of numerical libraries in each worker, for all loaders alike.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=_SECONDS_TO_START + task.seconds
    )
    if done.returncode:
        sys.exit(f"{task.contestant} failed:\n{done.stderr[-2000:]}")
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    return facts


def show(row: Row, *, as_json: bool) -> None:
    """Print one result."""
    values = {"name": row.name, "ours": row.ours, "peer": row.peer, "ratio": row.ratio, "unit": row.unit}
    if as_json:
        print(json.dumps(values), flush=True)
        return
    beside = "" if row.peer is None or row.ratio is None else f"   peer {row.peer:9.3f}   ratio {row.ratio:.3f}"
    print(f"{row.name:92s} {row.ours:9.3f} {row.unit}{beside}", flush=True)


PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "pixels": measure_pixels,
    "decode": measure_decode,
    "loader": measure_loaders,
    "overhead": measure_overhead,
    "planning": measure_planning,
    "resume": measure_resume,
    "device": measure_device,
}

if __name__ == "__main__":
    main()

"""What tests do to the pace of a training, as a transform of its images: it changes no pixel."""

import contextlib
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = "PACE_SECONDS"
# A training that is still to be hit crawls after this many images of a rank, 8 steps: it never ends before it is hit,
# however long the fault has to wait for another one.
IMAGES_BEFORE_CRAWL = 128
CRAWL = 10

_images = itertools.count(1)


def pace(image: np.ndarray[Any, Any], *, draw: object) -> np.ndarray[Any, Any]:
    """Return an image as it is, late by PACE_SECONDS: trainings last long enough to be hit, and cost no CPU time.

    Ten times later beyond the first 128 while there is the file `crawl_file` in the RunDir.
    A rank that finds a file for it in its RunDir (see `hang_file`) takes it away and never returns.
    """
    run_dir = Path(sys.argv[-1])
    crawls = next(_images) > IMAGES_BEFORE_CRAWL and crawl_file(run_dir).exists()
    time.sleep(float(os.environ.get(SECONDS, "0")) * (CRAWL if crawls else 1))
    with contextlib.suppress(FileNotFoundError):
        hang_file(run_dir, int(os.environ["RANK"])).unlink()
        while True:
            time.sleep(3600)
    return image


def hang_file(run_dir: Path, rank: int) -> Path:
    """Return the file that makes a rank hang."""
    return run_dir / f"hang-{rank}"


def crawl_file(run_dir: Path) -> Path:
    """Return the file that makes all ranks crawl."""
    return run_dir / "crawl"

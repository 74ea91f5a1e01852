"""What tests do to the pace of a training, as a transform of its images: it changes no pixel."""

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = "PACE_SECONDS"


def pace(image: np.ndarray[Any, Any], *, draw: object) -> np.ndarray[Any, Any]:
    """Return an image as it is, late by PACE_SECONDS: trainings last long enough to be hit, and cost no CPU time.

    A rank that finds a file for it in its RunDir (see `hang_file`) takes it away and never returns.
    """
    time.sleep(float(os.environ.get(SECONDS, "0")))
    with contextlib.suppress(FileNotFoundError):
        hang_file(Path(sys.argv[-1]), int(os.environ["RANK"])).unlink()
        while True:
            time.sleep(3600)
    return image


def hang_file(run_dir: Path, rank: int) -> Path:
    """Return the file that makes a rank hang."""
    return run_dir / f"hang-{rank}"

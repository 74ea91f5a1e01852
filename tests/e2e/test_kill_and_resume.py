"""SIGKILL of everything at random moments changes no number. The long version is the script itself."""

import random
import time
from pathlib import Path

from tests.e2e.conftest import cluster_file, orchestrate
from tests.e2e.kill_and_resume import compare, disturb


def test_killed_sweep_ends_byte_identical_to_an_undisturbed_one(sweep_file: Path, tmp_path: Path) -> None:
    cluster = cluster_file(tmp_path)
    quiet, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    began = time.monotonic()
    orchestrate("sweep", sweep_file, "--cluster", cluster, "--runs", quiet)
    whole = time.monotonic() - began
    # Parts of the time that the whole sweep takes here, so that a fast machine does not finish before the first kill.
    kills = disturb(sweep_file, cluster, disturbed, 4, (0.1 * whole, 0.5 * whole), random.Random(0))
    assert kills > 0
    rows = compare(quiet, disturbed)
    assert len(rows) == 2
    assert all(row["same"] for row in rows), rows

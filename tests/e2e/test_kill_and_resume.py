"""SIGKILL of everything, in a save, and of one rank, changes no number of any method."""

import random
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import cluster_file, orchestrate
from tests.e2e.kill_and_resume import Disturbance, compare

SWEEP = Path(__file__).parents[2] / "sweeps" / "tiny" / "every_method.yaml"


@pytest.mark.timeout(900)  # some forty starts of two ranks, beside whatever else the machine does
def test_every_method_killed_and_taken_up_again_ends_byte_identical(datasets: Path, tmp_path: Path) -> None:
    sweep, cluster = tmp_path / "sweep.yaml", cluster_file(tmp_path)
    values = yaml.safe_load(SWEEP.read_text().replace("num_classes: 10", "num_classes: 4"))
    values["base"]["data"] = {split: f"{datasets}/{split}" for split in ("train", "val")}
    sweep.write_text(yaml.safe_dump(values))
    quiet, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    orchestrate("sweep", sweep, "--cluster", cluster, "--runs", quiet, timeout=600)
    kills = Disturbance(sweep, cluster, disturbed, random.Random(0)).run_each(steps=13)
    rows = compare(quiet, disturbed)
    assert all(row["same"] and row["attempts"] > 1 for row in rows), rows
    assert len(rows) == kills.total() == 13
    assert set(kills) == {"training", "save", "one rank"}

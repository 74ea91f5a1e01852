"""A Slurm without and one with accounting, each started once; a dataset, and what undisturbed training makes of it."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.datasets import make_shapes
from tests.slurm.cluster import Cluster
from tests.slurm.studies import Study

# Probes of the reference; every study has others.
REFERENCE_K = 99
# Three trials at a time have two nodes each; and some for those that were lost or are not trusted any more.
NUM_NODES = 12


def started(*, accounting: bool, preempt_signal: bool) -> Iterator[Cluster]:
    """Start a cluster and take it away, whatever happens in between."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # pytest's own folders are too long for sockets
    cluster = Cluster(folder, nodes=NUM_NODES, accounting=accounting, preempt_signal=preempt_signal)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A cluster without accounting that sends the signal of `--signal` before it preempts."""
    yield from started(accounting=False, preempt_signal=True)


@pytest.fixture(scope="session")
def slurm_accounting() -> Iterator[Cluster]:
    """A cluster with accounting and limits that sends SIGTERM before it preempts, as Slurm does by default."""
    yield from started(accounting=True, preempt_signal=False)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training set of 203 images, which no batch divides, and a validation set of 101."""
    folder = tmp_path_factory.mktemp("slurm-data")
    make_shapes(folder / "train", 203, seed=0)
    make_shapes(folder / "val", 101, seed=1, split="val")
    return folder


@pytest.fixture(scope="session")
def reference(slurm: Cluster, data: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Final weights of the run that all trials are, undisturbed, on two nodes with a rank each."""
    folder = tmp_path_factory.mktemp("reference")
    study = Study(folder, slurm, data, "reference", [REFERENCE_K], {"environment": {"PACE_SECONDS": "0"}})
    assert study.start().wait() == 0, study.story()
    return study.trials[0].weights()

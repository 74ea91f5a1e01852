"""Jobs that end for a reason that people must hear of say it, with accounting and without."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from orchestrate.sweep.causes import Cause
from tests.slurm.cluster import Cluster
from tests.slurm.studies import Study

pytestmark = [pytest.mark.timeout(300)]

ONE_RANK = {"nodes": 1, "ranks_per_node": 1}
# A worker takes more by importing torch.
TOO_LITTLE_GB = 0.2


def rows(study: Study) -> dict[str, dict[str, Any]]:
    """Return what `orchestrate status` says of each trial."""
    answer = json.loads(study.command("status", study.name, "--json"))
    return {trial["id"]: trial for trial in answer["trials"]}


@pytest.fixture(params=["without", "with"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """Each of the clusters."""
    name = {"without": "slurm", "with": "slurm_accounting"}[request.param]
    found: Cluster = request.getfixturevalue(name)
    return found


def test_cancelled_outside_is_held_and_cancelled_here_is_cancelled(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    study = Study(tmp_path, cluster, data, "cancelled", [61, 62], {"resources": ONE_RANK})
    controller = study.start()
    try:
        outside, here = study.trials
        cluster.run("scancel", outside.wait_for_training().job)
        here.wait_for_training()
        study.command("cancel", here.id)
        assert controller.wait() != 0
    finally:
        controller.stop()
    told = rows(study)
    assert told[outside.id]["state"] == "HELD", study.story()
    assert told[outside.id]["cause"] == Cause.CANCELLED
    assert told[here.id]["state"] == "CANCELLED"
    assert "cancelled" in study.command("why", outside.id)
    assert "orchestrate resume" in study.command("why", outside.id)
    assert not [job for job in study.jobs() if job.state in ("PENDING", "RUNNING")]


def test_out_of_memory_says_so_and_is_not_tried_again(cluster: Cluster, data: Path, tmp_path: Path) -> None:
    changes = {"resources": ONE_RANK, "slurm": {"memory_gb": TOO_LITTLE_GB}}
    study = Study(tmp_path, cluster, data, "memory", [71], changes)
    controller = study.start()
    try:
        assert controller.wait() != 0
    finally:
        controller.stop()
    (trial,) = study.trials
    row = rows(study)[trial.id]
    assert (row["state"], row["cause"]) == ("FAILED", Cause.OUT_OF_MEMORY), study.story()
    assert row["attempts"] == 1
    assert "out of memory" in study.command("why", trial.id)


def test_limit_of_submissions_is_waited_out(slurm_accounting: Cluster, data: Path, tmp_path: Path) -> None:
    # The QOS `tight` takes two jobs of a user, and a trial is one.
    limits = {"qos": "tight", "account": "research"}
    changes = {"resources": ONE_RANK, "slurm": limits, "environment": {"PACE_SECONDS": "0"}}
    study = Study(tmp_path, slurm_accounting, data, "tight", [81, 82, 83], changes)
    assert study.start().wait() == 0, study.story()
    assert sorted(job.name for job in study.jobs()) == sorted(trial.job_name for trial in study.trials)


def test_node_with_a_left_over_worker_is_avoided_and_costs_no_retry(
    slurm: Cluster, data: Path, reference: bytes, tmp_path: Path
) -> None:
    study = Study(tmp_path, slurm, data, "unfit", [91])
    (trial,) = study.trials
    with orphan(trial.run.path, node="m1"):
        assert study.start().wait() == 0, study.story()
    first, *_, last = trial.attempts()
    assert trial.causes()[first.number] is Cause.PREFLIGHT, trial.story()
    assert first.blamed == ("m1",)
    assert "m1" not in last.nodes
    assert trial.weights() == reference
    assert "preflight" in study.command("why", trial.id)


@contextmanager
def orphan(run_dir: Path, *, node: str) -> Iterator[None]:
    """Have a process that looks like what a lost slurmstepd leaves: a worker of an attempt that has ended."""
    told = {"ORCHESTRATE_NODE": node, "ORCHESTRATE_JOB": "1", "ORCHESTRATE_ATTEMPT": "0"}
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)", "orchestrate.worker", str(run_dir)]
    process = subprocess.Popen(sleeper, env=os.environ | told, start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()

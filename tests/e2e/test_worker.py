"""One rank of the worker, started by hand: how it ends, and what it leaves."""

import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orchestrate.runs import RunDir, write_json
from tests.datasets import make_shapes
from tests.e2e.conftest import made_run
from tests.launchers.jobs import wait_until


def work(run: RunDir, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "orchestrate.worker", str(run.path)]
    environment = {"ORCHESTRATE_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=240, **options)


def status(run: RunDir) -> dict[str, Any]:
    return dict(json.loads(run.status_file.read_text()))


def test_loss_that_is_not_finite_ends_as_diverged_and_is_named(sweep_file: Path, tmp_path: Path) -> None:
    # SGD at this rate overflows fp32 within a few steps.
    run = made_run(tmp_path, sweep_file, optim={"name": "sgd", "lr": 1e30}, train={"warmup": "0ep"})
    result = work(run)
    assert result.returncode == 88, result.stderr
    assert "error: step " in result.stderr
    assert "loss = nan" in result.stderr
    assert status(run)["state"] == "diverged"
    record = json.loads((run.attempts / "1" / "rank-0.json").read_text())
    assert (record["rank"], record["exit_code"]) == (0, 88)
    assert record["error"].startswith("step ")
    assert not run.done_file.exists()


def test_disk_that_fills_up_ends_the_training_and_says_so(sweep_file: Path, tmp_path: Path) -> None:
    run = made_run(tmp_path, sweep_file)

    def fill_up() -> None:  # no file may pass 100 kB: logs fit, weights do not
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    result = work(run, preexec_fn=fill_up)
    assert result.returncode == 1, result.stderr
    assert "cannot write a checkpoint" in result.stderr
    assert "free space and resume" in result.stderr
    assert status(run)["state"] == "failed"
    result = work(run)  # with the disk as it was
    assert result.returncode == 0, result.stderr


def test_data_that_changed_since_the_plan_is_refused(sweep_file: Path, tmp_path: Path) -> None:
    make_shapes(tmp_path / "train", 64, seed=5)
    run = made_run(tmp_path, sweep_file, data={"train": str(tmp_path / "train")})
    make_shapes(tmp_path / "other", 64, seed=6)
    (tmp_path / "train").rename(tmp_path / "before")
    (tmp_path / "other").rename(tmp_path / "train")
    result = work(run)
    assert result.returncode == 2
    assert "the trial was planned with" in result.stderr
    assert not run.metrics_file.exists()


def test_run_dir_that_another_process_works_on_is_left_alone(sweep_file: Path, tmp_path: Path) -> None:
    run = made_run(tmp_path, sweep_file)
    with run.lock_file.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("elsewhere pid 1\n")
        file.flush()
        result = work(run)
    assert result.returncode == 74  # it may be a worker of a node that the cluster has lost
    assert "another process works on it: elsewhere pid 1" in result.stderr
    assert not run.status_file.exists()


def test_worker_that_was_replaced_ends_and_its_successor_gets_the_lock(sweep_file: Path, tmp_path: Path) -> None:
    run = made_run(tmp_path, sweep_file, train={"budget": "100000step"})
    write_json(run.path / "jobs" / "1.start.json", {})
    command = [sys.executable, "-m", "orchestrate.worker", str(run.path)]
    environment = os.environ | {"ORCHESTRATE_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "ORCHESTRATE_ATTEMPT": "1"}
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        wait_until(run.metrics_file.exists, "the first trains")
        write_json(run.path / "jobs" / "2.start.json", {"refused": "the first works on it"})
        write_json(run.path / "jobs" / "3.start.json", {})  # as after its node was given up
        second = subprocess.Popen(command, env=environment | {"ORCHESTRATE_ATTEMPT": "3"}, stdout=log, stderr=log)
        assert first.wait(timeout=60) == 74
        wait_until(lambda: run.attempt_file(3).exists(), "the second has the lock")
        second.send_signal(signal.SIGUSR1)
        assert second.wait(timeout=60) == 75, (tmp_path / "log").read_text()
    record = json.loads((run.attempts / "1" / "rank-0.json").read_text())
    assert (record["exit_code"], record["error"]) == (74, "attempt 3 was started in place of this one")
    assert json.loads(run.attempt_file(3).read_text())["stop_reason"] == "SIGUSR1"
    assert status(run)["attempt"] == 3


def test_config_of_another_trial_is_refused(sweep_file: Path, tmp_path: Path) -> None:
    run = made_run(tmp_path, sweep_file)
    run.config_file.write_text(run.config_file.read_text().replace("seed: 0", "seed: 1", 1))
    result = work(run)
    assert result.returncode == 2
    assert "the folder is of" in result.stderr


@pytest.mark.parametrize("arguments", [[], ["a", "b"]])
def test_worker_without_a_run_dir_says_how_it_is_called(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "orchestrate.worker", *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert "usage:" in result.stderr


def test_how_samples_are_loaded_changes_no_weight(sweep_file: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"views": {"pixels": "device"}, "train": {"budget": "8step"}}
    plain = made_run(tmp_path / "plain", sweep_file, system={"workers": 0}, **common)
    busy = {"workers": 2, "loader": "processes", "read_ahead": "always", "data_memory_gb": 0.0001}
    other = made_run(tmp_path / "other", sweep_file, system=busy, **common)
    assert plain.path.name == other.path.name  # the same trial
    for run in (plain, other):
        result = work(run)
        assert result.returncode == 0, result.stderr
    assert plain.weights_file.read_bytes() == other.weights_file.read_bytes()

"""A sweep from YAML to page, typed by a person: once, again, without its store, with another number of ranks."""

import json
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import cluster_file, orchestrate, run_file
from tests.sweep.sweeps import store_rows


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cluster_file(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def runs(sweep_file: Path, cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished sweep."""
    folder = tmp_path_factory.mktemp("runs")
    orchestrate("sweep", sweep_file, "--cluster", cluster, "--runs", folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file but the store, whose pages SQLite may move."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "store.sqlite" not in path.name and path.name != "lease.lock"
    }


def test_sweep_trains_scores_and_reports_every_trial(runs: Path) -> None:
    page = (runs / "sweeps/small/report/index.html").read_text()
    for done_file in runs.glob("trials/*/results/done.json"):
        done = json.loads(done_file.read_text())
        assert set(done["metrics"]) == {
            f"{encoder}{key}"
            for encoder in ("", "random_init/", "raw_pixels/")
            for key in ("knn_k5_cosine_t0.07.top1", "linear_ep5_lr0.1.top1")
        }
        assert done["fingerprint"][:8] in page
    assert len(list(runs.glob("trials/*/results/done.json"))) == 2


def test_same_command_again_starts_nothing(runs: Path, sweep_file: Path, cluster: Path) -> None:
    before = snapshot(runs)
    result = orchestrate("sweep", sweep_file, "--cluster", cluster, "--runs", runs)
    assert "all 2 trials are done" in result.stdout
    assert snapshot(runs) == before


def test_lost_store_changes_no_answer(runs: Path, tmp_path: Path) -> None:
    before = orchestrate("status", "small", "--runs", runs, "--json").stdout
    rows = store_rows(runs)
    assert len(rows) == 4  # two trials, an attempt each
    orchestrate("report", "small", "--runs", runs, "--out", tmp_path / "before")
    for path in runs.glob("store.sqlite*"):
        path.unlink()
    orchestrate("adopt", "--runs", runs)
    assert store_rows(runs) == rows
    orchestrate("report", "small", "--runs", runs, "--out", tmp_path / "after")
    assert orchestrate("status", "small", "--runs", runs, "--json").stdout == before
    assert snapshot(tmp_path / "before") == snapshot(tmp_path / "after")


def test_plan_knows_what_is_done(runs: Path, sweep_file: Path, cluster: Path) -> None:
    answer = json.loads(orchestrate("plan", sweep_file, "--cluster", cluster, "--runs", runs, "--json").stdout)
    assert [trial["state"] for trial in answer["trials"]] == ["done"] * 2


def test_cancelled_trial_goes_on_after_resume_as_if_never_stopped(
    runs: Path, sweep_file: Path, cluster: Path, tmp_path: Path
) -> None:
    run = run_file(tmp_path, sweep_file, "cancelled")
    folder = tmp_path / "runs"
    orchestrate("run", run, "--cluster", cluster, "--runs", folder, "--once")
    (trial,) = (folder / "trials").iterdir()
    deadline = time.monotonic() + 60
    while not (trial / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)  # the job's first sign of training
    orchestrate("cancel", "cancelled", "--runs", folder)
    assert not (trial / "results/done.json").exists()
    assert "CANCELLED" in orchestrate("status", "cancelled", "--runs", folder).stdout
    orchestrate("resume", "cancelled", "--runs", folder)
    undisturbed = runs / "trials" / trial.name
    weights = "results/weights.safetensors"
    assert (trial / weights).read_bytes() == (undisturbed / weights).read_bytes()
    assert len((trial / "metrics.jsonl").read_text().splitlines()) == 19

"""Training and evaluation as jobs of their own, started by hand: what each leaves, and that the numbers stay."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrate.checkpoint_files import list_checkpoints
from orchestrate.runs import RunDir, read_json
from orchestrate.score_files import num_scores, read_proof, unscored
from tests.e2e.conftest import made_run, orchestrate

MILESTONES = {"milestones": ["50%", "100%"], "checkpoint_every": "5step"}
HALF, WHOLE = "step-00000010", "step-00000019"


def start(run: RunDir, stage: str, **variables: str) -> "subprocess.Popen[str]":
    place = {"ORCHESTRATE_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment = os.environ | place | {"ORCHESTRATE_STAGE": stage, "PYTHONUNBUFFERED": "1"} | variables
    command = [sys.executable, "-m", "orchestrate.worker", str(run.path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, env=environment, **pipes)  # type: ignore[call-overload, no-any-return]


def work(run: RunDir, stage: str, *, ends_with: int = 0) -> str:
    process = start(run, stage)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == ends_with, output
    return output


@pytest.fixture(scope="module")
def together(sweep_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The trial as one job trains and scores it."""
    run = made_run(tmp_path_factory.mktemp("together"), sweep_file, system=MILESTONES)
    work(run, "all")
    return run


@pytest.fixture(scope="module")
def trained(sweep_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The same trial, only trained."""
    run = made_run(tmp_path_factory.mktemp("trained"), sweep_file, system=MILESTONES)
    work(run, "pretrain")
    return run


def copy_of(run: RunDir, folder: Path) -> RunDir:
    shutil.copytree(run.path, folder / run.path.name)
    return RunDir(folder / run.path.name)


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def done(run: RunDir) -> dict[str, Any]:
    return dict(json.loads(run.done_file.read_text()))


def test_training_alone_leaves_weights_and_a_proof_but_no_score(trained: RunDir, together: RunDir) -> None:
    assert read_proof(trained.trained_file, trained.path.name) is not None
    assert not trained.done_file.exists()
    assert num_scores(trained) == 0
    assert unscored(trained, trained.path.name) == (HALF, WHOLE, "final")
    assert trained.weights_file.read_bytes() == together.weights_file.read_bytes()
    assert (read_json(trained.status_file) or {})["state"] == "trained"


def test_job_that_trains_and_scores_leaves_no_proof_of_training_alone(together: RunDir) -> None:
    assert read_proof(together.trained_file, together.path.name) is None


def test_stages_give_the_numbers_of_one_job(trained: RunDir, together: RunDir, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    work(run, "evaluate")
    apart, whole = done(run), done(together)
    assert json.dumps(apart["metrics"]) == json.dumps(whole["metrics"])
    assert list(apart) == list(whole)
    timed = ("finished", "train_seconds", "rank_seconds")
    assert {key: apart[key] for key in apart if key not in timed} == {
        key: whole[key] for key in whole if key not in timed
    }
    assert apart["train_seconds"] > 0
    assert unscored(run, run.path.name) == ()
    assert (
        num_scores(run) == 2 + 2 + 6
    )  # two probes of each milestone; of the final encoder and two that learned nothing
    half, end = (json.loads((run.results / name / "done.json").read_text()) for name in (HALF, WHOLE))
    assert (half["step"], half["images"], half["fingerprint"]) == (10, 320, run.path.name)
    assert end["metrics"].items() <= apart["metrics"].items()
    assert half["metrics"] != end["metrics"]
    # The trial's own records are of its training.
    assert (read_json(run.status_file) or {})["state"] == "trained"
    assert (read_json(run.evaluation.status_file) or {})["state"] == "done"
    assert read_json(run.evaluation.attempt_file(1))


def test_evaluation_that_is_stopped_goes_on_with_what_is_missing(trained: RunDir, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    process = start(run, "evaluate")
    _wait_until(lambda: num_scores(run) >= 1, process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 75
    written = {path: path.stat().st_mtime_ns for path in run.results.rglob("*.*.json")}
    assert not run.done_file.exists()
    work(run, "evaluate")
    assert run.done_file.exists()
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_evaluation_with_nothing_to_do_ends_well(trained: RunDir, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    run.trained_file.unlink()
    shutil.rmtree(run.checkpoints)
    assert "nothing waits" in work(run, "evaluate")
    assert not run.done_file.exists()


def test_damaged_and_deleted_milestones_are_left_out(trained: RunDir, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    damage(run.checkpoints / HALF / "model.safetensors")
    shutil.rmtree(run.checkpoints / WHOLE)
    assert "fails its SHA-256, so it is damaged; skipped" in work(run, "evaluate")
    assert run.done_file.exists()
    assert unscored(run, run.path.name) == ()
    (run.checkpoints / HALF / "manifest.json").touch()  # as if the training had made it again
    assert unscored(run, run.path.name) == (HALF,)


def test_damaged_final_weights_are_no_result(trained: RunDir, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    damage(run.weights_file)
    assert "weights.safetensors: fails its SHA-256" in work(run, "evaluate", ends_with=1)
    assert not run.done_file.exists()


def test_two_evaluations_of_a_trial_never_work_at_once(trained: RunDir, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    first = start(run, "evaluate")
    _wait_until(lambda: run.evaluation.status_file.exists(), first)
    first.send_signal(signal.SIGSTOP)  # else it may be done before the other has imported torch
    assert "another process works on it" in work(run, "evaluate", ends_with=74)
    first.kill()
    first.communicate()


def test_checkpoint_that_a_child_begins_with_is_scored_by_its_parent(trained: RunDir, tmp_path: Path) -> None:
    run = copy_of(trained, tmp_path)
    assert unscored(run, "0" * 16) == ()
    assert len(list_checkpoints(run.checkpoints)) >= 2


def test_stage_that_does_not_exist_is_refused(trained: RunDir) -> None:
    assert "ORCHESTRATE_STAGE: finetune: no such stage" in work(trained, "finetune", ends_with=2)


def _wait_until(ready: Any, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


APART = """
launcher: local
resources: {nodes: 1, ranks_per_node: 2, cpus_per_rank: 1, device: cpu}
evaluate: {nodes: 1, ranks_per_node: 1, cpus_per_rank: 1, device: cpu}
limits: {parallel: 2, min_free_gb: 0.1}
"""


def test_sweep_evaluates_milestones_while_it_trains_and_the_rest_after(sweep_file: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(sweep_file.read_text())["base"]
    values["train"]["budget"] = "200step"
    values["system"] |= {"engine": "ddp", "milestones": ["10step"], "checkpoint_every": "50step"}
    (tmp_path / "apart.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "cluster.yaml").write_text(APART)
    runs = tmp_path / "runs"
    orchestrate("run", tmp_path / "apart.yaml", "--cluster", tmp_path / "cluster.yaml", "--runs", runs)
    (path,) = (runs / "trials").iterdir()
    run = RunDir(path)
    assert read_proof(run.trained_file, run.path.name) is not None
    assert unscored(run, run.path.name) == ()
    scored = json.loads((run.results / HALF / "done.json").read_text())["finished"]
    assert scored < json.loads(run.trained_file.read_text())["trained"]
    facts = done(run)
    assert (facts["step"], facts["world_size"], len(facts["metrics"])) == (200, 2, 6)
    status = json.loads(orchestrate("status", "apart", "--runs", runs, "--json").stdout)
    (row,) = status["trials"]
    assert row["state"] == "COMPLETED"
    assert row["milestones"]["10"].keys() == {key for key in facts["metrics"] if "/" not in key}
    table = (runs / "sweeps/apart/report/checkpoints.csv").read_text().splitlines()
    assert len(table) == 2
    log = orchestrate("logs", path.name, "--stage", "evaluate", "--attempt", "1", "--runs", runs).stdout
    assert log.startswith("step-00000010:\ntrained: knn")

"""Nodes that are not fit to run, with real faults where a test can make them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orchestrate.engine.preflight import Report, blame, check_nodes, known_product, small_product
from orchestrate.engine.ranks import Ranks
from orchestrate.engine.strangers import Worker, find_strangers, is_stranger
from orchestrate.errors import DataError, OrchestrateError, PreflightError, StorageError
from orchestrate.runs import RunDir

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def test_fit_node_passes_within_a_fraction_of_a_second(tmp_path: Path) -> None:
    check_nodes(ALONE, RunDir(tmp_path), load_data=lambda: 7)  # the first product starts threads
    began = time.process_time()
    assert check_nodes(ALONE, RunDir(tmp_path), load_data=lambda: 203) == 203
    assert time.process_time() - began < 0.3
    assert list(tmp_path.iterdir()) == []


def test_product_has_the_known_result() -> None:
    assert torch.equal(small_product(torch.device("cpu")), known_product())


# Disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)  # as root
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_node_whose_temporary_folder_is_full_is_unfit(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(PreflightError, match=r"temporary folder .* has 1 MiB left, 256 are the least") as caught:
        check_nodes(ALONE, RunDir(tmp_path), load_data=lambda: 1)
    assert caught.value.check == "disk"
    assert caught.value.exit_code == 87


def test_full_run_dir_is_no_fault_of_the_only_node(small_disk: Path) -> None:
    with pytest.raises(OrchestrateError, match="free space and resume") as caught:
        check_nodes(ALONE, RunDir(small_disk), load_data=lambda: 1)
    assert caught.value.exit_code == 1


# Datasets


def refuse(error: DataError) -> int:
    raise error


def test_dataset_that_no_node_reaches_is_no_nodes_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing") as caught:
        check_nodes(ALONE, RunDir(tmp_path), load_data=lambda: refuse(DataError("missing")))
    assert caught.value.exit_code == 2
    with pytest.raises(StorageError):
        check_nodes(ALONE, RunDir(tmp_path), load_data=lambda: refuse(StorageError("silent")))


def test_dataset_that_one_node_cannot_reach_is_its_fault() -> None:
    lost, fine = Report("m2", data_error="/data/x: missing"), Report("m1")
    for own, check in ((fine, ""), (lost, "dataset")):
        with pytest.raises(PreflightError, match="node m2: /data/x: missing, which other nodes can read") as caught:
            blame([fine, lost], own, DataError("missing") if own is lost else None)
        assert caught.value.check == check


# Agreement


def test_every_unfit_node_is_named_and_only_its_own_ranks_say_so() -> None:
    reports = [Report("m1"), Report("m2", "disk", "full"), Report("m2"), Report("m3", "GPU memory", "9 GiB in use")]
    with pytest.raises(PreflightError, match="node m2: full; node m3: 9 GiB in use") as caught:
        blame(reports, reports[0], None)
    assert caught.value.check == ""
    with pytest.raises(PreflightError) as caught:
        blame(reports, reports[1], None)
    assert caught.value.check == "disk"


def test_run_dir_that_one_node_cannot_write_is_its_fault_and_that_no_node_can_is_not() -> None:
    full = Report("m1", "disk", "RunDir is full", shared=True)
    with pytest.raises(PreflightError):
        blame([full, Report("m2")], full, None)
    with pytest.raises(OrchestrateError) as caught:
        blame([full, Report("m2", "disk", "RunDir is full", shared=True)], full, None)
    assert caught.value.exit_code == 1


def test_ranks_that_share_a_gpu_are_found() -> None:
    blame([Report("m1", device="A"), Report("m1", device="B"), Report("m2", device="A")], Report("m1"), None)
    with pytest.raises(PreflightError, match="two ranks have the same GPU"):
        blame([Report("m1", device="A"), Report("m1", device="A")], Report("m1", device="A"), None)


# Strangers


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, False),  # another rank of ours
        ({"attempt": "1"}, True),
        ({"job": "6"}, True),
        ({"attempt": "1", "node": "m2"}, False),  # one host may play several nodes
        ({"job": "6", "stage": "evaluate", "gpus": ""}, False),  # an evaluation may run beside the training
        ({"job": "6", "run_dir": "/other", "gpus": "2-3"}, False),
        ({"job": "6", "run_dir": "/other", "gpus": "1-2"}, True),
        ({"job": "6", "run_dir": "/other", "gpus": ""}, False),
    ],
)
def test_strangers_are_workers_that_should_have_ended_or_have_our_gpus(changes: dict[str, str], expected: bool) -> None:
    mine = {"run_dir": "/run", "attempt": "2", "job": "5", "node": "m1", "gpus": "0,1", "stage": "all"}
    assert is_stranger(Worker(2, **(mine | changes)), Worker(1, **mine)) is expected


# A process that looks like a worker, and says whom it finds.
LOOKING = """
import sys
from orchestrate.engine.strangers import find_strangers
print("ready", flush=True)
for line in sys.stdin:
    print(find_strangers(), flush=True)
"""


def looking(folder: Path, attempt: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", LOOKING, "orchestrate.worker", str(folder)]
    environment = os.environ | {"ORCHESTRATE_ATTEMPT": str(attempt), "ORCHESTRATE_NODE": f"node-{os.getpid()}"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ask(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("?\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_worker_that_an_earlier_attempt_left_is_found(tmp_path: Path) -> None:
    left, sibling, mine = looking(tmp_path, 1), looking(tmp_path, 2), looking(tmp_path, 2)
    try:
        assert ask(mine) == str([f"process {left.pid} of attempt 1 is left on {tmp_path}"])
        left.kill()
        left.wait()
        assert ask(mine) == "[]"
    finally:
        for process in (left, sibling, mine):
            process.kill()
            process.wait()


def test_node_on_which_a_stranger_stays_is_unfit(tmp_path: Path) -> None:
    assert find_strangers() == []  # this process is no worker
    code = "from orchestrate.engine import preflight\npreflight._STRANGER_PATIENCE_SECONDS = 0.1\n"
    code += "print(preflight._stranger_problem())"
    left = looking(tmp_path, 1)
    environment = os.environ | {"ORCHESTRATE_ATTEMPT": "2", "ORCHESTRATE_NODE": f"node-{os.getpid()}"}
    command = [sys.executable, "-c", code, "orchestrate.worker", str(tmp_path)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    finally:
        left.kill()
        left.wait()
    assert f"process {left.pid} of attempt 1 is left on {tmp_path}; it should have ended" in said

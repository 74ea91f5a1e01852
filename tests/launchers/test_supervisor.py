import subprocess
import sys
from pathlib import Path

import pytest

from orchestrate.exits import group_exit_code
from orchestrate.launchers.base import LaunchPlan
from orchestrate.launchers.supervisor import lock_is_held, rank_environment, take_lock
from orchestrate.runs import RunDir


@pytest.mark.parametrize(
    ("codes", "first", "stopping", "expected"),
    [
        ([0, 0], [], False, 0),
        ([1, 88], [1], False, 88),  # a peer of a diverged rank may break first
        ([87, -15], [87], False, 87),
        ([86, -6], [-6, 86], False, 86),
        ([-9, 1], [1, -9], False, 137),  # a broken connection is the consequence of a killed peer
        ([-9, 86], [-9], False, 137),  # the other one only hung because its peer was gone
        ([1, 75], [1], False, 1),
        ([74, 1], [1], False, 74),  # the peer of a rank whose store is silent loses its connection
        ([1, 2], [1, 2], False, 2),  # both ended before one look: the broken connection is the consequence of bad input
        ([1, 2], [1], False, 2),
        ([-6, 2], [-6], False, 2),  # libraries abort when their peer is gone
        ([86, 2], [86], False, 86),
        ([88, 2], [2], False, 88),
        ([75, 75], [75], False, 75),
        ([75, 75], [], True, 75),
        ([75, -15], [], True, 75),  # the signal came before the handler
        ([0, 0], [], True, 0),
        ([86, -9], [], True, 86),
        ([-9, -9], [], True, 137),
        ([1, 0], [1], True, 1),
        ([76, 76], [76], False, 76),
        ([76, 1], [76, 1], False, 1),  # only the loss of a peer is never a cause
        ([76, -9], [76], False, 137),
        ([76, -15], [76], False, 76),  # told to end because of the first
        ([76, 86], [76], False, 86),
        ([75, 76], [75], False, 75),
        ([76, 75], [], True, 75),
        ([76, 76], [], True, 76),  # nobody says that the state is saved
        ([1, 89], [1], False, 89),
        ([-9, 89], [-9], False, 89),
        ([86, 89], [86], False, 86),
        ([76, 74], [76], False, 74),
    ],
)
def test_exit_code_of_a_job_names_the_cause_and_not_its_consequence(
    codes: list[int], first: list[int], stopping: bool, expected: int
) -> None:
    assert group_exit_code(codes, first, stopping=stopping) == expected


def test_lock_is_seen_by_others_until_it_is_let_go(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert not lock_is_held(run)
    (tmp_path / "jobs").mkdir()
    lock = take_lock(run)
    assert lock is not None
    assert lock_is_held(run)
    lock.close()
    assert not lock_is_held(run)


def test_ranks_do_not_inherit_a_surrounding_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "another-job")
    monkeypatch.setenv("SLURM_PROCID", "7")
    monkeypatch.setenv("RANK", "7")
    plan = LaunchPlan("oc-x", tmp_path, 1, ("true",), {"PRICE": "$5"}, 2, tmp_path)
    environment = rank_environment(plan, 1)
    assert "MASTER_ADDR" not in environment
    assert "SLURM_PROCID" not in environment
    assert (environment["RANK"], environment["LOCAL_RANK"]) == ("1", "1")
    assert environment["PRICE"] == "$5"


def test_supervisor_starts_without_heavy_imports() -> None:
    code = "import sys, orchestrate.launchers.supervisor; print(*sys.modules)"
    modules = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pydantic", "numpy", "ray", "deepspeed"} & set(modules)

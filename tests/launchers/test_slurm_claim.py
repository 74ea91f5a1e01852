"""Numbers of attempts, who may take them, and who holds a trial."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestrate.launchers.slurm_claim import beat, claim_attempt, create_json, live_holder, open_attempts
from orchestrate.launchers.slurm_job import free_port, parse_options, read_rank_records
from orchestrate.runs import RunDir, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "00000000000000a1")


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_each_of_many_at_once_gets_a_number_of_its_own(run: RunDir) -> None:
    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(lambda index: claim_attempt(run, {"job": str(index)}), range(24)))
    assert sorted(numbers) == list(range(1, 25))
    for index, number in enumerate(numbers):
        assert json.loads((run.path / "jobs" / f"{number}.start.json").read_text())["job"] == str(index)
    assert len(list((run.path / "jobs").iterdir())) == 24  # nothing is left aside


def test_numbers_of_attempts_that_never_began_are_not_used_again(run: RunDir) -> None:
    write_json(run.path / "jobs" / "3.verdict.json", {"state": "CANCELLED"})
    assert claim_attempt(run, {}) == 4


def test_file_that_exists_is_left_alone(tmp_path: Path) -> None:
    assert create_json(tmp_path / "x.json", {"a": 1})
    assert not create_json(tmp_path / "x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_other_job_with_a_heartbeat_holds_the_trial(run: RunDir) -> None:
    claim_attempt(run, {"job": "7"})
    assert "job 7 works on it as attempt 1" in live_holder(run, "8")
    assert live_holder(run, "7") == ""  # an earlier run of the same job is over


def test_job_without_a_heartbeat_holds_nothing(run: RunDir) -> None:
    number = claim_attempt(run, {"job": "7"})
    start = run.path / "jobs" / "1.start.json"
    age(start, 60)
    assert live_holder(run, "8") == ""
    write_json(run.attempt_file(number), {"last_seen": 0.0})  # its worker lives, whatever its clock says
    assert live_holder(run, "8") != ""
    age(run.attempt_file(number), 60)
    assert live_holder(run, "8") == ""
    beat(run, number)
    assert live_holder(run, "8") != ""


def test_job_that_has_ended_holds_nothing(run: RunDir) -> None:
    claim_attempt(run, {"job": "7"})
    write_json(run.path / "jobs" / "1.end.json", {"exit_code": 75})
    assert live_holder(run, "8") == ""
    assert open_attempts(run) == []


def test_port_is_free_and_another_for_every_job_and_restart() -> None:
    import socket

    first = free_port(1234, 0)
    assert free_port(1234, 0) == first
    assert first not in (free_port(1235, 0), free_port(1234, 1))
    with socket.create_server(("", first)):
        assert free_port(1234, 0) != first


def test_command_line_keeps_the_words_after_the_dashes() -> None:
    options = parse_options(
        ["--run-dir", "/r", "--script", "/s", "--lead-seconds", "60", "--", "srun", "--x=1", "--", "y"]
    )
    assert options.words == ("srun", "--x=1", "--", "y")
    assert options.lead_seconds == 60


def test_records_of_ranks_are_read_by_their_numbers(tmp_path: Path) -> None:
    write_json(tmp_path / "rank-3.json", {"exit_code": 1})
    (tmp_path / "rank-4.json").write_text("{half")
    assert read_rank_records(tmp_path) == {3: {"exit_code": 1}}

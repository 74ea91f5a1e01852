"""What ranks leave behind about their ends, and how they see that they were replaced."""

import json
from pathlib import Path

from orchestrate.engine.records import HeartbeatFiles, RankRecord, has_other_attempts, newer_attempt
from orchestrate.errors import PreflightError
from orchestrate.runs import RunDir, write_json


def start(run: RunDir, number: int, **facts: object) -> None:
    write_json(run.path / "jobs" / f"{number}.start.json", facts)


def test_newer_attempt_is_seen_and_a_refused_one_is_not(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert newer_attempt(run, 1) == 0
    start(run, 1)
    start(run, 2, refused="job 7 works on it")
    assert newer_attempt(run, 1) == 0
    start(run, 3)
    start(run, 4, refused="job 9 works on it")
    assert newer_attempt(run, 1) == 3
    assert newer_attempt(run, 3) == 0
    assert has_other_attempts(run, 1)


def test_attempt_alone_has_no_others(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert not has_other_attempts(run, 1)
    start(run, 1)
    assert not has_other_attempts(run, 1)


def test_first_reason_of_an_end_stays(tmp_path: Path) -> None:
    record = RankRecord(RunDir(tmp_path), attempt=2, rank=5)
    record.write(75, "asked to")
    assert not (tmp_path / "attempts").exists()
    record.write(1, ValueError("first"))
    record.write(86, "second")
    facts = json.loads((tmp_path / "attempts" / "2" / "rank-5.json").read_text())
    assert (facts["rank"], facts["exit_code"], facts["error"]) == (5, 1, "ValueError: first")
    assert len(facts["traceback"]) == 16
    assert "preflight" not in facts


def test_only_the_rank_whose_node_is_unfit_says_that_it_is(tmp_path: Path) -> None:
    RankRecord(RunDir(tmp_path), attempt=1, rank=0).write(87, PreflightError("node m2: full"))
    RankRecord(RunDir(tmp_path), attempt=1, rank=1).write(87, PreflightError("node m2: full", check="disk"))
    facts = [json.loads((tmp_path / "attempts" / "1" / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert "preflight" not in facts[0]
    assert facts[1]["preflight"] == {"check": "disk", "problem": "node m2: full"}


def test_disk_that_takes_no_record_hides_no_reason(tmp_path: Path) -> None:
    (tmp_path / "attempts").write_text("a file where a folder should be")
    RankRecord(RunDir(tmp_path), attempt=1, rank=0).write(1, ValueError("x"))


def test_record_makes_no_folder_where_a_file_system_is_not_mounted(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "not mounted")
    RankRecord(run, attempt=1, rank=0).write(2, ValueError("x"))
    assert not run.path.exists()


def test_attempt_file_has_what_the_ledger_needs(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    facts = {"time": 9.0, "step": 7, "first_step": 2, "train_seconds": 3.25, "saves": 2, "stop_reason": "SIGUSR1"}
    HeartbeatFiles(run, attempt=3, world_size=4).write({**facts, "startup_seconds": {"imports": 1.5, "ranks": 0.25}})
    attempt = json.loads(run.attempt_file(3).read_text())
    expected = {"last_step": 7, "first_step": 2, "train_seconds": 3.25, "saves": 2, "stop_reason": "SIGUSR1"}
    assert (expected | {"startup_seconds": 1.75}).items() <= attempt.items()
    status = json.loads(run.status_file.read_text())
    assert status["startup_seconds"] == {"imports": 1.5, "ranks": 0.25}
    assert "stop_reason" not in status

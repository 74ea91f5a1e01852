import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from orchestrate.runs import write_json
from orchestrate.sweep.display import Lines, LiveTable
from orchestrate.sweep.ledger import Ledger
from orchestrate.sweep.observe import observe
from orchestrate.sweep.standing import Standing, State
from orchestrate.sweep.status import (
    TrialStatus,
    duration,
    fraction_done,
    objective_value,
    status_json,
    status_table,
    sweep_status,
)
from tests.launchers.jobs import rank_pids
from tests.sweep.sweeps import bench, record_of, script_all, write_sweep


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (61, "1 min 01 s"), (3700, "1 h 01 min"), (90000, "1 d 01 h")]
)
def test_duration_has_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_objective_is_found_by_the_name_of_its_probe_if_that_is_clear() -> None:
    metrics = {"knn_k20.top1": 0.5, "linear_e30.top1": 0.6, "random_init/knn_k20.top1": 0.1}
    assert objective_value(metrics, "knn_k20.top1") == 0.5
    assert objective_value(metrics, "knn.top1") == 0.5
    assert objective_value({**metrics, "knn_k5.top1": 0.4}, "knn.top1") is None
    assert objective_value(metrics, "knn.top5") is None


def drawn(width: int, renderable: object) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_running_trial_shows_its_heartbeat(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path))
    script_all(runs, record, {"*": "wait"})
    made.session.make_true(record, once=True)
    rank_pids(runs, record.trial_ids[0])
    run = runs / "trials" / record.trial_ids[0]
    beat = {"state": "training", "step": 5, "total_steps": 10, "loss": 1.25, "images_per_second": 321.4}
    write_json(run / "status.json", {**beat, "data_wait_percent": 3.2, "eta_seconds": 75})
    rows = sweep_status(record, runs, observe(runs, record.trial_ids, made.launcher))
    assert fraction_done(rows) == pytest.approx(5 / 20)
    text = drawn(120, status_table(record, rows))
    assert all(word in text for word in ("5/10", "321", "3 %", "1.250", "1 min 15 s", "RUNNING", "PENDING", "25%"))


def test_times_of_steps_and_memory_are_shown_where_there_is_room(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    beat: dict[str, Any] = {"step_seconds_p50": 0.2134, "step_seconds_p95": 123.4, "peak_memory_gb": 3.456}
    running = TrialStatus(record.trial_ids[0], {"train.seed": 0}, State.RUNNING, "", step=5, total_steps=10, **beat)
    waiting = TrialStatus(record.trial_ids[1], {"train.seed": 1}, State.PENDING, "")
    wide, narrow = (drawn(width, status_table(record, [running, waiting])) for width in (120, 80))
    assert all(word in wide for word in ("s/step p50", "p95", "memory", "0.21", "123", "3.5 GB"))
    assert "p95" not in narrow
    assert all(word in narrow for word in ("5/10", "RUNNING", "knn.top1"))
    assert "p95" not in drawn(120, status_table(record, [waiting]))


def test_status_for_programs_has_what_the_heartbeat_says_of_steps_and_memory(runs: Path, tmp_path: Path) -> None:
    made = bench(runs)
    record = record_of(write_sweep(tmp_path))
    script_all(runs, record, {"*": "wait"})
    made.session.make_true(record, once=True)
    rank_pids(runs, record.trial_ids[0])
    beat = {"step_seconds_p50": 0.2, "step_seconds_p95": 0.5, "peak_memory_gb": 3.5}
    write_json(runs / "trials" / record.trial_ids[0] / "status.json", {"state": "training", "step": 5, **beat})
    trials = status_json(record, sweep_status(record, runs, observe(runs, record.trial_ids, made.launcher)))["trials"]
    assert {key: trials[0][key] for key in beat} == beat
    assert {key: trials[1][key] for key in beat} == dict.fromkeys(beat)


def test_long_table_is_cut_and_says_so(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path, seeds=range(9)))
    rows = sweep_status(record, runs, observe(runs, record.trial_ids, bench(runs).launcher))
    assert "... and 5 more" in drawn(100, status_table(record, rows, limit=4))


def test_lines_tell_changes_in_words(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    bench(runs).session.make_true(record)
    output = io.StringIO()
    display = Lines(record, runs, Console(file=output, width=40))
    display.changed(record.trials[0], Standing(State.PENDING, "never started"))
    display.changed(record.trials[0], Standing(State.RUNNING, "attempt 2: its supervisor is process 7"))
    display.changed(record.trials[0], Standing(State.COMPLETED, "done.json"))
    display.changed(record.trials[0], Standing(State.FAILED, "attempt 2 ended: [user error] (exit code 1)"))
    told = [line.partition("  ")[2] for line in output.getvalue().splitlines()]
    short = record.trial_ids[0][:8]
    assert told[0] == f"{short} seed=0  RUNNING  attempt 2"
    assert told[1].startswith(f"{short} seed=0  COMPLETED  knn.top1 0.")
    assert told[2] == f"{short} seed=0  FAILED  attempt 2 ended: [user error] (exit code 1)"


def test_live_table_follows_a_sweep(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    made = bench(runs)
    output = io.StringIO()
    with LiveTable(record, runs, Console(file=output, width=100)) as table:
        made.display.each = table.looked
        assert made.session.make_true(record)
    assert "2 completed" in output.getvalue()


def test_lost_hours_and_true_causes_are_shown_where_a_trial_needed_several_attempts(runs: Path, tmp_path: Path) -> None:
    record = record_of(write_sweep(tmp_path))
    hours = Ledger(useful=1.5, replayed=0.5)
    again = TrialStatus(
        record.trial_ids[0],
        {"train.seed": 0},
        State.HELD,
        "",
        cause="cancelled",
        attempts=3,
        rank_hours=2.0,
        hours=hours,
    )
    once = TrialStatus(record.trial_ids[1], {"train.seed": 1}, State.COMPLETED, "", attempts=1, rank_hours=1.0)
    text = drawn(160, status_table(record, [again, once]))
    assert all(word in text for word in ("HELD (cancelled)", "attempts", "lost", "25%"))
    assert "attempts" not in drawn(160, status_table(record, [once]))
    told = status_json(record, [again, once])
    assert told["rank_hours"] == 3.0
    assert told["hours"]["replayed"] == 0.5
    assert told["trials"][0]["hours"]["useful"] == 1.5

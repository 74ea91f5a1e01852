import json
import os
from pathlib import Path

import pytest

from orchestrate.runs import write_json
from orchestrate.store import store_path
from orchestrate.sweep.lease import lease
from orchestrate.sweep.record import record_path
from tests.cli.commands import RUNS, finished_sweep, orchestrate, parsed, write_cluster, write_data
from tests.datasets import draw_shapes
from tests.launchers.jobs import rank_pids, state
from tests.sweep.sweeps import bench, record_of, script_all, write_sweep


def test_check_prints_every_default_of_every_kind_of_file(place: Path) -> None:
    result = orchestrate("check", str(write_sweep(place)), str(write_cluster(place)))
    assert result.exit_code == 0
    assert "a valid sweep file of 2 trials" in result.stdout
    assert "train.seed=1" in result.stdout
    assert "final_fraction: 0.001" in result.stdout
    assert "cpus_per_rank: 1" in result.stdout


def test_check_tells_all_problems_of_all_files_with_their_lines(place: Path) -> None:
    sweep = write_sweep(place)
    sweep.write_text(sweep.read_text().replace("budget: 1ep", "budgt: 1ep").replace("lr: 0.001", "lr: -1"))
    (place / "cluster.yaml").write_text("launcher: locl\n")
    result = orchestrate("check", str(sweep), "cluster.yaml")
    assert result.exit_code == 2
    told = result.stderr
    assert f"{sweep}:9: train.budgt: unknown key; did you mean `budget`?" in told
    assert f"{sweep}:8: optim.lr: -1: must be greater than 0" in told
    assert "cluster.yaml:1: launcher: 'locl': no such launcher" in told
    assert "Traceback" not in result.output


def test_check_speaks_json_to_programs(place: Path) -> None:
    (place / "bad.yaml").write_text("launcher: locl\n")
    result = orchestrate("check", str(write_cluster(place)), "bad.yaml", "--json")
    assert result.exit_code == 2
    files = json.loads(result.stdout)["files"]
    assert [file["valid"] for file in files] == [True, False]
    assert files[0]["resolved"]["limits"]["parallel"] == 1


def test_plan_shows_trials_launch_and_price_and_writes_nothing(place: Path) -> None:
    write_data(place)
    words = ("plan", str(write_sweep(place)), "--cluster", str(write_cluster(place)))
    result = orchestrate(*words)
    assert result.exit_code == 0
    assert result.stdout.count("missing") == 2
    assert "no finished trial to price from" in result.stdout
    assert "-m orchestrate.worker" in result.stdout
    assert not RUNS.exists()
    values = parsed(*words)
    assert values["left"]["images"] == 160
    assert values["launch"]["environment"]["WORLD_SIZE"] == "2"
    assert values["problems"] == []


def test_files_of_data_that_is_elsewhere_are_checked_and_priced(place: Path) -> None:
    sweep = write_sweep(place)
    text = sweep.read_text().replace("system: {", "system: {images_per_second: 20.0, ")
    sweep.write_text(text.replace("data: {", "data: {train_samples: 800, "))
    checked = orchestrate("check", str(sweep))
    assert checked.exit_code == 0
    assert checked.stdout.count("its data was not looked at; `orchestrate plan` does that") == 1
    cluster = str(write_cluster(place))
    planned = orchestrate("plan", str(sweep), "-c", cluster)
    assert planned.exit_code == 0
    assert "1,600 images; about 0.02 rank-hours, by the images_per_second that 2 trials state" in planned.stdout
    assert f"warning: {place}/data/train: not looked at: " in planned.stdout
    assert "warning: ids of trials are others where the datasets can be read" in planned.stdout
    refused = orchestrate("sweep", str(sweep), "-c", cluster)
    assert refused.exit_code == 2
    assert "data.train" in refused.stderr
    assert not RUNS.exists()


def test_plan_names_what_stands_in_the_way(place: Path) -> None:
    write_data(place)
    (place / "data" / "train" / "s-0.tar").unlink()
    words = ("plan", str(write_sweep(place, batch=9)), "-c", str(write_cluster(place)))
    result = orchestrate(*words)
    assert result.exit_code == 2
    assert "does not divide by the 2 ranks" in result.stdout
    assert "s-0.tar: missing" in result.stdout
    as_json = orchestrate(*words, "--json")
    assert as_json.exit_code == 2
    assert len(json.loads(as_json.stdout)["problems"]) == 2


def test_sweep_refuses_what_cannot_run_before_it_writes(place: Path) -> None:
    write_data(place)
    (place / "data" / "train" / "s-0.tar").unlink()
    result = orchestrate("sweep", str(write_sweep(place)), "-c", str(write_cluster(place)))
    assert result.exit_code == 2
    assert "s-0.tar: missing" in result.stderr
    assert not RUNS.exists()


def test_sweep_without_data_names_the_dataset_and_the_line(place: Path) -> None:
    sweep = write_sweep(place)
    result = orchestrate("sweep", str(sweep), "-c", str(write_cluster(place)))
    assert result.exit_code == 2
    assert f"{sweep}:4: data.train" in result.stderr
    assert "orchestrate data pack" in result.stderr


def test_files_of_the_wrong_kind_are_told_apart(place: Path) -> None:
    cluster, sweep = str(write_cluster(place)), str(write_sweep(place))
    assert "is a cluster file, a sweep file is needed here" in orchestrate("plan", cluster, "-c", cluster).stderr
    assert "is a sweep file, a run file is needed here" in orchestrate("run", sweep, "-c", cluster).stderr
    both = orchestrate("plan", cluster, "-c", sweep).stderr
    assert f"{cluster}:1: is a cluster file, a sweep file is needed here" in both
    assert f"{sweep}:1: is a sweep file, a cluster file is needed here" in both


def test_status_lists_trials_with_their_results(place: Path) -> None:
    record, _ = finished_sweep(place, {"*": "done"})
    result = orchestrate("status", "study")
    assert result.exit_code == 0
    assert result.stdout.count("COMPLETED") == 2
    assert record.trial_ids[0][:8] in result.stdout
    one = parsed("status", record.trial_ids[0][:6])
    assert [trial["id"] for trial in one["trials"]] == [record.trial_ids[0]]
    assert one["trials"][0]["value"] == one["trials"][0]["metrics"]["knn_k20.top1"]
    assert "study" in orchestrate("status").stdout
    assert parsed("status")["sweeps"][0]["counts"] == {"COMPLETED": 2}


def test_status_needs_no_store(place: Path) -> None:
    finished_sweep(place, {"*": "exit:75"}, {"*": "exit:1"})
    before = parsed("status", "study")
    store_path(RUNS).unlink()
    assert parsed("status", "study") == before
    assert "1 sweep, 2 trials" in orchestrate("adopt").stdout
    assert parsed("status", "study") == before


def test_status_says_nothing_that_json_cannot(place: Path) -> None:
    record, _ = finished_sweep(place, {"*": "exit:88"})
    write_json(RUNS / "trials" / record.trial_ids[0] / "status.json", {"state": "diverged", "loss": float("nan")})
    assert "NaN" not in orchestrate("status", "study", "--json").stdout


def test_sweep_is_found_by_its_file_too(place: Path) -> None:
    record, _ = finished_sweep(place)
    assert parsed("status", record.file)["sweep"] == "study"


def test_unknown_and_ambiguous_words_are_answered_with_what_there_is(place: Path) -> None:
    assert "there is no sweep yet" in orchestrate("status", "nothing").stderr
    record, _ = finished_sweep(place)
    unknown = orchestrate("why", "ffffffffff")
    assert unknown.exit_code == 2
    assert "sweeps: study" in unknown.stderr
    whole = orchestrate("why", "study")
    assert all(trial.id[:8] in whole.stderr for trial in record.trials)


def test_why_shows_the_evidence_and_the_next_command(place: Path) -> None:
    record, _ = finished_sweep(place, {"0": "exit:2"})
    result = orchestrate("why", record.trial_ids[0][:5])
    assert "FAILED (bad input)" in result.stdout
    assert "attempt 1: 2 ranks, training never began" in result.stdout
    assert "exit code 2 of rank 0" in result.stdout
    assert "| rank 0 attempt 1: exit:2" in result.stdout
    assert f"orchestrate resume {record.trial_ids[0][:8]}" in result.stdout
    values = parsed("why", record.trial_ids[0])
    assert (values["state"], values["cause"]) == ("FAILED", "bad input")


def test_suggested_commands_name_the_runs_folder_if_they_must(place: Path) -> None:
    record, _ = finished_sweep(place, {"*": "exit:1"})
    RUNS.rename("elsewhere")
    result = orchestrate("why", record.trial_ids[0], "--runs", "elsewhere")
    assert f"orchestrate resume {record.trial_ids[0][:8]} --runs elsewhere" in result.stdout


def test_logs_show_the_end_of_a_rank(place: Path) -> None:
    record, _ = finished_sweep(place)
    trial = record.trial_ids[0]
    assert orchestrate("logs", trial, "--rank", "1").stdout == "rank 1 attempt 1: done\n"
    assert orchestrate("logs", trial, "--follow").stdout == "rank 0 attempt 1: done\n"
    merged = "[0] rank 0 attempt 1: done\n[1] rank 1 attempt 1: done\n"
    assert orchestrate("logs", trial, "--rank", "all", "--follow").stdout == merged
    missing = orchestrate("logs", trial, "--rank", "7")
    assert "no such log; there are: logs/attempt-1/rank-0.log" in missing.stderr


def test_cancel_stops_a_running_trial_and_says_how_to_go_on(place: Path) -> None:
    record = record_of(write_sweep(place, seeds=(0,)))
    script_all(RUNS, record, {"*": "wait"})
    made = bench(RUNS)
    made.session.make_true(record, once=True)
    rank_pids(RUNS, record.trial_ids[0])
    result = orchestrate("cancel", "study", "--patience", "60")
    assert "cancelled; checkpoint at step 1" in result.stdout
    assert "orchestrate resume study" in result.stdout
    assert not state(made.launcher, record.trial_ids[0]).live
    assert "CANCELLED" in orchestrate("status", "study").stdout


def test_second_sweep_command_shows_the_status_and_names_the_first(place: Path) -> None:
    record, _ = finished_sweep(place)
    with lease(record_path(RUNS, record.name).parent):
        result = orchestrate("resume", "study")
    assert result.exit_code == 1
    assert f"process {os.getpid()} on" in result.stderr
    assert result.stdout.count("COMPLETED") == 2


def test_resumed_sweep_that_is_done_starts_nothing(place: Path) -> None:
    record, _ = finished_sweep(place)
    result = orchestrate("resume", "study")
    assert result.exit_code == 0
    assert "all 2 trials are done" in result.stdout
    assert not list((RUNS / "trials" / record.trial_ids[0] / "jobs").glob("2.*"))


def test_runs_folder_comes_from_option_then_environment_then_cluster(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_sweep(place)
    RUNS.rename("elsewhere")
    assert orchestrate("status", "study").exit_code == 2
    assert orchestrate("status", "study", "--runs", "elsewhere").exit_code == 0
    monkeypatch.setenv("ORCHESTRATE_RUNS", "elsewhere")
    assert orchestrate("status", "study").exit_code == 0


def test_report_is_written_where_it_is_asked_for(place: Path) -> None:
    finished_sweep(place, {"*": "done"})
    result = orchestrate("report", "study", "--out", "page")
    assert result.exit_code == 0, result.output
    assert Path("page/index.html").exists()


def test_data_is_packed_and_its_size_told(place: Path) -> None:
    draw_shapes(place / "images", 12, num_classes=3)
    options = ("--limit", "10", "--samples-per-shard", "5", "--workers", "1")
    result = orchestrate("data", "pack", "images", "packed", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("packed: 10 images of 3 classes in 2 shards, digest ")
    wrong = orchestrate("data", "pack", "no-such-folder", "elsewhere")
    assert wrong.exit_code == 2
    assert "no-such-folder: no such file or folder" in wrong.stderr

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrate.errors import LaunchError
from orchestrate.launchers.attempts import load_attempts
from orchestrate.launchers.base import JobExistsError, LaunchPlan, Phase, RunSpec, load_launcher
from orchestrate.launchers.cluster import Resources
from orchestrate.launchers.local import LocalLauncher, num_visible_gpus
from orchestrate.launchers.supervisor import process_start_ticks
from orchestrate.runs import RunDir
from tests.launchers.jobs import (
    cluster,
    is_gone,
    kill,
    launcher,
    rank_pids,
    start,
    state,
    supervisor_pid,
    trial_dir,
    wait_for_end,
    wait_until,
)

TRIAL = "00112233aabbccdd"


def test_plan_is_printable_and_does_nothing(runs: Path) -> None:
    jobs = LocalLauncher(cluster(ranks=3, MY_KEY="a b"), runs)
    plan = jobs.plan(RunSpec(TRIAL, runs / "trials" / TRIAL, 2))
    assert not (runs / "trials" / TRIAL).exists()
    assert plan.name == f"oc-{TRIAL}"
    assert plan.ranks == 3
    assert plan.command[-3:] == ("-m", "orchestrate.worker", str(runs / "trials" / TRIAL))
    text = plan.render()
    assert "export MY_KEY='a b'" in text
    assert "export DS_ACCELERATOR=cpu" in text
    assert text.count("LOCAL_RANK=") == 3


def test_plan_survives_json(runs: Path) -> None:
    plan = launcher(runs).plan(RunSpec(TRIAL, runs / "trials" / TRIAL, 1))
    assert LaunchPlan.from_json(plan.to_json()) == plan


def test_job_runs_to_its_end_and_leaves_records(runs: Path) -> None:
    jobs = launcher(runs)
    path = trial_dir(runs, TRIAL)
    plan = start(jobs, runs, TRIAL)
    end = wait_for_end(jobs, TRIAL)
    assert (end.phase, end.exit_code, end.attempt) == (Phase.FINISHED, 0, 1)
    assert [log.name for log in jobs.logs(end.job)] == ["rank-0.log", "rank-1.log"]
    assert "rank 1 attempt 1: done" in jobs.logs(end.job)[1].read_text()
    (record,) = load_attempts(RunDir(path))
    assert (record.exit_code, record.ranks, record.failed_rank) == (0, 2, None)
    assert record.rank_seconds > 0
    assert plan.environment["ORCHESTRATE_RENDEZVOUS"] == f"file://{path}/jobs/1.rendezvous"


def test_never_submitted_jobs_are_not_reported(runs: Path) -> None:
    assert launcher(runs).poll([f"oc-{TRIAL}"]) == {}


def test_ended_supervisor_is_no_zombie(runs: Path) -> None:
    jobs = launcher(runs)
    trial_dir(runs, TRIAL)
    start(jobs, runs, TRIAL)
    wait_for_end(jobs, TRIAL)
    pid = supervisor_pid(runs, TRIAL)

    def is_reaped() -> bool:
        state(jobs, TRIAL)
        return not Path(f"/proc/{pid}").exists()

    wait_until(is_reaped, "the supervisor is reaped")


def test_ranks_die_with_a_killed_supervisor(runs: Path) -> None:
    jobs = launcher(runs)
    trial_dir(runs, TRIAL, {"*": "deaf"})
    start(jobs, runs, TRIAL)
    pids = rank_pids(runs, TRIAL)
    assert state(jobs, TRIAL).phase is Phase.RUNNING
    kill(supervisor_pid(runs, TRIAL))
    wait_until(lambda: all(is_gone(pid) for pid in pids), "the ranks are gone")
    assert wait_for_end(jobs, TRIAL).phase is Phase.LOST


def test_one_killed_rank_ends_the_others(runs: Path) -> None:
    jobs = launcher(runs, ranks=3)
    path = trial_dir(runs, TRIAL, {"0": "wait", "1": "wait", "2": "wait"})
    start(jobs, runs, TRIAL)
    pids = rank_pids(runs, TRIAL, ranks=3)
    kill(pids[1])
    end = wait_for_end(jobs, TRIAL)
    assert end.exit_code == 128 + signal.SIGKILL
    assert all(is_gone(pid) for pid in pids)
    record = json.loads((path / "jobs" / "1.end.json").read_text())
    assert record["failed_rank"] == 1
    assert record["rank_codes"] == [75, 137, 75]  # the others were asked to stop, and did


def test_ranks_that_ignore_the_end_of_another_are_killed(runs: Path) -> None:
    jobs = launcher(runs)
    trial_dir(runs, TRIAL, {"0": "exit:1", "1": "deaf"})
    plan = replace(jobs.plan(RunSpec(TRIAL, runs / "trials" / TRIAL, 1)), kill_grace_seconds=0.1)
    jobs.submit(plan)
    assert wait_for_end(jobs, TRIAL).exit_code == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_stop_requests_reach_the_ranks_which_save(runs: Path, number: signal.Signals) -> None:
    jobs = launcher(runs)
    path = trial_dir(runs, TRIAL, {"*": "wait"})
    start(jobs, runs, TRIAL)
    rank_pids(runs, TRIAL)
    kill(supervisor_pid(runs, TRIAL), number)
    assert wait_for_end(jobs, TRIAL).exit_code == 75
    (record,) = load_attempts(RunDir(path))
    assert record.stopped_by == number.name
    assert (path / "checkpoints" / "step-00000001").is_dir()


def test_cancel_stops_one_attempt_and_not_the_next(runs: Path) -> None:
    jobs = launcher(runs)
    trial_dir(runs, TRIAL, {"*": "wait"})
    start(jobs, runs, TRIAL)
    rank_pids(runs, TRIAL)
    first = state(jobs, TRIAL).job
    jobs.cancel([first])
    assert wait_for_end(jobs, TRIAL).exit_code == 75
    start(jobs, runs, TRIAL, attempt=2)
    rank_pids(runs, TRIAL, attempt=2)
    jobs.cancel([first])
    assert state(jobs, TRIAL).phase is Phase.RUNNING


def test_ranks_deaf_to_a_stop_request_are_killed_after_the_grace(runs: Path) -> None:
    jobs = launcher(runs)
    trial_dir(runs, TRIAL, {"*": "deaf"})
    plan = replace(jobs.plan(RunSpec(TRIAL, runs / "trials" / TRIAL, 1)), stop_grace_seconds=0.1)
    job = jobs.submit(plan)
    rank_pids(runs, TRIAL)
    jobs.cancel([job])
    assert wait_for_end(jobs, TRIAL).exit_code == 137


def test_second_job_of_a_trial_is_refused_and_the_first_goes_on(runs: Path) -> None:
    first, second = launcher(runs), launcher(runs)
    trial_dir(runs, TRIAL, {"*": "wait"})
    start(first, runs, TRIAL)
    pids = rank_pids(runs, TRIAL)
    with pytest.raises(JobExistsError, match="running already"):
        start(second, runs, TRIAL, attempt=2)
    assert state(second, TRIAL).attempt == 1
    assert not any(is_gone(pid) for pid in pids)


def test_an_attempt_number_is_used_once(runs: Path) -> None:
    jobs = launcher(runs)
    trial_dir(runs, TRIAL)
    start(jobs, runs, TRIAL)
    wait_for_end(jobs, TRIAL)
    with pytest.raises(JobExistsError, match="at attempt 1 already"):
        start(launcher(runs), runs, TRIAL, attempt=1)


def test_children_of_ranks_are_killed_with_them(runs: Path) -> None:
    jobs = launcher(runs)
    path = trial_dir(runs, TRIAL, {"0": "parent", "1": "wait"})
    start(jobs, runs, TRIAL)
    rank_pids(runs, TRIAL)
    wait_until((path / "child").exists, "the child runs")
    child = int((path / "child").read_text())
    kill(rank_pids(runs, TRIAL)[0])
    wait_for_end(jobs, TRIAL)
    wait_until(lambda: is_gone(child), "the child is gone")


def test_job_is_not_called_lost_while_a_process_of_it_lives(runs: Path) -> None:
    jobs = launcher(runs)
    path = trial_dir(runs, TRIAL, {"0": "parent", "1": "wait"})
    start(jobs, runs, TRIAL)
    pids = rank_pids(runs, TRIAL)
    wait_until((path / "child").exists, "the child runs")
    kill(supervisor_pid(runs, TRIAL))
    wait_until(lambda: all(is_gone(pid) for pid in pids), "the ranks are gone")
    assert state(jobs, TRIAL).phase is Phase.RUNNING
    kill(int((path / "child").read_text()))
    assert wait_for_end(jobs, TRIAL).phase is Phase.LOST


def test_command_that_does_not_exist_is_the_users_error(runs: Path) -> None:
    jobs = launcher(runs, worker=("/no/such/program",))
    path = trial_dir(runs, TRIAL)
    start(jobs, runs, TRIAL)
    assert wait_for_end(jobs, TRIAL).exit_code == 127
    assert "/no/such/program" in (path / "logs" / "attempt-1" / "supervisor.log").read_text()


def test_process_that_reuses_a_pid_is_not_taken_for_the_job(runs: Path) -> None:
    path = trial_dir(runs, TRIAL)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    ticks = process_start_ticks(os.getpid())
    record = {"pid": os.getpid(), "start_ticks": (ticks or 0) - 1, "boot_id": boot, "host": "here", "started": 0.0}
    (path / "jobs").mkdir()
    (path / "jobs" / "1.start.json").write_text(json.dumps(record))
    assert state(launcher(runs), TRIAL).phase is Phase.LOST


def test_job_on_a_host_that_cannot_be_asked_is_unknown(runs: Path) -> None:
    path = trial_dir(runs, TRIAL)
    record = {"pid": 1, "start_ticks": 1, "boot_id": "another", "host": "elsewhere", "started": 0.0}
    (path / "jobs").mkdir()
    (path / "jobs" / "1.start.json").write_text(json.dumps(record))
    found = state(launcher(runs), TRIAL)
    assert found.phase is Phase.UNKNOWN
    assert "elsewhere" in found.evidence


def test_supervisor_that_cannot_start_says_why(runs: Path) -> None:
    jobs = launcher(runs)
    path = trial_dir(runs, TRIAL)
    (path / "jobs").write_text("a file where a folder must be")
    with pytest.raises(LaunchError, match="File exists"):
        start(jobs, runs, TRIAL)


def test_warning_of_the_interpreter_does_not_stop_a_submission(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONWARNINGS", "ignore::NoSuchWarning")  # Python complains before the supervisor begins
    jobs = launcher(runs)
    trial_dir(runs, TRIAL)
    start(jobs, runs, TRIAL)
    assert wait_for_end(jobs, TRIAL).exit_code == 0


def test_more_processes_than_cores_are_told_and_allowed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    jobs = launcher(runs, ranks=2)
    assert jobs.warnings(parallel=1) == ()
    assert jobs.warnings(parallel=2) == ("2 ranks x 1 CPU x 2 trials on 2 cores: they will slow each other down",)
    assert launcher(runs, ranks=4).warnings(parallel=1)[0].startswith("4 ranks x 1 CPU x 1 trial on 2 cores")
    assert jobs.problems() == ()


def test_gpus_that_are_not_there_are_told_before_a_job_needs_them(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = cluster(ranks=2, parallel=3).model_copy(update={"resources": Resources(ranks_per_node=99, device="cuda")})
    told = LocalLauncher(asked, runs).problems()
    assert len(told) == 2
    assert "resources.ranks_per_node: 99" in told[0]
    assert "limits.parallel: 3" in told[1]
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert num_visible_gpus(tmp_path) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert num_visible_gpus(tmp_path) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert num_visible_gpus(tmp_path) == 0


def test_one_host_is_one_node(runs: Path) -> None:
    two_nodes = cluster().model_copy(update={"resources": Resources(nodes=2)})
    assert "resources.nodes: 2" in LocalLauncher(two_nodes, runs).problems()[0]
    assert LocalLauncher(cluster(), runs).problems() == ()


def test_launcher_is_found_by_file_name(runs: Path) -> None:
    assert isinstance(load_launcher(cluster(), runs), LocalLauncher)
    with pytest.raises(LaunchError, match="no 'locale'"):
        load_launcher(cluster().model_copy(update={"launcher": "locale"}), runs)

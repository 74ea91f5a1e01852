"""The keeper of a job, run as Slurm runs it; commands of Slurm are scripts that say what Slurm says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from orchestrate.launchers import slurm_step
from orchestrate.launchers.slurm_commands import Answer
from orchestrate.launchers.slurm_job import Times
from orchestrate.launchers.slurm_step import WATCHED, Step
from orchestrate.runs import RunDir, write_json
from tests.launchers.jobs import wait_until

TRIAL = "00000000000000a1"
SAVED = 'echo "srun: error: m[1-2]: tasks 0-1: Exited with exit code 75" >&2; exit 75'
JOB = {
    "SLURM_JOB_ID": "12",
    "SLURM_JOB_NODELIST": "m[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_RESTART_COUNT": "1",
    "SLURM_JOB_PARTITION": "low",
    "SLURMD_NODENAME": "m1",
    "PYTHONSAFEPATH": "",
    "SECRET_TOKEN": "x",
}


class Job:
    """A job whose Slurm is a folder of scripts, each of which notes how it was called."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDir(folder / "my runs' $HOME" / TRIAL)
        self.bin, self.notes = folder / "bin", folder / "notes"
        for each in (self.run.path / "jobs", self.bin, self.notes):
            each.mkdir(parents=True)
        self.script = self.run.path / "jobs" / "submit.sh"
        self.script.write_text("#!/bin/bash\n")
        self.says("squeue", '[ "$2" = -j ] && echo "1790000000  1890000000"; exit 0')
        self.says("sbatch", "echo 13")
        self.says("scontrol", "exit 0")
        self.says("srun", "exit 0")

    def says(self, command: str, script: str) -> None:
        path = self.bin / command
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >>"{self.notes / command}"\n{script}\n')
        path.chmod(0o755)

    def asked(self, command: str) -> list[str]:
        path = self.notes / command
        return path.read_text().splitlines() if path.exists() else []

    def start(self, **changes: str) -> "subprocess.Popen[str]":
        environment = os.environ | JOB | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | changes
        keeper = (sys.executable, "-m", "orchestrate.launchers.slurm_job", "--run-dir", str(self.run.path))
        words = (
            "--script",
            str(self.script),
            "--lead-seconds",
            "100",
            "--",
            "srun",
            "--output=attempt-{attempt}",
            "worker",
        )
        return subprocess.Popen(
            (*keeper, *words), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def keep(self, **changes: str) -> tuple[int, str]:
        keeper = self.start(**changes)
        said, _ = keeper.communicate(timeout=100)
        return keeper.returncode, said

    def record(self, name: str) -> dict[str, Any]:
        return dict(json.loads((self.run.path / "jobs" / f"{name}.json").read_text()))

    def records(self) -> list[str]:
        return sorted(path.name.removesuffix(".json") for path in (self.run.path / "jobs").glob("*.json"))


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_good_run_is_recorded_from_start_to_end(job: Job) -> None:
    job.says("srun", 'env >"$(dirname "$0")/../notes/environment"; exit 0')
    code, said = job.keep()
    assert code == 0, said
    start = job.record("1.start")
    expected = {"name": f"oc-{TRIAL}", "job": "12", "restart": 1, "nodes": ["m1", "m2"], "ranks": 2, "node": "m1"}
    expected |= {"submitted": 1790000000.0, "ends": 1890000000.0, "launcher": "slurm", "lead_seconds": 100.0}
    assert expected.items() <= start.items()
    assert "SECRET_TOKEN" not in start["environment"]
    assert (job.record("1.end")["exit_code"], job.record("1.end")["rank_codes"]) == (0, [0, 0])
    assert job.asked("srun") == ["--output=attempt-1 worker"]
    environment = dict(line.split("=", 1) for line in job.asked("environment") if "=" in line)
    assert (environment["ORCHESTRATE_ATTEMPT"], environment["ORCHESTRATE_JOB"]) == ("1", "12")
    assert float(environment["ORCHESTRATE_DEADLINE"]) == 1890000000 - 100
    assert environment["SLURM_EXPORT_ENV"] == "ALL"
    assert int(environment["MASTER_PORT"]) > 1024
    assert job.asked("sbatch") == []


def test_saved_run_goes_on_by_a_successor_and_ends_well(job: Job) -> None:
    job.says("srun", SAVED)
    code, said = job.keep()
    assert code == 0, said  # 75 might make Slurm start it again beside its successor
    assert job.asked("sbatch") == [f"--parsable {job.script}"]
    end = job.record("1.end")
    assert (end["exit_code"], end["rank_codes"], end["next"]) == (75, [75, 75], "job 13 goes on")


def test_requeue_is_the_way_where_submission_is_forbidden(job: Job) -> None:
    job.says("srun", SAVED)
    job.says("sbatch", 'echo "sbatch: error: Access denied" >&2; exit 1')
    assert job.keep()[0] == 0
    assert job.asked("scontrol")[-1] == "requeue 12"
    assert job.record("1.end")["next"] == "requeued"
    job.says("scontrol", 'echo "scontrol: error: Access denied" >&2; exit 1')
    assert job.keep()[0] == 0
    assert job.record("2.end")["next"] == "sbatch: Access denied; scontrol requeue: Access denied"


@pytest.mark.parametrize("name", ["stop", "cancelled.json"])
def test_nobody_goes_on_where_a_person_wants_a_stop(job: Job, name: str) -> None:
    job.says("srun", f'touch "{job.run.path}/{name}"\n{SAVED}'.replace("$HOME", "\\$HOME"))
    job.keep()
    assert (job.asked("sbatch"), job.record("1.end")["exit_code"], job.record("1.end")["next"]) == ([], 75, "")


def test_allowance_bounds_a_job_that_nobody_watches(job: Job) -> None:
    job.says("srun", f'env >"$(dirname "$0")/../notes/environment"\n{SAVED}')
    write_json(job.run.path / "jobs" / "allowance.json", {"rank_seconds": 2 * 3600.0})
    started = time.time()
    job.keep()
    environment = dict(line.split("=", 1) for line in job.asked("environment") if "=" in line)
    assert started + 3500 <= float(environment["ORCHESTRATE_DEADLINE"]) <= time.time() + 3500
    assert len(job.asked("sbatch")) == 1
    write_json(job.run.path / "jobs" / "1.end.json", {"ended": started + 3450.0, "exit_code": 75})
    code, said = job.keep()
    assert (code, job.record("2.end")["next"]) == (0, "")
    assert "limits.gpu_hours" in said
    assert len(job.asked("sbatch")) == 1


def test_job_that_gets_nowhere_does_not_go_on_for_ever(job: Job) -> None:
    job.says("srun", SAVED)
    for number in (1, 2, 3):
        job.keep()
        assert len(job.asked("sbatch")) == min(number, 2)
    write_json(job.run.attempt_file(4), {"first_step": 5, "last_step": 6})
    write_json(job.run.path / "jobs" / "4.verdict.json", {})
    job.keep()  # the fifth; the fourth moved
    assert len(job.asked("sbatch")) == 3


@pytest.mark.parametrize("code", [1, 2, 74, 86, 87, 88, 89])
def test_failure_is_slurms_too_and_is_not_continued(job: Job, code: int) -> None:
    job.says("srun", f'echo "srun: error: m1: task 0: Exited with exit code {code}" >&2; exit {code}')
    assert job.keep()[0] == code
    assert (job.record("1.end")["exit_code"], job.record("1.end")["failed_rank"]) == (code, 0)
    assert job.asked("sbatch") == []


def test_end_by_slurm_is_recorded_and_left_to_slurm(job: Job) -> None:
    job.says("scontrol", 'echo "KillWait                = 30 sec"')
    # Slurm tells the ranks itself; srun passes on what the keeper sends.
    job.says(
        "srun",
        f'trap \'{SAVED}\' USR1; touch "$(dirname "$0")/../notes/ready"; for i in {{1..600}}; do sleep 0.1; done',
    )
    keeper = job.start()
    wait_until((job.notes / "ready").exists, "srun runs")
    keeper.send_signal(signal.SIGTERM)
    said, _ = keeper.communicate(timeout=60)
    end = job.record("1.end")
    assert (keeper.returncode, end["exit_code"], end["stopped_by"], end["next"]) == (0, 75, "SIGTERM", ""), said
    assert job.asked("sbatch") == []


def test_complete_or_cancelled_trial_takes_no_attempt(job: Job) -> None:
    write_json(job.run.done_file, {"fingerprint": "of another trial"})
    job.keep()
    assert job.records() == ["1.end", "1.start"]
    write_json(job.run.done_file, {"fingerprint": TRIAL})
    code, said = job.keep()
    assert (code, "the trial is done" in said) == (0, True)
    job.run.done_file.unlink()
    write_json(job.run.trained_file, {"fingerprint": TRIAL})
    assert "the training is over" in job.keep(ORCHESTRATE_STAGE="pretrain")[1]
    job.run.trained_file.unlink()
    job.run.stop_file.touch()
    code, said = job.keep()
    assert (code, "a person wants a stop" in said) == (0, True)
    write_json(job.run.cancelled_file, {})
    assert "the trial is cancelled" in job.keep()[1]
    assert job.records() == ["1.end", "1.start"]


def test_trial_that_another_job_works_on_is_left_alone(job: Job) -> None:
    write_json(job.run.path / "jobs" / "1.start.json", {"job": "7", "attempt": 1})
    keeper = job.start()
    assert keeper.stdout is not None
    assert "waiting: job 7 works on it as attempt 1" in keeper.stdout.readline()
    assert job.records() == ["1.start"]  # a worker that saw a record here would think that it was replaced
    keeper.send_signal(signal.SIGTERM)  # patience lasts a minute otherwise
    said, _ = keeper.communicate(timeout=60)
    assert (keeper.returncode, "this job leaves it alone" in said) == (74, True)
    assert "job 7" in job.record("2.start")["refused"]
    assert (job.record("2.end")["exit_code"], job.asked("srun")) == (74, [])


def test_job_takes_over_from_one_whose_heartbeat_stops(job: Job) -> None:
    path = job.run.path / "jobs" / "1.start.json"
    write_json(path, {"job": "7", "attempt": 1, "started": 5.0})
    write_json(job.run.attempt_file(1), {"last_seen": 123.0})
    keeper = job.start()
    assert keeper.stdout is not None
    assert "waiting: job 7" in keeper.stdout.readline()
    for each in (path, job.run.attempt_file(1)):
        os.utime(each, (time.time() - 60,) * 2)
    said, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 0, said
    end = job.record("1.end")
    assert (end["exit_code"], end["ended"], end["next"]) == (None, 123.0, "job 12 goes on")
    assert job.record("2.end")["exit_code"] == 0


def test_earlier_run_of_the_same_job_is_closed_with_what_it_left(job: Job) -> None:
    write_json(job.run.path / "jobs" / "1.start.json", {"job": "12", "attempt": 1, "started": 5.0})
    log = job.run.log_file(1, 0).with_name("srun.log")
    log.parent.mkdir(parents=True)
    log.write_text("srun: error: Node failure on m2\n")
    assert job.keep()[0] == 0
    end = job.record("1.end")
    assert (end["exit_code"], end["hint"], end["blamed"]) == (None, "node failure", ["m2"])


def test_srun_that_is_not_there_is_named(job: Job) -> None:
    (job.bin / "srun").unlink()
    code, said = job.keep(PATH=str(job.bin))
    assert code == 127, said
    assert job.record("1.end")["evidence"] == "srun: No such file or directory"


def test_srun_that_waits_for_a_lost_node_is_not_waited_for(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_step, "_SLACK_SECONDS", 0.2)
    job.says("srun", 'echo "srun: error: m1: task 0: Exited with exit code 76" >&2; exec sleep 600')

    class Slurm:
        def run(self, *words: str, text: str = "") -> Answer:
            return Answer(0, "KillWait                = 1 sec\n")

    before = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    try:
        began = time.monotonic()
        code = Step(Slurm(), beat=lambda: None).run(
            (str(job.bin / "srun"),), environment={}, log=job.notes / "srun.log"
        )
        assert (code, time.monotonic() - began < 60) == (None, True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_deadline_leaves_a_short_job_half_its_time() -> None:
    assert Times(None, None).deadline(100, now=0) is None
    assert Times(None, 1000.0).deadline(100, now=0) == 900
    assert Times(None, 150.0).deadline(100, now=50) == 100

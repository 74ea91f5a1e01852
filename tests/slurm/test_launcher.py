"""What every launcher does, on this host and on a real Slurm with and without accounting; and what only Slurm does."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from orchestrate.launchers.attempts import load_attempts
from orchestrate.launchers.base import JobState, Launcher, LaunchPlan, Phase, RunSpec, TryLaterError, job_name
from orchestrate.launchers.cluster import ClusterConfig
from orchestrate.launchers.local import LocalLauncher
from orchestrate.launchers.slurm import SlurmLauncher
from orchestrate.launchers.slurm_commands import Answer, SlurmCommands
from orchestrate.launchers.slurm_script import excluded_nodes
from orchestrate.runs import RunDir
from tests.launchers.jobs import STAND_IN, kill_supervisors
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import NUM_NODES

RANKS = 2


class NoLongerShown(SlurmCommands):
    """A Slurm whose queue has forgotten all jobs, as it does minutes after their ends."""

    def run(self, *words: str, text: str = "") -> Answer:
        return Answer(0) if words[0] == "squeue" else super().run(*words, text=text)


@dataclass
class Place:
    """Where trials run, and the jobs of this test."""

    runs: Path
    build: Callable[[], Launcher]
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        self.launcher = self.build()
        self.trial = uuid4().hex[:16]  # a job of the test before must not make ours wait

    @property
    def name(self) -> str:
        return job_name(self.trial)

    @property
    def run_dir(self) -> Path:
        return self.runs / "trials" / self.trial

    def plan(self, trial: str = "", *, attempt: int = 1, script: tuple[dict[str, str], ...] = ()) -> LaunchPlan:
        trial = trial or self.trial
        path = self.runs / "trials" / trial
        path.mkdir(parents=True, exist_ok=True)
        if script:
            (path / "script.json").write_text(json.dumps(script))
        return self.launcher.plan(RunSpec(trial, path, attempt, sweep="a sweep"))

    def start(self, *script: dict[str, str], attempt: int = 1) -> str:
        return self.launcher.submit(self.plan(attempt=attempt, script=script))

    def seen(self, trial: str = "") -> JobState:
        (state,) = self.launcher.poll([job_name(trial or self.trial)]).values()
        return state

    def wait_for_ranks(self, attempt: int = 1) -> None:
        files = [self.run_dir / "ready" / f"{attempt}-{rank}" for rank in range(RANKS)]
        wait_for(lambda: all(file.exists() for file in files), f"ranks of attempt {attempt} are there: {self.story()}")

    def wait_for_end(self, trial: str = "") -> JobState:
        wait_for(lambda: not self.seen(trial).live, f"the job ends: {self.story()}")
        return self.seen(trial)

    def story(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.runs.rglob("slurm-*.log")))


def slurm_place(runs: Path, cluster: Cluster, **more: Any) -> Place:
    resources = {"nodes": 2, "ranks_per_node": 1}
    options = {"gres": "gpu:1", "time_minutes": 10, "lead_seconds": 30, **more.pop("slurm", {})}
    config = ClusterConfig.model_validate({"launcher": "slurm", "resources": resources, "slurm": options} | more)
    commands = SlurmCommands(environment=os.environ | cluster.environment)
    return Place(runs, lambda: SlurmLauncher(config, runs, worker=STAND_IN[1:], commands=commands), cluster)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / 'my 100% runs\' $HOME "x"'
    (folder / "trials").mkdir(parents=True)
    return folder


@pytest.fixture(params=["slurm", "slurm_accounting"])
def place(request: pytest.FixtureRequest, runs: Path) -> Iterator[Place]:
    cluster: Cluster = request.getfixturevalue(request.param)
    yield slurm_place(runs, cluster)
    clear(cluster)


@pytest.fixture(params=["local", "slurm", "slurm_accounting"])
def any_place(request: pytest.FixtureRequest, runs: Path) -> Iterator[Place]:
    if request.param == "local":
        config = ClusterConfig.model_validate({"launcher": "local", "resources": {"ranks_per_node": RANKS}})
        yield Place(runs, lambda: LocalLauncher(config, runs, worker=STAND_IN))
        kill_supervisors(runs)
    else:
        cluster: Cluster = request.getfixturevalue(request.param)
        yield slurm_place(runs, cluster)
        clear(cluster)


def clear(cluster: Cluster) -> None:
    """Leave no job of the test behind, without waiting for its end."""
    live = [job.id for job in cluster.jobs() if job.state in ("RUNNING", "PENDING") and job.name.startswith("oc-")]
    for job in live:
        cluster.run("scancel", job, check=False)


def test_job_runs_to_its_end_and_leaves_records_and_logs(any_place: Place) -> None:
    job = any_place.start({"*": "done"})
    end = any_place.wait_for_end()
    assert (end.phase, end.job, end.exit_code, end.attempt) == (Phase.FINISHED, job, 0, 1)
    logs = any_place.launcher.logs(job)
    assert [log.name for log in logs[:RANKS]] == ["rank-0.log", "rank-1.log"]
    assert "rank 1 attempt 1: done" in logs[1].read_text()
    (record,) = load_attempts(RunDir(any_place.run_dir))
    assert (record.exit_code, record.ranks, record.failed_rank) == (0, RANKS, None)


def test_never_submitted_name_is_not_reported(any_place: Place) -> None:
    assert any_place.launcher.poll([any_place.name]) == {}


def test_another_process_finds_a_job_by_its_name(any_place: Place) -> None:
    job = any_place.start({"*": "wait"})
    any_place.wait_for_ranks()
    found = any_place.build().poll([any_place.name])[any_place.name]
    assert (found.phase, found.job, found.attempt) == (Phase.RUNNING, job, 1)


def test_failure_of_one_rank_ends_the_job_with_its_code(any_place: Place) -> None:
    any_place.start({"0": "wait", "1": "exit:3"})
    end = any_place.wait_for_end()
    assert (end.phase, end.exit_code) == (Phase.FINISHED, 3)


def test_cancelled_job_saves_and_nobody_goes_on_until_the_next_submission(any_place: Place) -> None:
    any_place.start({"*": "wait"})
    any_place.wait_for_ranks()
    any_place.launcher.cancel([any_place.seen().job])
    end = any_place.wait_for_end()
    assert (end.phase, end.exit_code, end.attempt) == (Phase.FINISHED, 75, 1)
    assert (any_place.run_dir / "checkpoints" / "step-00000001").is_dir()
    any_place.start(attempt=2)
    any_place.wait_for_ranks(attempt=2)
    assert (any_place.seen().phase, any_place.seen().attempt) == (Phase.RUNNING, 2)


def test_cancel_of_an_ended_job_does_nothing(any_place: Place) -> None:
    job = any_place.start({"*": "done"})
    any_place.wait_for_end()
    any_place.launcher.cancel([job])
    assert any_place.seen().exit_code == 0


def test_slurm_judges_a_plan_and_nothing_is_submitted(place: Place) -> None:
    assert place.cluster
    before = len(place.cluster.jobs())
    assert place.launcher.problems() == ()
    told = place.launcher.judge(place.plan())
    assert "to start at 20" in told
    assert "processors on nodes" in told
    assert len(place.cluster.jobs()) == before


@pytest.mark.parametrize(
    ("slurm_options", "resources", "fix"),
    [
        ({"partition": "a100"}, {}, "slurm.partition"),
        ({"gres": "gpu:99"}, {}, "slurm.gpus_per_node"),
        ({"gres": "fpga:1"}, {}, "slurm.gres"),
        ({"memory_gb": 10_000.0}, {}, "slurm.memory_gb"),
        ({"constraint": "nvlink"}, {}, "slurm.constraint"),
        ({}, {"nodes": 99}, "resources.nodes"),  # which sbatch itself would queue for ever
        ({"exclude": ["m99"]}, {}, "slurm.exclude"),
        ({"options": {"no-such-option": "1"}}, {}, "slurm.options"),
    ],
)
def test_request_beyond_the_cluster_is_a_problem_before_anything_starts(
    slurm_options: dict[str, Any], resources: dict[str, Any], fix: str, runs: Path, slurm: Cluster
) -> None:
    place = slurm_place(runs, slurm, slurm=slurm_options, resources={"nodes": 2, "ranks_per_node": 1} | resources)
    (problem,) = place.launcher.problems()
    assert fix in problem
    assert fix in place.launcher.judge(place.plan())


def test_suspected_nodes_are_used_again_where_too_few_others_are(runs: Path, slurm: Cluster) -> None:
    place = slurm_place(runs, slurm)
    trial = uuid4().hex[:16]
    nodes = tuple(f"m{number}" for number in range(1, NUM_NODES))  # all but the last
    plan = place.launcher.plan(RunSpec(trial, runs / "trials" / trial, 1, exclude=nodes))
    job = place.launcher.submit(plan)
    try:
        script = (plan.run_dir / "jobs" / "submit.sh").read_text()
        assert excluded_nodes(script) == nodes[:-1]  # two nodes are what the job needs
        assert f"{nodes[-1]}: used again" in "".join(place.launcher.remarks())
    finally:
        place.launcher.cancel([job])


def test_twin_of_a_job_waits_until_the_first_has_ended(place: Place) -> None:
    place.start({"*": "wait"}, {"*": "done"})
    place.wait_for_ranks()
    twin = place.build().submit(place.plan())
    assert place.cluster
    assert {job.state for job in place.cluster.jobs() if job.id == twin} == {"PENDING"}
    assert place.seen().phase is Phase.RUNNING


def test_hold_of_a_requeued_job_is_released(place: Place) -> None:
    job = place.start({"*": "wait"})
    place.wait_for_ranks()
    assert place.cluster
    place.cluster.requeue(job)
    wait_for(lambda: place.seen().held, "the job is held")
    assert (place.seen().phase, place.seen().attempt) == (Phase.QUEUED, 2)
    place.launcher.release([job])
    assert not place.seen().held
    # Two minutes, if it were not; and never, if it began in the second of the requeue: "Job credential revoked".
    place.wait_for_ranks(attempt=2)


def test_stopped_job_goes_on_as_the_next_attempt_without_us(place: Place) -> None:
    first = place.start({"*": "wait"}, {"*": "done"})
    place.wait_for_ranks()
    assert place.cluster
    place.cluster.signal(first, "USR1")
    wait_for(lambda: place.seen().exit_code == 0, "the successor ends")
    end = place.seen()
    assert (end.attempt, end.phase) == (2, Phase.FINISHED)
    assert end.job != first


def test_job_that_somebody_cancelled_has_that_verdict(place: Place) -> None:
    job = place.start({"*": "wait"})
    place.wait_for_ranks()
    assert place.cluster
    place.cluster.run("scancel", job)
    end = place.wait_for_end()
    assert end.verdicts[1].state == "CANCELLED"


def test_job_that_somebody_cancelled_before_it_began_takes_an_attempt(place: Place) -> None:
    plan = place.plan()
    place.launcher.submit(replace(plan, script=plan.script.replace("--requeue", "--requeue\n#SBATCH --hold")))
    assert place.seen().phase is Phase.QUEUED
    assert place.cluster
    place.cluster.run("scancel", place.seen().job)
    end = place.wait_for_end()
    assert (end.phase, end.attempt, end.verdicts[1].state) == (Phase.FINISHED, 1, "CANCELLED")


def test_script_that_fails_before_its_ranks_is_told_with_its_log(runs: Path, slurm: Cluster) -> None:
    place = slurm_place(runs, slurm, slurm={"setup": ["echo no such module; exit 1"]})
    job = place.start({"*": "done"})
    end = place.wait_for_end()
    assert (end.phase, end.attempt, end.verdicts[1].state) == (Phase.FINISHED, 1, "FAILED")
    assert f"see logs/slurm-{job}.log" in end.evidence
    assert place.launcher.logs(job)[-1].read_text() == "no such module\n"


def test_elements_of_an_array_run_as_the_jobs_they_stand_for(place: Place) -> None:
    assert place.cluster
    place = slurm_place(place.runs, place.cluster, resources={}, slurm={"arrays": True})
    trials = [uuid4().hex[:16] for _ in range(3)]
    assert place.launcher.array_size == 1001
    jobs = place.launcher.submit_array([place.plan(trial, script=({"*": "done"},)) for trial in trials])
    for index, trial in enumerate(trials):
        end = place.wait_for_end(trial)
        assert (end.phase, end.exit_code, end.job) == (Phase.FINISHED, 0, jobs[index])
        assert "rank 0 attempt 1: done" in place.launcher.logs(jobs[index])[0].read_text()


def test_silence_of_the_controller_concludes_nothing(runs: Path, slurm: Cluster) -> None:
    place = slurm_place(runs, slurm)
    config = ClusterConfig.model_validate({"launcher": "slurm"})
    impatient = SlurmCommands(environment=os.environ | slurm.environment, timeout_seconds=1.0)
    jobs = SlurmLauncher(config, runs, worker=STAND_IN[1:], commands=impatient)
    with slurm.without_controller():
        assert jobs.poll([place.name])[place.name].phase is Phase.UNKNOWN
        with pytest.raises(TryLaterError):
            jobs.submit(place.plan())
        with pytest.raises(TryLaterError):
            jobs.cancel(["1"])
        assert jobs.problems()
    assert jobs.poll([place.name]) == {}


def test_accounting_knows_the_end_of_a_job_that_the_queue_forgot(runs: Path, slurm_accounting: Cluster) -> None:
    place = slurm_place(runs, slurm_accounting)
    job = place.start({"*": "wait"})
    place.wait_for_ranks()
    for process in slurm_accounting.processes(job=job):  # its keeper too: there is no last word
        os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not place.seen().live, "the job ends")
    forgetful = NoLongerShown(environment=os.environ | slurm_accounting.environment)
    place.launcher = SlurmLauncher(ClusterConfig.model_validate({"launcher": "slurm"}), runs, commands=forgetful)
    wait_for(lambda: place.seen().verdicts, "accounting knows")
    end = place.seen()
    assert (end.phase, end.exit_code) == (Phase.FINISHED, None)
    assert (end.verdicts[1].source, end.verdicts[1].state) == ("sacct", "FAILED")
    assert len(end.verdicts[1].nodes) == 2

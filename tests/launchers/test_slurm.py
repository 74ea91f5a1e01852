import json
import time
from pathlib import Path

import pytest

from orchestrate.errors import LaunchError
from orchestrate.launchers.base import LaunchPlan, Phase, TryLaterError
from orchestrate.launchers.slurm_commands import Answer
from tests.launchers.slurm_text import DEAD, NAME, NOW, TRIAL, TextSlurm, config, kept, launcher, planned, queue_line


def test_plan_does_nothing_and_prints_what_sbatch_gets(runs: Path, slurm: TextSlurm) -> None:
    plan = planned(launcher(runs, slurm), runs, exclude=("m3",))
    assert not slurm.asked
    assert not (runs / "trials" / TRIAL).exists()
    assert (plan.name, plan.ranks, plan.nodes, plan.stage) == (NAME, 4, 2, "pretrain")
    assert plan.render() == plan.script
    assert "#SBATCH --exclude=m3\n" in plan.script
    assert f"#SBATCH --comment=dims/{TRIAL}/pretrain@" in plan.script
    assert LaunchPlan.from_json(plan.to_json()) == plan


def test_submitted_script_is_the_planned_one_and_stays_for_successors(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    plan = planned(jobs, runs)
    assert jobs.submit(plan) == "100"
    folder = runs / "trials" / TRIAL
    assert slurm.scripts == [plan.script] == [(folder / "jobs" / "submit.sh").read_text()]
    assert (folder / "logs").is_dir()  # into which Slurm writes from the first moment
    assert json.loads((folder / "jobs" / "submitted.json").read_text()) == {"job": "100", "time": NOW}
    assert slurm.count("sbatch") == 1


def test_submission_leaves_no_files_of_submitit(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    jobs.submit(planned(jobs, runs))
    there = {str(path.relative_to(runs)) for path in runs.rglob("*") if path.is_file()}
    assert there == {f"trials/{TRIAL}/jobs/submit.sh", f"trials/{TRIAL}/jobs/submitted.json"}


def test_job_of_the_evaluation_has_a_folder_and_resources_of_its_own(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm, config(evaluate={"cpus_per_rank": 3}))
    plan = planned(jobs, runs, stage="evaluate")
    assert (plan.name, plan.ranks) == (f"{NAME}-evaluate", 1)
    assert plan.run_dir == runs / "trials" / TRIAL / "evaluation"
    assert plan.command[-1] == str(runs / "trials" / TRIAL)
    assert plan.environment["ORCHESTRATE_STAGE"] == "evaluate"
    assert planned(jobs, runs).environment["ORCHESTRATE_STAGE"] == "pretrain"
    jobs.submit(plan)
    slurm.queue([queue_line("100", f"{NAME}-evaluate", "RUNNING")])
    states = jobs.poll([NAME, f"{NAME}-evaluate"])
    assert {name: state.phase for name, state in states.items()} == {f"{NAME}-evaluate": Phase.RUNNING}


def test_refusal_of_slurm_is_told_and_leaves_no_job(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    slurm.answers["sbatch"] = Answer(1, err="sbatch: error: Batch job submission failed: Invalid qos specification")
    with pytest.raises(LaunchError, match=r"Invalid qos specification; change slurm\.qos"):
        jobs.submit(planned(jobs, runs))
    slurm.queue([])
    assert jobs.poll([NAME]) == {}


def test_full_queue_is_told_apart_from_a_silent_controller(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    for said, full in (("QOSMaxSubmitJobPerUserLimit", True), ("Socket timed out on send/recv operation", False)):
        slurm.answers["sbatch"] = Answer(1, err=f"sbatch: error: {said}")
        with pytest.raises(TryLaterError) as caught:
            jobs.submit(planned(jobs, runs))
        assert caught.value.full is full


def test_answer_without_an_id_is_no_proof_of_a_failure(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    slurm.answers["sbatch"] = Answer(0, out="")
    with pytest.raises(TryLaterError, match="sbatch gave no id"):
        jobs.submit(planned(jobs, runs))


def test_queue_that_cannot_be_read_concludes_nothing_of_any_name(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    kept(runs, 1, job="7", started=NOW - 10_000, code=0)
    for answer in (DEAD, Answer(124, err="squeue: error: no answer within 90 s"), Answer(0, out="what?\n")):
        slurm.answers["squeue"] = answer
        states = jobs.poll([NAME, "oc-other"])
        assert {name: state.phase for name, state in states.items()} == dict.fromkeys([NAME, "oc-other"], Phase.UNKNOWN)
        assert all(state.evidence for state in states.values())


def test_jobs_of_other_people_s_names_are_not_ours(runs: Path, slurm: TextSlurm) -> None:
    slurm.queue([queue_line("1", "train.sh", "RUNNING"), queue_line("2", "oc-array-unknown", "RUNNING")])
    assert launcher(runs, slurm).poll([NAME]) == {}


def test_job_of_the_same_trial_in_another_folder_is_not_ours(runs: Path, tmp_path: Path, slurm: TextSlurm) -> None:
    jobs, others = launcher(runs, slurm), launcher(tmp_path / "other", slurm)
    others.submit(planned(others, tmp_path / "other"))
    comment = next(line.partition("=")[2] for line in slurm.scripts[0].splitlines() if "--comment=" in line)
    slurm.queue([queue_line("100", NAME, "RUNNING", Comment=comment)])
    assert jobs.poll([NAME]) == {}
    assert others.poll([NAME])[NAME].phase is Phase.RUNNING
    jobs.cancel(["100"])
    assert slurm.count("scancel") == 0


def test_job_whose_comment_the_site_has_changed_is_ours(runs: Path, slurm: TextSlurm) -> None:
    slurm.queue([queue_line("100", NAME, "RUNNING", Comment="billed to project 7")])
    assert launcher(runs, slurm).poll([NAME])[NAME].phase is Phase.RUNNING


def test_end_of_a_job_of_a_folder_that_was_removed_is_not_of_this_one(runs: Path, slurm: TextSlurm) -> None:
    slurm.queue([queue_line("9", NAME, "COMPLETED", SubmitTime=str(NOW - 3000), EndTime=f"{NOW - 5:.0f}")])
    jobs = launcher(runs, slurm)
    assert jobs.poll([NAME]) == {}
    jobs.submit(planned(jobs, runs))
    assert jobs.poll([NAME])[NAME].job == "100"


def test_one_poll_asks_squeue_once_and_accounting_once(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    names = [f"{number:016x}" for number in range(20)]
    for name in names:
        kept(runs, 1, job="7", started=NOW - 10_000, name=name)
    slurm.queue([])
    slurm.answers["sacct"] = Answer(0, out="")
    jobs.poll([f"oc-{name}" for name in names])
    assert [words[0] for words in slurm.asked] == ["squeue", "sacct"]


def test_accounting_is_not_asked_without_a_question(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    kept(runs, 1, job="7", started=NOW - 100, code=0)
    slurm.queue([])
    assert jobs.poll([NAME])[NAME].exit_code == 0
    assert slurm.count("sacct") == 0


def test_cluster_without_accounting_is_asked_once(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    kept(runs, 1, job="7", started=NOW - 10_000)
    slurm.queue([])
    assert [jobs.poll([NAME])[NAME].phase for _ in range(3)] == [Phase.LOST] * 3
    assert slurm.count("sacct") == 1


def test_accounting_that_never_heard_of_a_job_is_not_asked_for_ever(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    kept(runs, 1, job="7", started=NOW - 10_000)
    slurm.queue([])
    slurm.answers["sacct"] = Answer(0, out="")
    for _ in range(100):
        jobs.poll([NAME])
    assert 1 < slurm.count("sacct") < 50


def test_accounting_that_fails_once_is_asked_again(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    kept(runs, 1, job="7", started=NOW - 1000)
    slurm.queue([])
    slurm.answers["sacct"] = Answer(1, err="sacct: error: slurm_persist_conn_open: Connection refused")
    assert not jobs.poll([NAME])[NAME].verdicts
    slurm.answers["sacct"] = Answer(0, out=f"7|7|NODE_FAIL|{NOW - 1001:.0f}|{NOW - 500:.0f}|m1\n")
    assert jobs.poll([NAME])[NAME].verdicts[1].state == "NODE_FAIL"


def test_accounting_is_asked_from_before_the_oldest_run_in_question(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    kept(runs, 1, job="7", started=NOW - 5000)
    kept(runs, 1, job="8", started=NOW - 9000, name="other")
    slurm.queue([])
    slurm.answers["sacct"] = Answer(0, out="")
    jobs.poll([NAME, "oc-other"])
    start = next(word.removeprefix("--starttime=") for word in slurm.last("sacct") if word.startswith("--starttime="))
    since = time.mktime(time.strptime(start, "%Y-%m-%dT%H:%M:%S"))
    assert NOW - 11_000 < since < NOW - 9000

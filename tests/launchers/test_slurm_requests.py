import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrate.errors import LaunchError
from orchestrate.launchers.base import Phase, RunSpec, TryLaterError, load_launcher
from orchestrate.launchers.slurm import SlurmLauncher
from orchestrate.launchers.slurm_commands import Answer
from orchestrate.launchers.slurm_script import excluded_nodes
from orchestrate.runs import RunDir
from tests.launchers.slurm_text import DEAD, NAME, NOW, TRIAL, TextSlurm, config, kept, launcher, planned, queue_line


def test_hold_of_a_requeue_is_cleared(runs: Path, slurm: TextSlurm) -> None:
    launcher(runs, slurm).release(["7", "8_1"])
    assert slurm.last("scontrol") == ("scontrol", "update", "JobId=7,8_1", "StartTime=now+3")


def test_thousands_of_ids_do_not_make_one_command_line(runs: Path, slurm: TextSlurm) -> None:
    launcher(runs, slurm).release([str(100_000 + number) for number in range(1001)])
    assert slurm.count("scontrol") == 6
    launcher(runs, slurm).release([])
    assert slurm.count("scontrol") == 6


def test_cancel_saves_what_runs_and_drops_what_waits_of_the_same_trial(runs: Path, slurm: TextSlurm) -> None:
    slurm.queue(
        [
            queue_line("7", NAME, "RUNNING"),
            queue_line("8", NAME, "PENDING"),
            queue_line("9", "oc-other", "PENDING"),
            queue_line("10", NAME, "COMPLETED"),
        ]
    )
    launcher(runs, slurm).cancel(["7"])
    assert ("scancel", "--state=PENDING", "8") in slurm.asked
    assert ("scancel", "--state=RUNNING", "--signal=USR1", "7") in slurm.asked
    assert slurm.count("scancel") == 2
    assert (runs / "trials" / TRIAL / "stop").exists()  # for the keeper: nobody goes on


def test_cancel_of_one_element_of_an_array_leaves_the_others(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm, config(slurm={"arrays": True}, resources={}))
    jobs.submit_array([planned(jobs, runs, f"{number:016x}") for number in range(2)])
    array = next(word.removeprefix("--job-name=") for word in slurm.scripts[0].split() if "--job-name=" in word)
    slurm.queue([queue_line("100_0", array, "PENDING"), queue_line("100_1", array, "PENDING")])
    jobs.cancel(["100_1"])
    assert slurm.last("scancel") == ("scancel", "--state=PENDING", "100_1")


def test_next_submission_takes_the_stop_file_away(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    plan = planned(jobs, runs)
    jobs.submit(plan)
    slurm.queue([queue_line("100", NAME, "RUNNING")])
    jobs.cancel(["100"])
    jobs.submit(plan)
    assert not (runs / "trials" / TRIAL / "stop").exists()


def test_cancel_of_an_ended_job_does_nothing(runs: Path, slurm: TextSlurm) -> None:
    slurm.queue([queue_line("7", NAME, "COMPLETED")])
    launcher(runs, slurm).cancel(["7", "99"])
    assert slurm.count("scancel") == 0
    assert not (runs / "trials" / TRIAL / "stop").exists()


def test_cancel_says_so_if_slurm_does_not_answer(runs: Path, slurm: TextSlurm) -> None:
    (runs / "trials" / TRIAL).mkdir()
    slurm.queue([queue_line("7", NAME, "RUNNING")])
    slurm.answers["scancel"] = Answer(1, err="scancel: error: Kill job error on job id 7: Socket timed out")
    with pytest.raises(TryLaterError):
        launcher(runs, slurm).cancel(["7"])
    slurm.answers["squeue"] = DEAD
    with pytest.raises(TryLaterError):
        launcher(runs, slurm).cancel(["7"])


def test_cancel_passes_over_a_job_that_ends_meanwhile(runs: Path, slurm: TextSlurm) -> None:
    (runs / "trials" / TRIAL).mkdir()
    slurm.queue([queue_line("7", NAME, "RUNNING")])
    slurm.answers["scancel"] = Answer(1, err="scancel: error: Kill job error on job id 7: Invalid job id specified")
    launcher(runs, slurm).cancel(["7"])


def test_arrays_are_for_jobs_of_one_rank_if_wanted(runs: Path, slurm: TextSlurm) -> None:
    slurm.answers["scontrol"] = Answer(
        0, out="MaxArraySize            = 1001\nSchedulerParameters     = bf_interval=5\n"
    )
    wanted = {"arrays": True}
    assert launcher(runs, slurm).array_size == 0
    assert launcher(runs, slurm, config(slurm=wanted)).array_size == 0
    assert launcher(runs, slurm, config(slurm=wanted)).warnings(parallel=1)
    assert launcher(runs, slurm, config(slurm=wanted, evaluate={})).array_size == 1001  # jobs of one rank
    one = config(slurm=wanted, resources={})
    assert launcher(runs, slurm, one).warnings(parallel=1) == ()
    assert launcher(runs, slurm, one).array_size == 1001
    slurm.answers["scontrol"] = Answer(0, out="MaxArraySize = 1001\nSchedulerParameters = x,max_array_tasks=500\n")
    assert launcher(runs, slurm, one).array_size == 500
    slurm.answers["scontrol"] = DEAD
    assert launcher(runs, slurm, one).array_size == 0


def test_elements_of_an_array_are_found_by_the_names_of_their_jobs(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm, config(slurm={"arrays": True}, resources={}))
    trials = [f"{number:016x}" for number in range(3)]
    assert jobs.submit_array([planned(jobs, runs, trial) for trial in trials]) == ["100_0", "100_1", "100_2"]
    (script,) = slurm.scripts
    assert "#SBATCH --array=0-2\n" in script
    assert "singleton" not in script
    array = next(word.removeprefix("--job-name=") for word in script.split() if word.startswith("--job-name="))
    slurm.queue([queue_line("100_0", array, "RUNNING"), queue_line("100_2", array, "PENDING")])
    again = launcher(runs, slurm)  # another process knows the array, too
    for seen in (jobs, again):
        states = seen.poll([f"oc-{trial}" for trial in trials])
        assert {name: (state.phase, state.job) for name, state in states.items() if state.live} == {
            f"oc-{trials[0]}": (Phase.RUNNING, "100_0"),
            f"oc-{trials[2]}": (Phase.QUEUED, "100_2"),
        }
    own = (runs / "trials" / trials[1] / "jobs" / "submit.sh").read_text()
    assert f"#SBATCH --job-name=oc-{trials[1]}\n" in own  # by which its element does its work


def test_array_that_was_submitted_without_an_answer_is_found_again(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm, config(slurm={"arrays": True}, resources={}))
    slurm.answers["sbatch"] = Answer(1, err="sbatch: error: Socket timed out on send/recv operation")
    with pytest.raises(TryLaterError):
        jobs.submit_array([planned(jobs, runs)])
    array = next(word.removeprefix("--job-name=") for word in slurm.scripts[0].split() if "--job-name=" in word)
    slurm.queue([queue_line("55_0", array, "PENDING")])
    assert jobs.poll([NAME])[NAME].job == "55_0"


def test_elements_of_an_array_leave_out_all_nodes_that_any_of_them_must_not_get(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm, config(slurm={"arrays": True, "exclude": ["m[1-2]"]}, resources={}))
    jobs.submit_array([planned(jobs, runs, "a", exclude=("m3",)), planned(jobs, runs, "b", exclude=("m4", "m3"))])
    assert "#SBATCH --exclude=m[1-2],m3,m4\n" in slurm.scripts[0]


def test_problems_name_the_key_to_change_for_each_stage(runs: Path, slurm: TextSlurm) -> None:
    refused = "sbatch: error: invalid partition specified: a100\nallocation failure: Invalid partition name specified"
    slurm.answers["sbatch"] = Answer(1, err=refused)
    cluster = config(evaluate={}, slurm={"partition": "a100"})
    problems = launcher(runs, slurm, cluster).problems()
    assert [problem.partition(": sbatch")[0] for problem in problems] == ["cluster: pretrain", "cluster: evaluate"]
    assert all("change slurm.partition" in problem for problem in problems)
    assert all(words[1] == "--test-only" for words in slurm.asked if words[0] == "sbatch")


def test_place_without_slurm_has_a_problem_in_words(runs: Path, slurm: TextSlurm) -> None:
    slurm.answers["scontrol"] = Answer(127, err="scontrol: error: command not found")
    (problem,) = launcher(runs, slurm).problems()
    assert problem.startswith("cluster: launcher: slurm: there is no Slurm on this host")
    slurm.answers["scontrol"] = DEAD
    (problem,) = launcher(runs, slurm).problems()
    assert "Unable to contact slurm controller" in problem


def test_busy_cluster_is_no_problem(runs: Path, slurm: TextSlurm) -> None:
    slurm.answers["sbatch"] = Answer(1, err="allocation failure: Requested nodes are busy")
    assert launcher(runs, slurm).problems() == ()


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\x07b"])
def test_folder_that_slurm_misreads_is_a_problem(name: str, tmp_path: Path, slurm: TextSlurm) -> None:
    (problem,) = launcher(tmp_path / name, slurm).problems()
    assert "Slurm takes no such name of a folder" in problem


def test_judgement_is_slurm_s_with_times_for_people(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    said = "sbatch: Job 7 to start at 2026-11-23T17:25:34 using 4 processors on nodes m[1-2] in partition low"
    slurm.answers["sbatch"] = Answer(0, err=said)
    told = jobs.judge(planned(jobs, runs))
    assert told == said.removeprefix("sbatch: ").replace("23T17", "23 17")
    slurm.answers["sbatch"] = Answer(1, err="allocation failure: Memory specification can not be satisfied")
    assert "lower slurm.memory_gb" in jobs.judge(planned(jobs, runs))
    assert not (runs / "trials" / TRIAL).exists()


def test_logs_of_a_job_are_those_of_its_ranks_and_its_script(runs: Path, slurm: TextSlurm) -> None:
    run = RunDir(runs / "trials" / TRIAL)
    kept(runs, 1, job="7", started=NOW)
    kept(runs, 2, job="8", started=NOW)
    for number in (1, 2):
        for rank in range(11):
            run.log_file(number, rank).parent.mkdir(parents=True, exist_ok=True)
            run.log_file(number, rank).touch()
        (run.path / "logs" / f"slurm-{number + 6}.log").touch()
    found = launcher(runs, slurm).logs("8")
    assert found == (*(run.log_file(2, rank) for rank in range(11)), run.path / "logs" / "slurm-8.log")
    assert launcher(runs, slurm).logs("9") == ()


def test_launcher_is_loaded_by_its_name(runs: Path) -> None:
    assert isinstance(load_launcher(config(slurm={"poll_seconds": 7.0}), runs), SlurmLauncher)
    assert load_launcher(config(slurm={"poll_seconds": 7.0}), runs).poll_seconds == 7.0


def test_looking_at_jobs_does_not_import_submitit() -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrate.launchers.cluster import ClusterConfig\n"
        "from orchestrate.launchers.base import load_launcher\n"
        "jobs = load_launcher(ClusterConfig(launcher='slurm'), Path('x')); jobs.poll(['oc-a']); print(*sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"submitit", "torch", "numpy", "cloudpickle"} & set(told.stdout.split())


def test_ten_thousand_names_are_polled_in_a_moment(runs: Path, slurm: TextSlurm) -> None:
    names = [f"oc-{number:016x}" for number in range(10_000)]
    slurm.queue([queue_line(str(number), name, "PENDING") for number, name in enumerate(names)])
    jobs = launcher(runs, slurm)
    begin = time.process_time()
    assert len(jobs.poll(names)) == len(names)
    assert time.process_time() - begin < 5.0  # takes 0.5 s on a free core


def test_interpreter_of_a_container_is_not_the_keeper_s(runs: Path, slurm: TextSlurm) -> None:
    inside = config(slurm={"container": ["apptainer", "exec", "x.sif"], "python": "/opt/python"})
    script = planned(launcher(runs, slurm, inside), runs).script
    assert f"exec {sys.executable} -m orchestrate.launchers.slurm_job" in script
    assert "apptainer exec x.sif /opt/python -m orchestrate.launchers.slurm_rank" in script
    outside = config(slurm={"python": "/nodes/python"})
    assert "exec /nodes/python -m" in planned(launcher(runs, slurm, outside), runs).script


def test_plan_of_another_attempt_is_the_same_job(runs: Path, slurm: TextSlurm) -> None:
    """The number is taken when the job starts."""
    jobs = launcher(runs, slurm)
    plan = planned(jobs, runs)
    assert replace(plan, attempt=2).script == jobs.plan(RunSpec(TRIAL, runs / "trials" / TRIAL, 2, sweep="dims")).script


def test_hold_of_a_failed_launch_is_released_and_that_of_a_requeue_ended(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    failed = {"RestartCnt": "1", "Reason": "(launch failed requeued held)"}
    requeued = {"RestartCnt": "1", "Reason": "BeginTime"}
    slurm.queue([queue_line("7", NAME, "PENDING", **failed), queue_line("8", "oc-b", "PENDING", **requeued)])
    assert {state.held for state in jobs.poll([NAME, "oc-b"]).values()} == {True}
    jobs.release(["7", "8"])
    asked = [words[1:] for words in slurm.asked if words[0] == "scontrol"]
    assert asked == [("release", "7"), ("update", "JobId=8", "StartTime=now+3")]


def test_questions_that_accounting_did_not_answer_do_not_count(runs: Path, slurm: TextSlurm) -> None:
    jobs = launcher(runs, slurm)
    kept(runs, 1, job="7", started=NOW - 1000)
    slurm.queue([])
    slurm.answers["sacct"] = Answer(1, err="sacct: error: slurm_persist_conn_open: Connection refused")
    for _ in range(100):
        jobs.poll([NAME])
    slurm.answers["sacct"] = Answer(0, out=f"7|7|NODE_FAIL|{NOW - 1001:.0f}|{NOW - 500:.0f}|m1\n")
    assert jobs.poll([NAME])[NAME].verdicts[1].state == "NODE_FAIL"


class SmallSlurm(TextSlurm):
    """A cluster that has no nodes for a job that excludes more than two."""

    def run(self, *words: str, text: str = "") -> Answer:
        if words[0] == "sbatch" and len(excluded_nodes(text or Path(words[-1]).read_text())) > 2:
            return Answer(1, err="sbatch: error: Requested node configuration is not available")
        return super().run(*words, text=text)


def test_oldest_suspicions_are_dropped_until_a_job_fits(runs: Path) -> None:
    slurm = SmallSlurm()
    jobs = launcher(runs, slurm, config(slurm={"exclude": ["m9"]}))
    plan = planned(jobs, runs, exclude=("m3", "m1", "m4"))  # the newest first
    job = jobs.submit(plan)
    script = (runs / "trials" / TRIAL / "jobs" / "submit.sh").read_text()
    assert job and excluded_nodes(script) == ("m9", "m3")
    assert script == slurm.scripts[-1] == plan.script.replace("m9,m3,m1,m4", "m9,m3")
    assert jobs.remarks() == ("too few nodes fit without m1, m4: used again, though suspected",)
    assert jobs.remarks() == ()


def test_refusal_that_fewer_exclusions_do_not_help_stays_one(runs: Path) -> None:
    jobs = launcher(runs, SmallSlurm(), config(slurm={"exclude": ["m7", "m8", "m9"]}))
    with pytest.raises(LaunchError, match="no such nodes"):
        jobs.submit(planned(jobs, runs, exclude=("m1",)))

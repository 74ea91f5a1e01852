"""Run trials as jobs of a Slurm cluster. The one file that imports submitit."""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrate.errors import LaunchError
from orchestrate.launchers.attempts import job_file, job_numbers, submission_file
from orchestrate.launchers.base import (
    STAGES,
    JobState,
    LaunchPlan,
    RunSpec,
    TryLaterError,
    is_job_name,
    job_folder,
    worker_environment,
)
from orchestrate.launchers.slurm_arrays import ArrayFolders
from orchestrate.launchers.slurm_commands import Commands, SlurmCommands, why_silent
from orchestrate.launchers.slurm_queue import RELEASE_SECONDS
from orchestrate.launchers.slurm_refusals import refusal
from orchestrate.launchers.slurm_script import (
    SCRIPT_NAME,
    Request,
    array_script,
    excluded_nodes,
    job_script,
    script_path,
    with_excluded,
)
from orchestrate.launchers.slurm_watch import SlurmWatch
from orchestrate.runs import RunDir, read_json, write_json, write_text

if TYPE_CHECKING:
    from orchestrate.launchers.cluster import ClusterConfig

WORKER = ("-m", "orchestrate.worker")
# Ids in one request; a command line holds some 100,000 characters.
_IDS_AT_ONCE = 200


class SlurmLauncher:
    """Jobs of Slurm, each kept on its first node by `slurm_job`; see there for what happens when one ends.

    The queue, accounting and the files of the jobs are all that the launcher knows; it may be built anew at any time.

    Args:
        cluster: resources of a job, what it asks of Slurm, and the environment of its workers.
        runs: folder that holds `trials/`; the nodes see it at the same path.
        worker: what the interpreter of a rank runs, to which the RunDir is added.
        commands: Slurm; that of this host if None.
        clock: unix time.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        runs: Path,
        *,
        worker: tuple[str, ...] = WORKER,
        commands: Commands | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._cluster, self._options = cluster, cluster.slurm
        self._trials = runs.absolute() / "trials"
        self._mark = hashlib.sha256(str(runs.resolve()).encode()).hexdigest()[:8]
        self._arrays = ArrayFolders(runs.absolute() / "arrays")
        self._worker = worker
        self._commands: Commands = commands or SlurmCommands()
        self._clock = clock
        self._remarks: dict[str, None] = {}
        self._watch = SlurmWatch(self._trials, self._arrays, mark=self._mark, commands=self._commands, clock=clock)

    @property
    def poll_seconds(self) -> float:
        """Time between two looks at the queue."""
        return self._options.poll_seconds

    @cached_property
    def array_size(self) -> int:
        """Most jobs of an array; 0 if the config wants none, or has no jobs of one rank."""
        if not self._options.arrays or not self._has_small_jobs:
            return 0
        answer = self._commands.run("scontrol", "show", "config")
        sizes = re.findall(r"(?:MaxArraySize\s*=\s*|max_array_tasks=)(\d+)", answer.out)
        return min(map(int, sizes), default=0)

    @property
    def _has_small_jobs(self) -> bool:
        return any(self._cluster.stage_resources(stage).ranks == 1 for stage in STAGES)

    def plan(self, spec: RunSpec) -> LaunchPlan:
        """Decide everything about a submission, doing nothing."""
        resources, cwd = self._cluster.stage_resources(spec.stage), Path.cwd()
        interpreter = self._options.python or sys.executable
        plan = LaunchPlan(
            name=spec.name,
            run_dir=spec.folder.path,
            attempt=spec.attempt,
            command=(interpreter, *self._worker, str(spec.run_dir.absolute())),
            environment=worker_environment(self._cluster, spec, cwd),
            ranks=resources.ranks,
            cwd=cwd,
            stage=spec.stage,
            nodes=resources.nodes,
        )
        return replace(plan, script=job_script(plan, self._request(spec), keeper=self._keeper))

    @property
    def _keeper(self) -> str:
        """Interpreter outside the container, where Slurm's commands are."""
        return sys.executable if self._options.container else self._options.python or sys.executable

    def _request(self, spec: RunSpec) -> Request:
        return Request(
            self._cluster.stage_resources(spec.stage),
            self._options.at(spec.stage),
            exclude=spec.exclude,
            comment="/".join(filter(None, (spec.sweep, spec.trial_id, f"{spec.stage}@{self._mark}"))),
        )

    def problems(self) -> tuple[str, ...]:
        """Say what Slurm lacks to run trials as the cluster config asks."""
        for folder in (self._trials.parent, Path.cwd()):
            # A backslash tells sbatch that there are no patterns such as %j in the name of a log.
            if not str(folder).isprintable() or "\\" in str(folder):
                return (f"{str(folder)!r}: Slurm takes no such name of a folder; choose one of plain letters",)
        asked = self._commands.run("scontrol", "--oneliner", "show", "partition")
        if asked.code:
            return (f"cluster: launcher: slurm: {why_silent(asked)}",)
        stages = STAGES if self._cluster.evaluate else STAGES[:1]
        return tuple(filter(None, (self._stage_problem(stage) for stage in stages)))

    def _stage_problem(self, stage: str) -> str:
        """Ask Slurm about a job that will not be submitted."""
        plan = self.plan(RunSpec("0" * 16, self._trials / ("0" * 16), 1, stage=stage))
        answer = self._commands.run("sbatch", "--test-only", text=plan.script)
        error = refusal(f"cluster: {stage}", answer) if answer.code else None
        return "" if error is None or isinstance(error, TryLaterError) else str(error)

    def warnings(self, *, parallel: int) -> tuple[str, ...]:
        """Say what the config asks for in vain; jobs that find no room wait in the queue."""
        if not self._options.arrays or self._has_small_jobs:
            return ()
        return ("slurm.arrays: only jobs of one rank are submitted as arrays, and there are none",)

    def judge(self, plan: LaunchPlan) -> str:
        """Return what `sbatch --test-only` says."""
        answer = self._commands.run("sbatch", "--test-only", text=plan.script)
        if answer.code:
            return str(refusal(plan.name, answer))
        said = re.sub(r"^sbatch: ", "", answer.complaint)
        return re.sub(r"(?<=start at )(\d{4}-\d\d-\d\d)T", r"\1 ", said)

    def submit(self, plan: LaunchPlan) -> str:
        """Submit a job with the name of the trial and return its id.

        A job of that name that is queued or runs already makes this one wait until it has ended; nothing runs twice.

        Raises:
            TryLaterError: Slurm does not answer, or takes no more jobs now.
            LaunchError: Slurm refused.
        """
        job = self._sbatch(plan.name, self._prepared(plan))
        self._note(plan, job)
        return job

    def submit_array(self, plans: Sequence[LaunchPlan]) -> list[str]:
        """Submit an array of jobs of one rank each, and return the ids of its elements.

        Raises:
            TryLaterError, LaunchError: none was submitted; see `submit`.
        """
        for plan in plans:
            self._prepared(plan)
        name, folder = self._arrays.create(plans, now=self._clock())
        request = self._request(RunSpec("", self._trials, 1, stage=plans[0].stage))
        exclude = dict.fromkeys(node for plan in plans for node in excluded_nodes(plan.script))
        request = replace(request, exclude=tuple(exclude), comment=f"{len(plans)} jobs@{self._mark}")
        write_text(folder / SCRIPT_NAME, array_script(name, plans, request, folder=folder))
        array = self._sbatch(name, folder / SCRIPT_NAME)
        jobs = [f"{array}_{index}" for index in range(len(plans))]
        for plan, job in zip(plans, jobs, strict=True):
            self._note(plan, job)
        return jobs

    def _prepared(self, plan: LaunchPlan) -> Path:
        """Write what a job needs before it starts, and that it will be submitted; return its script."""
        run = RunDir(plan.run_dir)
        try:
            (run.path / "logs").mkdir(parents=True, exist_ok=True)  # Slurm drops output for which there is no folder
            run.stop_file.unlink(missing_ok=True)  # of the job before
            write_text(script_path(run.path), plan.script)
            self._note(plan, "")
        except OSError as error:
            raise LaunchError(f"{plan.name}: {run.path} cannot be written: {error.strerror}") from error
        return script_path(run.path)

    def _note(self, plan: LaunchPlan, job: str) -> None:
        write_json(submission_file(RunDir(plan.run_dir)), {"job": job, "time": self._clock()})

    def _sbatch(self, name: str, script: Path) -> str:
        """Submit a script; where suspected nodes are too many to leave out, with fewer of them."""
        submitter = _submitter()(script, name, self._commands)
        try:
            return str(submitter.submit(_nothing).job_id)
        except TryLaterError:
            raise
        except LaunchError:
            if not self._give_nodes_back(script):
                raise
        return str(submitter.submit(_nothing).job_id)

    def _give_nodes_back(self, script: Path) -> bool:
        """Rewrite a script so that it excludes fewer nodes, the oldest suspicions first; False if that is no help."""
        text = script.read_text()
        excluded = excluded_nodes(text)
        suspected = [node for node in excluded if node not in self._options.exclude]  # those that failed last first
        for num_left in reversed(range(len(suspected))):
            given_back = suspected[num_left:]
            shorter = with_excluded(text, [node for node in excluded if node not in given_back])
            if self._commands.run("sbatch", "--test-only", text=shorter).code == 0:
                write_text(script, shorter)
                self._remarks[f"too few nodes fit without {', '.join(given_back)}: used again, though suspected"] = None
                return True
        return False

    def remarks(self) -> tuple[str, ...]:
        """Say what a person should know about the submissions since the last call."""
        said, self._remarks = tuple(self._remarks), {}
        return said

    def poll(self, names: Iterable[str]) -> dict[str, JobState]:
        """Return the state of the latest job of each name, with one squeue and at most one sacct for all of them."""
        return self._watch.states(names)

    def release(self, jobs: Iterable[str]) -> None:
        """Clear the hold that Slurm puts on a job: two minutes after a requeue, for ever after a failed launch."""
        asked, failed = set(jobs), self._watch.launch_failed
        for some in _chunks(sorted(asked & failed)):
            self._commands.run("scontrol", "release", ",".join(some))
        for some in _chunks(sorted(asked - failed)):
            # Refused for a job that has started meanwhile; without an answer the hold ends by itself.
            self._commands.run("scontrol", "update", f"JobId={','.join(some)}", f"StartTime=now+{RELEASE_SECONDS:.0f}")

    def cancel(self, jobs: Iterable[str]) -> None:
        """Ask jobs to save and stop, and drop those of the same names that wait.

        Raises:
            TryLaterError: Slurm does not answer; stop files are written, which running jobs see by themselves.
        """
        wanted, queue = set(jobs), self._watch.queue()
        names = {row.name for row in queue if row.job in wanted}
        now = self._clock()
        rows = [row for row in queue if row.name in names and is_job_name(row.name)]
        for name in {row.name for row in rows if not row.final(now)}:
            stop_file = job_folder(self._trials, name).stop_file
            stop_file.parent.mkdir(parents=True, exist_ok=True)
            stop_file.touch()  # nobody continues a job that has one
        self._scancel([row.job for row in rows if row.queued(now)], "--state=PENDING")
        self._scancel([row.job for row in rows if row.running], "--state=RUNNING", "--signal=USR1")

    def _scancel(self, jobs: Sequence[str], *options: str) -> None:
        for some in _chunks(jobs):
            answer = self._commands.run("scancel", *options, *some)
            error = refusal("scancel", answer) if answer.code else None
            if isinstance(error, TryLaterError):  # all else is about jobs that have ended
                raise error

    def logs(self, job: str) -> tuple[Path, ...]:
        """Return the logs of the ranks of a job, rank 0 first, and then that of its batch script."""
        found = [
            *self._trials.glob(f"*/logs/slurm-{job}.log"),
            *self._trials.glob(f"*/evaluation/logs/slurm-{job}.log"),
        ]
        return tuple(path for script_log in found for path in (*_rank_logs(script_log.parent.parent, job), script_log))


def _rank_logs(folder: Path, job: str) -> Iterator[Path]:
    run = RunDir(folder)
    for number in job_numbers(run):
        if str((read_json(job_file(run, number)) or {}).get("job")) == job:
            logs = run.log_file(number, 0).parent.glob("rank-*.log")
            yield from sorted(logs, key=lambda path: int(path.stem.partition("-")[2]))


def _chunks(jobs: Iterable[str]) -> Iterator[list[str]]:
    left = list(jobs)
    while left:
        yield left[:_IDS_AT_ONCE]
        left = left[_IDS_AT_ONCE:]


def _nothing() -> None:
    """Stand for what a job does: that is in its script, and nothing of it is pickled."""


@cache
def _submitter() -> Any:
    """Build the class through which jobs are submitted, when the first one is: importing submitit takes a while."""
    import submitit
    from submitit.core.utils import FailedSubmissionError

    class Submitter(submitit.SlurmExecutor):  # type: ignore[misc]  # submitit has no types
        """submitit's plug-in for Slurm, with our script and without pickles, signal handlers and watchers."""

        def __init__(self, script: Path, name: str, commands: Commands) -> None:
            super().__init__(script.parent)
            self._script, self._name, self._commands = script, name, commands

        @classmethod
        def affinity(cls) -> int:
            return 2  # whether there is a Slurm is asked by `problems`

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return self._script.read_text()

        def _internal_process_submissions(self, delayed_submissions: list[Any]) -> list[Any]:
            return [self._submit_command("") for _ in delayed_submissions]

        def _submit_command(self, command: str) -> Any:
            answer = self._commands.run(*self._make_submission_command(self._script))
            if answer.code:
                raise refusal(self._name, answer)
            try:
                job = self._get_job_id_from_submission_command(answer.out)
            except FailedSubmissionError as error:
                raise TryLaterError(f"{self._name}: sbatch gave no id, but {answer.out.strip()!r}") from error
            return self.job_class(folder=self.folder, job_id=job)

    return Submitter

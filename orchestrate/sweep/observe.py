"""Look at the files and jobs of trials, and say what was seen."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestrate.launchers.attempts import AttemptRecord, checkpoint_step, jobs_folder, load_attempts
from orchestrate.launchers.base import JobState, Launcher, Verdict, job_name
from orchestrate.runs import RunDir, read_json
from orchestrate.score_files import num_scores, read_proof, unscored
from orchestrate.sweep.observed import Observed

_ANY = RunDir(Path())
_RESUMED = "resumed.json"
_ATTEMPTS, _JOBS, _CHECKPOINTS = _ANY.attempts.name, jobs_folder(_ANY).name, _ANY.checkpoints.name
_RESULTS, _EVALUATION = _ANY.results.name, _ANY.evaluation.path.name
_CANCELLED, _STOP = _ANY.cancelled_file.name, _ANY.stop_file.name


def run_dir_of(runs: Path, trial_id: str) -> RunDir:
    """Return the RunDir of a trial, which need not exist."""
    return RunDir(runs / "trials" / trial_id)


def resumed_file(run: RunDir) -> Path:
    """Record of the last time a person resumed the trial: attempts up to `after_attempt` no longer count."""
    return run.path / _RESUMED


def done_record(run: RunDir) -> dict[str, Any] | None:
    """Return results/done.json if it proves that this trial, and no other, is complete."""
    return read_proof(run.done_file, run.path.name)


def observe(
    runs: Path, trial_ids: Iterable[str], launcher: Launcher, *, evaluates: bool = False
) -> dict[str, Observed]:
    """Look at trials: one question to the launcher for all of them, then the files of each.

    Args:
        runs: folder with `trials/`.
        trial_ids: whom to look at.
        launcher: knows their jobs.
        evaluates: whether evaluation is a job of its own now; where it was once, its jobs are looked at anyway.
    """
    return look(runs, trial_ids, launcher, evaluates=evaluates)[0]


def look(
    runs: Path, trial_ids: Iterable[str], launcher: Launcher, *, evaluates: bool = False, others: Iterable[str] = ()
) -> tuple[dict[str, Observed], dict[str, JobState]]:
    """Look at trials as `observe` does; also return the whole answer of the launcher, which has `others` too.

    The launcher is asked first: a job that ends meanwhile is seen as live, and its end is seen next time. A trial that
    never began costs nothing but its name in one listing, and files that are not there are not asked for.
    """
    ids = list(trial_ids)
    jobs = launcher.poll([*_job_names(runs, ids, evaluates=evaluates), *others])
    there = _names(runs / "trials")
    seen = {
        trial_id: _observe(run_dir_of(runs, trial_id), jobs, evaluates=evaluates)
        if trial_id in there
        else Observed(job=jobs.get(job_name(trial_id)))
        for trial_id in ids
    }
    return seen, jobs


def _job_names(runs: Path, trial_ids: Iterable[str], *, evaluates: bool) -> list[str]:
    """List the names of the jobs of trials: of training, and of evaluation where there is or was such a job."""
    there = _names(runs / "trials")
    names = []
    for trial_id in trial_ids:
        names.append(job_name(trial_id))
        if trial_id in there and (evaluates or run_dir_of(runs, trial_id).evaluation.path.exists()):
            names.append(job_name(trial_id, "evaluate"))
    return names


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))  # noqa: PTH208 (see orchestrate.launchers.attempts)
    except (FileNotFoundError, NotADirectoryError):
        return frozenset()


def _observe(run: RunDir, jobs: Mapping[str, JobState], *, evaluates: bool) -> Observed:
    training, evaluation = job_name(run.path.name), job_name(run.path.name, "evaluate")
    files = _names(run.path)
    done = done_record(run) if _RESULTS in files else None
    resumed = (read_json(resumed_file(run)) or {}) if _RESUMED in files else {}
    seen = Observed(
        done=done is not None,
        finished=float((done or {}).get("finished", 0.0)),
        cancelled=_CANCELLED in files,
        job=jobs.get(training),
        attempts=_attempts(run, files, jobs.get(training)),
        checkpoint_step=checkpoint_step(run) if _CHECKPOINTS in files else 0,
        forgiven=int(resumed.get("after_attempt", 0)),
        evaluates=evaluates,
    )
    has_evaluation = _EVALUATION in files or evaluation in jobs
    trained = seen.done or (_RESULTS in files and read_proof(run.trained_file, run.path.name) is not None)
    is_wanted = (trained and not seen.done) or ((evaluates or has_evaluation) and _CHECKPOINTS in files)
    if not has_evaluation and not is_wanted and not trained:
        return seen
    return replace(
        seen,
        trained=trained,
        to_evaluate=unscored(run, run.path.name) if is_wanted and not seen.done else (),
        evaluation=_observe_evaluation(run, jobs.get(evaluation), resumed) if has_evaluation else None,
    )


def _observe_evaluation(run: RunDir, job: JobState | None, resumed: Mapping[str, Any]) -> Observed:
    """Look at the jobs that only evaluate a trial; a person who resumes the trial forgives those before."""
    folder = run.evaluation
    attempts = _attempts(folder, _names(folder.path), job)
    since = float(resumed.get("time", 0.0))
    forgiven = max((attempt.number for attempt in attempts if attempt.started < since), default=0)
    return Observed(job=job, attempts=attempts, checkpoint_step=num_scores(run), forgiven=forgiven)


def _attempts(run: RunDir, files: frozenset[str], job: JobState | None) -> tuple[AttemptRecord, ...]:
    """Read the attempts of a job folder, and add what the scheduler says that no file has yet."""
    has_some = _ATTEMPTS in files or _JOBS in files
    attempts = {attempt.number: attempt for attempt in (load_attempts(run) if has_some else ())}
    asked = _STOP in files or _CANCELLED in files
    for number, verdict in (job.verdicts if job is not None else {}).items():
        attempt = attempts.get(number) or _never_begun(number, verdict)
        attempts[number] = attempt if attempt.verdict else replace(attempt, verdict=verdict, asked_to_end=asked)
    if asked and attempts and (last := attempts[max(attempts)]).verdict is None:
        attempts[last.number] = replace(last, asked_to_end=True)
    return tuple(_end_by_verdict(attempts[number]) for number in sorted(attempts))


def _never_begun(number: int, verdict: Verdict) -> AttemptRecord:
    ended = verdict.ended or verdict.started or 0.0
    return AttemptRecord(number, ended, ended, 0, None)


def _end_by_verdict(attempt: AttemptRecord) -> AttemptRecord:
    """Let the scheduler say when an attempt ended that could not say it itself."""
    verdict = attempt.verdict
    if verdict is None or verdict.ended is None or attempt.exit_code is not None or not attempt.has_begun:
        return attempt
    return replace(attempt, ended=max(attempt.started, verdict.ended))

"""Keep one run of a Slurm job: `exec python -m orchestrate.launchers.slurm_job ... -- srun ...` ends its batch script.

look whether there is anything to do        done, cancelled, asked to stop: end at once
wait for another job that holds the trial   a minute; then leave it alone
take the number of the attempt              its record of the start says everything about this run
start the ranks through srun                with a deadline, and a port to meet at
wait for their end                          or for the time in which they must have ended
decide what it means                        exit code, cause, suspected nodes
go on                                       a successor if all saved and nobody wants a stop
write the record of the end
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrate.exits import Exit
from orchestrate.launchers.attempts import attempt_numbers, checkpoint_step, exit_file, jobs_folder
from orchestrate.launchers.base import job_name
from orchestrate.launchers.rank_allowance import seconds_left
from orchestrate.launchers.slurm_claim import beat, claim_attempt, create_json, last_beat, live_holder, open_attempts
from orchestrate.launchers.slurm_commands import Commands, SlurmCommands
from orchestrate.launchers.slurm_continue import Successor, environment_of_successor
from orchestrate.launchers.slurm_end import Ending, StepEnd, judge_end
from orchestrate.launchers.slurm_environment import SlurmJob
from orchestrate.launchers.slurm_queue import parse_time
from orchestrate.launchers.slurm_step import WATCHED, Step, read_complaints
from orchestrate.launchers.srun_log import INFRASTRUCTURE, NODE_FAILURE, PREEMPTED, TIME_LIMIT, parse_srun_log
from orchestrate.runs import RunDir, read_json, write_json

COMMAND_NOT_FOUND = 127
_HOLDER_PATIENCE_SECONDS = 60.0
_LOOK_AT_HOLDER_SECONDS = 2.0
_CONTROLLER_PATIENCE_SECONDS = 90.0
_COMMAND_SECONDS = 20.0
# Slurm says these when it ends a job, and starts it again itself where it should.
_SLURM_DECIDES = (PREEMPTED, NODE_FAILURE, TIME_LIMIT)
# Attempts in a row without a step that was kept, after which a job leaves it to others whether to go on.
_IDLE_ATTEMPTS = 3
# Below the range from which kernels take ports for outgoing connections.
_FIRST_PORT, _NUM_PORTS = 12000, 20000
# Variables of a start that are worth a look later; the rest may hold secrets.
_RECORDED = ("ORCHESTRATE_", "OMP_", "CUDA_VISIBLE", "NCCL_", "GLOO_", "TORCH_", "DS_", "PYTHON", "SRUN_")


@dataclass(frozen=True)
class Options:
    """What the batch script says.

    Attributes:
        folder: of the job's records and logs.
        script: what was submitted, for a successor.
        lead_seconds: time between the request to save and the end of the job.
        words: srun and all that follows; `{attempt}` stands for the number of the attempt.
    """

    folder: RunDir
    script: Path
    lead_seconds: float
    words: tuple[str, ...]


@dataclass(frozen=True)
class Times:
    """Unix times of this run of the job; None if Slurm did not say."""

    submitted: float | None
    ends: float | None

    def deadline(self, lead_seconds: float, *, now: float) -> float | None:
        """Return when the ranks must save; a short job gets half its time to work in."""
        if self.ends is None:
            return None
        return max(self.ends - lead_seconds, (now + self.ends) / 2)


class Keeper:
    """One run of a job.

    Args:
        options: what the batch script says.
        job: as Slurm describes it.
        environment: of the batch script.
        commands: of Slurm.
    """

    def __init__(self, options: Options, job: SlurmJob, environment: Mapping[str, str], commands: Commands) -> None:
        self._options, self._job, self._environment, self._commands = options, job, environment, commands
        self._folder = options.folder
        self._is_evaluation = self._folder.path.name == "evaluation"
        self._trial = RunDir(self._folder.path.parent) if self._is_evaluation else self._folder
        self._name = job_name(self._trial.path.name, "evaluate" if self._is_evaluation else "pretrain")
        self._step = Step(commands, beat=lambda: beat(self._folder, self._attempt))
        self._attempt = 0

    def keep(self) -> int:
        """Keep the job and return the exit code of its batch script."""
        if reason := self._nothing_to_do():
            print(f"nothing to do: {reason}", flush=True)
            return Exit.DONE
        if holder := self._wait_for_holder():
            return self._refuse(holder)
        times = self._ask_times()
        self._attempt = claim_attempt(self._folder, self._start_facts(times))
        self._close_earlier()
        mark = _size_of_output()
        ending = self._run_ranks(times, mark)
        following = self._go_on(ending, times)
        self._record_end(ending, following)
        print(
            f"attempt {self._attempt}: exit code {ending.exit_code} {ending.evidence} {following}".rstrip(), flush=True
        )
        # For Slurm a job that saved and stopped has done what it should. Its own way to start again, RequeueExit, is
        # not wanted: it would hold the job for two minutes, or start it beside the successor.
        return Exit.DONE if ending.exit_code in (Exit.DONE, Exit.CONTINUE) else ending.exit_code

    def _nothing_to_do(self) -> str:
        if self._trial.cancelled_file.exists():
            return "the trial is cancelled"
        if self._folder.stop_file in _listed(self._folder.path):  # a new submission takes it away
            return "a person wants a stop"
        from orchestrate.score_files import read_proof, unscored

        fingerprint = self._trial.path.name
        is_done = read_proof(self._trial.done_file, fingerprint) is not None
        if self._is_evaluation:
            return "everything is scored" if is_done and not unscored(self._trial, fingerprint) else ""
        only_trains = self._environment.get("ORCHESTRATE_STAGE") == "pretrain"
        if only_trains and read_proof(self._trial.trained_file, fingerprint) is not None:
            return "the training is over"
        return "the trial is done" if is_done else ""

    def _wait_for_holder(self) -> str:
        """Wait until no other job works on the trial; return who still does after all patience."""
        ends, told = time.monotonic() + _HOLDER_PATIENCE_SECONDS, False
        while holder := live_holder(self._folder, self._job.job):
            if not told:
                print(f"waiting: {holder}", flush=True)
            told = True
            if time.monotonic() >= ends or self._step.pause(_LOOK_AT_HOLDER_SECONDS):
                return holder
        return ""

    def _refuse(self, holder: str) -> int:
        """Leave a record of this run that no worker of the other job takes for its successor."""
        self._attempt = claim_attempt(self._folder, {**self._start_facts(Times(None, None)), "refused": holder})
        stopped = bool(self._step.stopped_by)
        ending = Ending(Exit.LATER, (None,) * self._job.ranks, None, "" if stopped else INFRASTRUCTURE, (), holder)
        self._record_end(ending, "")
        print(f"error: {self._folder.path}: {holder}; this job leaves it alone", file=sys.stderr, flush=True)
        return Exit.LATER

    def _ask_times(self) -> Times:
        answer = self._commands.run("squeue", "-h", "-j", self._job.number, "-O", "SubmitTime:40,EndTime:40")
        submitted, ends = [*answer.out.split(), "", ""][:2] if answer.code == 0 else ("", "")
        return Times(parse_time(submitted), parse_time(self._environment.get("SLURM_JOB_END_TIME", "") or ends))

    def _start_facts(self, times: Times) -> dict[str, Any]:
        job = self._job
        is_frozen = self._environment.get("PYTHONSAFEPATH") == "1"
        code = self._environment.get("PYTHONPATH", "").partition(os.pathsep)[0] if is_frozen else None
        recorded = {key: value for key, value in self._environment.items() if key.startswith(_RECORDED)}
        return {
            "name": self._name,
            "launcher": "slurm",
            "job": job.job,
            "restart": job.restart,
            "partition": job.partition,
            "ranks": job.ranks,
            "nodes": list(job.nodes),
            "node": job.node,
            "host": socket.gethostname(),
            "started": time.time(),
            "submitted": times.submitted,
            "ends": times.ends,
            "lead_seconds": self._options.lead_seconds,
            "command": list(self._options.words),
            "environment": recorded,
            "cwd": str(Path.cwd()),
            "checkpoint_step": checkpoint_step(self._folder),
            "code": code,
        }

    def _close_earlier(self) -> None:
        """Write the ends of earlier attempts that left none: whatever kept them was killed, or lost with its node."""
        for number, start in open_attempts(self._folder):
            if number >= self._attempt:
                continue
            worker = read_json(self._folder.attempt_file(number)) or {}
            log = parse_srun_log(read_complaints(self._logs(number), [0]))
            last = float(worker.get("last_seen") or last_beat(self._folder, number) or start.get("started") or 0.0)
            end = {
                "attempt": number,
                "ended": last,
                "exit_code": None,
                "rank_codes": [],
                "failed_rank": None,
                "stopped_by": None,
                "hint": log.hint,
                "blamed": list(log.lost_nodes or log.not_launched),
                "evidence": log.evidence if log.hint else "whatever kept the job was killed, or its node was lost",
                "next": f"job {self._job.job} goes on",
            }
            create_json(exit_file(self._folder, number), end)

    def _run_ranks(self, times: Times, mark: int) -> Ending:
        logs = self._logs(self._attempt)
        with contextlib.suppress(OSError):  # srun names a folder that it cannot write into
            logs.mkdir(parents=True, exist_ok=True)
        words = [word.replace("{attempt}", str(self._attempt)) for word in self._options.words]
        print(f"attempt {self._attempt} on {', '.join(self._job.nodes)}", flush=True)
        try:
            code = self._step.run(words, environment=self._rank_environment(times), log=logs / "srun.log")
        except OSError as error:
            said = f"{words[0]}: {error.strerror}"
            return Ending(COMMAND_NOT_FOUND, (None,) * self._job.ranks, None, INFRASTRUCTURE, (self._job.node,), said)
        places = self._job.places
        firsts = [rank for rank, place in enumerate(places) if rank == 0 or place != places[rank - 1]]
        log = parse_srun_log(read_complaints(logs, firsts, own=_output_since(mark)))
        records = read_rank_records(self._folder.attempts / str(self._attempt))
        return judge_end(StepEnd(code, log, records, self._step.stopped_by), places)

    def _logs(self, attempt: int) -> Path:
        return self._folder.log_file(attempt, 0).parent

    def _rank_environment(self, times: Times) -> dict[str, str]:
        now = time.time()
        # What the sweep may still spend on this job bounds it as its time limit does.
        ends = min(float("inf") if times.ends is None else times.ends, now + self._seconds_allowed(now))
        bounded = replace(times, ends=None if ends == float("inf") else ends)
        deadline = bounded.deadline(self._options.lead_seconds, now=now)
        mine = {
            "ORCHESTRATE_ATTEMPT": str(self._attempt),
            "ORCHESTRATE_JOB": self._job.job,
            "ORCHESTRATE_MAIN_NODE": self._job.node,
            "MASTER_PORT": str(free_port(int(self._job.number), self._job.restart)),
            # A job that was submitted with `--export=NONE` would pass nothing on.
            "SLURM_EXPORT_ENV": "ALL",
        }
        if deadline is not None:
            mine["ORCHESTRATE_DEADLINE"] = str(deadline)
        return {**self._environment, **mine}

    def _seconds_allowed(self, now: float) -> float:
        return seconds_left(self._folder, self._attempt, ranks=self._job.ranks, now=now)

    def _go_on(self, ending: Ending, times: Times) -> str:
        """Queue a successor if all ranks saved and nobody wants a stop; return what was done."""
        if ending.exit_code != Exit.CONTINUE or ending.hint in _SLURM_DECIDES or self._stop_is_wanted():
            return ""
        if not self._advances():
            return f"no step was kept in {_IDLE_ATTEMPTS} attempts: the sweep decides"
        # Half of so short a time would be spent on saving.
        if self._seconds_allowed(time.time()) <= 2 * self._options.lead_seconds:
            print("no successor: what limits.gpu_hours leaves for this trial is spent", flush=True)
            return ""
        left = float("inf") if times.ends is None else times.ends - time.time() - _COMMAND_SECONDS
        environment = environment_of_successor(self._environment, self._job.number)
        commands = SlurmCommands(timeout_seconds=_COMMAND_SECONDS, environment=environment)
        successor = Successor(
            self._name, self._job.number, self._options.script, commands=commands, wait=self._step.pause
        )
        patience = max(0.0, min(left, _CONTROLLER_PATIENCE_SECONDS))
        job, problem = successor.submit(exclude=ending.blamed, patience_seconds=patience)
        if job:
            return f"job {job} goes on"
        if self._stop_is_wanted():
            return ""
        # Slurm ends this job as soon as it takes the request.
        self._record_end(ending, "requeued")
        refusal = successor.requeue()
        return f"{problem}; {refusal}" if refusal else "requeued"

    def _stop_is_wanted(self) -> bool:
        """Tell whether Slurm ends this job, after which it or the sweep decides, or whether a person wants a stop."""
        self._step.pause(0.001)
        files = (self._folder.stop_file, self._trial.stop_file, self._trial.cancelled_file)
        return bool(self._step.stopped_by) or any(path.exists() for path in files)

    def _advances(self) -> bool:
        """Tell whether any of the last attempts got further."""
        latest = attempt_numbers(self._folder)[-_IDLE_ATTEMPTS:]
        records = [read_json(self._folder.attempt_file(number)) or {} for number in latest]
        return len(latest) < _IDLE_ATTEMPTS or any(
            int(each.get("last_step") or 0) > int(each.get("first_step") or 0) for each in records
        )

    def _record_end(self, ending: Ending, following: str) -> None:
        record = {
            "attempt": self._attempt,
            "ended": time.time(),
            "exit_code": ending.exit_code,
            "rank_codes": list(ending.rank_codes),
            "failed_rank": ending.failed_rank,
            "stopped_by": self._step.stopped_by or None,
            "hint": ending.hint,
            "blamed": list(ending.blamed),
            "evidence": ending.evidence,
            "next": following,
        }
        write_json(exit_file(self._folder, self._attempt), record)


def _listed(folder: Path) -> set[Path]:
    """List a folder: network file systems may remember for a while that a name was missing, but list anew."""
    try:
        return set(folder.iterdir())
    except OSError:
        return set()


def read_rank_records(folder: Path) -> dict[int, dict[str, Any]]:
    """Read what ranks wrote about their ends, by rank."""
    found = {}
    for path in folder.glob("rank-*.json"):
        number, record = path.stem.removeprefix("rank-"), read_json(path)
        if number.isdigit() and record is not None:
            found[int(number)] = record
    return found


def free_port(job: int, restart: int) -> int:
    """Return a port that nobody uses on this host: another one for every job and every restart, if all are free."""
    first = job * 7 + restart * 101
    for offset in range(_NUM_PORTS):
        port = _FIRST_PORT + (first + offset) % _NUM_PORTS
        try:
            with socket.create_server(("", port)):
                return port
        except OSError:
            continue
    raise OSError(f"no port from {_FIRST_PORT} to {_FIRST_PORT + _NUM_PORTS - 1} is free")


def _size_of_output() -> int:
    return os.fstat(2).st_size


def _output_since(mark: int) -> str:
    """Return what the batch script's log got since, where it is a file: Slurm says there why it ends a job."""
    try:
        with Path("/proc/self/fd/2").open("rb") as file:
            file.seek(mark)
            return file.read(2**16).decode(errors="replace")
    except OSError:
        return ""


def parse_options(arguments: Sequence[str]) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="orchestrate.launchers.slurm_job")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--lead-seconds", type=float, default=120.0)
    parser.add_argument("words", nargs=argparse.REMAINDER)
    options = parser.parse_args(arguments)
    words = tuple(options.words[1:] if options.words[:1] == ["--"] else options.words)
    return Options(RunDir(options.run_dir), options.script, options.lead_seconds, words)


def main() -> int:
    """Keep the job that this process is the batch script of."""
    options = parse_options(sys.argv[1:])
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    if "SLURM_JOB_ID" not in os.environ:
        print("error: this is no job of Slurm's: SLURM_JOB_ID is not set", file=sys.stderr)
        return Exit.BAD_INPUT
    jobs_folder(options.folder).mkdir(parents=True, exist_ok=True)
    commands = SlurmCommands(timeout_seconds=_COMMAND_SECONDS)
    return int(Keeper(options, SlurmJob.of(os.environ), dict(os.environ), commands).keep())


if __name__ == "__main__":
    sys.exit(main())

"""Entry of every rank of every launcher: `python -m orchestrate.worker RUN_DIR`.

The same RunDir again means: go on from the last whole checkpoint. The environment says who this rank is (see
`orchestrate.engine.ranks.join_ranks`), what the job does (ORCHESTRATE_STAGE: `all`, `pretrain` or `evaluate`), which
attempt this is (ORCHESTRATE_ATTEMPT) and when its time is over (ORCHESTRATE_DEADLINE, Unix seconds).

The exit codes are in `orchestrate.exits`. A rank that ends with another than 0 and 75 leaves a record of why.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from orchestrate.config.run import RunConfig, load_run
from orchestrate.engine.faults import exit_code_of
from orchestrate.engine.records import HeartbeatFiles, RankRecord, has_other_attempts, newer_attempt
from orchestrate.engine.startup import Startup
from orchestrate.engine.watch import HangWatch, Heartbeat, StopWatch, leave
from orchestrate.errors import BusyError, ConfigError, DataError, DivergedError, OrchestrateError, RunDirError
from orchestrate.exits import Exit
from orchestrate.runs import RunDir

# What a job does: train and score, or one of the two. An evaluation can run beside the training.
ALL, PRETRAIN, EVALUATE = STAGES = ("all", "pretrain", "evaluate")
# A file system such as Lustre may be mounted without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
# An earlier attempt sees within a heartbeat that it was replaced.
_LOCK_PATIENCE_SECONDS = 3 * Heartbeat.every_seconds
_JOIN_MINUTES = 10.0
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def main(arguments: list[str] | None = None) -> int:
    """Work on a trial until it is done, stopped or broken; return the exit code."""
    argv = sys.argv[1:] if arguments is None else arguments
    if len(argv) != 1:
        print("usage: python -m orchestrate.worker RUN_DIR", file=sys.stderr)
        return Exit.BAD_INPUT
    run = RunDir(Path(argv[0]))
    stage = os.environ.get("ORCHESTRATE_STAGE", ALL)
    job = run.evaluation if stage == EVALUATE else run
    life = Life(job, rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1)))
    deadline = float(os.environ.get("ORCHESTRATE_DEADLINE", "inf"))
    # One look for all ranks: a thousand would ask the file system two thousand times a second.
    stop = StopWatch(job.stop_file if life.is_main else None, deadline=deadline, leaving=life.leaving)
    stop.nothing_to_save = True  # until training begins
    stop.start()
    try:
        return _work(run, job, stop, life, stage=stage)
    except Exception as error:
        code = exit_code_of(error)
        _tell(error, code, run)
        life.record.write(code, error)
        return code


def _tell(error: Exception, code: int, run: RunDir) -> None:
    """Print an exception for a person: a fault of ours or of the machine with its traceback, any other in a line."""
    if isinstance(error, OrchestrateError):
        print(f"error: {error}", file=sys.stderr)
        return
    if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS:
        traceback.print_exception(error)
    if code == Exit.PEER_LOST:
        print("error: another rank is gone; its log says why", file=sys.stderr)
    elif isinstance(error, OSError):
        print(f"error: {run.path}: {error}; mend that and resume", file=sys.stderr)
    elif operation := _op_without_kernel(error):
        print(f"error: {operation} has no repeatable kernel; set system.deterministic: false", file=sys.stderr)


def _op_without_kernel(error: Exception) -> str:
    from orchestrate.engine.determinism import op_without_kernel

    return op_without_kernel(error)


class Life:
    """What this rank tells of itself: a heartbeat if it is the main one, and a record if it ends badly.

    Args:
        job: the RunDir, or its folder of evaluations.
        rank: of this process.
        world_size: number of ranks.
    """

    def __init__(self, job: RunDir, *, rank: int, world_size: int) -> None:
        self._job, self.is_main, self.holds_lock = job, rank == 0, False
        self.attempt = int(os.environ.get("ORCHESTRATE_ATTEMPT", 1))
        self._is_numbered = "ORCHESTRATE_ATTEMPT" in os.environ  # a worker started by hand takes no number
        self.record = RankRecord(job, attempt=self.attempt, rank=rank)
        self._files = HeartbeatFiles(job, attempt=self.attempt, world_size=world_size)
        self.heartbeat = Heartbeat(self._beat if self.is_main else _write_nothing)

    def _beat(self, facts: Mapping[str, Any]) -> None:
        newer = newer_attempt(self._job, self.attempt) if self._is_numbered else 0
        if newer:
            # The cluster has given this node up, though it lives. The files belong to the newer attempt now.
            reason = f"attempt {newer} was started in place of this one"
            print(f"error: {self._job.path}: {reason}", file=sys.stderr, flush=True)
            leave(Exit.LATER, reason, self.record.write)
        self._files.write(facts)

    def leaving(self, code: int, reason: str) -> None:
        """Write the last words of a process that a watch ends."""
        self.record.write(code, reason)
        if not self.holds_lock:
            return  # the files may be somebody else's
        stopped = {"state": "stopped", "stop_reason": reason} if code == Exit.CONTINUE else {"state": "failed"}
        self.heartbeat.update(exit_code=code, **stopped)
        with contextlib.suppress(OSError):
            self.heartbeat.beat()


def _work(run: RunDir, job: RunDir, stop: StopWatch, life: Life, *, stage: str) -> int:
    """Join the other ranks and do the trial's work under the lock of `job`: the RunDir, or its folder of evaluations.

    Raises:
        ConfigError: there is no such stage.
    """
    if stage not in STAGES:
        raise ConfigError(f"ORCHESTRATE_STAGE: {stage}: no such stage; write one of {', '.join(STAGES)}")
    startup = Startup()
    config = load_run(run.config_file)
    _check_identity(config, run)
    from orchestrate.engine.ranks import leave_ranks

    startup.mark("imports")
    heartbeat = life.heartbeat
    lock: AbstractContextManager[None] = _locked(job, own=life.attempt) if life.is_main else nullcontext()
    with lock:
        life.holds_lock = True
        heartbeat.update(state="starting")
        heartbeat.beat()
        heartbeat.start()
        try:
            ranks, num_samples = _join(config, job, startup, life)
            watched: dict[str, Any] = {"num_samples": num_samples, "stop": stop, "heartbeat": heartbeat}
            if stage == EVALUATE:
                code = _evaluate(config, run, ranks, **watched)
            else:
                code = _train_and_score(config, run, ranks, stage=stage, startup=startup, **watched)
            heartbeat.update(exit_code=code, stop_reason=stop.reason if code == Exit.CONTINUE else "")
            heartbeat.close()
            ranks.wait_for_main()  # the first rank that ends may take the others with it
            leave_ranks()
        except BaseException as error:
            heartbeat.update(state="diverged" if isinstance(error, DivergedError) else "failed")
            heartbeat.update(exit_code=exit_code_of(error))
            raise
        finally:
            heartbeat.close()
    return code


def _join(config: RunConfig, job: RunDir, startup: Startup, life: Life) -> tuple[Any, int]:
    """Join the other ranks and look whether all nodes are fit; return the ranks and the number of training samples."""
    from orchestrate.engine.determinism import make_deterministic
    from orchestrate.engine.preflight import check_nodes
    from orchestrate.engine.ranks import join_ranks

    # A rank that never comes would be waited for as long as the longest collective may take.
    watch = HangWatch(60 * max(config.system.hang_minutes, _JOIN_MINUTES), leaving=life.leaving)
    watch.start()
    try:
        ranks = join_ranks(patience_minutes=config.system.hang_minutes)
        if config.system.deterministic:
            make_deterministic(ranks.device)
        startup.mark("ranks")
        num_samples = check_nodes(ranks, job, load_data=lambda: _check_data(config))
        startup.mark("preflight")
    finally:
        watch.close()
    return ranks, num_samples


def _train_and_score(
    config: RunConfig,
    run: RunDir,
    ranks: Any,
    *,
    stage: str,
    num_samples: int,
    stop: StopWatch,
    heartbeat: Heartbeat,
    startup: Startup,
) -> int:
    from orchestrate.engine.base import build_engine
    from orchestrate.engine.methods import build_method, check_batches, seed_rank, tune_method
    from orchestrate.engine.trainer import Trainer
    from orchestrate.scoring import keep_weights, plain_copy, score_final, write_done, write_trained
    from ssl_methods.views import recipe as view_recipe

    recipe = view_recipe(config.views.name, config.views.size)
    say = print if ranks.is_main else _say_nothing
    _use_threads(ranks)
    method = build_method(config).to(ranks.device)
    check_batches(config, method, ranks, say)
    tune_method(method, config.system, say)
    seed_rank(config.train.seed, ranks.rank)
    startup.mark("network")
    engine = build_engine(config, method, ranks)
    startup.mark("engine")
    heartbeat.update(state="training")
    trainer = Trainer(
        config,
        run,
        ranks=ranks,
        engine=engine,
        recipe=recipe,
        num_samples=num_samples,
        stop=stop,
        heartbeat=heartbeat,
        startup=startup,
        say=say,
    )
    if not trainer.train():
        heartbeat.update(state="stopped")
        say(f"stopped as asked ({stop.reason or 'another rank was asked'}); the state is saved")
        return Exit.CONTINUE
    stop.nothing_to_save = True
    trained = plain_copy(config, engine, ranks)
    scores_elsewhere = stage == PRETRAIN and bool(config.probes)
    if not scores_elsewhere:
        heartbeat.update(state="evaluating")
        score_final(config, run, ranks, trained, step=trainer.total_steps)
    if ranks.is_main:
        training = keep_weights(config, run, ranks, trained, step=trainer.total_steps, num_samples=num_samples)
        write_trained(run, training) if scores_elsewhere else write_done(config, run, training)
    ranks.wait_for_main()  # nobody leaves before the proof is written
    heartbeat.update(state="trained" if scores_elsewhere else "done")
    return Exit.DONE


def _evaluate(
    config: RunConfig, run: RunDir, ranks: Any, *, num_samples: int, stop: StopWatch, heartbeat: Heartbeat
) -> int:
    """Score what waits for it; a stop request ends the process at once, as every score is on the disk."""
    from orchestrate.scoring import evaluate

    _use_threads(ranks)
    stop.nothing_to_save = True
    say = print if ranks.is_main else _say_nothing
    evaluate(config, run, ranks, num_samples=num_samples, heartbeat=heartbeat, say=say)
    heartbeat.update(state="done")
    return Exit.DONE


def _use_threads(ranks: Any) -> None:
    import torch

    if ranks.device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _check_identity(config: RunConfig, run: RunDir) -> None:
    expected = run.path.name
    if len(expected) == 16 and config.fingerprint() != expected:
        raise RunDirError(f"{run.config_file}: holds the trial {config.fingerprint()}, the folder is of {expected}")


def _check_data(config: RunConfig) -> int:
    """Refuse datasets that are not those the trial was planned with; return the number of training samples."""
    from orchestrate.data.index import load_manifest

    manifests = {split: load_manifest(getattr(config.data, split)) for split in ("train", "val")}
    for split, manifest in manifests.items():
        planned = getattr(config.data, f"{split}_digest")
        if manifest.digest != planned:
            url = getattr(config.data, split)
            raise DataError(f"{url}: has the digest {manifest.digest}, the trial was planned with {planned}")
    return manifests["train"].num_samples


@contextmanager
def _locked(run: RunDir, *, own: int) -> Iterator[None]:
    """Hold the lock of a RunDir, or of its evaluations; the kernel gives it back however the process ends.

    An earlier attempt that still holds it, on a node that the cluster has lost, sees this one and lets go.
    """
    run.path.mkdir(exist_ok=True)
    patience_ends = time.monotonic() + (_LOCK_PATIENCE_SECONDS if has_other_attempts(run, own) else 0.0)
    with run.lock_file.open("a+") as file:
        while not _takes(file):
            if time.monotonic() > patience_ends:
                file.seek(0)
                raise BusyError(f"{run.path}: another process works on it: {file.read().strip()}")
            time.sleep(0.2)
        file.truncate(0)
        file.write(f"{socket.gethostname()} pid {os.getpid()}\n")
        file.flush()
        yield


def _takes(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"{file.name}: its file system has no locks ({error.strerror}); nothing guards the trial", flush=True)
    return True


def _write_nothing(facts: Mapping[str, Any]) -> None:
    """Stand in for the record on ranks that keep none."""


def _say_nothing(text: str) -> None:
    """Stand in for printing on ranks that are not heard."""


def _leave(code: int) -> None:
    """End the process at once: threads of libraries must not turn a finished job into a crash."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main())

"""Entry of every rank of every launcher: `python -m orchestrate.worker RUN_DIR`.

The same RunDir again means: go on from the last whole checkpoint. The environment says who this rank is (see
`orchestrate.engine.ranks.join_ranks`), which attempt this is (ORCHESTRATE_ATTEMPT) and when its time is over
(ORCHESTRATE_DEADLINE, Unix seconds).

Exit codes: 0 done, 74 a store does not answer (go on later), 75 please continue (state saved), 86 hang, 88 diverged,
2 bad input, 1 other.
"""

import errno
import fcntl
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from orchestrate.config.run import RunConfig, load_run
from orchestrate.engine.startup import Startup
from orchestrate.engine.watch import EXIT_CONTINUE, Heartbeat, StopWatch
from orchestrate.errors import DataError, DivergedError, OrchestrateError, RunDirError
from orchestrate.runs import RunDir, write_json

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def main(arguments: list[str] | None = None) -> int:
    """Work on a trial until it is done, stopped or broken; return the exit code."""
    argv = sys.argv[1:] if arguments is None else arguments
    if len(argv) != 1:
        print("usage: python -m orchestrate.worker RUN_DIR", file=sys.stderr)
        return 2
    run = RunDir(Path(argv[0]))
    stop = StopWatch(run.stop_file, deadline=float(os.environ.get("ORCHESTRATE_DEADLINE", "inf")))
    stop.start()
    try:
        return _work(run, stop)
    except OrchestrateError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            traceback.print_exc()
        print(f"error: {run.path}: {error}; mend that and resume", file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        from orchestrate.engine.determinism import op_without_kernel

        if operation := op_without_kernel(error):
            print(f"error: {operation} has no repeatable kernel; set system.deterministic: false", file=sys.stderr)
        return 1


def _work(run: RunDir, stop: StopWatch) -> int:
    """Join the other ranks and do the trial's work under the RunDir's lock."""
    startup = Startup()
    config = load_run(run.config_file)
    _check_identity(config, run)
    from orchestrate.engine.determinism import make_deterministic
    from orchestrate.engine.ranks import join_ranks, leave_ranks

    startup.mark("imports")

    main_rank = int(os.environ.get("RANK", 0)) == 0
    lock: AbstractContextManager[None] = _locked(run) if main_rank else nullcontext()
    with lock:
        ranks = join_ranks(patience_minutes=config.system.hang_minutes)
        if config.system.deterministic:
            make_deterministic(ranks.device)
        startup.mark("ranks")
        record = HeartbeatFiles(run, attempt=int(os.environ.get("ORCHESTRATE_ATTEMPT", 1)), world_size=ranks.world_size)
        heartbeat = Heartbeat(record.write if main_rank else _write_nothing)
        heartbeat.update(state="starting")
        heartbeat.beat()
        heartbeat.start()
        try:
            code = _train_and_score(config, run, ranks, stop=stop, heartbeat=heartbeat, startup=startup)
            heartbeat.update(exit_code=code)
            leave_ranks()
        except BaseException as error:
            state = "diverged" if isinstance(error, DivergedError) else "failed"
            heartbeat.update(state=state, exit_code=error.exit_code if isinstance(error, OrchestrateError) else 1)
            raise
        finally:
            heartbeat.close()
    return code


def _train_and_score(
    config: RunConfig, run: RunDir, ranks: Any, *, stop: StopWatch, heartbeat: Heartbeat, startup: Startup
) -> int:
    import torch

    from orchestrate.engine.base import build_engine
    from orchestrate.engine.checkpoint import save_weights
    from orchestrate.engine.methods import build_method, seed_rank, tune_method
    from orchestrate.engine.trainer import Trainer
    from ssl_methods.views import recipe as view_recipe

    num_samples = _check_data(config)
    recipe = view_recipe(config.views.name, config.views.size)
    say = print if ranks.is_main else _say_nothing
    if ranks.device.type == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    method = build_method(config).to(ranks.device)
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
        return EXIT_CONTINUE
    stop.nothing_to_save = True
    heartbeat.update(state="evaluating")
    trained = _plain_copy(config, engine, ranks)
    _score(config, run, ranks, trained, trainer.total_steps)
    if ranks.is_main:
        weights = save_weights(trained, run.weights_file)
        _write_done(config, run, ranks, step=trainer.total_steps, num_samples=num_samples, weights_sha256=weights)
    ranks.wait_for_main()  # nobody leaves before the proof of completion is written
    heartbeat.update(state="done")
    return 0


def _plain_copy(config: RunConfig, engine: Any, ranks: Any) -> Any:
    """Build the method anew with what was trained: whole, without the engine's hooks, equal on all ranks."""
    from orchestrate.engine.methods import build_method

    plain = build_method(config).to(ranks.device)
    with engine.whole():
        plain.load_state_dict(engine.method.state_dict())
    # Batch norms that saw one rank's part have moments of their own on each rank; rank 0's are the encoder's.
    ranks.fill_from_main(plain.buffers())
    return plain


def _score(config: RunConfig, run: RunDir, ranks: Any, method: Any, step: int) -> None:
    from orchestrate.engine.methods import build_method
    from orchestrate.evaluation.features import encode_with, raw_pixels
    from orchestrate.evaluation.scores import Place, score_encoders
    from ssl_methods.views import normalise
    from ssl_methods.views import recipe as view_recipe

    prepare = partial(normalise, recipe=view_recipe(config.views.name, config.views.size))
    encoders = {
        "trained": lambda: encode_with(method.encoder(), prepare, ranks.device),
        "random_init": lambda: encode_with(build_method(config).encoder(), prepare, ranks.device),
        "raw_pixels": lambda: raw_pixels,
    }
    place = Place(ranks.rank, ranks.world_size, ranks.device, ranks.wait_for_main)
    score_encoders(config, run, encoders, step=step, place=place)


def _write_done(
    config: RunConfig, run: RunDir, ranks: Any, *, step: int, num_samples: int, weights_sha256: str
) -> None:
    from orchestrate.engine.metrics import total_step_seconds
    from orchestrate.evaluation.scores import collect_metrics

    images = step * config.train.global_batch
    train_seconds = total_step_seconds(run.metrics_file)
    done = {
        "fingerprint": config.fingerprint(),
        "step": step,
        "images": images,
        "epochs": images / num_samples,
        "num_train_samples": num_samples,
        "world_size": ranks.world_size,
        "device": ranks.device.type,
        "train_seconds": round(train_seconds, 3),
        "rank_seconds": round(train_seconds * ranks.world_size, 3),
        "metrics": collect_metrics(config, run),
        "weights": str(run.weights_file.relative_to(run.path)),
        "weights_sha256": weights_sha256,
        "versions": _versions(),
        "finished": time.time(),
    }
    write_json(run.done_file, done)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("orchestrate-ssl", "torch", "torchvision", "timm", "deepspeed", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


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
def _locked(run: RunDir) -> Iterator[None]:
    """Hold the RunDir's lock; the kernel gives it back however the process ends."""
    with run.lock_file.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise RunDirError(f"{run.path}: another process works on it: {file.read().strip()}") from error
        file.truncate(0)
        file.write(f"{socket.gethostname()} pid {os.getpid()}\n")
        file.flush()
        yield


class HeartbeatFiles:
    """status.json and attempts/<n>.json of one attempt, written by its rank 0."""

    def __init__(self, run: RunDir, *, attempt: int, world_size: int) -> None:
        self._run, self._attempt, self._world_size = run, attempt, world_size
        self._started = time.time()

    def write(self, facts: Mapping[str, Any]) -> None:
        """Write both files from the newest facts of the heartbeat."""
        here = {
            "attempt": self._attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world_size": self._world_size,
        }
        defaults = {"step": 0, "total_steps": 0, "images": 0, "loss": None}
        status = {key: value for key, value in facts.items() if key not in ("exit_code", "first_step")}
        write_json(self._run.status_file, {**defaults, **status, **here})
        attempt = {
            **here,
            "started": self._started,
            "last_seen": facts["time"],
            "first_step": facts.get("first_step", 0),
            "last_step": facts.get("step", 0),
            "exit_code": facts.get("exit_code"),
        }
        write_json(self._run.attempt_file(self._attempt), attempt)


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

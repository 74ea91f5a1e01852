"""Checkpoints of a training over ranks: everything that the next step depends on, in files that verify.

save    every rank hands its random-number state to rank 0, which copies the state of the training to memory of its own
        and writes it while the next steps are taken
load    rank 0 reads the newest checkpoint that is whole and sends it to the other ranks, which need not see the folder

The files are described in `orchestrate.checkpoint_files`.
"""

import errno
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from orchestrate.checkpoint_files import name_of
from orchestrate.engine.base import Engine
from orchestrate.engine.checkpoint_mirror import Mirror
from orchestrate.engine.checkpoint_publish import prune, publish
from orchestrate.engine.checkpoint_search import Search
from orchestrate.engine.ranks import Ranks
from orchestrate.engine.snapshot import (
    Snapshot,
    SnapshotBuffers,
    by_rank,
    find_non_finite,
    flatten,
    random_state,
    reseed,
    set_random_state,
    unflatten,
)
from orchestrate.engine.tensor_file import write_tensors
from orchestrate.errors import CheckpointError, DivergedError

MODEL, OPTIMIZER, RANKS = "model.safetensors", "optimizer.safetensors", "ranks.safetensors"


@dataclass(frozen=True)
class Position:
    """Where a training stands: everything but tensors that the next step depends on.

    Attributes:
        step: optimizer steps made.
        samples_seen: images consumed.
        fingerprint: of the trial.
        order: the numbers that fix the order of samples.
        facts: what the schedules were, for people.
    """

    step: int
    samples_seen: int
    fingerprint: str
    order: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)


class CheckpointStore:
    """The checkpoints of one RunDir, seen by one rank; only rank 0 touches the disk.

    Args:
        folder: of the checkpoints.
        keep: how many stay beside the milestones.
        url: where they are kept as well, as `s3://bucket/runs`; empty for nowhere.
        asynchronous: write while the training goes on.
        elastic: let another number of ranks go on with a method that is tied to it.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        keep: int,
        url: str = "",
        asynchronous: bool = True,
        elastic: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._ranks, self._keep, self._say = folder, ranks, keep, say
        self._asynchronous, self._elastic = asynchronous, elastic
        self._mirror = Mirror(url, folder, keep=keep, say=say) if url and ranks.is_main else None
        self._buffers = SnapshotBuffers(ranks.device)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._writing: Future[None] | None = None

    def save(self, engine: Engine, position: Position, *, milestone: bool = False) -> None:
        """Save the state of a training; every rank must call it.

        Returns when the training may go on: when the state is copied, or on the disk if the store is not asynchronous.
        A save waits for the one before. A milestone is never removed.

        Raises:
            CheckpointError: this write, or the one before, failed; what was there before is untouched.
            DivergedError: a number of the state is not finite, so that nothing was written.
        """
        random_states = self._ranks.gather_to_main(random_state(self._ranks))
        optimizer = flatten(engine.optimizer_state() if engine.sharded or self._ranks.is_main else {})
        with engine.whole():
            files = {MODEL: engine.method.state_dict(), OPTIMIZER: optimizer, RANKS: by_rank(random_states)}
            self._ranks.on_main(lambda: self._refuse(files, position.step))
            if self._ranks.is_main:
                facts = self._facts(engine, position, milestone=milestone)
                self._writing = self._executor.submit(self._write, self._buffers.copy(files), facts)
        if not self._asynchronous:
            self._ranks.on_main(self._await_write)

    def _refuse(self, files: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
        """Raise what stands against a save: the write before failed, or the state is spoilt."""
        self._await_write()
        name = find_non_finite(files[MODEL]) or find_non_finite(files[OPTIMIZER])
        if name:
            raise DivergedError(
                f"step {step}: {name} is not finite; not saved, the checkpoints before it stay; "
                "lower optim.lr or raise train.warmup"
            )

    def _facts(self, engine: Engine, position: Position, *, milestone: bool) -> dict[str, Any]:
        return {
            "step": position.step,
            "samples_seen": position.samples_seen,
            "fingerprint": position.fingerprint,
            "order": position.order,
            "schedules": position.facts,
            "world_size": self._ranks.world_size,
            "milestone": milestone,
            "engine": {
                "name": type(engine).__name__,
                "sharded": engine.sharded,
                "loss_scale": engine.loss_scale.state(),
            },
        }

    def _write(self, snapshot: Snapshot, facts: Mapping[str, Any]) -> None:
        """Write a snapshot; runs beside the training."""
        try:
            snapshot.settle()
            name = publish(self._folder, snapshot.files, facts)
            prune(self._folder, keep=self._keep, newest=name, spare=[self._mirror.busy_with] if self._mirror else ())
        except OSError:
            raise  # the disk's fault, told by whoever asks for the outcome
        except Exception:
            traceback.print_exc()
            raise
        if self._mirror is not None:
            self._mirror.push()

    @property
    def failure(self) -> str:
        """Why this rank's last write failed; empty if it did not, or has not ended."""
        error = self._writing.exception() if self._writing is not None and self._writing.done() else None
        return "" if error is None else self._told(error)

    def _told(self, error: BaseException) -> str:
        return f"{self._folder}: cannot write a checkpoint: {error}; {_advice(error)}"

    def _await_write(self) -> None:
        writing, self._writing = self._writing, None
        error = writing.exception() if writing is not None else None
        if error is not None:
            raise CheckpointError(self._told(error)) from error

    def finish(self, *, stopped: bool = False) -> None:
        """Wait for the write in flight and its upload; every rank must call it.

        Args:
            stopped: the training will go on another time, so that an upload that fails is told, but is no error.

        Raises:
            CheckpointError: a write failed, or the URL lacks a checkpoint that the folder has.
        """
        self._ranks.on_main(lambda: self._finish(stopped=stopped))

    def _finish(self, *, stopped: bool) -> None:
        self._await_write()
        problem = self._mirror.finish() if self._mirror is not None else ""
        if problem and not stopped:
            raise CheckpointError(f"{problem}; mend that and resume, nothing has to be trained again")

    def close(self) -> None:
        """Wait for the write in flight, without the other ranks, which may be gone: its state must not be lost."""
        if self._writing is not None:
            self._writing.exception()

    def load_newest(self, engine: Engine, fingerprint: str, *, parent: str = "") -> Position | None:
        """Load the newest checkpoint that verifies into an engine; every rank must call it.

        Damaged ones are named and skipped.

        Args:
            engine: what to load it into.
            fingerprint: of the trial.
            parent: fingerprint of the trial that this one continues, whose checkpoints serve as well; empty for none.

        Returns:
            Where the training stands, or None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints but none is whole, they belong to another config, another version or
                another number of ranks, or there is none and the trial continues another.
        """
        trials = (fingerprint, parent) if parent else (fingerprint,)
        manifest = self._ranks.on_main(lambda: self._find(engine, trials))
        if manifest is None:
            return None
        self._restore(self._folder / name_of(manifest["step"]), manifest, engine)
        names = ("step", "samples_seen", "fingerprint", "order", "schedules")
        return Position(*(manifest[name] for name in names))

    def _find(self, engine: Engine, trials: tuple[str, ...]) -> dict[str, Any] | None:
        manifest = Search(self._folder, self._mirror, trials, self._say).newest()
        if manifest is not None:
            self._check_ranks(engine, manifest)
        return manifest

    def _check_ranks(self, engine: Engine, manifest: Mapping[str, Any]) -> None:
        """Refuse, or tell, that another number of ranks goes on."""
        before, now = manifest["world_size"], self._ranks.world_size
        if before == now:
            return
        where = f"{self._folder / name_of(manifest['step'])}: saved by {_ranks(before)}, resumed by {now}"
        ties = f"{', '.join(engine.method.rank_bound)}, which ties {type(engine.method).__name__} to the rank count"
        if engine.method.rank_bound and not self._elastic:
            raise CheckpointError(f"{where}: {ties}; start {_ranks(before)}, or set system.elastic: true")
        kept = f"{ties}, and system.elastic lets that be" if engine.method.rank_bound else "sums round differently"
        self._say(f"{where}: the global batches stay; {kept}")

    def _restore(self, path: Path, manifest: Mapping[str, Any], engine: Engine) -> None:
        with engine.whole():
            self._ranks.on_main(lambda: _load_weights(engine.method, path))
            self._ranks.fill_from_main(engine.method.state_dict().values())
        engine.load_optimizer_state(unflatten(self._from_main(path / OPTIMIZER)))
        engine.loss_scale.load(manifest["engine"]["loss_scale"])
        random_states = self._from_main(path / RANKS)
        reseed(manifest["order"]["seed"], self._ranks.rank, manifest["step"])
        if manifest["world_size"] == self._ranks.world_size:
            set_random_state(random_states, self._ranks)

    def _from_main(self, path: Path) -> dict[str, Tensor]:
        return self._ranks.tensors_from_main(load_file(path) if self._ranks.is_main else {})


def _advice(error: BaseException) -> str:
    if not isinstance(error, OSError):
        return "a fault of this program, see the traceback"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return "free space and resume" if full else "mend that and resume"


def _ranks(number: int) -> str:
    return f"{number} rank" if number == 1 else f"{number} ranks"


def _load_weights(method: nn.Module, path: Path) -> None:
    try:
        method.load_state_dict(load_file(path / MODEL), strict=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the method: {error}") from error


def save_weights(module: nn.Module, path: Path) -> str:
    """Write a module's weights in one step and return their SHA-256; equal weights give equal bytes."""
    aside = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    facts = write_tensors(aside, weights)
    aside.replace(path)
    return str(facts["sha256"])

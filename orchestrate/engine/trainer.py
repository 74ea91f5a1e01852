"""The training loop.

go on from the newest whole checkpoint, or begin
for each step of the budget:
take the step's part of the global batch        data wait
set learning rates                              pure function of the step
forward: the loss over all ranks
agree with the other ranks                      is everything finite? did anybody ask to stop?
update; method.after_step                       gradients averaged; twins and centres move
write the step to metrics.jsonl
checkpoint, if due or stopping
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from orchestrate.config.run import RunConfig
from orchestrate.data.order import Order
from orchestrate.data.stream import Batch, TrainStream
from orchestrate.engine.base import Engine
from orchestrate.engine.checkpoint import CheckpointStore, Position
from orchestrate.engine.metrics import EventLog, MetricsLog, ProgressLine, Throughput
from orchestrate.engine.optim import set_learning_rates
from orchestrate.engine.ranks import Ranks
from orchestrate.engine.schedule import Schedule
from orchestrate.engine.watch import Heartbeat, StopWatch
from orchestrate.errors import CheckpointError, DivergedError
from orchestrate.runs import RunDir
from ssl_methods.method import Progress, StepOutput
from ssl_methods.views import ViewRecipe, normalise


@dataclass(frozen=True)
class Lengths:
    """The budget of a config in optimizer steps."""

    total_steps: int
    warmup_steps: int
    checkpoint_steps: int
    num_samples: int

    @staticmethod
    def of(config: RunConfig, num_samples: int) -> "Lengths":
        """Convert the budgets of a config for a training set of `num_samples`."""
        train, size = config.train, {"num_samples": num_samples, "global_batch": config.train.global_batch}
        total = train.budget.steps(**size)
        warmup = min(train.warmup.steps(**size, whole=total), total - 1)
        return Lengths(total, warmup, config.system.checkpoint_every.steps(**size), num_samples)


@dataclass(frozen=True)
class Stepped:
    """What one step left to be written down."""

    step: int
    batch: Batch
    means: dict[str, float]
    lr: float
    seconds: float
    wait_seconds: float
    stop: bool


class Trainer:
    """Run the steps of one trial on one rank; every rank runs the same ones."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        *,
        ranks: Ranks,
        engine: Engine,
        recipe: ViewRecipe,
        lengths: Lengths,
        stop: StopWatch,
        heartbeat: Heartbeat,
        say: Callable[[str], None] = print,
    ) -> None:
        self._config, self._run, self._ranks, self._engine = config, run, ranks, engine
        self._recipe, self._lengths, self._stop, self._heartbeat, self._say = recipe, lengths, stop, heartbeat, say
        train = config.train
        self._schedule = Schedule(lengths.total_steps, lengths.warmup_steps, train.schedule, train.final_lr_fraction)
        self._checkpoints = CheckpointStore(run.checkpoints, ranks, keep=config.system.keep_checkpoints, say=say)
        self._fingerprint = config.fingerprint()
        self._throughput = Throughput(train.global_batch)

    def train(self) -> bool:
        """Train until the budget is spent.

        Returns:
            Whether the budget is spent; if not, a stop was asked for and the state is saved.

        Raises:
            DivergedError: a loss term is not finite; the last checkpoint before it stays.
        """
        position = self._checkpoints.load_newest(self._engine, self._fingerprint)
        start = position.step if position else 0
        if start:
            self._say(f"resumed after step {start} of {self._lengths.total_steps}")
        self._heartbeat.update(first_step=start, step=start)
        if start >= self._lengths.total_steps:
            return True
        stream = self._open_stream(start, position)
        try:
            return self._loop(stream, start)
        finally:
            stream.close()

    def _open_stream(self, start: int, position: Position | None) -> TrainStream:
        config = self._config
        stream = TrainStream(
            config.data.train,
            recipe=self._recipe,
            seed=config.train.seed,
            global_batch=config.train.global_batch,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            workers=config.system.workers,
            start_step=start,
            with_labels=self._engine.method.uses_labels,
        )
        self._order = _plan_of(stream.order)
        if position is not None and position.order != self._order:
            stream.close()
            reason = f"another order of samples ({position.order}) than this version makes ({self._order})"
            raise CheckpointError(f"{self._run.checkpoints}: holds {reason}; go on with the version that made it")
        return stream

    def _loop(self, stream: TrainStream, start: int) -> bool:
        log = _Log(self._run, start, self._lengths.total_steps) if self._ranks.is_main else None
        try:
            for step in range(start + 1, self._lengths.total_steps + 1):
                done = self._step(stream, step)
                self._throughput.add(done.seconds, done.wait_seconds)
                if log is not None:
                    self._record(log, done)
                if done.stop or step % self._lengths.checkpoint_steps == 0 or step == self._lengths.total_steps:
                    self._save(step, log)
                if done.stop and step < self._lengths.total_steps:
                    return False
            return True
        finally:
            if log is not None:
                log.close()

    def _step(self, stream: TrainStream, step: int) -> Stepped:
        began = time.perf_counter()
        batch = next(stream)
        waited = time.perf_counter() - began
        lr = set_learning_rates(self._engine.optimizer, self._schedule.factor(step - 1))
        output = self._forward(batch)
        means, stop = self._agree(output, step)
        self._engine.update(output)
        lengths = self._lengths
        steps_per_epoch = lengths.num_samples / self._config.train.global_batch
        self._engine.method.after_step(Progress(step, lengths.total_steps, steps_per_epoch))
        return Stepped(step, batch, means, lr, time.perf_counter() - began, waited, stop)

    def _forward(self, batch: Batch) -> StepOutput:
        device = self._ranks.device
        views = [normalise(view.to(device, non_blocking=True), self._recipe) for view in batch.views]
        labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
        return self._engine.forward(views, labels)

    def _agree(self, output: StepOutput, step: int) -> tuple[dict[str, float], bool]:
        """Average loss and metrics over the ranks and learn whether any rank was asked to stop: one collective."""
        names = ["loss", *output.metrics]
        flag = torch.tensor(float(self._stop.requested))
        *values, stops = self._ranks.mean([output.loss, *output.metrics.values(), flag])
        means = dict(zip(names, values, strict=True))
        broken = [f"{name} = {value}" for name, value in means.items() if not abs(value) < float("inf")]
        if broken:
            raise DivergedError(f"step {step}: {', '.join(broken)}; lower optim.lr or raise train.warmup")
        if stops > 0 and step < self._lengths.total_steps:
            self._stop.obeyed()
        return means, stops > 0

    def _record(self, log: "_Log", done: Stepped) -> None:
        images = done.step * self._config.train.global_batch
        values = {
            "step": done.step,
            "images": images,
            "epoch": images / self._lengths.num_samples,
            **done.means,
            "lr": done.lr,
            "batch": done.batch.fingerprint,
            "step_seconds": round(done.seconds, 6),
            "data_wait_seconds": round(done.wait_seconds, 6),
        }
        log.write(values)
        self._heartbeat.update(
            step=done.step,
            stepped=time.time(),
            images=images,
            loss=done.means["loss"],
            images_per_second=round(self._throughput.images_per_second, 1),
            data_wait_percent=round(self._throughput.data_wait_percent, 1),
            eta_seconds=round((self._lengths.total_steps - done.step) * self._throughput.seconds_per_step, 1),
        )
        log.progress.show(done.step, loss=done.means["loss"], throughput=self._throughput)

    def _save(self, step: int, log: "_Log | None") -> None:
        if log is not None:
            log.steps.sync()
        samples = step * self._config.train.global_batch
        self._checkpoints.save(self._engine, Position(step, samples, self._fingerprint, self._order))


def _plan_of(order: Order) -> dict[str, int]:
    """Name the numbers that fix the order of samples, beside the dataset itself."""
    names = ("num_samples", "seed", "global_batch", "lanes", "chunk", "window")
    return {name: int(getattr(order, name)) for name in names}


class _Log:
    """The three places where rank 0 writes a step."""

    def __init__(self, run: RunDir, start: int, total_steps: int) -> None:
        self.steps = MetricsLog(run.metrics_file, last_step=start)
        self.events = EventLog(run.events, last_step=start)
        self.progress = ProgressLine(total_steps, first_step=start)

    def write(self, values: dict[str, Any]) -> None:
        """Write a step to the log and the event file."""
        self.steps.write(values)
        self.events.write(values["step"], values)

    def close(self) -> None:
        """Close all three."""
        self.steps.close()
        self.events.close()
        self.progress.close()

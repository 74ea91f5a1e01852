"""The training loop.

go on from the newest whole checkpoint, or begin  afresh: with the weights of others, if the method wants some
for each step of the budget:
take the step's part of the global batch        data wait
method.before_step; set learning rates          pure functions of the step: momenta, temperatures, weight decay, stage
forward: the loss over all ranks
agree with the other ranks                      is all finite? did anybody ask to stop? was the last save written?
update; method.after_step                       gradients averaged, clipped; twins and centres move
write the step to metrics.jsonl
checkpoint, if due or stopping                  copied now, written while the next steps are taken
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from orchestrate.config.run import RunConfig
from orchestrate.data.order import Order
from orchestrate.data.sample_source import Loading
from orchestrate.data.stream import Batch, TrainStream
from orchestrate.engine.base import Engine
from orchestrate.engine.checkpoint import CheckpointStore, Position
from orchestrate.engine.memory import peak_memory_gb
from orchestrate.engine.methods import load_pretrained
from orchestrate.engine.metrics import EventLog, MetricsLog, ProgressLine, Throughput
from orchestrate.engine.optim import set_rates
from orchestrate.engine.quarantine import Quarantine
from orchestrate.engine.ranks import Ranks
from orchestrate.engine.schedule import schedules_of
from orchestrate.engine.startup import Startup
from orchestrate.engine.watch import HangWatch, Heartbeat, StopWatch
from orchestrate.errors import CheckpointError, DivergedError
from orchestrate.runs import RunDir
from ssl_methods.device_views import finish_views
from ssl_methods.method import Progress, StepOutput
from ssl_methods.views import ViewRecipe, normalise

_ADVICE = "lower optim.lr or raise train.warmup"


@dataclass(frozen=True)
class Lengths:
    """Budgets of a config in optimizer steps.

    Attributes:
        total_steps: of the whole training.
        checkpoint_steps: from one checkpoint to the next.
        milestones: steps whose checkpoints are kept for ever.
        num_samples: of the training set.
    """

    total_steps: int
    checkpoint_steps: int
    milestones: frozenset[int]
    num_samples: int

    @staticmethod
    def of(config: RunConfig, num_samples: int) -> "Lengths":
        """Convert the budgets of a config for a training set of `num_samples`."""
        size = {"num_samples": num_samples, "global_batch": config.train.global_batch}
        total = config.train.budget.steps(**size)
        milestones = frozenset(each.steps(**size, whole=total) for each in config.system.milestones)
        return Lengths(total, config.system.checkpoint_every.steps(**size), milestones, num_samples)

    def saves_at(self, step: int) -> bool:
        """Tell whether a checkpoint is due after a step."""
        return step % self.checkpoint_steps == 0 or step == self.total_steps or step in self.milestones


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
        num_samples: int,
        stop: StopWatch,
        heartbeat: Heartbeat,
        startup: Startup,
        say: Callable[[str], None] = print,
    ) -> None:
        self._config, self._run, self._ranks, self._engine, self._recipe = config, run, ranks, engine, recipe
        self._stop, self._heartbeat, self._startup, self._say = stop, heartbeat, startup, say
        self._lengths, self._schedules = Lengths.of(config, num_samples), schedules_of(config, num_samples)
        self._fingerprint = config.fingerprint()
        self._throughput = Throughput(config.train.global_batch)
        self._hang = HangWatch(config.system.hang_minutes * 60, leaving=stop.leaving)
        self._train_seconds, self._saves = 0.0, 0
        self._quarantine = Quarantine(
            run.damaged_file, ranks, num_samples=num_samples, max_fraction=config.system.max_damaged
        )
        self._checkpoints = CheckpointStore(
            run.checkpoints,
            ranks,
            keep=config.system.keep_checkpoints,
            url=config.system.checkpoint_url,
            asynchronous=config.system.async_checkpoints,
            elastic=config.system.elastic,
            say=say,
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole budget."""
        return self._lengths.total_steps

    def train(self) -> bool:
        """Train until the budget is spent.

        Returns:
            Whether the budget is spent; if not, a stop was asked for and the state is saved.

        Raises:
            DivergedError: a loss term is not finite; the last checkpoint before it stays.
            CheckpointError: a checkpoint could not be written; those before it stay.
        """
        total = self._lengths.total_steps
        parent = self._config.continues.trial
        self._stop.nothing_to_save = True  # a request to stop need not wait for a download
        position = self._checkpoints.load_newest(self._engine, self._fingerprint, parent=parent)
        if position is None:
            load_pretrained(self._engine, self._ranks, self._say)
        start = position.step if position else 0
        if start:
            self._say(f"resumed after step {start} of {total}")
        self._heartbeat.update(first_step=start, step=start, total_steps=total)
        self._startup.mark("checkpoint")
        if start >= total:
            self._checkpoints.finish()  # an upload may be owed
            return True
        stream = self._open_stream(start, position)
        self._stop.nothing_to_save = False
        self._hang.start()
        try:
            spent = self._loop(stream, start)
        finally:
            self._hang.close()
            stream.close()
            self._checkpoints.close()
        self._stop.nothing_to_save = spent  # what is left is an upload, which the next attempt makes
        self._checkpoints.finish(stopped=not spent)
        return spent

    def _open_stream(self, start: int, position: Position | None) -> TrainStream:
        config = self._config
        stream = TrainStream(
            config.data.train,
            recipe=self._recipe,
            seed=config.train.seed,
            global_batch=config.train.global_batch,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            start_step=start,
            with_labels=self._engine.method.uses_labels,
            pixels=config.views.pixels,
            transform=config.views.transform,
            quarantined=self._quarantine.sample_ids,
            loading=Loading.of(config.system, pinned=self._ranks.device.type == "cuda"),
        )
        if stream.source.advice:
            self._say(stream.source.advice)
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
                self._train_seconds += done.seconds
                if log is not None:
                    self._record(log, done)
                self._hang.stepped()
                if done.stop or self._lengths.saves_at(step):
                    self._save(step, log)
                    self._hang.stepped()  # a slow disk is no hang
                if step == start + 1:
                    self._began(done)
                if done.stop and step < self._lengths.total_steps:
                    return False
            return True
        finally:
            if log is not None:
                log.close()

    def _began(self, done: Stepped) -> None:
        self._startup.mark("first step")
        self._heartbeat.update(startup_seconds=self._startup.seconds)
        self._say(str(self._startup))

    def _step(self, stream: TrainStream, step: int) -> Stepped:
        began = time.perf_counter()
        with self._stop.waiting_for_data():
            batch = next(stream)
        waited = time.perf_counter() - began
        self._engine.method.before_step(self._progress(step - 1))
        if self._schedules.stages.forgets(step - 1):  # also of what a checkpoint of the step before had kept
            self._engine.forget_optimizer_state()
        lr = self._set_rates(step - 1)
        output = self._forward(batch)
        means, stop = self._agree(output, batch, step, stream.new_retries())
        facts = self._update(output, step)
        if not math.isfinite(facts.get("grad_norm", 0.0)) and not facts.get("skipped"):
            raise DivergedError(f"step {step}: grad_norm = {facts['grad_norm']}; {_ADVICE}")
        if not facts.get("skipped"):
            self._engine.method.after_step(self._progress(step))
        return Stepped(step, batch, {**means, **facts}, lr, time.perf_counter() - began, waited, stop)

    def _update(self, output: StepOutput, step: int) -> dict[str, float]:
        try:
            return self._engine.update(output)
        except DivergedError as error:
            raise DivergedError(f"step {step}: {error}") from None

    def _progress(self, step: int) -> Progress:
        lengths = self._lengths
        steps_per_epoch = lengths.num_samples / self._config.train.global_batch
        return Progress(step, lengths.total_steps, steps_per_epoch, self._schedules.stages.at(step))

    def _set_rates(self, step: int) -> float:
        return set_rates(
            self._engine.optimizer,
            lr_factor=self._schedules.lr_factor(step),
            weight_decay=self._schedules.weight_decay(step),
            frozen=self._schedules.frozen(step),
        )

    def _forward(self, batch: Batch) -> StepOutput:
        device = self._ranks.device
        views = [view.to(device, non_blocking=True) for view in batch.views]
        if batch.parameters:
            views = [finish_views(view, each) for view, each in zip(views, batch.parameters, strict=True)]
        views = [normalise(view, self._recipe) for view in views]
        labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
        return self._engine.forward(views, labels)

    def _agree(self, output: StepOutput, batch: Batch, step: int, retries: float) -> tuple[dict[str, float], bool]:
        """Average loss and metrics over the ranks, and learn what else happened on any of them: one collective."""
        names = ["loss", *output.metrics]
        facts = (self._stop.requested, bool(self._checkpoints.failure), len(batch.damaged), batch.substituted, retries)
        flags = [torch.tensor(float(fact), dtype=torch.float64) for fact in facts]
        found = self._ranks.mean([output.loss, *output.metrics.values(), *flags])
        values, (stops, failures, damaged, substituted, retried) = found[: len(names)], found[len(names) :]
        if failures > 0:
            self._checkpoints.finish()  # raises on every rank
        if damaged > 0:
            self._quarantine.add(step, batch.damaged)  # raises on every rank if there are too many
        means = dict(zip(names, values, strict=True))
        for name, mean in {"substituted_samples": substituted, "read_retries": retried}.items():
            if mean > 0:
                means[name] = round(mean * self._ranks.world_size)
        broken = [f"{name} = {value}" for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise DivergedError(f"step {step}: {', '.join(broken)}; {_ADVICE}")
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
            train_seconds=self._train_seconds,
            step_seconds_p50=round(self._throughput.step_seconds_p50, 4),
            step_seconds_p95=round(self._throughput.step_seconds_p95, 4),
            peak_memory_gb=round(peak_memory_gb(self._ranks.device), 2),
            eta_seconds=round((self._lengths.total_steps - done.step) * self._throughput.seconds_per_step, 1),
        )
        log.progress.show(done.step, loss=done.means["loss"], throughput=self._throughput)

    def _save(self, step: int, log: "_Log | None") -> None:
        if log is not None:
            log.steps.sync()
        samples = step * self._config.train.global_batch
        position = Position(step, samples, self._fingerprint, self._order, self._schedules.as_facts())
        self._checkpoints.save(self._engine, position, milestone=step in self._lengths.milestones)
        self._saves += 1
        self._heartbeat.update(saves=self._saves)


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

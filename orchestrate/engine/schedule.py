"""Schedules: pure functions of the step, so that a resumed run only needs the step."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

from orchestrate.config.run import RunConfig
from orchestrate.config.train import (
    ConstantConfig,
    CosineConfig,
    LinearConfig,
    ScheduleConfig,
    StepConfig,
    TrainConfig,
    WsdConfig,
)
from ssl_methods.schedules import cosine, linear


class Shape(Protocol):
    """What follows the warm-up."""

    def factor(self, step: int, *, first: int, last: int) -> float:
        """Return what the peak is multiplied by at a step between the end of the warm-up and that of the budget."""


@dataclass(frozen=True)
class Cosine:
    """Half a cosine to `final_fraction`."""

    final_fraction: float = 0.001

    def factor(self, step: int, *, first: int, last: int) -> float:
        """Return what the peak is multiplied by."""
        return cosine(1.0, self.final_fraction, progress=_progress(step, first, last))


@dataclass(frozen=True)
class Line:
    """A line to `final_fraction`, over the last `num_steps` or, if 0, over all of them."""

    final_fraction: float = 0.0
    num_steps: int = 0

    def factor(self, step: int, *, first: int, last: int) -> float:
        """Return what the peak is multiplied by."""
        begin = max(first, last - self.num_steps) if self.num_steps else first
        return linear(1.0, self.final_fraction, progress=_progress(step, begin, last))


@dataclass(frozen=True)
class Steps:
    """Times `ratio` at each milestone."""

    milestones: tuple[int, ...]
    ratio: float = 0.1

    def factor(self, step: int, *, first: int, last: int) -> float:
        """Return what the peak is multiplied by."""
        return float(self.ratio ** sum(step >= milestone for milestone in self.milestones))


@dataclass(frozen=True)
class Constant:
    """The peak to the end."""

    def factor(self, step: int, *, first: int, last: int) -> float:
        """Return 1."""
        return 1.0


def _progress(step: int, first: int, last: int) -> float:
    return max(0, step - first) / max(1, last - first)


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0 to 1, then a shape.

    Attributes:
        total_steps: optimizer steps of the whole budget, or of a stage that has its own.
        warmup_steps: steps before the peak; fewer than `total_steps`.
        shape: what follows.

    Source: Zbontar et al. 2021, arXiv:2103.03230, sec. 2.2 (warm-up, then cosine to 0.001 of the peak, per step).
    """

    total_steps: int
    warmup_steps: int = 0
    shape: Shape = Cosine()

    def factor(self, step: int) -> float:
        """Return what the peak learning rate is multiplied by at a 0-based step."""
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return self.shape.factor(step, first=self.warmup_steps, last=self.total_steps)


@dataclass(frozen=True)
class Stages:
    """Where a training turns to its second and later stages.

    Attributes:
        starts: 0-based first steps of these stages, ascending.
        resets_optimizer: whether the optimizer forgets everything at each of them.
    """

    starts: tuple[int, ...] = ()
    resets_optimizer: bool = False

    def at(self, step: int) -> int:
        """Return the stage of a step, from 0."""
        return sum(step >= start for start in self.starts)

    def forgets(self, step: int) -> bool:
        """Return whether the optimizer begins afresh with a step, whatever came before it."""
        return self.resets_optimizer and step in self.starts


@dataclass(frozen=True)
class Schedules:
    """Everything about the optimizer that depends on the step, which is 0-based throughout.

    Attributes:
        rate: of all learning rates; of the first stage only, if there are restarts.
        initial_weight_decay, final_weight_decay: ends of a cosine over what the rate spans.
        freeze_steps: steps from the very first during which the last layer stays still.
        stages: of the training.
        restarts: what the later stages have instead of `rate`, if each has its own.
    """

    rate: LearningRate
    initial_weight_decay: float
    final_weight_decay: float
    freeze_steps: int = 0
    stages: Stages = Stages()
    restarts: tuple[LearningRate, ...] = ()

    def lr_factor(self, step: int) -> float:
        """Return what every group's peak learning rate is multiplied by."""
        rate, step = self._span(step)
        return rate.factor(step)

    def weight_decay(self, step: int) -> float:
        """Return the weight decay of the groups that decay.

        Source: Caron et al. 2021, arXiv:2104.14294, sec. 3.2 (cosine from 0.04 to 0.4, no warm-up).
        """
        if self.initial_weight_decay == self.final_weight_decay:
            return self.initial_weight_decay
        rate, step = self._span(step)
        return cosine(self.initial_weight_decay, self.final_weight_decay, progress=step / max(1, rate.total_steps))

    def _span(self, step: int) -> tuple[LearningRate, int]:
        """Return the rate that holds at a step, and the step counted from where that rate begins."""
        stage = self.stages.at(step) if self.restarts else 0
        return (self.restarts[stage - 1], step - self.stages.starts[stage - 1]) if stage else (self.rate, step)

    def frozen(self, step: int) -> bool:
        """Return whether the last layer stays still."""
        return step < self.freeze_steps

    def as_facts(self) -> dict[str, Any]:
        """Return plain values that tell these schedules from others."""
        return {
            **_facts_of(self.rate),
            "freeze_steps": self.freeze_steps,
            "initial_weight_decay": self.initial_weight_decay,
            "final_weight_decay": self.final_weight_decay,
            "stage_starts": list(self.stages.starts),
            "resets_optimizer": self.stages.resets_optimizer,
            "restarts": [_facts_of(rate) for rate in self.restarts],
        }


def _facts_of(rate: LearningRate) -> dict[str, Any]:
    shape = {"name": type(rate.shape).__name__.lower(), **asdict(rate)["shape"]}
    return {
        "total_steps": rate.total_steps,
        "warmup_steps": rate.warmup_steps,
        "shape": {key: list(value) if isinstance(value, tuple) else value for key, value in shape.items()},
    }


def schedules_of(config: RunConfig, num_samples: int) -> Schedules:
    """Resolve the schedules of a config for a training set of `num_samples`."""
    train, optim = config.train, config.optim
    size = {"num_samples": num_samples, "global_batch": train.global_batch}
    total = train.budget.steps(**size)
    starts = tuple(start.steps(**size, whole=total) for start in train.stages.starts)
    ends = (*starts, total) if train.stages.schedule == "restart" else (total,)
    first, *later = (_rate_of(train, num_samples, end - begin) for begin, end in pairwise((0, *ends)))
    final = optim.weight_decay if optim.final_weight_decay == "same" else optim.final_weight_decay
    return Schedules(
        first,
        optim.weight_decay,
        final,
        optim.freeze_last_layer.steps(**size, whole=total),
        Stages(starts, train.stages.optimizer == "reset"),
        tuple(later),
    )


def _rate_of(train: TrainConfig, num_samples: int, span: int) -> LearningRate:
    """Resolve the schedule of a config over a number of steps."""
    warmup = train.warmup.steps(num_samples=num_samples, global_batch=train.global_batch, whole=span)
    return LearningRate(span, min(warmup, span - 1), _shape_of(train, num_samples, span))


def _shape_of(train: TrainConfig, num_samples: int, span: int) -> Shape:
    schedule: ScheduleConfig = train.schedule
    size = {"num_samples": num_samples, "global_batch": train.global_batch, "whole": span}
    match schedule:
        case CosineConfig():
            return Cosine(schedule.final_fraction)
        case LinearConfig():
            return Line(schedule.final_fraction)
        case WsdConfig():
            return Line(schedule.final_fraction, schedule.decay.steps(**size))
        case StepConfig():
            return Steps(tuple(each.steps(**size) for each in schedule.milestones), schedule.factor)
        case ConstantConfig():
            return Constant()

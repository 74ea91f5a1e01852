"""What only shows when the sections of a config meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from orchestrate.config.budget import Budget
from orchestrate.config.load import Key, Problem, suggestion
from orchestrate.config.train import StepConfig, WsdConfig

if TYPE_CHECKING:
    from orchestrate.config.run import RunConfig


def cross_checks(config: RunConfig, method: Any) -> list[Problem]:
    """Find what is wrong with sections that are right each by itself.

    Args:
        config: every section resolved.
        method: class of the config's method.
    """
    return [
        *_view_problems(config, method),
        *_backbone_problems(config),
        *_optim_problems(config, method),
        *_engine_problems(config, method),
        *_length_problems(config),
        *_schedule_problems(config),
        *_stage_problems(config),
        *_continues_problems(config),
    ]


def _view_problems(config: RunConfig, method: Any) -> Iterator[Problem]:
    from ssl_methods.views import recipe, recipe_names

    views = config.views
    if views.name not in recipe_names():
        reason = f"no such recipe; {suggestion(views.name, ('auto', *recipe_names()))}"
        yield Problem(("views", "name"), views.name, reason)
        return
    made = len(recipe(views.name, views.size).views)
    if method.num_views not in (0, made):
        fitting = [name for name in recipe_names() if len(recipe(name, views.size).views) == method.num_views]
        takes = f"makes {made} views, {config.method.name} takes {method.num_views}"
        yield Problem(("views", "name"), views.name, f"{takes}; write one of {', '.join(fitting)}")


def _backbone_problems(config: RunConfig) -> Iterator[Problem]:
    from ssl_methods.backbones import build

    name = config.backbone.name
    if not build.exists(name):
        near = build.suggest(name)
        ours = f"take {', '.join(build.names())}, or a name of torchvision or timm"
        hint = f"did you mean {', '.join(near)}?" if near else ours
        yield Problem(("backbone", "name"), name, f"no such backbone; {hint}")


def _optim_problems(config: RunConfig, method: Any) -> Iterator[Problem]:
    optim = config.optim
    if optim.clip == "none" and optim.clip_norm != 1.0:
        reason = "means nothing without clipping; add `clip: global` or `clip: per_tensor`, or leave it out"
        yield Problem(("optim", "clip_norm"), optim.clip_norm, reason)
    if optim.freeze_last_layer.amount > 0 and not method.has_last_layer:
        reason = f"{config.method.name} has no last layer that could be held still; leave it out"
        yield Problem(("optim", "freeze_last_layer"), str(optim.freeze_last_layer), reason)


def _engine_problems(config: RunConfig, method: Any) -> Iterator[Problem]:
    stage, key = config.system.zero_stage, ("system", "zero_stage")
    if stage == 0:
        return
    if config.system.engine == "ddp":
        yield Problem(key, stage, "plain DDP has no ZeRO; write `zero_stage: 0` or `engine: deepspeed`")
    elif stage == 3 and method.has_twin:
        reason = f"the twin of {config.method.name} averages whole parameters, ZeRO 3 leaves each rank a part of them"
        yield Problem(key, stage, f"{reason}; write `zero_stage: 2`")
    elif stage == 3 and config.optim.freeze_last_layer.amount > 0:
        yield Problem(key, stage, "a last layer cannot be held still under ZeRO 3; write `zero_stage: 2`")


def _length_problems(config: RunConfig) -> Iterator[Problem]:
    budget = config.train.budget
    lengths = {("train", "warmup"): config.train.warmup, ("optim", "freeze_last_layer"): config.optim.freeze_last_layer}
    for key, length in lengths.items():
        if _share(length, budget) >= 1:
            reason = f"as long as the budget of {budget}; write less, or a part such as 10%"
            yield Problem(key, str(length), reason)


def _schedule_problems(config: RunConfig) -> Iterator[Problem]:
    schedule, budget = config.train.schedule, config.train.budget
    at = ("train", "schedule")
    if isinstance(schedule, WsdConfig):
        if _share(schedule.decay, budget) + _share(config.train.warmup, budget) > 1:
            reason = f"is, with a warm-up of {config.train.warmup}, longer than the budget of {budget}; write less"
            yield Problem((*at, "decay"), str(schedule.decay), reason)
    elif isinstance(schedule, StepConfig):
        yield from _ascent_problems((*at, "milestones"), schedule.milestones, budget)


def _stage_problems(config: RunConfig) -> Iterator[Problem]:
    stages, at = config.train.stages, ("train", "stages")
    if stages.starts:
        yield from _ascent_problems((*at, "starts"), stages.starts, config.train.budget)
        return
    for key, default in {"optimizer": "keep", "schedule": "continue"}.items():
        if (value := getattr(stages, key)) != default:
            reason = "means nothing without a second stage; add `starts: [...]`, or leave it out"
            yield Problem((*at, key), value, reason)


def _ascent_problems(at: Key, moments: Sequence[Budget], budget: Budget) -> Iterator[Problem]:
    """Find moments of a training, at least one, that do not follow each other inside its budget."""
    amounts = [each.amount for each in moments]
    listed = ", ".join(map(str, moments))
    if len({each.unit for each in moments}) > 1:
        yield Problem(at, listed, "have several units; write all in one")
    elif sorted(set(amounts)) != amounts:
        yield Problem(at, listed, "must ascend; sort them and list each once")
    elif _share(moments[-1], budget) >= 1:
        reason = f"is not before the end of the budget of {budget}; write an earlier one, or a part such as 80%"
        yield Problem((*at, len(moments) - 1), str(moments[-1]), reason)


def step_problems(config: RunConfig, num_samples: int) -> list[Problem]:
    """Find lengths that do not fit the budget, which in different units only shows with the size of the dataset."""
    train, optim = config.train, config.optim
    size = {"num_samples": num_samples, "global_batch": train.global_batch}
    total = train.budget.steps(**size)
    lengths: dict[Key, Budget] = {
        ("train", "warmup"): train.warmup,
        ("optim", "freeze_last_layer"): optim.freeze_last_layer,
    }
    if isinstance(train.schedule, StepConfig):
        last = len(train.schedule.milestones) - 1
        lengths["train", "schedule", "milestones", last] = train.schedule.milestones[last]
    if train.stages.starts:
        lengths["train", "stages", "starts", len(train.stages.starts) - 1] = train.stages.starts[-1]
    of_budget = f"of the {total} steps of the budget of {train.budget}; write less, or a part such as 10%"
    problems = []
    for key, length in lengths.items():
        steps = length.steps(**size, whole=total)
        if length.unit != "%" and steps and steps >= total:  # a part of few steps may be rounded to all
            problems.append(Problem(key, str(length), f"takes {steps} {of_budget}"))
    if not problems and isinstance(train.schedule, WsdConfig):
        decay = train.schedule.decay
        steps = decay.steps(**size, whole=total) + train.warmup.steps(**size, whole=total)
        if steps > total + 1:  # both may be rounded up
            reason = f"takes, with a warm-up of {train.warmup}, {steps} {of_budget}"
            problems.append(Problem(("train", "schedule", "decay"), str(decay), reason))
    return problems or _restart_problems(config, size, total)


def _restart_problems(config: RunConfig, size: dict[str, int], total: int) -> list[Problem]:
    """Find stages without a step, and lengths that do not fit the shortest of those that begin anew."""
    train = config.train
    starts = [start.steps(**size, whole=total) for start in train.stages.starts]
    spans = [end - begin for begin, end in pairwise((0, *starts, total))]
    shortest = min(spans)
    if shortest < 1:
        listed = ", ".join(map(str, train.stages.starts))
        reason = f"leave a stage without a step of the {total} of the budget of {train.budget}; write others"
        return [Problem(("train", "stages", "starts"), listed, reason)]
    if train.stages.schedule == "continue":
        return []
    lengths: dict[Key, Budget] = {("train", "warmup"): train.warmup}
    if isinstance(train.schedule, StepConfig):
        last = len(train.schedule.milestones) - 1
        lengths["train", "schedule", "milestones", last] = train.schedule.milestones[last]
    elif isinstance(train.schedule, WsdConfig):
        lengths["train", "schedule", "decay"] = train.schedule.decay
    of_stage = f"of the {shortest} steps of the shortest stage, which each have their own; write less, or a part"
    steps = {key: length.steps(**size, whole=shortest) for key, length in lengths.items()}
    return [
        Problem(key, str(lengths[key]), f"takes {count} {of_stage}")
        for key, count in steps.items()
        if lengths[key].unit != "%" and count >= shortest
    ]


def _share(length: Budget, budget: Budget) -> float:
    """Return which part of a budget a length is, 0 if only the size of the dataset would tell."""
    if length.unit == "%":
        return length.amount / 100
    return length.amount / budget.amount if length.unit == budget.unit else 0.0


def _continues_problems(config: RunConfig) -> Iterator[Problem]:
    trial, step = config.continues.trial, config.continues.step
    if trial and not step:
        yield Problem(("continues", "step"), step, f"which step of {trial}? write the step of one of its checkpoints")
    if step and not trial:
        yield Problem(("continues", "trial"), trial, f"whose step {step}? write the trial's 16 digits")

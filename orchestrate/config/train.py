"""Sections that say how long is trained and how: `train`, its schedule, and `system`."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from orchestrate.config.budget import Budget
from orchestrate.config.fields import AllOrCount, Fraction, Length, NonNegative, Part, Parts, Positive, PositivePart
from orchestrate.config.section import Section


class CosineConfig(Section):
    """Half a cosine from the peak to `final_fraction` of it at the end."""

    name: Literal["cosine"] = "cosine"
    final_fraction: Fraction = 0.001


class LinearConfig(Section):
    """A straight line from the peak to `final_fraction` of it at the end."""

    name: Literal["linear"]
    final_fraction: Fraction = 0.0


class StepConfig(Section):
    """The peak, times `factor` at each milestone."""

    name: Literal["step"]
    milestones: Annotated[Parts, Field(min_length=1)]
    factor: Fraction = 0.1


class WsdConfig(Section):
    """Warm-up, stable, decay: the peak, then a straight line over the last `decay` of the budget."""

    name: Literal["wsd"]
    decay: PositivePart
    final_fraction: Fraction = 0.0


class ConstantConfig(Section):
    """The peak to the end."""

    name: Literal["constant"]


ScheduleConfig = CosineConfig | LinearConfig | StepConfig | WsdConfig | ConstantConfig
SCHEDULES: dict[str, type[ScheduleConfig]] = {
    "cosine": CosineConfig,
    "linear": LinearConfig,
    "step": StepConfig,
    "wsd": WsdConfig,
    "constant": ConstantConfig,
}


class StagesConfig(Section):
    """When the second and later stages of a training begin, and what begins anew with them.

    Attributes:
        starts: one for each stage of the method but its first, as in `[50%]`.
        optimizer: keep its momenta into the next stage, or drop them at its first step.
        schedule: go on with one schedule over the whole budget, or span each stage anew by warm-up, learning rate and
            weight decay; a part such as `10%` is then one of the stage.
    """

    starts: Parts = ()
    optimizer: Literal["keep", "reset"] = "keep"
    schedule: Literal["continue", "restart"] = "continue"


class TrainConfig(Section):
    """How long, how large, how seeded. `warmup` may be a part of the budget, as in `10%`."""

    global_batch: Annotated[int, Field(ge=2, le=2**24)]
    budget: Length
    warmup: Part = Budget(0, "ep")
    schedule: Annotated[ScheduleConfig, Field(discriminator="name")] = CosineConfig()
    stages: StagesConfig = StagesConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


def _url_or_nothing(url: str) -> str:
    if url and "://" not in url:
        raise ValueError("must be a URL such as s3://bucket/runs, or empty")
    return url


class SystemConfig(Section):
    """How the same numbers are computed; no part of a trial's identity.

    Attributes:
        milestones: when the checkpoint of a step is kept for ever, as in `50%`.
        checkpoint_url: where checkpoints are kept beside the RunDir; any URL that fsspec knows.
        micro_batch: images that a rank pushes through the network at once; the gradient stays that of the whole batch.
        deterministic: take kernels that give the same bits every time.
        elastic: let another number of ranks go on with a method that is tied to the number of ranks.
        workers: threads of a rank that decode and augment; `loader: processes` for transforms that hold Python's lock.
        loader: what the workers are.
        read_ahead: fetch what comes next in long ranges: from object stores only (`remote`), `always` or `never`.
        data_memory_gb: of samples fetched ahead, a rank.
        cache: folder on a node's own disk for what was fetched, shared by its ranks; empty for none.
        cache_gb: that the folder may hold.
        max_damaged: share of the samples that may turn out damaged before the training stops with their list.
        hang_minutes: without a step for so long, a rank dumps its stacks and ends.
        images_per_second: of a rank, by which a plan prices the trial while none like it has finished; 0 for unknown.
    """

    engine: Literal["deepspeed", "ddp"] = "deepspeed"
    zero_stage: Literal[0, 1, 2, 3] = 0
    workers: Annotated[int, Field(ge=0, le=64)] = 1
    loader: Literal["threads", "processes"] = "threads"
    read_ahead: Literal["remote", "always", "never"] = "remote"
    data_memory_gb: Positive = 4.0
    cache: str = ""
    cache_gb: Positive = 100.0
    max_damaged: Fraction = 1e-4
    checkpoint_every: Length = Budget(1, "ep")
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    milestones: Parts = ()
    checkpoint_url: Annotated[str, AfterValidator(_url_or_nothing)] = ""
    async_checkpoints: bool = True
    micro_batch: AllOrCount = "all"
    activation_checkpointing: bool = False
    compile: bool = False
    deterministic: bool = True
    elastic: bool = False
    hang_minutes: Positive = 30.0
    images_per_second: NonNegative = 0.0


def _trial_or_nothing(trial: str) -> str:
    if not re.fullmatch(r"([0-9a-f]{16})?", trial):
        raise ValueError("must be the 16 hex digits of a trial, or empty")
    return trial


class ContinuesConfig(Section):
    """The trial and step whose checkpoint a training begins from; an empty trial begins afresh."""

    trial: Annotated[str, AfterValidator(_trial_or_nothing)] = ""
    step: Annotated[int, Field(ge=0)] = 0

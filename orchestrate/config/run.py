"""RunConfig: the frozen, fully resolved answer to "what is trained"."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from orchestrate.config.budget import Budget, BudgetField
from orchestrate.config.load import (
    ABSENT,
    Document,
    Key,
    Problem,
    dump_yaml,
    problems_of,
    raise_problems,
    read_document,
    suggestion,
)
from orchestrate.config.plugin import parse_plugin, stated_name
from orchestrate.config.section import Plugin, PluginField, Section
from orchestrate.errors import ConfigError
from ssl_methods import plugins

METHODS = "ssl_methods.methods"
PROBES = "orchestrate.evaluation.probes"
FORMAT = 1  # raise it when the meaning of a key changes: old fingerprints then stay with the old meaning

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Url = Annotated[str, Field(min_length=1)]


def _above_zero(budget: Budget) -> Budget:
    if budget.amount <= 0:
        raise ValueError("must be more than 0")
    return budget


def _of_known_length(budget: Budget) -> Budget:
    if budget.unit in ("gpuh", "%"):
        raise ValueError("a schedule needs a length in ep, img or step; GPU-hours belong in a sweep's limits")
    return budget


class DataConfig(Section):
    """Datasets by URL. The digests name their contents and are filled in when a sweep is planned."""

    train: Url
    val: Url
    train_digest: str = ""
    val_digest: str = ""


class BackboneConfig(Section):
    """Network that maps images to features; `stem: small` suits images under 64 pixels."""

    name: str
    stem: Literal["default", "small"] = "default"


class ViewsConfig(Section):
    """Crop and augmentation recipe; `auto` takes the method's own."""

    name: str = "auto"
    size: Annotated[int, Field(ge=8, le=1024)] = 224


class OptimConfig(Section):
    """What every optimizer has. `lr_scaling: linear` multiplies learning rates by global_batch / 256."""

    lr: Positive
    weight_decay: NonNegative = 0.0
    lr_scaling: Literal["linear", "sqrt", "none"] = "linear"

    def lr_factor(self, global_batch: int) -> float:
        """Return what the learning rates of the config are multiplied by."""
        factors: dict[str, float] = {"linear": global_batch / 256, "sqrt": math.sqrt(global_batch / 256), "none": 1.0}
        return factors[self.lr_scaling]


class LarsConfig(OptimConfig):
    """LARS as Barlow Twins uses it: `bias_lr` is for 1-D tensors, which have no decay and no trust ratio."""

    name: Literal["lars"]
    bias_lr: Positive
    momentum: Fraction = 0.9
    trust: Positive = 0.001


class SgdConfig(OptimConfig):
    """SGD with momentum; 1-D tensors are not decayed."""

    name: Literal["sgd"]
    momentum: Fraction = 0.9


class AdamWConfig(OptimConfig):
    """AdamW; 1-D tensors are not decayed."""

    name: Literal["adamw"]
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999


Optimizer = LarsConfig | SgdConfig | AdamWConfig
OPTIMIZERS: dict[str, type[Optimizer]] = {"lars": LarsConfig, "sgd": SgdConfig, "adamw": AdamWConfig}


class TrainConfig(Section):
    """How long, how large, how seeded. `warmup` may be a part of the budget, as in `10%`."""

    global_batch: Annotated[int, Field(ge=2, le=2**24)]
    budget: Annotated[BudgetField, AfterValidator(_above_zero), AfterValidator(_of_known_length)]
    warmup: BudgetField = Budget(0, "ep")
    schedule: Literal["cosine", "constant"] = "cosine"
    final_lr_fraction: Fraction = 0.001
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class SystemConfig(Section):
    """How the same numbers are computed; no part of a trial's identity."""

    engine: Literal["deepspeed", "ddp"] = "deepspeed"
    zero_stage: Literal[0, 1] = 0
    workers: Annotated[int, Field(ge=0, le=64)] = 1
    checkpoint_every: Annotated[BudgetField, AfterValidator(_above_zero), AfterValidator(_of_known_length)] = Budget(
        1, "ep"
    )
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2


class RunConfig(Section):
    """What is trained, resolved: no default is left to the code that reads it."""

    data: DataConfig
    method: PluginField
    backbone: BackboneConfig
    views: ViewsConfig
    optim: Annotated[Optimizer, Field(discriminator="name")]
    train: TrainConfig
    probes: tuple[PluginField, ...]
    system: SystemConfig

    def identity(self) -> dict[str, Any]:
        """Return everything that changes the numbers: digests instead of URLs, nothing of `system`."""
        values = self.model_dump(mode="json")
        del values["system"], values["data"]["train"], values["data"]["val"]
        return {"format": FORMAT, **values}

    def fingerprint(self) -> str:
        """Hash the identity to 16 hex digits, the id of the trial.

        Raises:
            ConfigError: the datasets are not pinned by their digests yet.
        """
        if not (self.data.train_digest and self.data.val_digest):
            raise ConfigError("data: the digests of train and val are not known yet; plan the run first")
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """Write the config so that `load_run` reads an equal one."""
        return dump_yaml(self.model_dump(mode="json"))


SectionT = TypeVar("SectionT", bound=Section)
_REQUIRED: dict[str, type[Section]] = {"data": DataConfig, "backbone": BackboneConfig, "train": TrainConfig}
_OPTIONAL: dict[str, type[Section]] = {"views": ViewsConfig, "system": SystemConfig}


def parse_run(values: Mapping[str, Any]) -> tuple[RunConfig | None, list[Problem]]:
    """Resolve plain values into a RunConfig, or say everything that is wrong with them.

    Returns:
        The config and no problems, or None and at least one problem.
    """
    problems = [
        Problem((key,), value, f"unknown section; {suggestion(key, RunConfig.model_fields)}")
        for key, value in values.items()
        if key not in RunConfig.model_fields
    ]
    parts: dict[str, Any] = {}
    for key, section in (_REQUIRED | _OPTIONAL).items():
        parts[key] = _parse_section(section, values, key, problems, required=key in _REQUIRED)
    parts["method"] = parse_plugin(METHODS, values.get("method", ABSENT), ("method",), problems)
    parts["optim"] = _parse_optimizer(values.get("optim", ABSENT), problems)
    parts["probes"] = _parse_probes(values.get("probes", ()), problems)
    if problems:
        return None, problems
    parts["views"] = _resolve_views(parts["views"], parts["method"])
    config = RunConfig(**parts)
    problems = list(_cross_checks(config))
    return (None, problems) if problems else (config, [])


def load_run(path: Path) -> RunConfig:
    """Read a RunConfig from a YAML file.

    Raises:
        ConfigError: every problem of the file, a line each.
    """
    document = read_document(path)
    return run_of(document)


def run_of(document: Document) -> RunConfig:
    """Resolve a document into a RunConfig; see `load_run`."""
    config, problems = parse_run(document.data)
    if config is None:
        raise_problems(document, problems)
    return config


def _parse_section(
    section: type[Section], values: Mapping[str, Any], name: str, problems: list[Problem], *, required: bool
) -> Section | None:
    if required and name not in values:
        problems.append(Problem((name,), ABSENT, f"missing section; it needs {_needs(section)}"))
        return None
    return _validated(section, values.get(name, {}), (name,), problems)


def _validated(section: type[SectionT], values: Any, at: Key, problems: list[Problem]) -> SectionT | None:
    try:
        return section.model_validate(values)
    except ValidationError as error:
        problems.extend(problems_of(error, section, at))
        return None


def _needs(section: type[Section]) -> str:
    return ", ".join(f"`{name}`" for name, info in section.model_fields.items() if info.is_required())


def _parse_optimizer(values: Any, problems: list[Problem]) -> Section | None:
    name = stated_name(values, OPTIMIZERS, ("optim",), kind="optimizer")
    if isinstance(name, Problem):
        problems.append(name)
        return None
    return _validated(OPTIMIZERS[name], values, ("optim",), problems)


def _parse_probes(values: Any, problems: list[Problem]) -> tuple[Plugin | None, ...]:
    if not isinstance(values, (list, tuple)):
        problems.append(Problem(("probes",), values, "must be a list; write `- name: knn` lines"))
        return ()
    found = tuple(parse_plugin(PROBES, value, ("probes", index), problems) for index, value in enumerate(values))
    for index, probe in enumerate(found):
        if probe is not None and probe in found[:index]:
            problems.append(Problem(("probes", index), probe.name, "the same probe is listed before; remove one"))
    return found


def _resolve_views(views: ViewsConfig, method: Plugin) -> ViewsConfig:
    if views.name != "auto":
        return views
    plugin: Any = plugins.load(METHODS, method.name)
    return views.model_copy(update={"name": plugin.default_views})


def _cross_checks(config: RunConfig) -> list[Problem]:
    """Find what only shows when sections meet."""
    from ssl_methods.backbones import build

    problems = list(_view_problems(config))
    if not build.exists(config.backbone.name):
        near = build.suggest(config.backbone.name)
        ours = f"take {', '.join(build.names())}, or a name of torchvision or timm"
        hint = f"did you mean {', '.join(near)}?" if near else ours
        problems.append(Problem(("backbone", "name"), config.backbone.name, f"no such backbone; {hint}"))
    if isinstance(config.optim, LarsConfig) and config.system.zero_stage >= 1:
        reason = "LARS needs whole layers, ZeRO >= 1 splits them; write `zero_stage: 0` or another optimizer"
        problems.append(Problem(("system", "zero_stage"), config.system.zero_stage, reason))
    if config.system.engine == "ddp" and config.system.zero_stage >= 1:
        reason = "plain DDP has no ZeRO; write `zero_stage: 0` or `engine: deepspeed`"
        problems.append(Problem(("system", "zero_stage"), config.system.zero_stage, reason))
    warmup, budget = config.train.warmup, config.train.budget
    if warmup.unit == "gpuh":
        problems.append(Problem(("train", "warmup"), str(warmup), "write ep, img, step or a part such as 10%"))
    elif warmup.amount >= {"%": 100, budget.unit: budget.amount}.get(warmup.unit, math.inf):
        reason = f"as long as the budget of {budget}; write less, or a part such as 10%"
        problems.append(Problem(("train", "warmup"), str(warmup), reason))
    return problems


def _view_problems(config: RunConfig) -> list[Problem]:
    from ssl_methods.views import recipe, recipe_names

    views = config.views
    if views.name not in recipe_names():
        reason = f"no such recipe; {suggestion(views.name, ('auto', *recipe_names()))}"
        return [Problem(("views", "name"), views.name, reason)]
    plugin: Any = plugins.load(METHODS, config.method.name)
    made = len(recipe(views.name, views.size).views)
    if plugin.num_views in (0, made):
        return []
    fitting = [name for name in recipe_names() if len(recipe(name, views.size).views) == plugin.num_views]
    reason = f"makes {made} views, {config.method.name} takes {plugin.num_views}; write one of {', '.join(fitting)}"
    return [Problem(("views", "name"), views.name, reason)]

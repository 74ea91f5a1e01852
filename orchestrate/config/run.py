"""RunConfig: the frozen, fully resolved answer to "what is trained"."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from orchestrate.config.checks import cross_checks
from orchestrate.config.fields import Url
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
from orchestrate.config.optim import OPTIMIZERS, Optimizer
from orchestrate.config.plugin import parse_plugin, stated_name
from orchestrate.config.section import Plugin, PluginField, Section
from orchestrate.config.train import SCHEDULES, ContinuesConfig, SystemConfig, TrainConfig
from orchestrate.errors import ConfigError
from ssl_methods import plugins

METHODS = "ssl_methods.methods"
PROBES = "orchestrate.evaluation.probes"
FORMAT = 4  # raise it when the meaning of a key changes: old fingerprints then stay with the old meaning


class DataConfig(Section):
    """Datasets by URL. The digests name their contents and are filled in when a sweep is planned.

    `train_samples` is for plans that are made where the training set cannot be read; 0 is not stated.
    """

    train: Url
    val: Url
    train_samples: Annotated[int, Field(ge=0)] = 0
    train_digest: str = ""
    val_digest: str = ""


class BackboneConfig(Section):
    """Network that maps images to features; `stem: small` suits images under 64 pixels.

    `window` is the side of the windows of attention in tokens, for networks that have them; 0 is as the name says.
    """

    name: str
    stem: Literal["default", "small"] = "default"
    window: Annotated[int, Field(ge=0, le=64)] = 0


def _function_or_nothing(path: str) -> str:
    if path and not re.fullmatch(r"[\w.]+:\w+", path):
        raise ValueError("must be `module:function`, or empty")
    return path


class ViewsConfig(Section):
    """Crop and augmentation recipe; `auto` takes the method's own.

    Attributes:
        pixels: `fast` equals torchvision to a grey level; `reference` is torchvision; `device` crops on the CPU and
            leaves colours, blur and solarisation to the GPU.
        transform: `module:function` of yours that is run on each decoded image first; see docs/data.md.
    """

    name: str = "auto"
    size: Annotated[int, Field(ge=8, le=1024)] = 224
    pixels: Literal["fast", "reference", "device"] = "fast"
    transform: Annotated[str, AfterValidator(_function_or_nothing)] = ""


class RunConfig(Section):
    """What is trained, resolved: no default is left to the code that reads it."""

    data: DataConfig
    method: PluginField
    backbone: BackboneConfig
    views: ViewsConfig
    optim: Annotated[Optimizer, Field(discriminator="name")]
    train: TrainConfig
    probes: tuple[PluginField, ...]
    continues: ContinuesConfig
    system: SystemConfig

    def identity(self) -> dict[str, Any]:
        """Return everything that changes the numbers: digests instead of URLs, nothing of `system`."""
        values = self.model_dump(mode="json")
        del values["system"]
        values["data"] = {key: values["data"][key] for key in ("train_digest", "val_digest")}
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
_OPTIONAL: dict[str, type[Section]] = {"views": ViewsConfig, "continues": ContinuesConfig, "system": SystemConfig}


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
    values = _with_schedule(values, problems)
    parts: dict[str, Any] = {}
    for key, section in (_REQUIRED | _OPTIONAL).items():
        parts[key] = _parse_section(section, values, key, problems, required=key in _REQUIRED)
    parts["method"] = parse_plugin(METHODS, values.get("method", ABSENT), ("method",), problems)
    parts["optim"] = _parse_named(OPTIMIZERS, values.get("optim", ABSENT), ("optim",), problems, kind="optimizer")
    parts["probes"] = _parse_probes(values.get("probes", ()), problems)
    if problems:
        return None, problems
    method: Any = plugins.load(METHODS, parts["method"].name)
    if parts["views"].name == "auto":
        parts["views"] = parts["views"].model_copy(update={"name": method.default_views})
    config = RunConfig(**parts)
    problems = cross_checks(config, method)
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


def _with_schedule(values: Mapping[str, Any], problems: list[Problem]) -> Mapping[str, Any]:
    """Resolve the schedule inside the train section first, as each has keys of its own."""
    train = values.get("train")
    if not isinstance(train, Mapping) or "schedule" not in train:
        return values
    at = ("train", "schedule")
    schedule = _parse_named(SCHEDULES, train["schedule"], at, problems, kind="schedule")
    rest = {key: value for key, value in train.items() if key != "schedule"}
    return {**values, "train": rest if schedule is None else {**rest, "schedule": schedule}}


def _parse_named(
    sections: Mapping[str, type[Section]], values: Any, at: Key, problems: list[Problem], *, kind: str
) -> Section | None:
    name = stated_name(values, sections, at, kind=kind)
    if isinstance(name, Problem):
        problems.append(name)
        return None
    return _validated(sections[name], values, at, problems)


def _parse_probes(values: Any, problems: list[Problem]) -> tuple[Plugin | None, ...]:
    if not isinstance(values, (list, tuple)):
        problems.append(Problem(("probes",), values, "must be a list; write `- name: knn` lines"))
        return ()
    found = tuple(parse_plugin(PROBES, value, ("probes", index), problems) for index, value in enumerate(values))
    for index, probe in enumerate(found):
        if probe is not None and probe in found[:index]:
            problems.append(Problem(("probes", index), probe.name, "the same probe is listed before; remove one"))
    return found

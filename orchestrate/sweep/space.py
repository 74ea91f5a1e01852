"""The space of a sweep, expanded into trials."""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any

from orchestrate.config.checks import step_problems
from orchestrate.config.construction import construction_problems
from orchestrate.config.load import Document, Key, Problem
from orchestrate.config.run import METHODS, RunConfig, parse_run
from orchestrate.errors import ConfigError, DataError
from orchestrate.sweep.config import SweepConfig, axis_keys
from ssl_methods import plugins

# url -> (digest, number of samples, names of the classes)
DatasetIdentity = Callable[[str], tuple[str, int, tuple[str, ...]]]
# url -> why it cannot be read; filled by those who make do with what a config states of its datasets
Unseen = dict[str, str]


@dataclass(frozen=True)
class Trial:
    """One frozen RunConfig of a sweep.

    Attributes:
        id: the config's fingerprint; empty while the datasets are not pinned.
        assignment: value of each axis, as the sweep file states it.
        num_samples: size of the training set; 0 while the datasets are not pinned.
    """

    id: str
    assignment: dict[str, Any]
    config: RunConfig
    num_samples: int = 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole budget."""
        train = self.config.train
        return train.budget.steps(num_samples=self.num_samples, global_batch=train.global_batch)


@dataclass(frozen=True)
class Point:
    """One assignment of values to dotted keys, with the place in the file that gave each value."""

    values: dict[str, Any]
    places: dict[str, Key]


def grid_points(space: Mapping[str, list[Any]]) -> list[Point]:
    """Combine every value of every axis, the last axis fastest.

    Raises:
        ValueError: a value of a joined axis has not one entry for each key.
    """
    axes = [[_point(axis, index, value) for index, value in enumerate(values)] for axis, values in space.items()]
    return [
        Point(
            {key: value for part in parts for key, value in part.values.items()},
            {key: place for part in parts for key, place in part.places.items()},
        )
        for parts in product(*axes)
    ]


def _point(axis: str, index: int, value: Any) -> Point:
    keys = axis_keys(axis)
    values = [value] if len(keys) == 1 else value
    if not isinstance(values, list) or len(values) != len(keys):
        raise ValueError(f"space.{axis}: {value!r}: needs a list of {len(keys)} values, one for each key")
    place: Key = ("space", axis, index)
    return Point(dict(zip(keys, values, strict=True)), dict.fromkeys(keys, place))


def expand(
    sweep: SweepConfig,
    document: Document,
    points: Iterable[Point],
    *,
    identity: DatasetIdentity | None = None,
    unseen: Unseen | None = None,
) -> tuple[Trial, ...]:
    """Build the trial of each point.

    Args:
        sweep, document: what `load_sweep` returned.
        points: what the strategy asks for.
        identity: looks a dataset up by its URL; without it datasets are not looked at and trials have no id.
        unseen: see `pin`.

    Raises:
        ConfigError: every problem of every trial, a line each, and trials that are the same.
    """
    messages: dict[str, None] = {}
    trials: list[Trial] = []
    points = list(points)
    for point, assignment in zip(points, _assignments(points), strict=True):
        trial = _trial(sweep, document, point, assignment, messages, identity=identity, unseen=unseen)
        if trial is not None:
            trials.append(trial)
    for message in _repeated(document, trials):
        messages[message] = None
    if messages:
        raise ConfigError("\n".join(messages))
    return tuple(trials)


def _trial(
    sweep: SweepConfig,
    document: Document,
    point: Point,
    assignment: dict[str, Any],
    messages: dict[str, None],
    *,
    identity: DatasetIdentity | None,
    unseen: Unseen | None,
) -> Trial | None:
    values = copy.deepcopy(sweep.base)
    for key in sorted(point.values, key=lambda key: key.count(".")):
        _assign(values, key.split("."), copy.deepcopy(point.values[key]))
    config, problems = parse_run(values)
    num_samples = 0
    if config is not None:
        problems = construction_problems(config)
    if config is not None and identity is None and config.data.train_samples:
        problems = [*problems, *step_problems(config, config.data.train_samples)]
    if config is not None and identity is not None:
        config, num_samples, found = pin(config, identity, unseen)
        problems = [*problems, *found]
    for problem in problems:
        messages[_message(document, point, problem)] = None
    if config is None or problems:
        return None
    return Trial(config.fingerprint() if identity else "", assignment, config, num_samples)


def _assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        child = values.get(part)
        values[part] = child if isinstance(child, dict) else {}
        values = values[part]
    values[path[-1]] = value


def _assignments(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Show whole sections on axes by their names, and by the keys that differ where names alone tell none apart."""
    named = [_named(point.values) for point in points]
    groups: dict[str, list[Point]] = {}
    for point, assignment in zip(points, named, strict=True):
        groups.setdefault(repr(assignment), []).append(point)
    telling: dict[tuple[str, str], dict[str, None]] = {}
    for group in groups.values():
        for axis, section in _named_sections(group[0]).items():
            others = [point.values[axis] for point in group]
            keys = dict.fromkeys(key for other in others for key in other)
            differ = [key for key in keys if len({repr(other.get(key)) for other in others}) > 1]
            telling.setdefault((axis, section["name"]), {}).update(dict.fromkeys(differ))
    return [_with_telling(assignment, point, telling) for point, assignment in zip(points, named, strict=True)]


def _with_telling(
    assignment: Mapping[str, Any], point: Point, telling: Mapping[tuple[str, str], Iterable[str]]
) -> dict[str, Any]:
    """Add, behind the name of each section, its keys that tell it from others of the name; axes of their own win."""
    sections = _named_sections(point)
    full: dict[str, Any] = {}
    for axis, value in assignment.items():
        full[axis] = value
        if section := sections.get(axis):
            full |= {f"{axis}.{key}": section[key] for key in telling[axis, section["name"]] if key in section}
    return {**full, **assignment}


def _named_sections(point: Point) -> dict[str, dict[str, Any]]:
    return {key: value for key, value in point.values.items() if isinstance(value, dict) and "name" in value}


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Show a section by its name, and one without a name by its keys."""
    named: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(value, dict):
            named[key] = value
        elif "name" in value:
            named[key] = value["name"]
        else:
            named |= {f"{key}.{part}": each for part, each in value.items()}
    return named


def _message(document: Document, point: Point, problem: Problem) -> str:
    """Locate a problem at the axis value that set its key, else in the base."""
    dotted = ".".join(str(part) for part in problem.key)
    setters = [key for key in point.places if f"{dotted}.".startswith(f"{key}.") or key.startswith(f"{dotted}.")]
    if setters:
        line = document.line(point.places[max(setters, key=len)])
        return document.message(problem, line=line)
    return document.message(problem, line=document.line(("base", *problem.key)))


def pin(
    config: RunConfig, identity: DatasetIdentity, unseen: Unseen | None = None
) -> tuple[RunConfig, int, list[Problem]]:
    """Write the digests of the datasets into a config.

    Args:
        config: with the URLs.
        identity: looks a dataset up by its URL.
        unseen: takes datasets that cannot be read from here, where the config states `data.train_samples`. Unless
            their digests are stated too, the trial then has another id than it will have where it runs.

    Returns:
        The pinned config, the number of training samples, and what is wrong now that they are known.
    """
    problems: list[Problem] = []
    digests: dict[str, str] = {}
    classes: dict[str, tuple[str, ...]] = {}
    num_samples = 0
    for split in ("train", "val"):
        url, stated = getattr(config.data, split), getattr(config.data, f"{split}_digest")
        try:
            digest, size, classes[split] = identity(url)
        except DataError as error:
            if unseen is None or not config.data.train_samples:
                problems.append(Problem(("data", split), url, str(error)))
                continue
            unseen[url] = str(error)
            digests[f"{split}_digest"] = stated or f"unseen {url}"
            num_samples = config.data.train_samples
            continue
        if stated and stated != digest:
            reason = f"the dataset there has the digest {digest}; the data changed, or the URL is wrong"
            problems.append(Problem(("data", f"{split}_digest"), stated, reason))
        if split == "train" and config.data.train_samples not in (0, size):
            reason = f"the dataset there has {size:,}; write that number, or leave it out"
            problems.append(Problem(("data", "train_samples"), config.data.train_samples, reason))
        problems.extend(_class_problems(config, split, len(classes[split])))
        digests[f"{split}_digest"] = digest
        num_samples = size if split == "train" else num_samples
    problems.extend(_order_problems(config, classes.get("train", ()), classes.get("val", ())))
    if num_samples:
        problems.extend(step_problems(config, num_samples))
    return config.model_copy(update={"data": config.data.model_copy(update=digests)}), num_samples, problems


def _class_problems(config: RunConfig, split: str, classes: int) -> list[Problem]:
    method: Any = plugins.load(METHODS, config.method.name)
    wanted = config.method.params.get("num_classes")
    # Without labels it is a guess of the user's, where the method needs none.
    if wanted is not None and wanted != classes and (classes or method.uses_labels):
        return [Problem(("method", "num_classes"), wanted, f"data.{split} has {classes} classes; write that number")]
    if config.probes and classes == 0:
        reason = "has no labels, which the probes need; pack it with labels, or remove the probes"
        return [Problem(("data", split), getattr(config.data, split), reason)]
    return []


def _order_problems(config: RunConfig, train: tuple[str, ...], val: tuple[str, ...]) -> list[Problem]:
    """Labels are positions in a split's own list of classes, so both splits must list the same."""
    if not train or not val or train == val:
        return []
    index, (ours, theirs) = next(
        (index, names) for index, names in enumerate(zip_longest(train, val)) if names[0] != names[1]
    )
    if len(train) != len(val):
        found = f"has {len(val)} classes, data.train has {len(train)}; the first that differs is {theirs or ours!r}"
    else:
        found = f"class {index} is {theirs!r}, of data.train {ours!r}"
    reason = (
        f"{found}; pack it with `orchestrate data pack SOURCE {config.data.val} --classes-from {config.data.train}`"
    )
    return [Problem(("data", "val"), config.data.val, reason)]


def _repeated(document: Document, trials: list[Trial]) -> list[str]:
    """Name the trials that would be the same training."""
    seen: dict[str, Trial] = {}
    messages = []
    for trial in trials:
        data = trial.config.data
        key = trial.id or json.dumps([trial.config.identity(), data.train, data.val], sort_keys=True)
        if key in seen:
            problem = Problem(
                ("space",),
                f"{seen[key].assignment} and {trial.assignment}",
                "are the same trial; remove one (keys of `system` do not tell trials apart)",
            )
            messages.append(document.message(problem))
        seen[key] = trial
    return messages

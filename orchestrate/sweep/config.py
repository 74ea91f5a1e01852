"""SweepConfig: what a sweep file says, before its space is expanded."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from orchestrate.config.load import ABSENT, Document, Key, Problem, problems_of, raise_problems, read_document
from orchestrate.config.plugin import parse_plugin
from orchestrate.config.section import Plugin, Section, resolve_plugin

STRATEGIES = "orchestrate.sweep.strategies"


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ValueError("must be letters, digits, `.`, `_` and `-`, at most 64, the first a letter or digit")
    return name


class Objective(Section):
    """Metric that ranks the trials, as `<probe key>.<number>` or `<probe name>.<number>`."""

    metric: str
    goal: Literal["max", "min"] = "max"


class SweepLimits(Section):
    """Most trials at once (0: as many as the cluster allows) and most GPU-hours in all (0: no limit)."""

    parallel: Annotated[int, Field(ge=0)] = 0
    gpu_hours: Annotated[float, Field(ge=0)] = 0.0


class SweepConfig(Section):
    """Desired state: a base run, the axes on which trials differ, and limits.

    `space` maps a dotted key of the base, or several joined by commas, to the values it takes;
    values of joined keys are lists, an entry a key.
    """

    name: Annotated[str, AfterValidator(_folder_name)]
    base: dict[str, Any]
    space: dict[str, list[Any]] = Field(default_factory=dict)
    strategy: dict[str, Any] = Field(default_factory=lambda: {"name": "grid"})
    objective: Objective | None = None
    limits: SweepLimits = SweepLimits()

    def resolved_strategy(self) -> Plugin:
        """Return the strategy with all its parameters."""
        return resolve_plugin(STRATEGIES, self.strategy)


def load_sweep(path: Path) -> tuple[SweepConfig, Document]:
    """Read a sweep file; its trials are checked by `orchestrate.sweep.space.expand`.

    Raises:
        ConfigError: every problem of the file, a line each.
    """
    document = read_document(path)
    return sweep_of(document), document


def sweep_of(document: Document) -> SweepConfig:
    """Build a SweepConfig from a parsed file; see `load_sweep`."""
    problems: list[Problem] = []
    sweep: SweepConfig | None = None
    try:
        sweep = SweepConfig.model_validate(document.data)
    except ValidationError as error:
        # A strategy that is no mapping is told below, by what could stand there.
        problems = [each for each in problems_of(error, SweepConfig, ()) if each.key != ("strategy",)]
    parse_plugin(STRATEGIES, document.data.get("strategy", {"name": "grid"}), ("strategy",), problems, kind="strategy")
    problems.extend(_space_problems(document.data.get("space", {})))
    if sweep is None or problems:
        raise_problems(document, problems)
    return sweep


def axis_keys(axis: str) -> list[str]:
    """Return the dotted keys that an axis sets together."""
    return [key.strip() for key in axis.split(",")]


def _space_problems(space: Any) -> Iterator[Problem]:
    """Find axes that cannot be meant; what their values do to a trial is seen when it is built."""
    if not isinstance(space, dict):
        return
    owners: dict[str, str] = {}
    for axis, values in space.items():
        at: Key = ("space", axis)
        keys = axis_keys(axis)
        if not all(all(key.split(".")) for key in keys):
            yield Problem(at, ABSENT, "names no key; write a key such as `train.seed`, or several joined by commas")
            continue
        for key in keys:
            if owners.setdefault(key, axis) != axis:
                yield Problem(at, ABSENT, f"`{key}` is on two axes; the other is `{owners[key]}`; remove one")
        for key in dict.fromkeys(key for key in keys if keys.count(key) > 1):
            yield Problem(at, ABSENT, f"names `{key}` twice; remove one")
        if values == []:
            yield Problem(at, ABSENT, "has no values; write at least one, or remove the axis")
        if isinstance(values, list) and len(keys) > 1:
            yield from _joined_problems(at, values, len(keys))


def _joined_problems(at: Key, values: list[Any], num_keys: int) -> Iterator[Problem]:
    for index, value in enumerate(values):
        if not (isinstance(value, list) and len(value) == num_keys):
            yield Problem((*at, index), value, f"must be a list of {num_keys} values, one for each key")

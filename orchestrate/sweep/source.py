"""Files that a user hands in, made into a sweep and its trials."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from orchestrate.config.kind import Kind, kind_of, require_kind
from orchestrate.config.load import Document, read_document
from orchestrate.config.run import run_of
from orchestrate.errors import ConfigError
from orchestrate.sweep.config import STRATEGIES, SweepConfig, sweep_of
from orchestrate.sweep.record import counted
from orchestrate.sweep.space import DatasetIdentity, Trial, Unseen, expand
from ssl_methods import plugins

_UNSEEN = "# its data was not looked at; `orchestrate plan` does that"


@dataclass(frozen=True)
class Source:
    """A sweep file, or a run file as a sweep of one, with its trials."""

    sweep: SweepConfig
    document: Document
    trials: tuple[Trial, ...]


def load_source(
    path: Path,
    kind: Literal["sweep", "run"],
    *,
    identity: DatasetIdentity | None = None,
    unseen: Unseen | None = None,
) -> Source:
    """Read a sweep file and expand it, or a run file as a sweep of one.

    Args:
        path: of the file.
        kind: what the file must be.
        identity: looks a dataset up by its URL; without it the trials have no ids.
        unseen: gets the datasets that cannot be read from here, of which the file states the size; see `space.pin`.

    Raises:
        ConfigError: every problem of the file and of every trial, a line each.
    """
    document = read_document(path)
    require_kind(document, kind)
    if kind == "run":
        run_of(document)  # its problems are told with the lines of the run file
        document = _as_sweep(document)
    sweep = sweep_of(document)
    strategy = sweep.resolved_strategy()
    try:
        points = plugins.load(STRATEGIES, strategy.name)(**strategy.params).ask(sweep.space)
    except ValueError as error:
        raise ConfigError(f"{path}:{document.line(('space',))}: {error}") from error
    return Source(sweep, document, expand(sweep, document, points, identity=identity, unseen=unseen))


def _as_sweep(document: Document) -> Document:
    lines = {("base", *key): line for key, line in document.lines.items()}
    data = {"name": sweep_name_of_run(document.path), "base": dict(document.data)}
    return replace(document, data=data, lines=lines)


def sweep_name_of_run(path: Path) -> str:
    """Name the sweep of one that a run file makes: the file's name, with what a name cannot hold replaced."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", path.stem).lstrip("._-")[:64] or "run"


def resolved(path: Path) -> tuple[Kind, Mapping[str, Any]]:
    """Validate any config file and return its kind and its resolved values.

    Raises:
        ConfigError: every problem of the file, a line each.
    """
    from orchestrate.launchers.cluster import load_cluster

    kind = kind_of(read_document(path))
    if kind == "cluster":
        return kind, load_cluster(path).model_dump(mode="json")
    source = load_source(path, kind)
    configs = [trial.config.model_dump(mode="json") for trial in source.trials]
    if kind == "run":
        return kind, configs[0]
    stated = source.sweep.model_dump(mode="json") | {"strategy": source.sweep.resolved_strategy().flat()}
    trials = [
        {"assignment": trial.assignment, "config": config} for trial, config in zip(source.trials, configs, strict=True)
    ]
    return kind, {key: stated[key] for key in stated if key != "base"} | {"trials": trials}


def _assignment_text(assignment: Mapping[str, Any]) -> str:
    return "  ".join(f"{key}={value}" for key, value in assignment.items()) or "the base alone"


def resolved_text(path: Path, kind: Kind, values: Mapping[str, Any]) -> str:
    """Write a resolved config for people: as YAML, of a sweep the trials and the first config."""
    if kind != "sweep":
        note = f"\n{_UNSEEN}" if kind == "run" else ""
        return f"# {path}: a valid {kind} file, resolved{note}\n{yaml.safe_dump(dict(values), sort_keys=False)}"
    trials = values["trials"]
    rest = {key: value for key, value in values.items() if key not in ("trials", "space")}
    lines = [
        f"# {path}: a valid sweep file of {counted(len(trials), 'trial')}",
        _UNSEEN,
        yaml.safe_dump(rest, sort_keys=False).rstrip(),
    ]
    lines += ["# trials", *(f"#   {_assignment_text(trial['assignment'])}" for trial in trials)]
    return "\n".join([*lines, "# the first trial, resolved", yaml.safe_dump(trials[0]["config"], sort_keys=False)])

"""Sections that begin with a name: plug-ins, optimizers, strategies."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from orchestrate.config.load import ABSENT, Key, Problem, problems_of, suggestion
from orchestrate.config.section import Plugin, plugin_section, resolve_plugin
from ssl_methods import plugins


def stated_name(values: Any, known: Iterable[str], at: Key, *, kind: str) -> str | Problem:
    """Return the known name that a section states, or say what is wrong with it.

    Args:
        values: the section as the file has it; ABSENT if it has none.
        known: the names there are.
        at: place of the section.
        kind: what the names are of, for the message.
    """
    choices = list(known)
    if values is ABSENT:
        return Problem(at, ABSENT, f"missing section; it needs `name`, one of {', '.join(choices)}")
    if isinstance(values, str):
        if values in choices:
            return Problem(at, values, f"must be a mapping; write `{{name: {values}}}`")
        return Problem(at, values, f"must be a mapping, and there is no such {kind}; {suggestion(values, choices)}")
    if not isinstance(values, Mapping):
        return Problem(at, values, f"must be a mapping; write `{{name: ...}}`, one of {', '.join(choices)}")
    if "name" not in values:
        return Problem((*at, "name"), ABSENT, f"missing; one of {', '.join(choices)}")
    name = values["name"]
    if not isinstance(name, str) or name not in choices:
        return Problem((*at, "name"), name, f"no such {kind}; {suggestion(str(name), choices)}")
    return name


def parse_plugin(
    package: str, values: Any, at: Key, problems: list[Problem], *, kind: str = "plug-in"
) -> Plugin | None:
    """Resolve the section of a plug-in, or add what is wrong with it to `problems`."""
    name = stated_name(values, plugins.names(package), at, kind=kind)
    if isinstance(name, Problem):
        problems.append(name)
        return None
    try:
        return resolve_plugin(package, values)
    except ValidationError as error:
        problems.extend(problems_of(error, plugin_section(package, name), at))
        return None

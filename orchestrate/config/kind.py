"""What a config file is: a sweep, a run or a cluster."""

from collections.abc import Mapping
from typing import Literal

from orchestrate.config.load import Document
from orchestrate.errors import ConfigError

Kind = Literal["sweep", "run", "cluster"]
_WHERE_IT_BELONGS: Mapping[Kind, str] = {
    "cluster": "give it with --cluster",
    "run": "start it with `orchestrate run`",
    "sweep": "start it with `orchestrate sweep`",
}


def looks_like(document: Document) -> Kind | None:
    """Tell what a config file is by its sections; None if it has the sections of no kind."""
    if "launcher" in document.data:
        return "cluster"
    if "base" in document.data:
        return "sweep"
    return "run" if {"method", "train", "backbone"} & set(document.data) else None


def kind_of(document: Document) -> Kind:
    """Tell what a config file is.

    Raises:
        ConfigError: it has the sections of no kind.
    """
    kind = looks_like(document)
    if kind is None:
        has = "a sweep has `base`, a run `method`, a cluster `launcher`"
        raise ConfigError(f"{document.path}:1: cannot tell what this is; {has}")
    return kind


def require_kind(document: Document, kind: Kind) -> None:
    """Refuse a file of another kind.

    Raises:
        ConfigError: the file is of another kind or of none; says where it belongs.
    """
    found = kind_of(document)
    if found != kind:
        where = _WHERE_IT_BELONGS[found]
        raise ConfigError(f"{document.path}:1: is a {found} file, a {kind} file is needed here; {where}")

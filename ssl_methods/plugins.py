"""Plug-ins by file name: what a package offers, and the one class of each file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from difflib import get_close_matches


def names(package: str) -> tuple[str, ...]:
    """List the plug-in files of a package, sorted, without importing any of them.

    Raises:
        ValueError: there is no such package.
    """
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # a package above it is missing
        spec = None
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError(f"{package}: not a package")
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return tuple(sorted(module.name for module in found if not module.ispkg and not module.name.startswith("_")))


def load(package: str, name: str) -> type:
    """Import a plug-in file and return the one public class it defines.

    Raises:
        ValueError: the package has no such file.
        TypeError: the file defines no public class, or several.
    """
    known = names(package)
    if name not in known:
        raise ValueError(f"{package}: no {name!r}{_did_you_mean(name, known)}; known: {', '.join(known)}")
    module = importlib.import_module(f"{package}.{name}")
    public = [
        value
        for key, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if len(public) != 1:
        found = ", ".join(each.__name__ for each in public) or "none"
        raise TypeError(f"{module.__name__}: a plug-in file defines one public class, found {found}")
    return public[0]


def _did_you_mean(name: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""

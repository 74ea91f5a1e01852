"""YAML text -> values with the line of every key, and every error at once as `file:line: key: value: reason; fix`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from pydantic import ValidationError
from yaml.reader import ReaderError

from orchestrate.config.section import Section
from orchestrate.errors import ConfigError

Key = tuple[str | int, ...]
SectionT = TypeVar("SectionT", bound=Section)
ABSENT: Any = object()  # value of a problem that is about a key alone


class _Loader(yaml.SafeLoader):
    """YAML without the surprises of version 1.1.

    `1e-6` is a number; `on`, `off`, `yes`, `no`, `010`, `1_000` and `1:30` are words.
    """


_TAG = "tag:yaml.org,2002:"
_SURPRISING = tuple(f"{_TAG}{kind}" for kind in ("bool", "int", "float", "value"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _SURPRISING]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern, _first in (
    ("bool", r"true|True|false|False", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+", "-+0123456789."),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as a word."""


# Also what YAML 1.1 takes for something else, for readers that are not ours.
_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *resolvers]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}

_DEEPEST = 100  # levels; our files have six, and Python's stack ends at some hundred
_TOO_DEEP = f"nested more than {_DEEPEST} levels deep, or an anchor that holds itself"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in a file; `key` locates it, `reason` says why and what to write."""

    key: Key
    value: Any
    reason: str


@dataclass(frozen=True)
class Document:
    """A parsed YAML file that remembers the line of every key.

    Attributes:
        path: as the user wrote it.
        data: plain Python values.
        lines: 1-based line of each key path; the path of a list item ends in its index.
    """

    path: Path
    data: dict[str, Any]
    lines: Mapping[Key, int] = field(default_factory=dict)
    text: str = ""

    def line(self, key: Key) -> int:
        """Return the line of a key, or of the nearest parent that the file states."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def message(self, problem: Problem, *, line: int | None = None) -> str:
        """Write a problem as `file:line: key: value: reason`."""
        value = "" if problem.value is ABSENT else f"{_short(problem.value)}: "
        return f"{self.path}:{line or self.line(problem.key)}: {dotted(problem.key)}: {value}{problem.reason}"


def dotted(key: Key) -> str:
    """Write a key path as it is typed in a sweep's space."""
    return ".".join(str(part) for part in key) or "(whole file)"


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_document(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: no such file, not YAML, a key given twice, or not a mapping.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file; give the path of a YAML file") from error
    return parse_document(text, path)


def parse_document(text: str, path: Path) -> Document:
    """Parse YAML text; see `read_document`."""
    lines: dict[Key, int] = {}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        data = {} if node is None else _construct(loader, node, (), lines, path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {error.problem}") from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        reason = f"the character U+{ord(text[error.position]):04X} cannot be in a text; remove it"
        raise ConfigError(f"{path}:{line}: not YAML: {reason}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}:1: not YAML: {_TOO_DEEP}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: the top level is a {type(data).__name__}; write `key: value` lines")
    return Document(path, data, lines, text)


def _construct(loader: _Loader, node: yaml.Node, key: Key, lines: dict[Key, int], path: Path) -> Any:
    if len(key) > _DEEPEST:
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: not YAML: {_TOO_DEEP}")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{path}:{key_node.start_mark.line + 1}: not YAML: a key must be one word")
            name = str(_scalar(loader, key_node, key, path))
            if name in result:
                raise ConfigError(
                    f"{path}:{key_node.start_mark.line + 1}: {dotted((*key, name))}: given twice; "
                    f"the first is on line {lines[(*key, name)]}"
                )
            lines[(*key, name)] = key_node.start_mark.line + 1
            result[name] = _construct(loader, value_node, (*key, name), lines, path)
        return result
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines[(*key, index)] = item.start_mark.line + 1
        return [_construct(loader, item, (*key, index), lines, path) for index, item in enumerate(node.value)]
    return _scalar(loader, node, key, path)


def _scalar(loader: _Loader, node: yaml.Node, key: Key, path: Path) -> Any:
    where = f"{path}:{node.start_mark.line + 1}: not YAML: {dotted(key)}"
    try:
        value = loader.construct_object(node)
    except (ValueError, LookupError, AttributeError) as error:  # what PyYAML raises is up to each kind of scalar
        kind = node.tag.removeprefix(_TAG)
        raise ConfigError(f"{where}: {_short(node.value)} is no {kind}; quote it if it is a text") from error
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where}: holds a NUL character; remove it")
    return value


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write plain values so that `parse_document` reads equal ones."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def suggestion(name: str, known: Iterable[str]) -> str:
    """Say which known name was meant, or list them all."""
    choices = list(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else f"known: {', '.join(choices)}"


def problems_of(error: ValidationError, section: type[Section], at: Key) -> list[Problem]:
    """Translate a validation error of a section into problems located below `at`."""
    return [_problem(entry, section, at) for entry in error.errors()]


def _problem(entry: Any, section: type[Section], at: Key) -> Problem:
    location = tuple(entry["loc"])
    if location and location[-1] == "[key]":  # pydantic's mark for a key, not a value, that is wrong
        location = location[:-1]
    key = (*at, *location)
    if entry["type"] == "extra_forbidden":
        owner = _section_at(section, location[:-1])
        return Problem(key, ABSENT, f"unknown key; {suggestion(str(location[-1]), owner.model_fields)}")
    if entry["type"] == "missing":
        owner = _section_at(section, location[:-1])
        parent = dotted(key[:-1]) if key[:-1] else "the file"
        return Problem(key, ABSENT, f"missing; add `{location[-1]}: ...` to {parent}")
    if entry["type"] == "model_type":
        return Problem(key, entry["input"], _mapping_hint(_section_at(section, location), entry["input"]))
    if entry["type"] in _REASONS:
        return Problem(key, entry["input"], _REASONS[entry["type"]])
    reason = entry["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if reason != entry["msg"] and entry["msg"].startswith("Input should be "):
        reason = f"must be {reason}"
    return Problem(key, entry["input"], reason)


_REASONS = {
    "dict_type": "must be a mapping of keys; write `key: value` lines",
    "list_type": "must be a list; write `[a, b]`",
    "tuple_type": "must be a list; write `[a, b]`",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


def _mapping_hint(section: type[Section], value: Any) -> str:
    fields = section.model_fields
    first = next((name for name, info in fields.items() if info.is_required()), next(iter(fields), "key"))
    if first == "name" and isinstance(value, str):
        return f"must be a mapping of keys; write `{{name: {value}}}`"
    return f"must be a mapping of keys, such as `{{{first}: ...}}`"


def _section_at(section: type[Section], location: tuple[Any, ...]) -> type[Section]:
    for part in location:
        field_info = section.model_fields.get(str(part))
        annotation = field_info.annotation if field_info else None
        for each in (annotation, *get_args(annotation)):
            if isinstance(each, type) and issubclass(each, Section):
                section = each
    return section


def build_section(section: type[SectionT], document: Document) -> SectionT:
    """Build a section from a whole file.

    Raises:
        ConfigError: every problem of the file, a line each.
    """
    try:
        return section.model_validate(document.data)
    except ValidationError as error:
        raise_problems(document, problems_of(error, section, ()))


def raise_problems(document: Document, problems: Iterable[Problem]) -> NoReturn:
    """Raise one ConfigError that holds all the problems.

    Raises:
        ConfigError: always.
    """
    messages = dict.fromkeys(document.message(problem) for problem in problems)
    raise ConfigError("\n".join(messages))

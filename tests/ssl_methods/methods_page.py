"""docs/methods.md, written from the code: `scripts/methods_page` writes it, a test sees that it is current."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_methods import plugins
from tests.ssl_methods.method_costs import BATCH, PACKAGE, Pass, count_flops, count_passes

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
HEADINGS = ("Args", "Differs", "Source")
_ARGUMENT = re.compile(r"(\w+(?:, \w+)*): (.+)")

HEAD = f"""# Methods

Written by `scripts/methods_page` from the code, and checked by `pytest tests/ssl_methods/test_methods_page.py`.
A method's section in a sweep has the knobs of its list; `orchestrate check` names what is wrong with them.

- **Views** go through the trained backbone with gradient, an image and step; beside them the relative number of pixels.
- **GFLOP** of an image and step: forward and backward pass of all networks and the loss on a ResNet-50, views of 224
  pixels, {BATCH} images on one rank, a multiplication with its addition counted as two. What a supervised step costs is
  the yardstick for "compute".
- **Twin**: a moving average of the trained network is kept, and moved after each step.
- **Stages**: parts of the training that `train.stages` separates; what a knob asks for more is said there.
- **Ranks**: whether N ranks compute the numbers of one process; if not, what ties them to their number.
"""


@dataclass(frozen=True)
class Description:
    """The parts of a method's docstring.

    Attributes:
        text: paragraphs that belong to no heading.
        knobs: meaning of each, by name.
        differs: points in which it is another one than the authors' code.
        source: of the method.
    """

    text: tuple[str, ...]
    knobs: dict[str, str]
    differs: tuple[str, ...]
    source: str


def describe(method: type) -> Description:
    """Take a docstring apart.

    Raises:
        ValueError: a heading is missing.
    """
    paragraphs = inspect.cleandoc(method.__doc__ or "").split("\n\n")
    found = dict.fromkeys(HEADINGS, "")
    text = []
    for paragraph in paragraphs:
        heading = paragraph.partition(":")[0]
        if heading in found:
            found[heading] = paragraph.removeprefix(f"{heading}:")
        else:
            text.append(_joined(paragraph))
    if missing := [heading for heading, body in found.items() if not body.strip()]:
        raise ValueError(f"{method.__name__}: no {', '.join(missing)} in its docstring")
    knobs = {
        name: meaning
        for names, meaning in (_argument(entry) for entry in _entries(found["Args"]))
        for name in names.split(", ")
        if name != "backbone"
    }
    differs = tuple(entry.removeprefix("- ") for entry in _entries(found["Differs"]))
    return Description(tuple(text), knobs, differs, _joined(found["Source"]))


def _entries(body: str) -> list[str]:
    """Split an indented list whose entries go on with a deeper indentation."""
    lines = inspect.cleandoc(f"\n{body.strip(chr(10))}").splitlines()
    entries: list[str] = []
    for line in lines:
        if line.startswith(" "):
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    return entries


def _argument(entry: str) -> tuple[str, str]:
    match = _ARGUMENT.fullmatch(entry)
    if match is None:
        raise ValueError(f"{entry!r}: not `name: meaning`")
    return match[1], match[2]


def _joined(paragraph: str) -> str:
    return " ".join(paragraph.split())


def page(flops: Mapping[str, float]) -> str:
    """Write the page; `flops` of an image and step by method, in units of 10^9."""
    names = plugins.names(PACKAGE)
    rows = ["| method | views | GFLOP | twin | stages | ranks |", "|---|---|---|---|---|---|"]
    rows += [_row(name, flops[name]) for name in names]
    return "\n".join([HEAD, *rows, "", *(_section(name) for name in names)])


def _row(name: str, gigaflop: float) -> str:
    method: Any = plugins.load(PACKAGE, name)
    ranks = "; ".join(method.rank_bound) or "as one process"
    stages = "1" if method.num_stages is _default_stages() else "1 or 2"
    cells = (f"[{name}](#{name})", views_text(count_passes(name)), f"{gigaflop:.1f}")
    return f"| {' | '.join((*cells, 'yes' if method.has_twin else 'no', stages, ranks))} |"


def _default_stages() -> object:
    from ssl_methods.method import Method

    return Method.num_stages


def views_text(passes: Iterable[Pass]) -> str:
    """Write passes as `2 + 8 x 0.18 = 3.47`."""
    passes = tuple(passes)
    parts = [f"{each.views:g}" if each.area == 1 else f"{each.views:g} x {each.area:.2f}" for each in passes]
    text = " + ".join(parts)
    return text if text.isdigit() else f"{text} = {sum(each.views * each.area for each in passes):.2f}"


def _section(name: str) -> str:
    method: Any = plugins.load(PACKAGE, name)
    described = describe(method)
    lines = [f"## {name}", "", *_spaced(described.text), "```", method.equation, "```", ""]
    parameters = inspect.signature(method).parameters.values()
    knobs = [each for each in parameters if each.name in described.knobs]
    if knobs:
        lines += ["| knob | default | |", "|---|---|---|"]
        lines += [f"| `{each.name}` | {_default(each)} | {_in_cell(described.knobs[each.name])} |" for each in knobs]
        lines += [""]
    lines += ["Differs from the authors' code:", "", *(f"- {point}" for point in described.differs), ""]
    recipe = f"Views it was published with: `{method.default_views}`."
    return "\n".join([*lines, f"{recipe} Source: {described.source}", ""])


def _in_cell(text: str) -> str:
    return text.replace("|", "\\|")


def _spaced(paragraphs: Iterable[str]) -> list[str]:
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is inspect.Parameter.empty:
        return "(to be given)"
    value = parameter.default
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value:.4g}`" if isinstance(value, float) else f"`{value}`" if value != "" else '`""`'


def written_flops(text: str) -> dict[str, float]:
    """Read the operations back from a page."""
    found = re.findall(r"^\| \[(\w+)\]\(#\w+\) \| [^|]+ \| ([0-9.]+) \|", text, re.MULTILINE)
    return {name: float(number) for name, number in found}


def main() -> None:
    """Write the page."""
    flops = {name: count_flops(name) / 1e9 for name in plugins.names(PACKAGE)}
    PAGE.write_text(page(flops))
    print(PAGE)


if __name__ == "__main__":
    main()

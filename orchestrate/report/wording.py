"""Numbers and names as a reader wants them: few digits, with units."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime

from orchestrate.report.curves import EMBED_DIM, Line, Spread

NONE = "\N{EN DASH}"
TIMES = "\N{MULTIPLICATION SIGN}"
RANK_TIME = f"time {TIMES} ranks"  # compute: wall-clock time, once for each rank
SPACE = "\N{NO-BREAK SPACE}"  # between a number and its unit
_FRACTIONS = {"accuracy": "accuracy", "top1": "top-1 accuracy", "top5": "top-5 accuracy"}
_DAY = 86400


def axis_name(axis: str) -> str:
    """Name a swept axis on a figure: the embedding dimension in words, others by their key without `method.`."""
    return "embedding dimension" if axis == EMBED_DIM else axis.removeprefix("method.")


@dataclass(frozen=True)
class Metric:
    """How to write values of `<probe key>.<name>`: accuracies as percent, anything else with four digits."""

    key: str

    @property
    def probe(self) -> str:
        """Name the probe with its protocol."""
        return self.key.rpartition(".")[0]

    @property
    def label(self) -> str:
        """Say what is measured, without the protocol."""
        name = self.key.rpartition(".")[2]
        return _FRACTIONS.get(name, name)

    @property
    def title(self) -> str:
        """Give the label as the start of a sentence."""
        return self.label[:1].upper() + self.label[1:]

    @property
    def is_fraction(self) -> bool:
        """Tell whether values lie between 0 and 1 and are written as percent."""
        return self.key.rpartition(".")[2] in _FRACTIONS

    @property
    def margin_unit(self) -> str:
        """Name the unit of a difference of two values, with a leading space; empty if there is none."""
        return " points" if self.is_fraction else ""

    def value(self, value: float) -> str:
        """Write a value with its unit: `81.2 %`."""
        return f"{self.number(value)}{SPACE}%" if self.is_fraction else self.number(value)

    def number(self, value: float) -> str:
        """Write a value without its unit: `81.2`."""
        return minus(f"{100 * value:.1f}" if self.is_fraction else f"{value:.4g}")

    def margin(self, value: float) -> str:
        """Write a difference of two values with its sign and without its unit: `+14.3`."""
        return minus(f"{100 * value:+.1f}" if self.is_fraction else f"{value:+.3g}")

    def range(self, spread: Spread) -> str:
        """Write the lowest and the highest of several seeds, without the unit; a dash for one seed."""
        return f"{self.number(spread.low)} to {self.number(spread.high)}" if spread.n > 1 else NONE

    def margin_range(self, spread: Spread) -> str:
        """Write the lowest and the highest margin of several seeds; a dash for one seed."""
        return f"{self.margin(spread.low)} to {self.margin(spread.high)}" if spread.n > 1 else NONE


def minus(text: str) -> str:
    """Write a true minus sign, and no sign for a number that rounds to zero."""
    if text[:1] in "+-" and not text.strip("+-0."):
        text = text[1:]
    return text.replace("-", "\N{MINUS SIGN}")


def count(value: float | None) -> str:
    """Write a whole number with thousands separated: `1,200,000`."""
    return NONE if value is None else f"{value:,.0f}"


def short_count(value: float) -> str:
    """Write a number in at most four characters and a letter: `1.2M`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def epochs(value: float) -> str:
    """Write the epochs of a budget: `0.5`, `20`, `300`; `2` for the 2.005 that whole steps make of 2."""
    rounded = round(value, 1)
    return f"{rounded:g}" if math.isclose(value, rounded, rel_tol=0.01) else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Write a time with its two leading units: `38 s`, `4 min 12 s`, `2 h 05 min`, `3 d 4 h`."""
    if seconds is None:
        return NONE
    whole = round(seconds)
    if seconds < 10:
        text = f"{seconds:.2g} s"
    elif whole < 60:
        text = f"{whole} s"
    elif whole < 3600:
        text = f"{whole // 60} min {whole % 60:02d} s"
    elif whole < _DAY:
        text = f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    else:
        text = f"{whole // _DAY} d {whole % _DAY // 3600} h"
    return text.replace(" ", SPACE)


def tick_duration(seconds: float, *, unit_of: float | None = None) -> str:
    """Write a time with one unit, for an axis: `30 s`, `5 min`, `2 h`; the unit is that of `unit_of` if given."""
    for size, unit in ((_DAY, "d"), (3600, "h"), (60, "min")):
        if (unit_of or seconds) >= size:
            return f"{seconds / size:.3g}{SPACE}{unit}"
    return f"{seconds:.3g}{SPACE}s"


def moment(unix: float | None) -> str:
    """Write a time of day in UTC; the reader may be elsewhere than the cluster."""
    return NONE if unix is None else datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M UTC")


def line_name(line: Line, *, with_dim: bool = True) -> str:
    """Name a line for a reader: `barlow_twins · 256`."""
    dim = [str(line.embed_dim)] if with_dim and line.embed_dim is not None else []
    return " · ".join([line.method, *dim, *variant_names(line)])


def variant_names(line: Line) -> tuple[str, ...]:
    """Name the other axes that tell a line from its neighbours: `backbone=resnet50`, `optim.lr=0.2`."""
    return tuple(f"{axis.removeprefix('method.').removesuffix('.name')}={value}" for axis, value in line.variant)


def budget_name(budget: str) -> str:
    """Name a budget for a reader: `20ep` as `20 epochs`; anything unknown stays as it is."""
    match = re.fullmatch(r"([0-9.]+)(ep|Mimg|kstep|gpuh)", budget)
    if match is None:
        return budget
    singular = {"ep": "epoch", "Mimg": "million image", "kstep": "thousand step", "gpuh": "GPU-hour"}[match[2]]
    return f"{match[1]} {singular}{'' if match[1] == '1' and match[2] in ('ep', 'gpuh') else 's'}"


def plural(number: int, noun: str) -> str:
    """Count things: `1 trial`, `3 trials`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def printable(text: str, *, limit: int = 10_000) -> str:
    """Make any text fit for XML on one line: control characters become U+FFFD, too long ones end in an ellipsis."""
    clean = "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) in ("Cc", "Cs", "Cn") else c for c in text)
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"

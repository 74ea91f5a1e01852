"""How a line looks in every figure and legend: colour and marker say the method, shade and dashes the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrate.report.curves import Line

# Told apart under the common kinds of colour blindness and dark enough for thin lines on white; after Okabe and Ito
# (2008), with orange and sky blue darkened. Markers go round with another period, so that they repeat together late.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a6428d", "#b08500", "#2f9fd6", "#5b5b5b", "#7b3f00")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES: tuple[tuple[float, ...], ...] = ((), (6, 2), (2.5, 1.6), (7, 2, 1.5, 2), (1, 1.6))
# The same shapes as matplotlib's markers, for the legend: SVG paths around (0, 0).
_MARKER_PATHS = {
    "o": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "s": "M-3.6,-3.6H3.6V3.6H-3.6Z",
    "^": "M0,-4.4L4.2,3.4H-4.2Z",
    "D": "M0,-4.6L4.6,0L0,4.6L-4.6,0Z",
    "v": "M0,4.4L4.2,-3.4H-4.2Z",
    "P": "M-1.6,-4.2H1.6V-1.6H4.2V1.6H1.6V4.2H-1.6V1.6H-4.2V-1.6H-1.6Z",
    "X": "M-4,-2L-2,-4L0,-2L2,-4L4,-2L2,0L4,2L2,4L0,2L-2,4L-4,2L-2,0Z",
}


@dataclass(frozen=True)
class Look:
    """Colour as #rrggbb, a matplotlib marker, and dashes in pixels (empty: solid)."""

    colour: str
    marker: str
    dashes: tuple[float, ...] = ()

    @property
    def marker_path(self) -> str:
        """Draw the marker as an SVG path around (0, 0), about 8 pixels wide."""
        return _MARKER_PATHS[self.marker]


RANDOM_INIT = Look("#555555", "o", (7, 3))
RAW_PIXELS = Look("#555555", "o", (1.5, 2.5))


def method_looks(lines: Sequence[Line]) -> dict[str, Look]:
    """Give each method a colour and a marker, by the order of their names."""
    methods = sorted({line.method for line in lines})
    return {
        name: Look(_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])
        for index, name in enumerate(methods)
    }


def line_looks(lines: Sequence[Line]) -> dict[Line, Look]:
    """Shade each method's lines: the largest dimension solid and dark, the smaller ones lighter and dashed.

    The same dimension looks the same in all methods.
    """
    by_method = method_looks(lines)
    kinds = sorted({_kind(line) for line in lines}, reverse=True)
    looks = {}
    for line in lines:
        rank, own = kinds.index(_kind(line)), by_method[line.method]
        light = 0.5 * rank / max(len(kinds) - 1, 1)
        looks[line] = Look(lighten(own.colour, light), own.marker, _DASHES[rank % len(_DASHES)])
    return looks


def lighten(colour: str, share: float) -> str:
    """Mix a #rrggbb colour with white: 0 leaves it, 1 gives white."""
    return _from_channels(channel + (255 - channel) * share for channel in _channels(colour))


def darken(colour: str) -> str:
    """Make a #rrggbb colour dark enough for small text on white: a contrast of at least 4.5 (WCAG AA)."""
    while _contrast_with_white(colour) < 4.5:
        colour = _from_channels(0.95 * channel for channel in _channels(colour))
    return colour


def _contrast_with_white(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in _channels(colour))]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 1.05 / (luminance + 0.05)


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[start : start + 2], 16) for start in (1, 3, 5))


def _from_channels(channels: Iterable[float]) -> str:
    return "#" + "".join(f"{round(channel):02x}" for channel in channels)


def _kind(line: Line) -> tuple[int, tuple[tuple[str, str], ...]]:
    return (-1 if line.embed_dim is None else line.embed_dim, line.variant)

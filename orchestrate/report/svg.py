"""A matplotlib figure as an SVG element that can stand inside an HTML page beside others."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from orchestrate.report.wording import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1c2430", "#5b6573", "#e4e7eb"
# Any: the type of the keys is another one in each release of matplotlib.
_STYLE: Any = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same layout on every machine
    "font.size": 11.5,
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "text.parse_math": False,  # a name may hold a dollar sign
    "text.color": INK,
    "axes.edgecolor": "#aab2bd",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.labelpad": 6,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#aab2bd",
    "ytick.color": "#aab2bd",
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
    "lines.dash_capstyle": "butt",
}
_LARGEST_SCALE = 1.15  # a figure may grow a little to fill its column
PIXELS_PER_INCH = 72  # the SVG backend always counts so


@contextmanager
def house_style() -> Iterator[None]:
    """Apply the report's style to figures that are built inside, and nothing else."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()  # a reader's own matplotlibrc must not change the page
        matplotlib.rcParams.update(_STYLE)
        # The browser draws the text, with fonts of its own; what DejaVu lacks does not matter.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of a size in pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / PIXELS_PER_INCH, height / PIXELS_PER_INCH), dpi=PIXELS_PER_INCH)


def to_inline_svg(figure: Figure, *, name: str, alt: str) -> str:
    """Render a figure as one `<svg>` element.

    Args:
        figure: built under `house_style`; call this under it too.
        name: unique on the page; ids inside get it as prefix, so that figures do not take each other's clip paths.
        alt: what a reader who cannot see the figure is told.

    Returns:
        The element without XML declaration, scripts, metadata or namespaces; equal bytes for equal figures.
    """
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root)
    for element in root.iter():
        _make_inline(element, prefix=f"{name}-")
    width = root.attrib.pop("width").removesuffix("pt")
    for attribute in ("height", "version"):
        root.attrib.pop(attribute, None)
    style = f"max-width:{_LARGEST_SCALE * float(width):.0f}px"
    root.attrib.update({"role": "img", "aria-label": printable(alt), "style": style})
    return ElementTree.tostring(root, encoding="unicode")


def _strip(root: ElementTree.Element) -> None:
    """Drop metadata and the style sheet: inside a page its `*` rule would hit everything."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)


def _make_inline(element: ElementTree.Element, *, prefix: str) -> None:
    element.tag = element.tag.rpartition("}")[2]
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for key, value in attributes.items():
        if key == "id":
            attributes[key] = prefix + value
        elif key == "href":
            attributes[key] = value.replace("#", f"#{prefix}", 1)
        elif "url(#" in value:
            attributes[key] = value.replace("url(#", f"url(#{prefix}")
    element.attrib.clear()
    element.attrib.update(attributes)

"""Every combination."""

from collections.abc import Mapping
from typing import Any

from orchestrate.sweep.space import Point, grid_points


class Grid:
    """Ask for every combination of the values of all axes, the last axis fastest."""

    def ask(self, space: Mapping[str, list[Any]]) -> list[Point]:
        """Return the points that should have a trial."""
        return grid_points(space)

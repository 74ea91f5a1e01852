"""SweepConfig: what a sweep file says, before its space is expanded."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from orchestrate.config.load import Document, Problem, build_section, raise_problems, read_document, suggestion
from orchestrate.config.section import Plugin, Section, resolve_plugin
from ssl_methods import plugins

STRATEGIES = "orchestrate.sweep.strategies"


class Objective(Section):
    """Metric that ranks the trials, as `<probe key>.<number>` or `<probe name>.<number>`."""

    metric: str
    goal: Literal["max", "min"] = "max"


class SweepLimits(Section):
    """Most trials at once (0: as many as the cluster allows) and most GPU-hours in all (0: no limit)."""

    parallel: Annotated[int, Field(ge=0)] = 0
    gpu_hours: Annotated[float, Field(ge=0)] = 0.0


class SweepConfig(Section):
    """Desired state: a base run, the axes on which trials differ, and limits.

    `space` maps a dotted key of the base, or several joined by commas, to the values it takes;
    values of joined keys are lists, an entry a key.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    base: dict[str, Any]
    space: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    strategy: dict[str, Any] = Field(default_factory=lambda: {"name": "grid"})
    objective: Objective | None = None
    limits: SweepLimits = SweepLimits()

    @field_validator("space")
    @classmethod
    def _joined_keys_have_joined_values(cls, space: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for axis, values in space.items():
            keys = axis.split(",")
            for value in values:
                if len(keys) > 1 and not (isinstance(value, list) and len(value) == len(keys)):
                    raise ValueError(f"`{axis}`: {value!r} must be a list of {len(keys)} values, one for each key")
        return space

    def resolved_strategy(self) -> Plugin:
        """Return the strategy with all its parameters."""
        return resolve_plugin(STRATEGIES, self.strategy)


def load_sweep(path: Path) -> tuple[SweepConfig, Document]:
    """Read a sweep file; its trials are checked by `orchestrate.sweep.space.expand`.

    Raises:
        ConfigError: every problem of the file, a line each.
    """
    document = read_document(path)
    return sweep_of(document), document


def sweep_of(document: Document) -> SweepConfig:
    """Build a SweepConfig from a parsed file; see `load_sweep`."""
    sweep = build_section(SweepConfig, document)
    known = plugins.names(STRATEGIES)
    name = sweep.strategy.get("name")
    if name not in known:
        reason = f"no such strategy; {suggestion(str(name), known)}"
        raise_problems(document, [Problem(("strategy", "name"), name, reason)])
    return sweep

"""ClusterConfig: where trials run. It never changes the numbers."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from orchestrate.config.load import build_section, read_document, suggestion
from orchestrate.config.section import Section
from ssl_methods import plugins

# Files of this package that are no launchers.
_NOT_LAUNCHERS = ("base", "cluster", "supervisor")


def launcher_names() -> tuple[str, ...]:
    """List the launchers by file name."""
    return tuple(name for name in plugins.names("orchestrate.launchers") if name not in _NOT_LAUNCHERS)


def _known_launcher(name: str) -> str:
    if name not in launcher_names():
        raise ValueError(f"no such launcher; {suggestion(name, launcher_names())}")
    return name


class Resources(Section):
    """What one trial gets: `nodes` x `ranks_per_node` worker processes; on `cuda` a rank owns a GPU."""

    nodes: Annotated[int, Field(ge=1)] = 1
    ranks_per_node: Annotated[int, Field(ge=1)] = 1
    cpus_per_rank: Annotated[int, Field(ge=1)] = 1
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def ranks(self) -> int:
        """Worker processes of one trial."""
        return self.nodes * self.ranks_per_node


class ClusterLimits(Section):
    """Bounds that protect the place: trials at once, and free disk under which nothing starts."""

    parallel: Annotated[int, Field(ge=1)] = 1
    min_free_gb: Annotated[float, Field(ge=0)] = 1.0


class Paths(Section):
    """Folders; relative ones are relative to where the command runs."""

    runs: str = "runs"


class ClusterConfig(Section):
    """Launcher, resources of a trial, limits, paths, and environment variables for the workers."""

    launcher: Annotated[str, AfterValidator(_known_launcher)]
    resources: Resources = Resources()
    limits: ClusterLimits = ClusterLimits()
    paths: Paths = Paths()
    environment: dict[str, str] = Field(default_factory=dict)


def load_cluster(path: Path) -> ClusterConfig:
    """Read a cluster config from a YAML file.

    Raises:
        ConfigError: every problem of the file, a line each.
    """
    return build_section(ClusterConfig, read_document(path))

"""ClusterConfig: where trials run. It never changes the numbers."""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from orchestrate.config.kind import looks_like, require_kind
from orchestrate.config.load import build_section, read_document, suggestion
from orchestrate.config.section import Section
from orchestrate.launchers.slurm_options import SlurmOptions, StageOptions
from ssl_methods import plugins

# Files of this package that are no launchers; parts of a launcher have two words, such as `slurm_script`.
_NOT_LAUNCHERS = ("attempts", "base", "cluster", "supervisor")
# What places a rank; a value of the user's would make all ranks the same one, or wait for others for ever.
_OWN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OWN_PREFIX = "ORCHESTRATE_"


def launcher_names() -> tuple[str, ...]:
    """List the launchers by file name."""
    files = plugins.names("orchestrate.launchers")
    return tuple(name for name in files if name not in _NOT_LAUNCHERS and "_" not in name)


def _known_launcher(name: str) -> str:
    if name not in launcher_names():
        raise ValueError(f"no such launcher; {suggestion(name, launcher_names())}")
    return name


def _free_variable(name: str) -> str:
    if name in _OWN_VARIABLES or name.startswith(_OWN_PREFIX):
        raise ValueError("is set by the launcher; remove it")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("no name of a variable; write letters, digits and `_`")
    return name


class Resources(Section):
    """What one trial gets: `nodes` x `ranks_per_node` worker processes; on `cuda` a rank owns a GPU."""

    nodes: Annotated[int, Field(ge=1, le=2**16)] = 1
    ranks_per_node: Annotated[int, Field(ge=1, le=2**10)] = 1
    cpus_per_rank: Annotated[int, Field(ge=1, le=2**10)] = 1
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def ranks(self) -> int:
        """Worker processes of one trial."""
        return self.nodes * self.ranks_per_node


class ClusterLimits(Section):
    """Bounds that protect the place: trials and ranks at once (0: any), and free disk under which nothing starts."""

    parallel: Annotated[int, Field(ge=1)] = 1
    ranks: Annotated[int, Field(ge=0)] = 0
    min_free_gb: Annotated[float, Field(ge=0)] = 1.0


class Paths(Section):
    """Folders; relative ones are relative to where the command runs."""

    runs: str = "runs"


class ClusterConfig(Section):
    """Launcher, resources of a trial, limits, paths, and environment variables for the workers.

    Attributes:
        resources: of the jobs that train.
        evaluate: of the jobs that score a trained encoder; None: the job that trains scores too.
        code: which code jobs run: a copy made when the sweep was submitted, or the checkout as it is when they start.
    """

    launcher: Annotated[str, AfterValidator(_known_launcher)]
    resources: Resources = Resources()
    evaluate: Resources | None = None
    limits: ClusterLimits = ClusterLimits()
    paths: Paths = Paths()
    code: Literal["frozen", "live"] = "frozen"
    environment: dict[Annotated[str, AfterValidator(_free_variable)], str] = Field(default_factory=dict)
    slurm: SlurmOptions = SlurmOptions()

    @field_validator("slurm")
    @classmethod
    def _slurm_has_its_launcher(cls, options: SlurmOptions, info: ValidationInfo) -> SlurmOptions:
        launcher = info.data.get("launcher", "slurm")
        if launcher != "slurm" and options != SlurmOptions():
            raise ValueError(f"says nothing to the launcher {launcher!r}; remove it, or write `launcher: slurm`")
        if options.evaluate != StageOptions() and info.data.get("evaluate") is None:
            raise ValueError("slurm.evaluate: there are no jobs that only evaluate; write `evaluate: {...}` as well")
        return options

    def stage_resources(self, stage: str) -> Resources:
        """Return the resources of the jobs of a stage."""
        return self.evaluate if stage == "evaluate" and self.evaluate else self.resources


def load_cluster(path: Path) -> ClusterConfig:
    """Read a cluster config from a YAML file.

    Raises:
        ConfigError: every problem of the file, a line each.
    """
    document = read_document(path)
    if looks_like(document) not in ("cluster", None):
        require_kind(document, "cluster")
    return build_section(ClusterConfig, document)

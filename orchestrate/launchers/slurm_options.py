"""SlurmOptions: what a cluster config says to Slurm, and nothing that our scripts say themselves."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from orchestrate.config.section import Section

# What every script of ours says, by sbatch's long name, and what to do instead.
_OURS = {
    "account": "write slurm.account",
    "array": "write slurm.arrays",
    "chdir": "jobs start where the command was run",
    "comment": "it holds the names of sweep, trial and stage",
    "constraint": "write slurm.constraint",
    "cpus-per-task": "write resources.cpus_per_rank",
    "dependency": "it keeps two jobs of a trial from running at once",
    "error": "it goes where the output goes",
    "exclude": "write slurm.exclude",
    "exclusive": "write slurm.exclusive",
    "export": "write `environment`",
    "export-file": "write `environment`",
    "gpus-per-node": "write slurm.gpus_per_node",
    "gres": "write slurm.gres",
    "hold": "a held job would wait for ever",
    "input": "workers read nothing",
    "job-name": "jobs are found again by it",
    "kill-on-invalid-dep": "jobs depend on nothing that can fail",
    "mem": "write slurm.memory_gb",
    "no-requeue": "a job that lost a node must come back",
    "nodes": "write resources.nodes",
    "ntasks": "write resources.ranks_per_node",
    "ntasks-per-node": "write resources.ranks_per_node",
    "open-mode": "logs of all runs of a job are kept",
    "output": "logs go to the trial's folder",
    "parsable": "the launcher reads the answer",
    "partition": "write slurm.partition",
    "qos": "write slurm.qos",
    "requeue": "it is always on",
    "signal": "write slurm.lead_seconds",
    "test-only": "`orchestrate plan` does that",
    "time": "write slurm.time_minutes",
    "wait": "the launcher waits itself",
    "wrap": "the launcher writes the script",
}


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("has a line break or another character that cannot be printed; remove it")
    return text


def _word(text: str) -> str:
    if re.search(r"\s", _one_line(text)):
        raise ValueError("has a space; write one word")
    return text


def _node(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[0-9,-]+\])?[A-Za-z0-9._-]*", text):
        raise ValueError("is no name of a node; write one such as `gpu07`, or several such as `gpu[07-09]`")
    return text


def _free_option(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise ValueError("is no long option of sbatch; write it as in `man sbatch`, without the leading dashes")
    if name in _OURS:
        raise ValueError(f"is set by the launcher: {_OURS[name]}")
    return name


def _printable_option(value: str | int | float | bool) -> str | int | float | bool:
    return _one_line(value) if isinstance(value, str) else value


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, AfterValidator(_word)]
Node = Annotated[str, AfterValidator(_node)]


class StageOptions(Section):
    """What the jobs of one stage ask of Slurm where it differs from the rest; empty and 0 mean no difference."""

    partition: Word = ""
    qos: Word = ""
    gres: Word = ""
    gpus_per_node: Annotated[int, Field(ge=0, le=2**10)] = 0
    memory_gb: Annotated[float, Field(ge=0)] = 0.0
    time_minutes: Annotated[int, Field(ge=0)] = 0

    @field_validator("gpus_per_node")
    @classmethod
    def _gpus_are_asked_for_once(cls, gpus: int, info: ValidationInfo) -> int:
        if gpus and has_gpus(info.data.get("gres", "")):
            raise ValueError(f"gres: {info.data['gres']!r} asks for GPUs too; remove one of them")
        return gpus


def has_gpus(gres: str) -> bool:
    """Tell whether generic resources such as `gpu:a100:4,nvme:1` have GPUs among them."""
    return any(part.startswith("gpu") for part in gres.removeprefix("gres/").split(","))


class SlurmOptions(StageOptions):
    """What the jobs of a trial ask of Slurm; see `man sbatch`. Empty and 0 leave a choice to the cluster.

    Attributes:
        partition: one, or several with commas: Slurm takes the one that starts first.
        gres: generic resources of a node; together with `gpus_per_node` an error.
        gpus_per_node: 0 with device cuda and no `gres` means one a rank.
        memory_gb: of a node.
        time_minutes: of one run of a job; trials go on in the next one.
        exclusive: no other job on the nodes.
        lead_seconds: time between the request to save and the end of a job.
        setup: shell lines at the beginning of the script, such as `module load cuda`.
        container: words before the command of a rank, such as `apptainer exec --nv image.sif`.
        srun: further options of srun.
        python: interpreter of the ranks; in a container the one inside.
        exclude: nodes that no job may get.
        arrays: whether many jobs of one rank each are submitted with one request.
        poll_seconds: time between two looks at the queue.
        options: any further option of sbatch by its long name; true for one without a value.
        evaluate: what differs for the jobs of the stage evaluate.
    """

    account: Word = ""
    constraint: Line = ""
    exclusive: bool = False
    lead_seconds: Annotated[int, Field(ge=10, le=3600, validate_default=True)] = 120
    setup: list[Line] = Field(default_factory=list)
    container: list[Line] = Field(default_factory=list)
    srun: list[Line] = Field(default_factory=list)
    python: Line = ""
    exclude: list[Node] = Field(default_factory=list)
    arrays: bool = False
    poll_seconds: Annotated[float, Field(ge=0.2, le=3600)] = 30.0
    options: dict[
        Annotated[str, AfterValidator(_free_option)],
        Annotated[str | int | float | bool, AfterValidator(_printable_option)],
    ] = Field(default_factory=dict)
    evaluate: StageOptions = StageOptions()

    @field_validator("lead_seconds")
    @classmethod
    def _leaves_time_to_train(cls, lead: int, info: ValidationInfo) -> int:
        _check_time(info.data.get("time_minutes", 0), lead)
        return lead

    @field_validator("evaluate")
    @classmethod
    def _leaves_time_to_evaluate(cls, evaluate: StageOptions, info: ValidationInfo) -> StageOptions:
        _check_time(evaluate.time_minutes, info.data.get("lead_seconds", 0))
        return evaluate

    def at(self, stage: str) -> "SlurmOptions":
        """Return the options of the jobs of a stage."""
        if stage != "evaluate":
            return self
        given = {key: value for key, value in self.evaluate.model_dump().items() if value}
        if {"gres", "gpus_per_node"} & given.keys():  # one of them replaces both
            given = {"gres": "", "gpus_per_node": 0} | given
        return self.model_copy(update=given)


def _check_time(minutes: int, lead_seconds: int) -> None:
    if minutes and lead_seconds >= minutes * 60:
        raise ValueError(f"of {minutes} min, {lead_seconds} s are for saving; write less lead_seconds or more time")

"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrate.wiring import RUNS_VARIABLE

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP", help="Sweep file (YAML).")]
SweepWord = Annotated[str, typer.Argument(metavar="SWEEP", help="Name of a sweep, or its file.")]
Word = Annotated[
    str, typer.Argument(metavar="SWEEP|TRIAL", help="Name or file of a sweep, or a trial's id, which may be cut short.")
]
OptionalWord = Annotated[
    str, typer.Argument(metavar="SWEEP|TRIAL", help="Name or file of a sweep, or a trial's id.", show_default=False)
]
TrialWord = Annotated[str, typer.Argument(metavar="TRIAL", help="Id of a trial, which may be cut short.")]
ClusterFile = Annotated[Path, typer.Option("--cluster", "-c", metavar="FILE", help="Cluster file (YAML).")]
Runs = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar=RUNS_VARIABLE,
        help="Folder of all results. Default: what the cluster file says, else ./runs.",
    ),
]
OldRuns = Annotated[
    Path | None,
    typer.Option("--runs", metavar="DIR", envvar=RUNS_VARIABLE, help="Folder of all results. Default: ./runs."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Show a live table instead of a line for each change.")]
Once = Annotated[bool, typer.Option("--once", help="Look and act once, then leave the jobs to themselves.")]

"""The command line: parse, call, print. What a command needs is imported inside it, so that most start at once."""

from __future__ import annotations

import errno
import shlex
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from orchestrate import wiring
from orchestrate.cli_data import data_app
from orchestrate.cli_options import (
    AsJson,
    ClusterFile,
    OldRuns,
    Once,
    OptionalWord,
    Runs,
    SweepFile,
    SweepWord,
    TrialWord,
    Watch,
    Word,
)
from orchestrate.errors import ConfigError, OrchestrateError, RunDirError

# A full disk, a spent quota, a folder of somebody else: the user's to mend, so no traceback.
_PLACE_IS_BAD = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


class _Commands(TyperGroup):
    """Commands whose errors are one message without a traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; end with the exit code of its error."""
        try:
            return super().invoke(ctx)
        except OrchestrateError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if error.errno not in _PLACE_IS_BAD:
                raise
            typer.echo(f"error: {error.filename}: {error.strerror}; free space, or use another folder", err=True)
            raise typer.Exit(RunDirError.exit_code) from error


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Sweeps of self-supervised pretraining that survive their cluster, and a page that says what compute bought.

    A sweep file says what to learn about, a cluster file where it runs. [bold]orchestrate sweep[/bold] makes it true.
    Run it again at any time: what is done stays done, what broke goes on from its last checkpoint.

    [dim]orchestrate sweep sweeps/quickstart.yaml --cluster cluster_configs/local.yaml[/dim]""",
)
app.add_typer(data_app, name="data")


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Sweep, run or cluster files.")],
    as_json: AsJson = False,
) -> None:
    """Validate config files and print them resolved, every default filled in. Needs no data.

    [dim]orchestrate check sweeps/quickstart.yaml cluster_configs/local.yaml[/dim]
    """
    from orchestrate.sweep.source import resolved, resolved_text

    results: list[dict[str, Any]] = []
    texts, problems = [], []
    for file in files:
        try:
            kind, values = resolved(file)
            results.append({"file": str(file), "valid": True, "kind": kind, "resolved": values})
            texts.append(resolved_text(file, kind, values))
        except OrchestrateError as error:
            problems.append(str(error))
            results.append({"file": str(file), "valid": False, "problems": str(error).splitlines()})
    if as_json:
        wiring.print_json({"files": results})
    else:
        typer.echo("\n".join(texts))
    if problems and not as_json:
        raise ConfigError("\n".join(problems))
    if problems:
        raise typer.Exit(ConfigError.exit_code)


@app.command()
def plan(sweep: SweepFile, cluster: ClusterFile, runs: Runs = None, as_json: AsJson = False) -> None:
    """Show what a sweep would do: its trials, what is done, how a trial is started, what is left to pay.

    Starts nothing and writes nothing. Needs no data where the file states `data.train_samples`.

    [dim]orchestrate plan sweeps/quickstart.yaml --cluster cluster_configs/local.yaml[/dim]
    """
    from orchestrate.sweep.forecast import look_ahead, plan_json, plan_view
    from orchestrate.sweep.preflight import find_problems

    unseen: dict[str, str] = {}
    record, folder = wiring.record_of(sweep, "sweep", cluster, runs, unseen=unseen)
    observed, launcher = wiring.look(record, folder)
    problems = find_problems(record, folder, launcher, check_data=wiring.checks_but(unseen))
    outlook = look_ahead(record, folder, observed, launcher, problems, unseen=unseen)
    if as_json:
        wiring.print_json(plan_json(outlook))
    else:
        wiring.console().print(plan_view(outlook))
    if problems:
        raise typer.Exit(ConfigError.exit_code)


@app.command()
def sweep(sweep: SweepFile, cluster: ClusterFile, watch: Watch = False, once: Once = False, runs: Runs = None) -> None:
    """Make a sweep true: train what is missing, go on with what was interrupted, write the report.

    Ctrl-C stops the looking, not the jobs; the same command takes over again. Exit code 0 means that all are done.

    [dim]orchestrate sweep sweeps/quickstart.yaml --cluster cluster_configs/local.yaml --watch[/dim]
    """
    record, folder = wiring.record_of(sweep, "sweep", cluster, runs)
    wiring.make_true(record, folder, watch=watch, once=once)


@app.command()
def run(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run file (YAML).")],
    cluster: ClusterFile,
    watch: Watch = False,
    once: Once = False,
    runs: Runs = None,
) -> None:
    """Train one run: a sweep of one, named like the file.

    [dim]orchestrate run first.yaml --cluster cluster_configs/local.yaml[/dim]
    """
    record, folder = wiring.record_of(run, "run", cluster, runs)
    wiring.make_true(record, folder, watch=watch, once=once)


@app.command()
def status(word: OptionalWord = "", runs: OldRuns = None, as_json: AsJson = False) -> None:
    """Show the trials of a sweep, or all sweeps.

    [dim]orchestrate status barlow-dims[/dim]
    """
    from orchestrate.sweep import status as views
    from orchestrate.sweep.find import find_target
    from orchestrate.sweep.record import load_records

    folder = runs or wiring.DEFAULT_RUNS
    if word:
        target = find_target(folder, word)
        record = target.record if target.whole else target.record.only([target.trials[0].id])
        rows = views.sweep_status(record, folder, wiring.look(record, folder)[0])
        wiring.print_json(views.status_json(record, rows)) if as_json else wiring.console().print(
            views.status_table(record, rows)
        )
        return
    records = load_records(folder)
    statuses = {record.name: views.sweep_status(record, folder, wiring.look(record, folder)[0]) for record in records}
    if as_json:
        wiring.print_json({"sweeps": [views.status_json(record, statuses[record.name]) for record in records]})
    elif records:
        wiring.console().print(views.overview_table(records, statuses))
    else:
        typer.echo(f"{folder}: no sweep yet; start one with `orchestrate sweep FILE --cluster FILE`")


@app.command()
def why(trial: TrialWord, runs: OldRuns = None, as_json: AsJson = False) -> None:
    """Explain the state of a trial: the evidence, the end of its log, and what happens next.

    [dim]orchestrate why 3f2a[/dim]
    """
    from orchestrate.sweep.find import find_trial
    from orchestrate.sweep.why import explain, render

    folder = runs or wiring.DEFAULT_RUNS
    target = find_trial(folder, trial)
    entry = target.trials[0]
    seen = wiring.look(target.record.only([entry.id]), folder)[0][entry.id]
    flags = wiring.runs_flag(folder)
    hours = wiring.hours_of(target.record, folder)
    explanation = explain(target.record, entry, folder, seen, now=time.time(), hours=hours, flags=flags)
    if as_json:
        wiring.print_json(asdict(explanation))
    else:
        typer.echo(render(explanation))


@app.command()
def logs(
    trial: TrialWord,
    rank: Annotated[
        str,
        typer.Option(metavar="N|all|job", help="Rank whose log to show; all; or what launcher and scheduler wrote."),
    ] = "0",
    attempt: Annotated[int, typer.Option(min=0, help="Attempt whose log to show; 0 is the last one.")] = 0,
    stage: Annotated[
        Literal["pretrain", "evaluate"], typer.Option(help="Job whose log to show, where evaluation has its own.")
    ] = "pretrain",
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Lines to show from the end.")] = 40,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on while the trial has a job or gets another one.")
    ] = False,
    runs: OldRuns = None,
) -> None:
    """Show the log of a trial: of one rank, or of all with the rank before each line.

    [dim]orchestrate logs 3f2a --rank all --follow[/dim]
    """
    from orchestrate.sweep.find import find_trial
    from orchestrate.sweep.logs import TrialLogs, retries

    folder = runs or wiring.DEFAULT_RUNS
    target = find_trial(folder, trial)
    found = TrialLogs(folder, target.trials[0], stage=stage, rank=rank, attempt=attempt)
    for line in found.last_lines(lines):
        typer.echo(line)
    if follow:
        launcher = wiring.launcher_of(target.record, folder)
        is_awaited = retries(folder, target.trials[0], launcher, stage=stage)
        for line in found.follow(launcher, is_awaited=is_awaited):
            typer.echo(line)


@app.command()
def cancel(
    word: Word,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to watch the jobs save and stop.")] = 15.0,
    runs: OldRuns = None,
) -> None:
    """Stop trials for good: their jobs save and end, and no sweep starts them again until `resume`.

    [dim]orchestrate cancel 3f2a[/dim]
    """
    from orchestrate.sweep.find import find_target
    from orchestrate.sweep.interventions import cancel_trials

    folder = runs or wiring.DEFAULT_RUNS
    target = find_target(folder, word)
    launcher = wiring.launcher_of(target.record, folder)
    if cancel_trials(folder, target.trials, launcher, patience_seconds=patience, say=typer.echo):
        typer.echo(f"take it up again with: orchestrate resume {shlex.quote(word)}{wiring.runs_flag(folder)}")


@app.command()
def resume(
    word: Word,
    budget: Annotated[
        str,
        typer.Option(metavar="LENGTH", help="Train on to this longer budget, such as 30ep, as trials of a new sweep."),
    ] = "",
    zero_stage: Annotated[
        int | None,
        typer.Option(
            min=0, max=3, help="Go on with this ZeRO stage; the numbers stay, up to rounding on more than two ranks."
        ),
    ] = None,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", "-c", metavar="FILE", help="Cluster file (YAML). Default: where it ran before."),
    ] = None,
    abandon_jobs: Annotated[
        bool,
        typer.Option(
            "--abandon-jobs",
            help="With --cluster: do not wait for jobs at the old place that nobody can ask about. See first that none "
            "runs.",
        ),
    ] = False,
    watch: Watch = False,
    once: Once = False,
    runs: Runs = None,
) -> None:
    """Take up a sweep or a trial again: what was cancelled, held or failed gets a fresh set of retries.

    A trial whose loss diverged is tried again only if it is named itself. Training goes on from checkpoints.

    It goes on with the code as it is now, and with --cluster elsewhere: jobs that run save and stop first.

    With --budget a trial gets a child that begins from its newest checkpoint, in a sweep such as barlow-dims-30ep.

    [dim]orchestrate resume barlow-dims[/dim]

    [dim]orchestrate resume 3f2a --budget 30ep --cluster cluster_configs/local.yaml[/dim]
    """
    from orchestrate.launchers.cluster import load_cluster
    from orchestrate.sweep.find import find_target

    place = load_cluster(cluster) if cluster else None
    folder = runs or (Path(place.paths.runs) if place else wiring.DEFAULT_RUNS)
    target = wiring.replanned(find_target(folder, word), folder, budget=budget, zero_stage=zero_stage)
    record = target.record.with_cluster(place, cluster.read_text()) if place and cluster else target.record
    only = () if target.whole else tuple(trial.id for trial in target.trials)
    wanted = wiring.Resume(diverged_too=not target.whole, abandons_jobs=abandon_jobs)
    wiring.make_true(record, folder, watch=watch, once=once, only=only, resume=wanted)


@app.command()
def adopt(runs: OldRuns = None) -> None:
    """Rebuild the store from the folders of the runs; nothing but the store is written.

    [dim]orchestrate adopt --runs /scratch/runs[/dim]
    """
    from orchestrate.store import open_store, store_path
    from orchestrate.sweep.adopt import adopt as adopt_runs
    from orchestrate.sweep.adopt import refuse_while_controlled
    from orchestrate.sweep.record import counted

    folder = runs or wiring.DEFAULT_RUNS
    if not folder.is_dir():
        raise RunDirError(f"{folder}: no such folder; say with --runs where the results lie")
    refuse_while_controlled(folder)
    with open_store(store_path(folder)) as store:
        sweeps, trials = adopt_runs(folder, store)
    typer.echo(f"{store_path(folder)}: {counted(sweeps, 'sweep')}, {counted(trials, 'trial')}")


@app.command()
def report(
    word: SweepWord,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write. By default beside sweep.json.")
    ] = None,
    runs: OldRuns = None,
) -> None:
    """Write the page of a sweep: accuracy against compute, with the numbers as CSV beside it.

    [dim]orchestrate report barlow-dims --out /tmp/page[/dim]
    """
    from orchestrate.report.page import write_report
    from orchestrate.sweep.find import find_sweep
    from orchestrate.sweep.record import record_path

    folder = runs or wiring.DEFAULT_RUNS
    sweep_dir = record_path(folder, find_sweep(folder, word).name).parent
    typer.echo(write_report(sweep_dir, folder / "trials", out or sweep_dir / "report"))


@app.command()
def export(
    trial: TrialWord,
    form: Annotated[
        Literal["torchvision", "timm", "safetensors", "packed"],
        typer.Option(
            "--format", help="Library that will load it; safetensors keeps our own names, packed a bit a binary weight."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write; FILE.json beside it says how to load it.")],
    checkpoint: Annotated[
        str, typer.Option(metavar="STEP|newest", help="Take a checkpoint. Default: the weights of a finished trial.")
    ] = "",
    runs: OldRuns = None,
    as_json: AsJson = False,
) -> None:
    """Write the trained encoder as torchvision or timm names its weights, load it there, and compare the features.

    [dim]orchestrate export 3f2a --format torchvision --out resnet50.safetensors[/dim]
    """
    from orchestrate.engine.export import export_encoder
    from orchestrate.sweep.find import find_trial
    from orchestrate.sweep.observe import run_dir_of

    folder = runs or wiring.DEFAULT_RUNS
    run_dir = run_dir_of(folder, find_trial(folder, trial).trials[0].id)
    exported = export_encoder(run_dir, out, form=form, checkpoint=checkpoint)
    if as_json:
        wiring.print_json(asdict(exported))
    else:
        typer.echo(exported.text())

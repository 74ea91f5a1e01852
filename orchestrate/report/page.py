"""The page: everything that a reader needs, in one file without script or network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from orchestrate.report import answer, csv_files, provenance, sections, tables
from orchestrate.report.curves import Baseline, Curve, build_baselines, build_curves, line_of
from orchestrate.report.plots import Data
from orchestrate.report.queries import Sweep, load_sweep, metric_names
from orchestrate.report.wording import Metric, printable
from orchestrate.runs import write_text

_HERE = Path(__file__).parent


def write_report(sweep_dir: Path, trials_dir: Path, out_dir: Path) -> Path:
    """Write index.html and the CSV files of a sweep.

    Args:
        sweep_dir: holds sweep.json.
        trials_dir: holds a RunDir for each trial that was started, by its id.
        out_dir: made if missing; equal RunDirs give equal bytes in it.

    Returns:
        The path of index.html.

    Raises:
        RunDirError: sweep.json is missing or damaged.
    """
    sweep = load_sweep(sweep_dir, trials_dir)
    metrics = metric_names(sweep.trials, sweep.objective)
    curves = {key: build_curves(sweep.trials, key) for key in metrics}
    baselines = {key: build_baselines(sweep.trials, key) for key in metrics}
    csv_files.write_trials(out_dir / "trials.csv", sweep)
    csv_files.write_checkpoints(out_dir / "checkpoints.csv", sweep)
    csv_files.write_curves(out_dir / "curves.csv", curves)
    csv_files.write_baselines(out_dir / "baselines.csv", baselines)
    # Last: the time of the page tells the next command whether all of the report is newer than the results.
    page = out_dir / "index.html"
    write_text(page, _render(sweep, curves, baselines, trials_dir))
    return page


def _render(
    sweep: Sweep,
    curves: Mapping[str, Sequence[Curve]],
    baselines: Mapping[str, Sequence[Baseline]],
    trials_dir: Path,
) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else _printable_lines(str(value)),
    )
    lines = tuple(line_of(sweep.trials).values())
    datas = [Data(Metric(key), tuple(curves[key]), tuple(baselines[key]), lines) for key in curves if curves[key]]
    main = curves[sweep.objective.metric]
    return environment.get_template("page.html.j2").render(
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        sweep=sweep,
        answer=answer.answer(sweep, main),
        evidence=answer.evidence(sweep, main),
        facts=answer.facts(sweep, main),
        states=provenance.states(sweep),
        is_complete=all(trial.is_done for trial in sweep.trials),
        sections=[
            sections.metric_section(data, goal=_goal(sweep, data.metric), index=index)
            for index, data in enumerate(datas)
        ],
        baselines=tables.baseline_table(baselines),
        trials=tables.trial_table(sweep, list(curves)),
        losses=sections.loss_figure(sweep, trials_dir),
        command=provenance.command_line(sweep),
        origins=provenance.origins(sweep),
    )


def _goal(sweep: Sweep, metric: Metric) -> str:
    """The objective has its own goal; of any other metric more is better."""
    return sweep.objective.goal if metric.key == sweep.objective.metric else "max"


def _printable_lines(text: str) -> str:
    return "\n".join(printable(line.expandtabs(4)) for line in text.split("\n"))

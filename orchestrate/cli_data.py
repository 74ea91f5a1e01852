"""The commands of `orchestrate data`; what they need is imported inside, as in the command line itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from orchestrate.data.index import Manifest
    from orchestrate.data.shard_pool import ShardProgress

data_app = typer.Typer(no_args_is_help=True, help="Make, check and show datasets that any number of ranks can read.")
_MOST_LINES = 20


@data_app.command("pack")
def data_pack(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of images (sub-folders are classes), .csv of path and label, tars, or fashion-mnist."
        ),
    ],
    dest: Annotated[str, typer.Argument(help="Folder to write: new, empty, or one to be continued.")],
    split: Annotated[str, typer.Option(help="Name of the split; of fashion-mnist train, val or test.")] = "train",
    limit: Annotated[int, typer.Option(min=0, help="Pack only so many images; 0 packs all.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Images in one tar file.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Order of the images in the shards.")] = 0,
    shuffle: Annotated[bool, typer.Option(help="Shuffle, or keep the order of the source.")] = True,
    classes_from: Annotated[
        str, typer.Option(metavar="DATASET", help="Use the classes of this dataset, such as the training split.")
    ] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 uses every core.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out what cannot be decoded or packed.")] = False,
    resize_short: Annotated[
        int, typer.Option(min=0, help="Scale the shorter side of larger images down to so many pixels; 0 keeps all.")
    ] = 0,
    quality: Annotated[int, typer.Option(min=1, max=95, help="JPEG quality of what is scaled down.")] = 85,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another dataset in DEST.")] = False,
) -> None:
    """Pack images into WebDataset shards with an index, checking each image.

    Run it again after an interruption: it goes on where it stopped, and does nothing where the pack is whole.

    [dim]orchestrate data pack ~/images/train data/mine/train[/dim]
    """
    from rich.console import Console
    from rich.progress import Progress

    from orchestrate.data.index import load_manifest
    from orchestrate.data.pack import pack
    from orchestrate.data.pack_shrink import Shrink
    from orchestrate.data.tar_problems import counted

    console = Console(stderr=True)
    with (
        _interruptible("packing"),
        Progress(transient=True, console=console, disable=not console.is_terminal) as bar,
    ):
        task = bar.add_task(f"packing {source}", total=None)
        manifest = pack(
            source,
            dest,
            split=split,
            limit=limit or None,
            samples_per_shard=samples_per_shard,
            shuffle_seed=seed if shuffle else None,
            classes=load_manifest(classes_from).classes if classes_from else None,
            workers=workers or None,
            skip_bad=skip_bad,
            overwrite=overwrite,
            shrink=Shrink(resize_short, quality) if resize_short else None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if manifest.info.get("skipped"):
        typer.echo(f"left out with --skip-bad: {counted(manifest.info['skipped'], 'sample')}", err=True)
    typer.echo(_summary(dest, manifest, "image"))


@data_app.command("index")
def data_index(
    url: Annotated[str, typer.Argument(help="Folder of .tar files, one, or a pattern: s3://b/train-{000..127}.tar.")],
    to: Annotated[
        str, typer.Option(metavar="DEST", help="Folder for the index, if not beside the shards.", show_default=False)
    ] = "",
    classes: Annotated[
        str,
        typer.Option(metavar="FILE|DATASET", help="Class names: a text file, one a line, or a dataset that has them."),
    ] = "",
    split: Annotated[str, typer.Option(help="Name of the split.")] = "train",
    workers: Annotated[int, typer.Option(min=0, help="Shards read at a time; 0 chooses.")] = 0,
    accept_cut: Annotated[
        bool, typer.Option("--accept-cut", help="Use cut shards up to their cuts, rather than refuse them.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index of other shards, or its class names.")
    ] = False,
) -> None:
    """Make an index for WebDataset shards that lie anywhere, reading each once and changing none.

    Run it again after an interruption, or when shards were added: what was read and has not changed is not read again.

    [dim]orchestrate data index s3://bucket/in1k/train --to data/in1k/train[/dim]
    """
    from orchestrate.data.class_names import load_classes
    from orchestrate.data.indexing import index
    from orchestrate.data.storage import base_folder

    with _interruptible("indexing"), _progress(f"indexing {url}") as show:
        report = index(
            url,
            dest=to or None,
            classes=load_classes(classes) if classes else None,
            split=split,
            workers=workers or None,
            accept_cut=accept_cut,
            overwrite=overwrite,
            progress=show,
        )
    _list(report.problems)
    if report.counts:
        typer.echo("problems: " + ", ".join(f"{kind}: {count:,}" for kind, count in report.counts.items()), err=True)
    if report.unusable:
        typer.echo(_what_unusable_means(report.unusable, report.manifest.num_samples), err=True)
    typer.echo(_summary(to or base_folder(url), report.manifest, "sample"))


@data_app.command("verify")
def data_verify(
    url: Annotated[str, typer.Argument(help="Folder of a packed or indexed dataset.")],
    full: Annotated[bool, typer.Option("--full", help="Read every byte and check each sample.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every image, strictly.")] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make missing and damaged indexes of sound shards again.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the report for programs; - prints it.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Shards checked at a time; 0 chooses.")] = 0,
) -> None:
    """Check that a dataset is what its index says; exit code 1 if anything is wrong.

    Without options it looks at names, sizes, versions and the end of each shard, and reads no sample.

    [dim]orchestrate data verify data/in1k/train --full[/dim]
    """
    from orchestrate.data.fsck import verify
    from orchestrate.data.tar_problems import counted
    from orchestrate.errors import DataError

    with _interruptible("verifying"), _progress(f"verifying {url}") as show:
        verdict = verify(
            url,
            mode="decode" if decode else "full" if full else "quick",
            repair=repair,
            workers=workers or None,
            progress=show,
        )
    text = json.dumps(verdict.as_facts(), indent=1)
    _list(verdict.problems)
    for note in verdict.notes:
        typer.echo(f"note: {note}", err=True)
    for name in verdict.repaired:
        typer.echo(f"repaired: {name}", err=True)
    found = counted(len(verdict.problems), "problem") if verdict.problems else "whole"
    looked_at = f"{counted(verdict.samples, 'sample')} in {counted(verdict.shards, 'shard')}"
    typer.echo(text if str(report) == "-" else f"{url}: {looked_at}, {verdict.mode} check: {found}")
    if report is not None and str(report) != "-":
        try:
            report.write_text(text + "\n")
        except OSError as error:
            raise DataError(f"{report}: the report cannot be written: {error.strerror}; choose another file") from error
    if not verdict.is_whole:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    url: Annotated[str, typer.Argument(help="Folder of a packed or indexed dataset.")],
    batch: Annotated[int, typer.Option(min=1, help="Global batch whose mix of classes is reported.")] = 1024,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw samples and their views into this file.")
    ] = None,
    views: Annotated[str, typer.Option(metavar="RECIPE", help="Views to draw.")] = "barlow_twins",
    size: Annotated[int, typer.Option(min=1, help="Side of the views, pixels.")] = 224,
    rows: Annotated[int, typer.Option(min=1, help="Samples to draw.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the order and the views, as in a training.")] = 0,
) -> None:
    """Show counts, sizes, class balance, how well batches mix the classes, and samples with their views.

    [dim]orchestrate data show data/in1k/train --batch 4096 --image sheet.png[/dim]
    """
    from orchestrate.data.show import describe, write_sheet

    typer.echo(describe(url, global_batch=batch, seed=seed).as_text())
    if image is not None:
        write_sheet(image, url, views, size=size, num_samples=rows, seed=seed)
        typer.echo(f"{image}: each row is a sample, then its views by {views}")


def _summary(place: str, manifest: Manifest, noun: str) -> str:
    from orchestrate.data.tar_problems import counted

    counts = f"{counted(manifest.num_samples, noun)} of {counted(manifest.num_classes, 'class')}"
    return f"{place}: {counts} in {counted(len(manifest.shards), 'shard')}, digest {manifest.digest[:16]}"


def _what_unusable_means(unusable: int, num_samples: int) -> str:
    """Compare samples that can never be used with what a training tolerates unless it is told otherwise."""
    from orchestrate.config.train import SystemConfig
    from orchestrate.data.tar_problems import counted

    default = float(SystemConfig().max_damaged)
    allowed = max(1, int(default * num_samples))
    found = f"{counted(unusable, 'sample')} can never be used; others stand in for them. Training allows {allowed:,} "
    rule = f"(system.max_damaged: {default:g}, 1 in {round(1 / default):,} and at least one)"
    if unusable <= allowed:
        return f"{found}{rule}"
    return (
        f"{found}{rule} and would stop: repack without them (`orchestrate data pack --skip-bad`), or set "
        f"system.max_damaged to {min(1.0, 2 * unusable / num_samples):.2g}"
    )


@contextmanager
def _interruptible(doing: str) -> Iterator[None]:
    """Say after Ctrl-C what was kept."""
    try:
        yield
    except KeyboardInterrupt:
        again = "run it again" if doing == "verifying" else "what is done is kept; run again to go on"
        typer.echo(f"{doing} was interrupted; {again}", err=True)
        raise typer.Exit(130) from None


def _list(problems: tuple[object, ...]) -> None:
    for problem in problems[:_MOST_LINES]:
        typer.echo(f"  {problem}", err=True)
    if len(problems) > _MOST_LINES:
        typer.echo(f"  and {len(problems) - _MOST_LINES:,} more", err=True)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[ShardProgress], None]]:
    """Show a bar of bytes with shards, rate and time left, where there is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[shards]} shards"),
               DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, transient=True, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, shards="0")

        def show(done: ShardProgress) -> None:
            shards = f"{done.shards:,}/{done.num_shards:,}"
            bar.update(task, completed=done.bytes, total=done.expected_bytes or None, shards=shards)

        yield show

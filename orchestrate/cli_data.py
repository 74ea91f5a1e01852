"""The commands of `orchestrate data`; what they need is imported inside, as in the command line itself."""

from typing import Annotated

import typer

data_app = typer.Typer(no_args_is_help=True, help="Pack datasets into shards that any number of ranks can read.")


@data_app.command("pack")
def data_pack(
    source: Annotated[
        str,
        typer.Argument(help="Folder of images (sub-folders are classes), .csv of path and label, or fashion-mnist."),
    ],
    dest: Annotated[str, typer.Argument(help="Folder to write: new, empty, or one to be continued.")],
    split: Annotated[str, typer.Option(help="Name of the split; of fashion-mnist train, val or test.")] = "train",
    limit: Annotated[int, typer.Option(min=0, help="Pack only so many images; 0 packs all.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Images in one tar file.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Order of the images in the shards.")] = 0,
    shuffle: Annotated[bool, typer.Option(help="Shuffle, or keep the order of the source.")] = True,
    classes_from: Annotated[
        str, typer.Option(metavar="DATASET", help="Use the classes of this packed dataset, such as the training split.")
    ] = "",
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 uses every core.")] = 0,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be decoded.")] = False,
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

    console = Console(stderr=True)
    with Progress(transient=True, console=console, disable=not console.is_terminal) as bar:
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
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    counts = f"{manifest.num_samples:,} images of {manifest.num_classes} classes in {len(manifest.shards)} shards"
    typer.echo(f"{dest}: {counts}, digest {manifest.digest[:16]}")

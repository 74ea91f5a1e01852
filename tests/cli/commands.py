"""Commands as a user types them, and the files they are given."""

import hashlib
import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from orchestrate.cli import app
from orchestrate.data.index import Manifest, Shard, write_manifest
from orchestrate.sweep.record import SweepRecord
from tests.sweep.sweeps import Bench, bench, record_of, script_all, write_sweep

RUNS = Path("runs")


def orchestrate(*words: str) -> Result:
    return CliRunner().invoke(app, list(words), prog_name="orchestrate", env={"COLUMNS": "100", "TERM": "dumb"})


def parsed(*words: str) -> Any:
    result = orchestrate(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def write_cluster(folder: Path, *, ranks: int = 2) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(f"launcher: local\nresources: {{ranks_per_node: {ranks}}}\nlimits: {{min_free_gb: 0.0}}\n")
    return path


def write_data(folder: Path) -> None:
    """Write two datasets that look whole to whoever does not read the images."""
    for split in ("train", "val"):
        path = folder / "data" / split
        path.mkdir(parents=True)
        tar = b"tar of " + split.encode()
        (path / "s-0.tar").write_bytes(tar)
        (path / "s-0.tar.idx").write_bytes(bytes(8 * 80))
        shard = Shard("s-0.tar", 80, len(tar), hashlib.sha256(tar).hexdigest())
        write_manifest(path, Manifest((shard,), tuple("abcdefghij"), split))


def finished_sweep(folder: Path, *script: dict[str, str]) -> tuple[SweepRecord, Bench]:
    """Run a sweep of two stand-in trials to its end."""
    record = record_of(write_sweep(folder))
    made = bench(RUNS)
    script_all(RUNS, record, *script)
    made.session.make_true(record)
    return record, made

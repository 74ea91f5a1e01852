"""Bad input gets one clear error, exit code 2, and nothing is written or started."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import cluster_file, orchestrate

Change = tuple[str, Any]

BAD_SWEEPS: dict[str, tuple[Change, str]] = {
    "misspelt key": (("base.train.global_bach", 32), "train.global_bach: unknown key; did you mean `global_batch`?"),
    "wrong type": (("base.train.global_batch", "many"), "train.global_batch: 'many': must be a valid integer"),
    "out of range": (("base.optim.lr", -1), "optim.lr: -1: must be greater than 0"),
    "unknown plug-in": (("space.method", [{"name": "barlow"}]), "did you mean `barlow_twins`?"),
    "axis that names no key": (("space.train.sed", [0, 1]), "train.sed: unknown key; did you mean `seed`?"),
    "same trial twice": (("space.train.seed", [0, 0]), "are the same trial"),
    "batch that the ranks do not divide": (("base.train.global_batch", 33), "33: does not divide by the 2 ranks"),
    "no dataset": (("base.data.train", "/nowhere/at/all"), "no manifest.json"),
    "network that cannot be built": (
        ("base.backbone", {"name": "tiny_resnet", "stem": "small"}),
        "backbone.stem: 'small': ",
    ),
    "ZeRO without DeepSpeed": (("base.system", {"engine": "ddp", "zero_stage": 1}), "plain DDP has no ZeRO"),
}


def changed(values: dict[str, Any], change: Change) -> dict[str, Any]:
    path, value = change
    if path == "base":
        values["base"] |= value
    elif path.startswith("space."):
        values["space"][path.removeprefix("space.")] = value
    else:
        *parents, last = path.split(".")
        at = values
        for part in parents:
            at = at[part]
        at[last] = value
    return values


@pytest.mark.parametrize("case", BAD_SWEEPS)
def test_bad_sweep_is_refused_before_anything_starts(case: str, sweep_file: Path, tmp_path: Path) -> None:
    change, message = BAD_SWEEPS[case]
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(changed(yaml.safe_load(sweep_file.read_text()), change), sort_keys=False))
    result = orchestrate("sweep", bad, "--cluster", cluster_file(tmp_path), "--runs", tmp_path / "runs", check=False)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "bad.yaml" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def refused(sweep_file: Path, tmp_path: Path, data: Path) -> str:
    values = yaml.safe_load(sweep_file.read_text())
    values["base"]["data"]["train"] = str(data)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(values))
    cluster, runs = cluster_file(tmp_path), tmp_path / "runs"
    result = orchestrate("sweep", tmp_path / "sweep.yaml", "--cluster", cluster, "--runs", runs, check=False)
    assert result.returncode == 2
    assert not runs.exists()
    return result.stderr


def test_manifest_and_shards_that_disagree_are_refused(sweep_file: Path, datasets: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(datasets / "train", data)
    shard = next(data.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    assert shard.name in refused(sweep_file, tmp_path, data)


def test_empty_dataset_folder_is_refused(sweep_file: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "no manifest.json" in refused(sweep_file, tmp_path, tmp_path / "data")

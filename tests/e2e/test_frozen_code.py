"""A checkout that is edited while a sweep runs: trials that wait run what was there when it was started."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.e2e.conftest import cluster_file

ROOT = Path(__file__).parents[2]
TRANSFORM = "def darker(image, draw):\n    return image // 2\n"


def copy_of_checkout(folder: Path) -> Path:
    """Copy what the tests run on, as a checkout of its own."""
    for package in ("orchestrate", "ssl_methods"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / ".gitignore").write_text("*.so\n")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "all of it")):
        command = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false", *words)
        subprocess.run(command, cwd=folder, check=True)
    return folder


def test_trials_that_wait_run_the_code_of_the_command(sweep_file: Path, tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    place = tmp_path / "place"  # where the command is typed, with code of the user's own
    place.mkdir()
    (place / "own_code.py").write_text(TRANSFORM)
    sweep = yaml.safe_load(sweep_file.read_text())
    sweep["base"]["train"] |= {"budget": "6step", "warmup": "0ep"}
    sweep["base"]["views"]["transform"] = "own_code:darker"
    sweep["base"]["system"]["engine"] = "ddp"
    sweep["base"]["probes"] = sweep["base"]["probes"][:1]
    sweep |= {"space": {"train.seed": [0, 1]}}
    (place / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    command = ("-m", "orchestrate", "sweep", "sweep.yaml", "--cluster", cluster_file(place, ranks=1))
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(place.glob("runs/trials/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    assert len(list(place.glob("runs/trials/*/run.yaml"))) == 1, "no trial waits, so this shows nothing"
    worker = checkout / "orchestrate" / "worker.py"
    worker.write_text(f"raise SystemExit('edited')\n{worker.read_text()}")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    (code,) = {json.loads(path.read_text())["digest"] for path in place.glob("runs/trials/*/code.json")}
    tree = place / "runs" / "code" / code / "tree"
    assert "edited" not in (tree / "orchestrate" / "worker.py").read_text()
    starts = [json.loads(path.read_text()) for path in place.glob("runs/trials/*/jobs/1.start.json")]
    assert [start["environment"]["PYTHONPATH"].split(":")[:2] for start in starts] == [[str(tree), str(place)]] * 2
    (trial, _) = place.glob("runs/trials/*")
    told = subprocess.run(
        [sys.executable, "-m", "orchestrate", "why", trial.name],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
    )
    commit = subprocess.run(("git", "rev-parse", "HEAD"), cwd=checkout, capture_output=True, text=True).stdout.strip()
    assert f"runs the code {code}, commit {commit[:10]}, frozen in" in told.stdout
    assert commit in (place / "runs/sweeps/small/report/index.html").read_text()

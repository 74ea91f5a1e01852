"""The commands of `orchestrate data`, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import orchestrate
from tests.data.tars import write_tar
from tests.datasets import draw_shapes


@pytest.fixture
def shards(place: Path) -> Path:
    """Three shards that were written elsewhere, each of one class."""
    draw_shapes(place / "images", 6, num_classes=3, size=8)
    for number, folder in enumerate(sorted((place / "images").iterdir())):
        listed = [(f"{path.stem}.{ending}", data) for path in sorted(folder.iterdir())
                  for ending, data in (("png", path.read_bytes()), ("cls", b"%d" % number))]  # fmt: skip
        write_tar(place / f"shards/{number:03d}.tar", listed)
    return place / "shards"


def test_foreign_shards_are_indexed_and_verified(shards: Path) -> None:
    Path("names.txt").write_text("disc\nsquare\ntriangle\n")
    made = orchestrate("data", "index", "shards", "--to", "index", "--classes", "names.txt")
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith("index: 6 samples of 3 classes in 3 shards, digest ")
    checked = orchestrate("data", "verify", "index", "--decode")
    assert (checked.exit_code, checked.stdout) == (0, "index: 6 samples in 3 shards, decode check: whole\n")
    again = orchestrate("data", "index", "shards", "--to", "index")
    assert again.stdout == made.stdout  # class names are kept


def test_problems_are_listed_and_end_with_one(shards: Path) -> None:
    assert orchestrate("data", "index", "shards").exit_code == 0
    damaged = bytearray((shards / "001.tar").read_bytes())
    damaged[1700] ^= 1
    (shards / "001.tar").write_bytes(damaged)
    result = orchestrate("data", "verify", "shards", "--full", "--json", "report.json")
    assert result.exit_code == 1
    assert "001.tar: sample 0, key" in result.stderr
    assert "full check: 2 problems" in result.stdout
    report = json.loads(Path("report.json").read_text())
    assert (report["ok"], report["mode"], report["shards"], report["samples"]) == (False, "full", 3, 6)
    assert report["problems"][1]["shard"] == "001.tar"
    printed = orchestrate("data", "verify", "shards", "--full", "--json", "-")
    assert json.loads(printed.stdout) == report
    lost = orchestrate("data", "verify", "shards", "--json", "nowhere/report.json")
    assert lost.exit_code == 2
    assert "shards: 6 samples in 3 shards, quick check: whole" in lost.stdout
    assert "error: nowhere/report.json: the report cannot be written: No such file" in lost.stderr


def test_copied_shards_are_whole_with_a_note(shards: Path) -> None:
    assert orchestrate("data", "index", "shards").exit_code == 0
    shutil.copytree("shards", "copy")  # with the dates of today's copies
    for path in Path("copy").glob("*.tar"):
        os.utime(path, (1e9, 1e9))
    checked = orchestrate("data", "verify", "copy")
    assert (checked.exit_code, checked.stdout) == (0, "copy: 6 samples in 3 shards, quick check: whole\n")
    assert checked.stderr.startswith(
        "note: 3 shards copied or touched since the index was made, such as 000.tar: --full"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("index", "shards"), "indexing was interrupted; what is done is kept; run again to go on"),
        (("pack", "shards", "packed", "--workers", "1"), "packing was interrupted; what is done is kept; run again"),
        (("verify", "shards", "--full"), "verifying was interrupted; run it again"),
    ],
)
def test_interrupted_command_says_how_to_go_on(shards: Path, words: tuple[str, ...], said: str) -> None:
    assert words[0] != "verify" or orchestrate("data", "index", "shards").exit_code == 0
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "data", *words], check=False, capture_output=True, text=True
    )
    assert ended.returncode == 130
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


INTERRUPTED = """
import os, signal, sys, zlib
from orchestrate.cli import app

real = zlib.crc32
def once(*args):
    zlib.crc32 = real
    os.kill(os.getpid(), signal.SIGINT)
    return real(*args)

zlib.crc32 = once
app()
"""


def test_samples_that_cannot_be_used_are_said(shards: Path) -> None:
    Path("names.txt").write_text("disc\nsquare\ntriangle\n")
    write_tar(shards / "003.tar", [("x.cls", b"1")])
    one = orchestrate("data", "index", "shards", "--classes", "names.txt")
    assert "1 sample can never be used; others stand in for them. Training allows 1 (system.max_damaged" in one.stderr
    write_tar(shards / "004.tar", [("y.cls", b"1")])
    two = orchestrate("data", "index", "shards")
    assert "2 samples can never be used; others stand in for them. Training allows 1 (" in two.stderr
    assert "would stop: repack without them (`orchestrate data pack --skip-bad`)" in two.stderr
    packed = orchestrate("data", "pack", "shards", "packed", "--skip-bad", "--workers", "1")
    assert packed.stderr == "left out with --skip-bad: 2 samples\n"
    assert packed.stdout.startswith("packed: 6 images of 3 classes in 1 shard, digest ")


def test_lost_sidecar_is_repaired(shards: Path) -> None:
    assert orchestrate("data", "index", "shards").exit_code == 0
    (shards / "002.tar.idx").unlink()
    assert orchestrate("data", "verify", "shards").exit_code == 1
    repaired = orchestrate("data", "verify", "shards", "--repair")
    assert (repaired.exit_code, repaired.stderr) == (0, "repaired: 002.tar.idx\n")
    assert orchestrate("data", "verify", "shards").exit_code == 0


def test_cut_shards_are_refused_unless_accepted(shards: Path) -> None:
    path = shards / "001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    refused = orchestrate("data", "index", "shards")
    assert refused.exit_code == 2
    assert "--accept-cut" in refused.stderr
    accepted = orchestrate("data", "index", "shards", "--accept-cut")
    assert accepted.exit_code == 0
    assert "001.tar: cut at byte 3,000" in accepted.stderr
    assert "problems: cut: 1" in accepted.stderr


def test_compressed_shards_are_refused_with_the_way_out(shards: Path) -> None:
    (shards / "000.tar").rename(shards / "000.tgz")
    refused = orchestrate("data", "index", "shards")
    assert refused.exit_code == 2
    assert "000.tgz" in refused.stderr
    assert "orchestrate data pack" in refused.stderr


def test_tars_are_repacked_and_scaled_down(shards: Path) -> None:
    result = orchestrate("data", "pack", "shards", "packed", "--workers", "1", "--resize-short", "6", "--quality", "90")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("packed: 6 images of 3 classes in 1 shard, digest ")
    assert orchestrate("data", "verify", "packed", "--decode").exit_code == 0


def test_many_problems_are_cut_short(place: Path) -> None:
    write_tar(place / "shards/a.tar", [(f"{number:03d}.txt", b"") for number in range(50)])
    result = orchestrate("data", "index", "shards")
    assert result.exit_code == 0
    # Twenty of a kind are listed, then come the counts, and what they mean.
    assert len(result.stderr.splitlines()) == 22
    assert "set system.max_damaged to 1\n" in result.stderr
    assert "problems: no image: 50" in result.stderr
    checked = orchestrate("data", "verify", "shards", "--full")
    assert checked.exit_code == 1
    assert "and 30 more" in checked.stderr

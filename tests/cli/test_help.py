"""The public surface: names, options and help of every command; `UPDATE_GOLDEN=1` writes it anew."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrate.cli import app, data_app
from tests.cli.commands import finished_sweep, orchestrate
from tests.launchers.jobs import kill_supervisors

GOLDEN = Path(__file__).parents[1] / "golden" / "help.txt"


def command_names() -> list[tuple[str, ...]]:
    top = [command.name or command.callback.__name__ for command in app.registered_commands]  # type: ignore[union-attr]
    data = [("data", str(command.name)) for command in data_app.registered_commands]
    return [(), *((name,) for name in top), ("data",), *data]


def test_help_is_as_it_was() -> None:
    pages = [f"$ orchestrate {' '.join((*words, '--help'))}\n{help_of(words)}" for words in command_names()]
    text = "\n".join(pages)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "the command line changed; if it should, run with UPDATE_GOLDEN=1"


def help_of(words: tuple[str, ...]) -> str:
    result = orchestrate(*words, "--help")
    assert result.exit_code == 0
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)  # some CI services make every program print colours
    return "\n".join(line.rstrip() for line in plain.splitlines())


@pytest.mark.parametrize("words", [words for words in command_names() if words not in ((), ("data",))], ids=" ".join)
def test_every_command_teaches_with_an_example(words: tuple[str, ...]) -> None:
    assert re.search(rf"^ orchestrate {' '.join(words)} \S", help_of(words), re.MULTILINE)


HEAVY = {"torch", "torchvision", "timm", "ray", "deepspeed", "submitit"}
DRAWING = {"matplotlib", "numpy"}


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """RunDir of a finished trial, so that commands run to their ends."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        record, _ = finished_sweep(folder)
    yield folder / "runs" / "trials" / record.trial_ids[0]
    kill_supervisors(folder / "runs")


@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        ("--help", HEAVY | DRAWING),
        ("status --help", HEAVY | DRAWING),
        ("status", HEAVY | DRAWING),
        ("status study", HEAVY | DRAWING),
        ("why TRIAL", HEAVY | DRAWING),
        ("logs TRIAL", HEAVY | DRAWING),
        ("cancel TRIAL", HEAVY | DRAWING),
        ("adopt", HEAVY | DRAWING),
        ("report study", HEAVY),
    ],
)
def test_commands_that_must_start_at_once_import_nothing_heavy(words: str, forbidden: set[str], trial: Path) -> None:
    code = (
        "import sys\n"
        "from orchestrate.cli import app\n"
        f"sys.argv = ['orchestrate', *{words.replace('TRIAL', trial.name).split()!r}]\n"
        "code = 0\n"
        "try:\n    app()\nexcept SystemExit as end:\n    code = end.code\n"
        "print('ended', code, *sys.modules)"
    )
    place = trial.parents[2]
    output = subprocess.run((sys.executable, "-c", code), cwd=place, capture_output=True, text=True, check=True)
    ended, exit_code, *loaded = output.stdout.splitlines()[-1].split()
    assert (ended, exit_code) == ("ended", "0"), output.stderr  # a command that fails early imports little
    assert not forbidden & set(loaded)

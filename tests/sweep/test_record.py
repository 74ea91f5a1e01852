import subprocess
from pathlib import Path

import pytest

from orchestrate.sweep.record import git_state
from tests.sweep.sweeps import record_of, write_sweep

IDENTITY = ("-c", "user.name=A", "-c", "user.email=a@example.org")


def checkout(folder: Path, *files: str) -> str:
    """Commit some files in a new git checkout and return the commit."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", *files)
    git(*IDENTITY, "commit", "-q", "-m", "files")
    return git("rev-parse", "HEAD")


def test_commit_is_that_of_the_code_and_whether_it_was_changed(tmp_path: Path) -> None:
    commit = checkout(tmp_path, "orchestrate/__init__.py")
    assert git_state(tmp_path / "orchestrate") == (commit, False)
    (tmp_path / "orchestrate" / "__init__.py").write_text("changed = True\n")
    assert git_state(tmp_path / "orchestrate") == (commit, True)


def test_code_that_is_installed_inside_of_another_checkout_has_no_commit(tmp_path: Path) -> None:
    checkout(tmp_path, "sweep.yaml")
    package = tmp_path / ".venv" / "orchestrate"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_state(package) == (None, False)


def test_code_outside_of_git_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    assert git_state(tmp_path) == (None, False)


def test_commit_does_not_depend_on_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = record_of(write_sweep(tmp_path)).commit
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    commit = checkout(elsewhere, "sweep.yaml")
    monkeypatch.chdir(elsewhere)
    found = record_of(write_sweep(tmp_path)).commit
    assert found == expected != commit

"""Frozen copies of the code: what is in them, when there is a new one, which one a trial runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrate.errors import RunDirError
from orchestrate.runs import RunDir, read_json
from orchestrate.sweep.code import FrozenCode, code_for, code_of, freeze, plan_freeze, renew_code
from orchestrate.sweep.code_source import Source, find_source
from orchestrate.sweep.record import git_state

GIT = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")


def git(root: Path, *words: str) -> str:
    return subprocess.run((*GIT, *words), cwd=root, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A committed checkout, with a built extension, ignored files and a name with a space."""
    root = tmp_path / "checkout"
    for name in ("orchestrate/__init__.py", "ssl_methods/__init__.py", "my plugins/new.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("number = 1\n")
    (root / ".gitignore").write_text("*.so\n/runs\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    (root / "ssl_methods/_pixels.so").write_bytes(b"machine code")
    (root / "runs").mkdir()
    (root / "runs/big").write_text("results")
    return root


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def names(code: FrozenCode) -> set[str]:
    return {str(path.relative_to(code.path)) for path in code.path.rglob("*") if path.is_file()}


def run_dir(runs: Path) -> RunDir:
    run = RunDir(runs / "trials" / "0123456789abcdef")
    run.path.mkdir(parents=True)
    return run


TRACKED = {"orchestrate/__init__.py", "ssl_methods/__init__.py", "my plugins/new.py", ".gitignore"}


def test_copy_holds_what_git_knows_and_what_was_built(checkout: Path, runs: Path) -> None:
    code = freeze(runs, root=checkout)
    assert names(code) == TRACKED | {"ssl_methods/_pixels.so"}
    assert code.commit == git(checkout, "rev-parse", "HEAD").strip()
    assert not code.dirty
    folder = code.path.parent
    assert folder == runs / "code" / code.digest
    assert (folder / "COMMIT").read_text() == f"{code.commit}\n"
    assert (folder / "diff.patch").read_bytes() == b""


def test_edits_and_new_files_are_in_the_copy_and_in_the_patch(checkout: Path, runs: Path) -> None:
    (checkout / "orchestrate/__init__.py").write_text("number = 2\n")
    (checkout / "orchestrate/added.py").write_text("number = 3\n")
    (checkout / "my plugins/new.py").unlink()
    (checkout / "large.bin").write_bytes(bytes(5_000_000))
    code = freeze(runs, root=checkout)
    assert code.dirty
    assert (code.path / "orchestrate/__init__.py").read_text() == "number = 2\n"
    assert names(code) == TRACKED - {"my plugins/new.py"} | {"orchestrate/added.py", "ssl_methods/_pixels.so"}
    # The patch makes the copy of the commit.
    again = runs / "again"
    git(runs, "clone", "-q", str(checkout), str(again))
    git(again, "apply", str(code.path.parent / "diff.patch"))
    shutil.rmtree(again / ".git")
    for name in names(code) - {"ssl_methods/_pixels.so"}:
        assert (again / name).read_text() == (code.path / name).read_text()
    assert not (again / "my plugins/new.py").exists()


def test_results_and_environments_in_the_checkout_are_no_code(checkout: Path) -> None:
    runs = checkout / "results"
    for name in (
        "results/trials/1/run.yaml",
        "old/store.sqlite",
        "old/trials/1/run.yaml",
        "venv/pyvenv.cfg",
        "venv/x.py",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("")
    first = freeze(runs, root=checkout)
    assert names(first) == TRACKED | {"ssl_methods/_pixels.so"}
    assert not first.dirty
    assert freeze(runs, root=checkout) == first


def test_a_heap_of_files_is_refused_with_what_to_do(
    checkout: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrate.sweep.code_source._MOST_UNTRACKED_FILES", 3)
    for number in range(4):
        (checkout / f"photo-{number}.jpg").write_bytes(b"")
    with pytest.raises(RunDirError, match=r"4 files .* such as photo-0.jpg; list their folders in .gitignore"):
        freeze(runs, root=checkout)
    assert not runs.exists()


def test_same_code_is_one_folder_and_other_code_another(checkout: Path, runs: Path) -> None:
    first = freeze(runs, root=checkout)
    written = {path: path.stat().st_mtime_ns for path in runs.rglob("*")}
    assert freeze(runs, root=checkout) == first
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*")} == written
    (checkout / "ssl_methods/_pixels.so").write_bytes(b"other machine code")
    second = freeze(runs, root=checkout)
    git(checkout, "commit", "-qm", "the same files at another commit", "--allow-empty")
    third = freeze(runs, root=checkout)
    assert len({first.digest, second.digest, third.digest}) == 3
    assert {path.name for path in (runs / "code").iterdir()} == {first.digest, second.digest, third.digest}


def test_plan_writes_nothing_and_names_the_same_copy(checkout: Path, runs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in checkout.rglob("*")}
    planned = plan_freeze(runs, root=checkout)
    assert not runs.exists()
    assert {path: path.stat().st_mtime_ns for path in checkout.rglob("*")} == before
    assert freeze(runs, root=checkout) == planned


def test_copy_cannot_be_edited_by_mistake_and_a_broken_one_is_made_again(checkout: Path, runs: Path) -> None:
    code = freeze(runs, root=checkout)
    module = code.path / "orchestrate/__init__.py"
    assert not module.stat().st_mode & 0o222
    module.unlink()
    assert freeze(runs, root=checkout) == code
    assert module.read_text() == "number = 1\n"
    assert [path.name for path in (runs / "code").iterdir()] == [code.digest]


def test_installed_packages_are_copied_alone(checkout: Path, runs: Path) -> None:
    shutil.rmtree(checkout / ".git")
    (checkout / "orchestrate/__pycache__").mkdir()
    (checkout / "orchestrate/__pycache__/x.pyc").write_bytes(b"")
    code = freeze(runs, root=checkout)
    assert names(code) == {"orchestrate/__init__.py", "ssl_methods/__init__.py", "ssl_methods/_pixels.so"}
    assert (code.commit, code.dirty) == (None, False)


def test_trial_keeps_the_copy_that_it_began_with(checkout: Path, runs: Path) -> None:
    run = run_dir(runs)
    assert code_of(run) is None
    old = freeze(runs, root=checkout)
    assert code_for(run, old) == old
    (checkout / "orchestrate/__init__.py").write_text("number = 2\n")
    new = freeze(runs, root=checkout)
    assert code_for(run, new) == old
    assert code_of(run) == old
    assert renew_code(run, new) == old
    assert code_for(run, old) == new
    assert renew_code(run, new) is None


def test_trial_whose_copy_is_gone_takes_the_code_of_now(checkout: Path, runs: Path) -> None:
    run = run_dir(runs)
    old = code_for(run, freeze(runs, root=checkout))
    shutil.rmtree(old.path.parent)
    (checkout / "orchestrate/__init__.py").write_text("number = 2\n")
    new = freeze(runs, root=checkout)
    assert code_for(run, new) == new
    assert (read_json(run.code_file) or {})["digest"] == new.digest


def test_trial_that_never_began_needs_no_renewal(checkout: Path, runs: Path) -> None:
    run = run_dir(runs)
    assert renew_code(run, freeze(runs, root=checkout)) is None
    assert not run.code_file.exists()


def test_runs_folder_that_cannot_be_written_is_told(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="code: live"):
        freeze(tmp_path / "file", root=checkout)


def test_file_that_vanishes_while_the_code_is_copied_is_left_out(
    checkout: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = checkout / "orchestrate/.module.py.swp"
    saving.write_text("an editor's")
    listed = find_source

    def list_and_save(root: Path, folder: Path) -> Source:
        source = listed(root, folder)
        assert "orchestrate/.module.py.swp" in source.files
        saving.unlink()
        return source

    monkeypatch.setattr("orchestrate.sweep.code.find_source", list_and_save)
    assert names(freeze(runs, root=checkout)) == TRACKED | {"ssl_methods/_pixels.so"}


def test_source_that_cannot_be_read_is_named_and_not_the_target(checkout: Path, runs: Path) -> None:
    (checkout / "orchestrate/loop").symlink_to("/proc/self/mem")  # which opens, and fails when it is read
    with pytest.raises(RunDirError, match="orchestrate/loop: cannot be read") as error:
        freeze(runs, root=checkout)
    assert "--runs" not in str(error.value)


def test_git_that_fails_to_list_is_no_empty_checkout(
    checkout: Path, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\ncase "$*" in *--stage*) exit 128;; esac\nexec {shutil.which("git")} "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(RunDirError, match="`git ls-files -z --stage` failed"):
        freeze(runs, root=checkout)


def test_checkout_of_another_user_is_a_checkout(checkout: Path, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = freeze(runs, root=checkout)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert subprocess.run(("git", "status"), cwd=checkout, capture_output=True, check=False).returncode == 128
    assert freeze(runs, root=checkout) == mine
    assert git_state(checkout / "orchestrate") == (mine.commit, False)


def test_links_inside_stay_links_and_others_become_files(checkout: Path, runs: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("number = 4\n")
    (tmp_path / "data").mkdir()
    links = {
        "ssl_methods/same.py": "../orchestrate/__init__.py",
        "ssl_methods/absolute.py": str(checkout / "orchestrate/__init__.py"),
        "plugins": "my plugins",
        "orchestrate/other.py": str(tmp_path / "outside.py"),
        "data": str(tmp_path / "data"),
        "gone.py": "nowhere.py",
    }
    for name, to in links.items():
        (checkout / name).symlink_to(to)
    git(checkout, "add", "-A")
    git(checkout, "commit", "-qm", "links")
    said = list[str]()
    code = freeze(runs, root=checkout, say=said.append)
    kept = {name: str((code.path / name).readlink()) for name in links if (code.path / name).is_symlink()}
    inside = "../orchestrate/__init__.py"
    assert kept == {"ssl_methods/same.py": inside, "ssl_methods/absolute.py": inside, "plugins": "my plugins"}
    assert (code.path / "orchestrate/other.py").read_text() == "number = 4\n"
    assert (code.path / "plugins/new.py").read_text() == "number = 1\n"
    assert said == ["the frozen copy of the code leaves out: link that leads out of the code: data, gone.py"]
    assert freeze(runs, root=checkout, say=said.append) == code
    assert len(said) == 1
    (code.path / "plugins").unlink()
    assert freeze(runs, root=checkout) == code
    assert (code.path / "plugins").is_symlink()


def test_what_a_copy_leaves_out_is_told_in_a_line(checkout: Path, runs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-qm", "other", "--allow-empty")
    git(checkout, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(other), "third_party")
    git(checkout, "clone", "-q", str(other), "scratch")
    (checkout / "weights.bin").write_bytes(bytes(5_000_000))
    said = list[str]()
    code = freeze(runs, root=checkout, say=said.append)
    assert names(code) == TRACKED | {"ssl_methods/_pixels.so", ".gitmodules"}
    assert said == [
        "the frozen copy of the code leaves out: submodule: third_party; untracked file over 5 MB: weights.bin; "
        "checkout inside this one: scratch/"
    ]

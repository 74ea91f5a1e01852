"""What `make check` asks for holds; the suite is what everybody runs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COMMANDS = {
    "ruff check": [BIN / "ruff", "check", "."],
    "ruff format": [BIN / "ruff", "format", "--check", "."],
    "mypy": [BIN / "mypy"],
    "import-linter": [BIN / "lint-imports", "--no-cache"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_check_is_clean(name: str) -> None:
    result = subprocess.run([*map(str, COMMANDS[name])], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_file_of_ours_is_longer_than_400_lines() -> None:
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    lengths = {file: len((ROOT / file).read_text().splitlines()) for file in files.split()}
    assert {file: lines for file, lines in lengths.items() if lines > 400} == {}

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launchers.jobs import kill_supervisors


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run commands in, as a user would; results go to its `runs`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHESTRATE_RUNS", raising=False)
    yield tmp_path
    kill_supervisors(tmp_path / "runs")

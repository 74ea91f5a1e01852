from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.config.methods import bare_method_installed, staged_method_installed
from tests.launchers.jobs import kill_supervisors


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A runs folder that does not exist yet; its jobs end with the test."""
    yield tmp_path / "runs"
    kill_supervisors(tmp_path / "runs")


@pytest.fixture
def bare_method(tmp_path: Path) -> Iterator[str]:
    """Name of a method that holds a parameter itself."""
    with bare_method_installed(tmp_path) as name:
        yield name


@pytest.fixture
def staged_method(tmp_path: Path) -> Iterator[str]:
    """Name of a method that takes few ranks and gives advice."""
    with staged_method_installed(tmp_path) as name:
        yield name

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launchers.jobs import kill_supervisors
from tests.launchers.slurm_text import TextSlurm


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Path]:
    """A runs folder whose jobs end with the test; its name tries what paths may hold."""
    folder = tmp_path / "my runs' $HOME"
    (folder / "trials").mkdir(parents=True)
    yield folder
    kill_supervisors(folder)


@pytest.fixture
def slurm() -> TextSlurm:
    return TextSlurm()

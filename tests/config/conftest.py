from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.config.methods import bare_method_installed, staged_method_installed


@pytest.fixture
def bare_method(tmp_path: Path) -> Iterator[str]:
    """Name of a method that holds a parameter itself."""
    with bare_method_installed(tmp_path) as name:
        yield name


@pytest.fixture
def staged_method(tmp_path: Path) -> Iterator[str]:
    """Name of a method whose training has two stages."""
    with staged_method_installed(tmp_path) as name:
        yield name

import os

import jaxtyping
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores are shared by all test processes
torch.set_num_threads(1)

# annotated shapes are verified in tests, at no cost in production; before the package's first import
jaxtyping.install_import_hook(["ssl_methods"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that wait most, beside which the other process has time to compute."""
    items.sort(key=lambda item: item.path.parent.name != "slurm")

import os

import jaxtyping
import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cores are shared by all test processes
torch.set_num_threads(1)

# annotated shapes are verified in tests, at no cost in production; before the package's first import
jaxtyping.install_import_hook(["ssl_methods"], "beartype.beartype")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of a file in one process, which sets up what they share once; other groups are marked.

    The longest group begins first, so that no process waits for it at the end.
    """
    items.sort(key=lambda item: item.path.parent.name != "slurm")
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))

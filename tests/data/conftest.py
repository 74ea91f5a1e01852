import pytest

from tests.datasets import make_shapes


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """97 shapes of 4 classes in shards of 10: no count divides another."""
    folder = str(tmp_path_factory.mktemp("tiny") / "train")
    make_shapes(folder, 97, samples_per_shard=10)
    return folder

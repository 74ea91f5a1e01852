from pathlib import Path

import pytest
import torch
from torch import Tensor

from orchestrate.evaluation.features import extract, raw_pixels
from orchestrate.evaluation.probe import Features
from tests.datasets import make_shapes
from tests.distributed import run_on_ranks


def _raw_features(url: str) -> Features | None:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return extract(raw_pixels, url, size=28, rank=rank, world_size=world_size, device=torch.device("cpu"))


@pytest.mark.parametrize("num_samples", [37, 2])
def test_features_over_ranks_equal_those_of_one_process(tmp_path: Path, num_samples: int) -> None:
    make_shapes(tmp_path / "data", num_samples)
    url = str(tmp_path / "data")
    alone = extract(raw_pixels, url, size=28, rank=0, world_size=1, device=torch.device("cpu"))
    assert alone is not None
    assert alone.values.shape == (num_samples, 28 * 28 * 3)
    for world_size in (2, 3):  # neither divides 37; with 2 samples a third rank has none
        together, *others = run_on_ranks(world_size, _raw_features, url)
        assert others == [None] * (world_size - 1)
        assert torch.equal(together.values, alone.values)
        assert torch.equal(together.labels, alone.labels)


def test_raw_pixels_are_flat_and_between_0_and_1() -> None:
    images: Tensor = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    assert raw_pixels(images).tolist() == [pytest.approx([0.0, 0.2, 1.0])]

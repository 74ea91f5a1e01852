"""The device's half of a view against the path that makes it whole on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssl_methods.device_views import NUM_PARAMETERS, crop_views, finish_views
from ssl_methods.view_plan import plan_view
from ssl_methods.views import make_views, recipe, recipe_names, view_sides
from tests.ssl_methods.photos import COLOUR, GREY, photo

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", recipe_names())
def test_views_equal_those_made_on_the_cpu(name: str, device: str) -> None:
    chosen, image, samples = recipe(name, 32), photo(60, 45), range(16)
    whole = [make_views(image, chosen, seed=0, epoch=1, sample_id=i) for i in samples]
    halves = [crop_views(image, chosen, seed=0, epoch=1, sample_id=i) for i in samples]
    for view, spec in enumerate(chosen.views):
        batch = torch.from_numpy(np.stack([half[view][0] for half in halves])).to(device)
        parameters = torch.from_numpy(np.stack([half[view][1] for half in halves]))
        finished = finish_views(batch, parameters)
        assert finished.device.type == device
        for sample_id, made in zip(samples, finished.cpu().numpy(), strict=True):
            differences = np.abs(made.astype(int) - whole[sample_id][view])
            plan = plan_view(spec, (60, 45), seed=0, epoch=1, sample_id=sample_id, view=view)
            # the CPU rounds before and after the blur, the device once
            assert differences.max() <= (1 if plan.blur_sigma else 0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_does_not_depend_on_its_batch(device: str) -> None:
    views, rows = zip(
        *(crop_views(COLOUR, recipe("byol", 24), seed=0, epoch=0, sample_id=i)[0] for i in range(12)), strict=True
    )
    batch, parameters = torch.from_numpy(np.stack(views)).to(device), torch.from_numpy(np.stack(rows))
    together = finish_views(batch, parameters)
    apart = torch.cat([finish_views(batch[i : i + 1], parameters[i : i + 1]) for i in range(12)])
    assert torch.equal(together, apart)


def test_crops_fill_rows_of_batches() -> None:
    chosen = recipe("small_dino", 28)
    rows = [np.zeros((side, side, 3), np.uint8) for side in view_sides(chosen)]
    made = crop_views(GREY, chosen, seed=0, epoch=0, sample_id=5, out=rows)
    assert all(view is row for (view, _), row in zip(made, rows, strict=True))
    assert {(parameters.shape, parameters.dtype.name) for _, parameters in made} == {((NUM_PARAMETERS,), "float32")}


def test_tiny_views_can_be_blurred() -> None:
    (view, parameters), *_ = crop_views(COLOUR, recipe("byol", 3), seed=0, epoch=0, sample_id=0)
    assert finish_views(torch.from_numpy(view[None]), torch.from_numpy(parameters[None])).shape == (1, 3, 3, 3)

import pytest
import torch

from orchestrate.engine.snapshot import SnapshotBuffers, find_non_finite, flatten, unflatten

TENSORS = {
    "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "flag": torch.tensor([True, False]),
    "count": torch.tensor(7),
    "rate": torch.tensor(0.5),
    "nothing": torch.zeros(0, 2),
}


def test_copies_equal_their_originals_and_share_nothing_with_them() -> None:
    snapshot = SnapshotBuffers(torch.device("cpu")).copy({"file": TENSORS})
    snapshot.settle()
    for name, copy in snapshot.files["file"].items():
        assert torch.equal(copy, TENSORS[name])
        assert copy.dtype == TENSORS[name].dtype
        assert copy.numel() == 0 or copy.data_ptr() != TENSORS[name].data_ptr()


def test_memory_of_one_copy_serves_for_the_next() -> None:
    buffers = SnapshotBuffers(torch.device("cpu"))
    places = [
        {name: copy.data_ptr() for name, copy in buffers.copy({"file": TENSORS}).files["file"].items()}
        for _ in range(2)
    ]
    assert places[0] == places[1]


def test_tensor_of_another_shape_gets_new_memory() -> None:
    buffers = SnapshotBuffers(torch.device("cpu"))
    buffers.copy({"file": {"queue": torch.zeros(2)}})
    copy = buffers.copy({"file": {"queue": torch.ones(3, dtype=torch.float64)}}).files["file"]["queue"]
    assert torch.equal(copy, torch.ones(3, dtype=torch.float64))


def test_layout_of_a_tensor_in_memory_does_not_show_in_its_copy() -> None:
    images = torch.arange(24.0).reshape(1, 2, 3, 4)
    copy = SnapshotBuffers(torch.device("cpu")).copy({"file": {"w": images.to(memory_format=torch.channels_last)}})
    assert copy.files["file"]["w"].is_contiguous()
    assert torch.equal(copy.files["file"]["w"], images)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["weight", "half", "rate"])
def test_tensor_that_is_not_finite_is_named(name: str, value: float) -> None:
    spoilt = TENSORS[name].clone()
    spoilt.view(-1)[-1] = value
    assert find_non_finite(TENSORS | {name: spoilt}) == name


def test_finite_tensors_of_any_type_are_no_problem() -> None:
    assert find_non_finite(TENSORS) == ""
    assert find_non_finite({}) == ""


def test_optimizer_state_is_flattened_and_back_whatever_its_names() -> None:
    state = {'a.b "c"': {"exp_avg": torch.ones(2), "step": torch.tensor(3.0)}, "d": {"x.y": torch.zeros(1)}}
    assert unflatten(flatten(state)) == state

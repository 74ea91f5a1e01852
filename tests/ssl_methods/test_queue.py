from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ssl_methods.queue import NegativeQueue


def batch(number: int, *, size: int = 4, dim: int = 5) -> Tensor:
    return F.normalize(torch.randn(size, dim, generator=torch.Generator().manual_seed(number)), dim=1)


def test_starts_with_random_directions() -> None:
    torch.manual_seed(0)
    keys = NegativeQueue(64, 2000).keys
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(2000), rtol=1e-6, atol=0)  # fp32
    assert float(keys.mean(dim=0).norm()) < 0.05  # 1 / sqrt(2000) for directions without preference


def test_newest_batches_take_the_place_of_the_oldest() -> None:
    queue = NegativeQueue(5, 12)
    start = queue.negatives()
    queue.enqueue(batch(0))
    torch.testing.assert_close(queue.negatives(), torch.cat([batch(0), start[4:]]))
    for number in (1, 2, 3):
        queue.enqueue(batch(number))
    torch.testing.assert_close(queue.negatives(), torch.cat([batch(3), batch(1), batch(2)]))
    assert int(queue.position) == 4


def test_keys_of_any_length_and_precision_are_stored_as_unit_vectors() -> None:
    queue = NegativeQueue(5, 4)
    queue.enqueue((7 * batch(0)).bfloat16())
    assert queue.keys.dtype == torch.float32
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(4), rtol=1e-6, atol=0)  # normalised in fp32
    torch.testing.assert_close(queue.keys, batch(0), rtol=0, atol=5e-3)  # the keys themselves were bf16


def test_state_holds_keys_and_position() -> None:
    queue, restored = NegativeQueue(5, 12), NegativeQueue(5, 12)
    queue.enqueue(batch(0))
    restored.load_state_dict(queue.state_dict())
    for each in (queue, restored):
        each.enqueue(batch(1))
    assert torch.equal(queue.keys, restored.keys)
    assert not list(queue.parameters())


def test_negatives_survive_an_enqueue_before_the_backward_pass() -> None:
    queue = NegativeQueue(5, 4)
    queries = batch(0).requires_grad_()
    loss = (queries @ queue.negatives().T).exp().sum()
    queue.enqueue(batch(1))
    loss.backward()
    assert queries.grad is not None


@pytest.mark.parametrize(("num_keys", "fitting"), [(5, 10), (24, 24)])
def test_batch_that_would_straddle_the_end_is_refused(num_keys: int, fitting: int) -> None:
    message = f"queue_size: 12 is no multiple of the global batch of {num_keys}; write {fitting}, say"
    with pytest.raises(ValueError, match=message):
        NegativeQueue(5, 12).enqueue(batch(0, size=num_keys))

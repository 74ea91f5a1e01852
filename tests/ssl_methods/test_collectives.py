from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_methods.collectives import (
    RankBatchNorm,
    RankBatchNormAct,
    all_reduce_sum,
    gather,
    rank,
    shared_permutation,
    standardise,
    synchronise_batch_norm,
    world_size,
)
from tests.distributed import run_on_ranks
from tests.ssl_methods.inputs import rank_slice

SHAPES = [(11, 4), (11, 4, 3), (11, 4, 3, 2)]  # 11 samples: no two rank counts split them evenly


def global_batch(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 2


def test_one_process_is_the_identity() -> None:
    x = torch.ones(3)
    assert (rank(), world_size()) == (0, 1)
    assert gather(x) is x
    assert all_reduce_sum(x) is x


def collectives_on_this_rank() -> dict[str, Tensor]:
    x = (torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * rank()).requires_grad_()
    gathered, total = gather(x), all_reduce_sum(x)
    # rank r's loss weighs the parts by r + 1, so a backward that forgot a rank would show
    loss = (rank() + 1) * (gathered.pow(3).sum() + total.pow(3).sum())
    loss.backward()
    assert x.grad is not None
    return {"x": x.detach(), "gathered": gathered.detach(), "total": total.detach(), "grad": x.grad}


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_gather_and_sum_have_the_gradient_of_all_ranks_losses(num_ranks: int) -> None:
    results = run_on_ranks(num_ranks, collectives_on_this_rank)
    parts = [each["x"].requires_grad_() for each in results]
    everything, total = torch.cat(parts), torch.stack(parts).sum(0)
    weights = sum(range(1, num_ranks + 1))
    (weights * (everything.pow(3).sum() + total.pow(3).sum())).backward()
    for part, result in zip(parts, results, strict=True):
        assert torch.equal(result["gathered"], everything)
        assert torch.equal(result["total"], total)
        torch.testing.assert_close(result["grad"], part.grad, rtol=1e-14, atol=0)


def permutations_on_this_rank() -> tuple[list[Tensor], Tensor]:
    """Two orders, the first of them again after rank 0's generator was put back, and a number of one's own."""
    torch.manual_seed(100 + rank())
    cpu = torch.device("cpu")
    before = torch.get_rng_state()
    orders = [shared_permutation(9, device=cpu), shared_permutation(9, device=cpu)]
    if rank() == 0:
        torch.set_rng_state(before)
    return [*orders, shared_permutation(9, device=cpu)], torch.rand(1)


def test_permutation_is_shared_and_follows_rank_zeros_generator() -> None:
    results = run_on_ranks(4, permutations_on_this_rank)
    for orders, _ in results:
        assert all(torch.equal(mine, zeros) for mine, zeros in zip(orders, results[0][0], strict=True))
    first, second, again = results[0][0]
    assert torch.equal(first, torch.randperm(9, generator=torch.Generator().manual_seed(100)))
    assert torch.equal(again, first)
    assert not torch.equal(first, second)
    for number, (_, drawn) in enumerate(results[1:], start=1):
        torch.manual_seed(100 + number)
        assert torch.equal(drawn, torch.rand(1))  # the others' generators were not touched


def test_permutation_of_one_process_is_torchs_own() -> None:
    torch.manual_seed(3)
    drawn = shared_permutation(9, device=torch.device("cpu"))
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.randperm(9))


def norm_on_this_rank(shape: tuple[int, ...], options: dict[str, Any]) -> dict[str, Tensor]:
    """One training step of a batch norm on this rank's samples; each sample weighs differently in the loss."""
    norm = RankBatchNorm(shape[1], **options).double()
    if norm.affine:
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    x = rank_slice(global_batch(shape), rank(), world_size()).clone().requires_grad_()
    weights = rank_slice(torch.linspace(-1, 2, shape[0], dtype=torch.float64), rank(), world_size())
    y = norm(x)
    # averaged over ranks, this is the global sum
    loss = world_size() * (y.pow(3) * weights.view(-1, *[1] * (len(shape) - 1))).sum()
    loss.backward()
    assert x.grad is not None
    state = {name: value.detach().double() for name, value in norm.state_dict().items()}
    gradients = {f"{name}.grad": value.grad for name, value in norm.named_parameters() if value.grad is not None}
    plain = standardise(x.detach().flatten(1), epsilon=norm.eps)
    return {"y": y.detach(), "standardised": plain, "x.grad": x.grad, **state, **gradients}


def assert_norm_equal(shape: tuple[int, ...], options: dict[str, Any], *, num_ranks: int) -> None:
    whole = norm_on_this_rank(shape, options)
    results = run_on_ranks(num_ranks, norm_on_this_rank, shape, options)
    for name, expected in whole.items():
        parts = [result[name] for result in results]
        if name in ("y", "standardised"):
            actual = torch.cat(parts)
        elif name == "x.grad":
            actual = torch.cat(parts) / num_ranks  # each sample lives on one rank, the average divides it
        else:
            actual = torch.stack(parts).mean(0)
        # float64, moments combined in another order
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_over_ranks_equals_one_process(shape: tuple[int, ...], num_ranks: int) -> None:
    assert_norm_equal(shape, {}, num_ranks=num_ranks)


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"track_running_stats": False}])
def test_batch_norm_options_hold_over_ranks(options: dict[str, Any]) -> None:
    assert_norm_equal((11, 4), options, num_ranks=2)


def moments_far_from_zero() -> tuple[Tensor, Tensor]:
    x = rank_slice(global_batch((64, 2)) + 10_000, rank(), world_size())
    exact = RankBatchNorm(2, momentum=1.0).double()
    single = RankBatchNorm(2, momentum=1.0)
    exact(x), single(x.float())
    assert exact.running_var is not None and single.running_var is not None
    return exact.running_var, single.running_var.double()


def test_variance_survives_a_large_mean_in_single_precision() -> None:
    exact, single = run_on_ranks(2, moments_far_from_zero)[0]
    # a sum of squares in fp32 would be wrong by about 100 %; rounding the inputs at 10^4 costs 5e-4 a sample
    torch.testing.assert_close(single, exact, rtol=1e-3, atol=0)


def half_precision_on_this_rank() -> tuple[Tensor, Tensor, Tensor]:
    norm = RankBatchNorm(4)
    x = rank_slice(global_batch((11, 4)), rank(), world_size()).bfloat16().requires_grad_()
    y = norm(x)
    y.float().square().sum().backward()
    assert x.grad is not None and norm.running_mean is not None
    return y.detach(), x.grad, norm.running_mean


def test_half_precision_inputs_have_single_precision_moments() -> None:
    y, gradient, running_mean = run_on_ranks(2, half_precision_on_this_rank)[1]
    assert (y.dtype, gradient.dtype, running_mean.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    expected = 0.1 * global_batch((11, 4)).bfloat16().float().mean(0)
    torch.testing.assert_close(running_mean, expected, rtol=1e-6, atol=1e-7)  # fp32; bf16 would be off by 4e-3


def evaluation_on_this_rank() -> bool:
    norm, plain = RankBatchNorm(4).eval(), nn.BatchNorm1d(4).eval()
    x = global_batch((5, 4)).float() * (rank() + 1)
    return torch.equal(norm(x), plain(x))


def test_evaluation_uses_the_running_moments() -> None:
    assert run_on_ranks(2, evaluation_on_this_rank) == [True, True]


def test_one_process_equals_plain_batch_norm() -> None:
    x = global_batch((11, 4, 3, 2)).float()
    ours, plain = RankBatchNorm(4), nn.BatchNorm2d(4)
    assert torch.equal(ours(x), plain(x))
    for name, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_synchronised_network_keeps_names_parameters_and_buffers() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.1), nn.Sequential(nn.BatchNorm1d(4))).eval()
    before = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert synchronise_batch_norm(network) is network
    after = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert isinstance(network[1], RankBatchNorm)
    assert (network[1].eps, network[1].training) == (0.1, False)
    assert isinstance(network[2][0], RankBatchNorm)


def test_activation_inside_a_timm_batch_norm_survives() -> None:
    from timm import create_model  # here: the ranks of the other tests import this file

    network = create_model("efficientnet_b0", num_classes=0)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = network.eval()(x)
    synchronise_batch_norm(network)
    assert any(isinstance(module, RankBatchNormAct) for module in network.modules())
    assert torch.equal(network(x), expected)


def test_unknown_batch_norm_is_refused() -> None:
    class Special(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="Special: cannot be synchronised"):
        synchronise_batch_norm(nn.Sequential(Special(3)))

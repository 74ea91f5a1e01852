from typing import Any

import pytest
import torch
from torch import nn

from orchestrate.config.optim import LarsConfig, OptimConfig, SgdConfig
from orchestrate.engine.gradients import GradientRules, GradientSlice
from orchestrate.engine.layout import WholeLayout, trained_names
from orchestrate.engine.optim import build_optimizer
from orchestrate.engine.precision import LossScale
from tests.distributed import run_on_ranks

CPU = torch.device("cpu")


def lars_step(weight: list[float], gradient: list[float], *, decay: float, variant: Any) -> list[float]:
    """One step of a matrix at learning rate 1."""
    network = nn.ParameterList([nn.Parameter(torch.tensor([weight], dtype=torch.float64))])
    config = LarsConfig(name="lars", lr=1.0, bias_lr=1.0, weight_decay=decay, variant=variant)
    optimizer = build_optimizer(config, network, global_batch=256)
    network[0].grad = torch.tensor([gradient], dtype=torch.float64)
    rules_of(config, network, optimizer).apply(WholeLayout(optimizer, network).slices())
    optimizer.step()
    return (torch.tensor(weight, dtype=torch.float64) - network[0].detach()[0]).tolist()


def rules_of(
    config: OptimConfig, network: nn.Module, optimizer: Any, *, scale: LossScale | None = None, sharded: bool = False
) -> GradientRules:
    return GradientRules(
        config,
        optimizer,
        loss_scale=scale or LossScale(dynamic=False),
        names=trained_names(optimizer, network),
        device=CPU,
        sharded=sharded,
    )


@pytest.mark.parametrize(
    ("variant", "decay", "step"),
    [
        ("barlow_twins", 0.0, [0, 0.005]),
        ("triplet", 0.0, [0, 0.005]),
        ("barlow_twins", 0.1, [0.001047645, 0.004889012]),
        ("triplet", 0.1, [0.001, 0.004666667]),
    ],
)
def test_lars_takes_the_published_step(variant: str, decay: float, step: list[float]) -> None:
    assert lars_step([3, 4], [0, 1], decay=decay, variant=variant) == pytest.approx(step, abs=1e-9)


@pytest.mark.parametrize(
    ("variant", "weight", "gradient", "step"),
    [
        ("barlow_twins", [0, 0], [0, 1], [0, 1]),  # a plain step if either norm is 0
        ("barlow_twins", [3, 4], [0, 0], [0, 0]),
        ("triplet", [0, 0], [0, 1], [0, 0]),  # no guard in the authors' code: a zero weight stays
        ("triplet", [0, 0], [0, 0], [0, 0]),
    ],
)
def test_lars_of_zero_norms(variant: str, weight: list[float], gradient: list[float], step: list[float]) -> None:
    assert lars_step(weight, gradient, decay=0.0, variant=variant) == pytest.approx(step)


def test_b8_scale_of_the_loss_moves_vectors_and_not_matrices() -> None:
    config = LarsConfig(name="lars", lr=1.0, bias_lr=1.0)
    updates = []
    for factor in (1.0, 7.0):
        network = network_with_gradients()
        before = {name: value.detach().clone() for name, value in network.named_parameters()}
        for parameter in network.parameters():
            parameter.grad = parameter.grad * factor  # type: ignore[operator]
        optimizer = build_optimizer(config, network, global_batch=256)
        rules_of(config, network, optimizer).apply(WholeLayout(optimizer, network).slices())
        optimizer.step()
        updates.append({name: value.detach() - before[name] for name, value in network.named_parameters()})
    for name, update in updates[0].items():
        ratio = 7.0 if update.ndim == 1 else 1.0
        torch.testing.assert_close(updates[1][name], ratio * update, rtol=1e-3, atol=1e-6)  # fp32 differences


def network_with_gradients() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return network


@pytest.mark.parametrize("clip", ["none", "global", "per_tensor"])
@pytest.mark.parametrize("bound", [0.5, 1e9])
@pytest.mark.parametrize("dynamic", [False, True])
def test_clipping_and_unscaling_are_torchs(clip: Any, bound: float, dynamic: bool) -> None:
    config = SgdConfig(name="sgd", lr=0.1, clip=clip, clip_norm=bound)
    network, plain = network_with_gradients(), network_with_gradients()
    optimizer, scale = build_optimizer(config, network, global_batch=256), LossScale(dynamic=dynamic)
    for parameter in network.parameters():
        parameter.grad = parameter.grad * scale.value  # type: ignore[operator]
    facts = rules_of(config, network, optimizer, scale=scale).apply(WholeLayout(optimizer, network).slices())
    norm = torch.nn.utils.get_total_norm([each.grad for each in plain.parameters() if each.grad is not None])
    if clip == "global":
        torch.nn.utils.clip_grad_norm_(plain.parameters(), bound)
    elif clip == "per_tensor":
        for parameter in plain.parameters():
            torch.nn.utils.clip_grad_norm_(parameter, bound)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        # Groups list the tensors in another order than the module, so the sum of squares rounds differently.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=0)
    if facts:
        assert facts["grad_norm"] == pytest.approx(float(norm), rel=1e-6)


def test_nothing_is_to_do_in_full_precision_without_clipping() -> None:
    config = SgdConfig(name="sgd", lr=0.1)
    network = network_with_gradients()
    assert rules_of(config, network, build_optimizer(config, network, global_batch=256)).idle


def test_layer_that_is_held_still_does_not_count_for_the_norm() -> None:
    config = SgdConfig(name="sgd", lr=0.1, clip="global", clip_norm=1e9)
    network = network_with_gradients()
    optimizer = build_optimizer(config, network, global_batch=256, last_layer=tuple(network[1].parameters()))
    for group in optimizer.param_groups:
        group["still"] = group["last_layer"]
    facts = rules_of(config, network, optimizer).apply(WholeLayout(optimizer, network).slices())
    own = torch.nn.utils.get_total_norm([each.grad for each in network[0].parameters() if each.grad is not None])
    assert facts["grad_norm"] == pytest.approx(float(own), rel=1e-6)  # rounding


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_overflow_halves_the_scale_and_asks_to_skip(bad: float) -> None:
    config = SgdConfig(name="sgd", lr=0.1)
    network, scale = network_with_gradients(), LossScale(dynamic=True)
    optimizer = build_optimizer(config, network, global_batch=256)
    network[0].bias.grad[0] = bad
    facts = rules_of(config, network, optimizer, scale=scale).apply(WholeLayout(optimizer, network).slices())
    assert facts == {"loss_scale": 65536.0, "skipped": 1.0}
    assert scale.value == 32768.0


def _sliced(first_numbers: int) -> list[tuple[Any, ...]]:
    """Cut all gradients after some numbers between two ranks; compare what each makes of its part with the whole."""
    rank = torch.distributed.get_rank()
    facts = []
    for config in (
        SgdConfig(name="sgd", lr=0.1, clip="global", clip_norm=0.5),
        SgdConfig(name="sgd", lr=0.1, clip="per_tensor", clip_norm=0.5),
        LarsConfig(name="lars", lr=0.1, bias_lr=0.1, weight_decay=0.1),
        LarsConfig(name="lars", lr=0.1, bias_lr=0.1, weight_decay=0.1, variant="triplet"),
    ):
        whole, parts = network_with_gradients(), network_with_gradients()
        optimizers = [build_optimizer(config, network, global_batch=256) for network in (whole, parts)]
        expected = rules_of(config, whole, optimizers[0]).apply(WholeLayout(optimizers[0], whole).slices())
        own, begin = [], 0
        for each in WholeLayout(optimizers[1], parts).slices():
            cut = min(max(first_numbers - begin, 0), each.gradient.numel())
            part = slice(cut, None) if rank else slice(0, cut)
            gradient, weight = each.gradient.view(-1)[part], each.weight.view(-1)[part]
            begin += each.gradient.numel()
            if gradient.numel():
                own.append(GradientSlice(each.name, gradient, weight, each.group))
        found = rules_of(config, parts, optimizers[1], sharded=True).apply(own)
        goals = dict(whole.named_parameters())
        for each in own:
            goal = goals[each.name].grad.view(-1)  # type: ignore[union-attr]
            goal = goal[-each.gradient.numel() :] if rank else goal[: each.gradient.numel()]
            facts.append((each.name, float(((each.gradient - goal) / goal).abs().max())))
        facts.append(("norm", abs(found.get("grad_norm", 1.0) / expected.get("grad_norm", 1.0) - 1)))
    return facts


def test_norms_over_slices_are_those_of_whole_tensors() -> None:
    for first_numbers in (7, 0):  # in the middle of a matrix; and a rank with nothing at all
        for facts in run_on_ranks(2, _sliced, first_numbers):
            assert max(difference for _, difference in facts) < 1e-6  # rounding of the sums

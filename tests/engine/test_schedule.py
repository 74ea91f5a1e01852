import json
from typing import Any

import pytest

from orchestrate.config.run import parse_run
from orchestrate.engine.schedule import Constant, Cosine, LearningRate, Line, Schedules, Stages, Steps, schedules_of

# Barlow Twins at a global batch of 2048 on ImageNet: 1000 epochs of 626 steps, 10 of warm-up, base learning rate 0.2.
BARLOW_TWINS = LearningRate(1000 * 626, 10 * 626)
# EsViT at a global batch of 512 on ImageNet: 300 epochs of 2502 steps, 10 of warm-up, weight decay from .04 to .4.
ESVIT = Schedules(LearningRate(300 * 2502, 10 * 2502), 0.04, 0.4)


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0.0), (5, 0.8), (10, 1.6), (505, 0.8008), (1000, 0.0016)])
def test_published_schedule_of_barlow_twins_is_met(epoch: int, lr: float) -> None:
    assert 0.2 * 2048 / 256 * BARLOW_TWINS.factor(epoch * 626) == pytest.approx(lr, abs=1e-12)


# Published to three digits.
@pytest.mark.parametrize(
    ("epoch", "lr", "weight_decay"), [(0, 0, 0.04), (10, 1e-3, 0.041), (150, 5.28e-4, 0.22), (299, 1.03e-6, 0.40)]
)
def test_published_schedules_of_esvit_are_met(epoch: int, lr: float, weight_decay: float) -> None:
    step = epoch * 2502
    assert 5e-4 * 512 / 256 * ESVIT.lr_factor(step) == pytest.approx(lr, rel=5e-3)
    assert ESVIT.weight_decay(step) == pytest.approx(weight_decay, rel=5e-3)


@pytest.mark.parametrize(("epoch", "lr"), [(0, 3e-4), (100, 1.5e-4), (199, 1.5e-6)])
def test_s8_published_line_of_s2_bnn_is_met(epoch: int, lr: float) -> None:
    assert 3e-4 * LearningRate(200, 0, Line()).factor(epoch) == pytest.approx(lr, abs=1e-12)


def test_steps_of_a_linear_probe_are_met() -> None:
    schedule = LearningRate(100, 0, Steps((60, 80), 0.1))
    assert [schedule.factor(step) for step in (0, 59, 60, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_stable_decay_falls_in_its_last_part_only() -> None:
    schedule = LearningRate(20, 4, Line(0.0, num_steps=4))
    assert [schedule.factor(step) for step in (0, 2, 4, 16, 18, 20)] == [0, 0.5, 1, 1, 0.5, 0]


def test_constant_schedule_stays_at_the_peak_after_warm_up() -> None:
    schedule = LearningRate(10, 4, Constant())
    assert [schedule.factor(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("shape", [Cosine(), Line(), Line(0.1, num_steps=2), Steps((3,)), Constant()])
def test_no_warm_up_starts_at_the_peak(shape: Any) -> None:
    assert LearningRate(10, 0, shape).factor(0) == 1


def resolved(**train: Any) -> Schedules:
    config, problems = parse_run(
        {
            "data": {"train": "unused", "val": "unused"},
            "method": {"name": "barlow_twins"},
            "backbone": {"name": "tiny_resnet"},
            "optim": {"name": "sgd", "lr": 0.1, "weight_decay": 0.04, "final_weight_decay": 0.4},
            "train": {"global_batch": 10, "budget": "4ep", "warmup": "25%", **train},
        }
    )
    assert config is not None, problems
    return schedules_of(config, num_samples=100)


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        ({"name": "cosine"}, Cosine(0.001)),
        ({"name": "linear", "final_fraction": 0.5}, Line(0.5)),
        ({"name": "step", "milestones": ["2ep", "3ep"], "factor": 0.5}, Steps((20, 30), 0.5)),
        ({"name": "step", "milestones": ["50%"]}, Steps((20,), 0.1)),
        ({"name": "wsd", "decay": "10%"}, Line(0.0, num_steps=4)),
        ({"name": "constant"}, Constant()),
    ],
)
def test_schedules_of_a_config_are_in_steps(schedule: dict[str, Any], shape: Any) -> None:
    schedules = resolved(schedule=schedule)
    assert schedules.rate == LearningRate(40, 10, shape)
    assert (schedules.weight_decay(0), schedules.weight_decay(40)) == (0.04, 0.4)


def test_last_layer_is_frozen_before_its_step_only() -> None:
    schedules = Schedules(LearningRate(10), 0.0, 0.0, freeze_steps=3)
    assert [schedules.frozen(step) for step in range(5)] == [True, True, True, False, False]


def test_facts_tell_schedules_apart_and_are_plain() -> None:
    facts = [
        resolved(schedule=each).as_facts() for each in ({"name": "cosine"}, {"name": "step", "milestones": ["9%"]})
    ]
    assert facts[0] != facts[1]
    assert json.loads(json.dumps(facts)) == facts


def test_stages_that_go_on_share_one_schedule() -> None:
    plain, staged = resolved(), resolved(stages={"starts": ["50%"], "optimizer": "reset"})
    assert staged.stages == Stages((20,), resets_optimizer=True)
    for step in range(41):
        assert staged.lr_factor(step) == plain.lr_factor(step)
        assert staged.weight_decay(step) == plain.weight_decay(step)
    assert [staged.stages.at(step) for step in (0, 19, 20, 39)] == [0, 0, 1, 1]
    assert [step for step in range(40) if staged.stages.forgets(step)] == [20]
    assert not any(resolved(stages={"starts": ["50%"]}).stages.forgets(step) for step in range(40))


@pytest.mark.parametrize("schedule", [{"name": "cosine"}, {"name": "wsd", "decay": "50%"}, {"name": "linear"}])
def test_stages_that_begin_anew_have_the_schedule_of_a_training_of_their_length(schedule: dict[str, Any]) -> None:
    # 40 steps cut at 16 and 24: stages of 16, 8 and 16, each with its own quarter of warm-up
    stages = {"starts": ["40%", "60%"], "schedule": "restart"}
    staged = resolved(schedule=schedule, stages=stages)
    for begin, end, budget in ((0, 16, "1.6ep"), (16, 24, "0.8ep"), (24, 40, "1.6ep")):
        alone = resolved(schedule=schedule, budget=budget)
        for step in range(begin, end):
            assert staged.lr_factor(step) == alone.lr_factor(step - begin)
            assert staged.weight_decay(step) == alone.weight_decay(step - begin)


def test_restart_warms_up_again_and_takes_weight_decay_back() -> None:
    staged = resolved(stages={"starts": ["50%"], "schedule": "restart"})
    assert [staged.lr_factor(step) for step in (20, 21, 25)] == [0.0, 0.2, 1.0]
    assert (staged.weight_decay(20), staged.weight_decay(40)) == (0.04, 0.4)

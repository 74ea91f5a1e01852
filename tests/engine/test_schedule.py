import pytest

from orchestrate.engine.schedule import Schedule

# Barlow Twins at a global batch of 2048 on ImageNet: 1000 epochs of 626 steps, 10 of warm-up, base learning rate 0.2.
STEPS_PER_EPOCH = 626
PEAK = 0.2 * 2048 / 256
PUBLISHED = Schedule(1000 * STEPS_PER_EPOCH, 10 * STEPS_PER_EPOCH)


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0.0), (5, 0.8), (10, 1.6), (505, 0.8008), (1000, 0.0016)])
def test_published_schedule_is_met(epoch: int, lr: float) -> None:
    assert PEAK * PUBLISHED.factor(epoch * STEPS_PER_EPOCH) == pytest.approx(lr, abs=1e-12)


def test_constant_schedule_stays_at_the_peak_after_warm_up() -> None:
    schedule = Schedule(10, 4, "constant")
    assert [schedule.factor(step) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]


def test_no_warm_up_starts_at_the_peak() -> None:
    assert Schedule(10).factor(0) == 1

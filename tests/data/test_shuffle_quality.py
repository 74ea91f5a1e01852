"""How many classes a batch holds, beside what chance gives."""

from math import comb

import numpy as np
import pytest

from orchestrate.data.order import Order, shuffled
from orchestrate.data.shuffle_quality import expected_classes, expected_distance, sampled_steps, shuffle_quality

IMAGENET, CLASSES, BATCH = 1_281_167, 1000, 4096
SORTED = np.arange(IMAGENET) * CLASSES // IMAGENET  # by class, as an image folder lists it
COUNTS = np.bincount(SORTED)
ALL = 10**6


def quality(labels: np.ndarray = SORTED, num_batches: int = ALL, **plan: int):
    order = Order(len(labels), 0, global_batch=BATCH, **plan)
    return shuffle_quality(order, labels.__getitem__, class_counts=np.bincount(labels), num_batches=num_batches)


@pytest.mark.parametrize("counts", [[3, 4, 5], [1, 1, 10], [2, 0, 6], [7]])
@pytest.mark.parametrize("batch", [1, 4, 7, 100])
def test_what_chance_gives_equals_counting_all_draws(counts: list[int], batch: int):
    total, drawn = sum(counts), min(batch, sum(counts))

    def chance(size: int, hits: int) -> float:
        return comb(size, hits) * comb(total - size, drawn - hits) / comb(total, drawn)

    classes = sum(1 - chance(size, 0) for size in counts)
    distance = sum(
        chance(size, hits) * abs(hits / drawn - size / total) / 2
        for size in counts
        for hits in range(min(size, drawn) + 1)
    )
    # The closed forms go through logarithms of factorials, which are good to about 1e-14 each.
    assert expected_classes(np.array(counts), batch) == pytest.approx(classes, abs=1e-9)
    assert expected_distance(np.array(counts), batch) == pytest.approx(distance, abs=1e-9)


def test_what_chance_gives_holds_for_permuted_data():
    # Over 312 batches the means stray by about 0.2 classes and 0.0003.
    found = quality(SORTED[shuffled(IMAGENET, 1)])
    assert found.classes == pytest.approx(found.expected_classes, abs=1)
    assert found.distance == pytest.approx(found.expected_distance, abs=0.002)
    assert not found.is_low


def test_batches_of_data_sorted_by_class_hold_nearly_as_many_classes_as_chance_gives():
    # Another seed moves the mean by about 2 classes and the fewest by about 10.
    found = quality(lanes=256)
    assert found.expected_classes == pytest.approx(983.5, abs=0.1)
    assert found.classes == pytest.approx(934, abs=6)
    assert found.fewest_classes > 875
    assert found.distance == pytest.approx(0.264, abs=0.005)
    assert not found.is_low
    assert quality().classes > found.classes  # lanes as a training has them: the more, the better


@pytest.mark.parametrize(("plan", "classes"), [({"lanes": 64}, 646), ({"lanes": 64, "chunk": 256, "window": 4}, 263)])
def test_few_lanes_over_sorted_data_are_called_low(plan: dict[str, int], classes: int):
    found = quality(**plan)
    assert found.classes == pytest.approx(classes, abs=8)
    assert found.is_low


def test_unequal_shares_of_few_classes_are_called_low():
    labels = np.arange(40_960) * 10 // 40_960
    order = Order(len(labels), 0, global_batch=64, lanes=1, chunk=256, window=4)
    found = shuffle_quality(order, labels.__getitem__, class_counts=np.bincount(labels), num_batches=ALL)
    assert found.distance > 0.4  # four chunks at a time
    assert found.is_low


def test_few_of_many_classes_are_called_low():
    order = Order(IMAGENET, 0, global_batch=64, lanes=1)
    found = shuffle_quality(order, SORTED.__getitem__, class_counts=COUNTS, num_batches=100)
    assert found.distance == pytest.approx(found.expected_distance, abs=0.06)  # far from 1,000 classes in any case
    assert found.classes < 20
    assert found.is_low


def test_a_sample_of_the_batches_tells_what_all_tell():
    some, all_of_them = quality(num_batches=16), quality()
    assert (some.num_batches, some.is_whole_epoch) == (16, False)
    assert (all_of_them.num_batches, all_of_them.is_whole_epoch) == (IMAGENET // BATCH, True)
    assert some.classes == pytest.approx(all_of_them.classes, rel=0.01)  # single batches differ by 1 %


def test_sampled_steps_span_the_epoch():
    order = Order(1000, 0, global_batch=10)
    assert sampled_steps(order, 3) == [0, 50, 99]
    assert sampled_steps(order, 1000) == list(range(100))
    assert sampled_steps(Order(5, 0, global_batch=10), 3) == [0]


def test_samples_without_a_label_are_left_out():
    labels = SORTED.copy()
    labels[::2] = -1
    order = Order(IMAGENET, 0, global_batch=BATCH)
    found = shuffle_quality(order, labels.__getitem__, class_counts=COUNTS, num_batches=4)
    assert found.classes == pytest.approx(expected_classes(COUNTS, BATCH // 2), rel=0.05)  # of half as many samples
    assert found.distance == pytest.approx(expected_distance(COUNTS, BATCH // 2), abs=0.05)


def test_a_batch_larger_than_the_dataset_holds_every_class():
    labels = np.arange(100) % 7
    order = Order(100, 0, global_batch=256)
    found = shuffle_quality(order, labels.__getitem__, class_counts=np.bincount(labels), num_batches=3)
    assert found.classes == found.expected_classes == found.fewest_classes == 7

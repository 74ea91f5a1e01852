"""Trainings on a real Slurm that are hit again and again end with the same bytes as one that is not.

Several trials are the same training (they differ in their probes).
Each is hit by several faults in turn: the next one as soon as the attempt after the last one trains.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from orchestrate.sweep.causes import Cause
from tests.slurm import faults
from tests.slurm.cluster import Cluster
from tests.slurm.storm import Case, Storm
from tests.slurm.studies import STEPS, Study

pytestmark = [pytest.mark.timeout(600)]


# One list a trial, without accounting and with a signal before a preemption. The soak hits trials by every fault with
# accounting and SIGTERM before a preemption.
PLAIN = [
    [
        Case("lost second node", faults.lose_node(1), Cause.NODE),
        Case("lost rank", faults.lose_rank, Cause.INFRASTRUCTURE),
        Case("USR1", faults.send("USR1"), Cause.PREEMPTED),
    ],
    [
        Case("frozen rank", faults.freeze_rank, Cause.HANG),
        Case("preempted with a signal", faults.preempt, Cause.PREEMPTED),
        Case("damaged checkpoint", faults.damage_checkpoint, Cause.INFRASTRUCTURE),
    ],
]
# A training of 96 s is asked to save after 90 s; a deaf one hears nothing before its limit of a minute.
LIMITED = [[Case("time limit", faults.nothing, Cause.TIME_LIMIT)]]
DEAF = [[Case("deaf until the time limit", faults.freeze_all, Cause.TIME_LIMIT)]]


@pytest.fixture(scope="module")
def storms(
    slurm: Cluster, slurm_accounting: Cluster, data: Path, reference: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Storm]]:
    """All storms, at the same time."""
    folder = tmp_path_factory.mktemp("storms")

    def storm(name: str, cluster: Cluster, plan: Sequence[Sequence[Case]], **changes: dict[str, object]) -> Storm:
        # A trial has its nodes for itself, so that it is hit only by what is meant for it.
        changes["slurm"] = {"exclusive": True, **changes.get("slurm", {})}
        probes = range(first[name], first[name] + len(plan))
        system = {"hang_minutes": 30} if name == "deaf" else {}
        return Storm(Study(folder / name, cluster, data, name, probes, changes, system), plan)

    first = {"plain": 1, "limited": 21, "deaf": 31}
    found = {
        "limited": storm(
            "limited",
            slurm_accounting,
            LIMITED,
            slurm={"time_minutes": 2, "lead_seconds": 30},
            environment={"PACE_SECONDS": "0.1"},
        ),
        "deaf": storm("deaf", slurm, DEAF, slurm={"time_minutes": 1, "lead_seconds": 10}),
        "plain": storm("plain", slurm, PLAIN),
    }
    yield found
    for each in found.values():
        each.end()


PLANS = {"plain": PLAIN, "deaf": DEAF, "limited": LIMITED}
TRIALS = [
    pytest.param(place, index, id=", ".join(case.name for case in cases))
    for place, plan in PLANS.items()
    for index, cases in enumerate(plan)
]


@pytest.mark.parametrize(("place", "index"), TRIALS)
def test_training_that_was_hit_ends_with_the_same_weights(
    storms: dict[str, Storm], place: str, index: int, reference: bytes
) -> None:
    trial, hits = storms[place].outcome(index)
    assert trial.weights() == reference, trial.story()
    assert trial.steps() == list(range(1, STEPS + 1))
    causes = trial.causes()
    assert [causes.get(number) for _, number in hits] == [case.cause for case, _ in hits], trial.story()
    told = storms[place].study.command("why", trial.id)
    assert [case.cause for case, _ in hits if case.cause not in told] == [], told


@pytest.mark.parametrize("place", list(PLANS))
def test_sweep_ends_by_itself_when_all_trials_are_done(storms: dict[str, Storm], place: str) -> None:
    storm = storms[place]
    assert storm.controller.wait() == 0, storm.study.story()

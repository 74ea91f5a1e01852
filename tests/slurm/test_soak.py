"""Twenty random faults, each kind among them, over six trials in one run. The long version is scripts/soak."""

import random
from pathlib import Path

import pytest

from tests.slurm import soak
from tests.slurm.cluster import Cluster
from tests.slurm.faults import OUTAGE_SECONDS

pytestmark = [pytest.mark.timeout(600)]

SEED = 0


def test_sweep_under_twenty_faults_loses_nothing_and_repeats_nothing(
    slurm_accounting: Cluster, data: Path, reference: bytes, tmp_path: Path
) -> None:
    rng = random.Random(SEED)
    plan = soak.draw(rng, num_faults=20, num_trials=6, outage_seconds=OUTAGE_SECONDS)
    storm = soak.start(slurm_accounting, tmp_path, data, plan, rng=rng, parallel=4, patience=500.0)
    try:
        outcomes = [storm.outcome(index) for index in range(len(plan))]
        assert storm.controller.wait() == 0, storm.study.story()
    finally:
        storm.end()
    assert soak.problems(storm.study, reference) == []
    hits = [(trial, case, number) for trial, cases in outcomes for case, number in cases]
    assert len(hits) == 20
    assert {case.name for _, case, _ in hits} == {case.name for case in soak.kinds(OUTAGE_SECONDS)}
    assert [trial.causes().get(number) for trial, _, number in hits] == [case.cause for _, case, _ in hits]
    for ledger in soak.ledgers(storm.study):
        assert 0 < ledger.useful < ledger.total == pytest.approx(ledger.useful + ledger.wasted)

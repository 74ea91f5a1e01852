"""Whole sweeps against a simulated Slurm: whatever happens, what must never happen does not."""

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from orchestrate.launchers.cluster import ClusterConfig
from orchestrate.launchers.slurm import SlurmLauncher
from orchestrate.store import Store, open_store, store_path
from orchestrate.sweep.controller import Controller, Pass
from orchestrate.sweep.observe import observe
from orchestrate.sweep.observed import Observed, ledger_of, rank_hours
from orchestrate.sweep.record import SweepRecord, TrialEntry
from orchestrate.sweep.standing import State
from tests.sweep.simulated import ControllerDiedError, Odds, SimulatedSlurm
from tests.sweep.simulated_trial import BEAT_SECONDS, STEP_SECONDS, STEPS, Fate

RANKS = 2
MISHAPS = ("saves", "killed", "node lost", "time limit", "error", "hangs")
EVERYTHING_WRONG = Odds(silence=0.1, lost_reply=0.02, late=0.01, death=0.002, twice=0.2)
# A pass ends at the first lost reply, so that thousands of submissions need rarer ones to end in this minute.
SELDOM_WRONG = Odds(silence=0.1, lost_reply=0.0005, late=0.0003, death=0.0003, twice=0.2)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what only a power cut would show, and what takes minutes for so many files."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def mishaps(*, share: float, doomed: float = 0.0, cancelled: float = 0.0) -> Any:
    """Let a share of all runs suffer something at a random moment."""

    def fate(chance: random.Random) -> Fate:
        drawn = chance.random()
        if drawn < doomed:
            return Fate(chance.choice(("bad input", "diverges")), chance.randint(31, 60))
        if drawn < doomed + cancelled:
            return Fate("cancelled", chance.randint(40, 300))
        if drawn < doomed + cancelled + share:
            return Fate(chance.choice(MISHAPS), chance.randint(1, 329))
        return Fate()

    return fate


def killed(*, share: float) -> Any:
    """Let a share of all runs be preempted, or lose their node."""

    def fate(chance: random.Random) -> Fate:
        lost = chance.random() < share
        return Fate(chance.choice(("killed", "node lost")), chance.randint(31, 329)) if lost else Fate()

    return fate


def goes_on_after(seconds: float) -> Any:
    """Let every run save, and be followed by another, before it has made much of a step."""
    return lambda chance: Fate("saves", seconds)


def sweep_of(count: int, *, parallel: int, evaluate: bool = False, gpu_hours: float = 0.0) -> SweepRecord:
    stages: dict[str, Any] = {"evaluate": {"ranks_per_node": 1}} if evaluate else {}
    place = ClusterConfig.model_validate(
        {
            "launcher": "slurm",
            "resources": {"ranks_per_node": RANKS},
            "limits": {"parallel": parallel},
            "code": "live",
            **stages,
        }
    )
    trials = tuple(TrialEntry(f"{number:016x}", {"seed": number}, {"seed": number}, STEPS) for number in range(count))
    return SweepRecord(
        name="study",
        file="study.yaml",
        sha="",
        sweep_yaml="",
        cluster_yaml="",
        cluster=place.model_dump(mode="json"),
        limits={"parallel": 0, "gpu_hours": gpu_hours},
        objective={"metric": "loss", "goal": "min"},
        command=(),
        commit=None,
        dirty=False,
        created=0.0,
        trials=trials,
    )


@dataclass
class Play:
    """A sweep, its Slurm, and the controllers that come and go."""

    runs: Path
    record: SweepRecord
    slurm: SimulatedSlurm
    look_every: int
    said: list[str] = field(default_factory=list)
    most_calls: Counter[str] = field(default_factory=Counter)
    num_passes: int = 0
    last: Pass | None = None

    def to_the_end(self, *, most_passes: int = 400) -> Pass:
        """Look, decide and act until nothing is left; a controller that dies is followed by another."""
        (self.runs / "trials").mkdir(parents=True, exist_ok=True)
        while True:
            with closing(open_store(store_path(self.runs))) as store:
                try:
                    for current in self.passes(store):
                        if current.finished or current.stalled:
                            return current
                        assert self.num_passes < most_passes, self._where(current)
                except ControllerDiedError:
                    continue

    def passes(self, store: Store) -> Iterator[Pass]:
        slurm = self.slurm
        launcher = SlurmLauncher(self.record.cluster_config(), self.runs, commands=slurm, clock=slurm.clock)
        controller = Controller(self.record, self.runs, launcher, store, say=self.said.append, clock=slurm.clock)
        while True:
            before = slurm.calls.copy()
            self.num_passes += 1
            self.last = controller.reconcile()
            self.most_calls |= slurm.calls - before
            yield self.last
            slurm.pass_time(self.look_every)

    def _where(self, current: Pass) -> str:
        return f"{Counter(place.state for place in current.standing.values())}, {self.said[-3:]}"


def play(folder: Path, record: SweepRecord, *, look_every: int = 30, **slurm: Any) -> Play:
    runs = folder / "runs"
    return Play(runs, record, SimulatedSlurm(runs, **({"seed": 0} | slurm)), look_every)


def check_hours(made: Play) -> None:
    """Compare what the files account for with what Slurm billed: the same, or as much as nobody could see."""
    slurm = made.slurm
    slurm.odds = Odds()
    launcher = SlurmLauncher(made.record.cluster_config(), made.runs, commands=slurm, clock=slurm.clock)
    seen = observe(made.runs, made.record.trial_ids, launcher)
    lost = [bill for bill in slurm.bills if bill.state in ("PREEMPTED", "NODE_FAIL")]
    unseen = 0.0 if slurm.accounting else sum(bill.ranks for bill in lost) * BEAT_SECONDS / 3600
    told = rank_hours(seen)
    assert slurm.rank_hours - unseen <= told + 1e-6
    assert told <= slurm.rank_hours + 1e-6
    assert sum(ledger_of(view).total for view in seen.values()) == pytest.approx(told)


@pytest.mark.timeout(600)  # half a minute on two free cores
@pytest.mark.parametrize("accounting", [True, False])
def test_ten_thousand_trials_end_whatever_goes_wrong(tmp_path: Path, accounting: bool) -> None:
    count, odds = (10_000, SELDOM_WRONG) if accounting else (1_000, EVERYTHING_WRONG)
    record = sweep_of(count, parallel=count // 4)
    made = play(
        tmp_path,
        record,
        look_every=350,
        fate=mishaps(share=0.25, doomed=0.01, cancelled=0.005),
        odds=odds,
        nodes=count // 20,
        accounting=accounting,
    )
    last = made.to_the_end()
    states = Counter(place.state for place in last.standing.values())
    done = {trial for trial, seen in last.observed.items() if seen.done}
    assert {trial for trial, place in last.standing.items() if place.state is State.COMPLETED} == done
    assert states[State.COMPLETED] > 0.9 * count
    assert states[State.HELD] and states[State.FAILED] and states[State.DIVERGED]
    assert sum(states.values()) == count
    assert made.slurm.deaths
    assert made.most_calls["squeue"] == 1
    assert made.most_calls["sacct"] <= 1
    check_hours(made)


def test_every_trial_is_done_if_all_faults_are_of_machines(tmp_path: Path) -> None:
    made = play(tmp_path, sweep_of(200, parallel=50), seed=3, fate=mishaps(share=0.2), odds=EVERYTHING_WRONG, nodes=16)
    last = made.to_the_end()
    assert last.count(State.COMPLETED) == 200
    trained = Counter(bill.name for bill in made.slurm.bills)
    assert max(trained.values()) > 2  # some did suffer


@pytest.mark.parametrize("accounting", [True, False])
def test_evaluation_jobs_follow_their_trainings(tmp_path: Path, accounting: bool) -> None:
    record = sweep_of(200, parallel=60, evaluate=True)
    made = play(
        tmp_path, record, seed=5, fate=mishaps(share=0.15), odds=EVERYTHING_WRONG, nodes=30, accounting=accounting
    )
    last = made.to_the_end()
    assert last.count(State.COMPLETED) >= 195
    assert all(place.state.final for place in last.standing.values())
    names = {bill.name for bill in made.slurm.bills if bill.ended > bill.started}
    assert sum(name.endswith("-evaluate") for name in names) >= 195
    check_hours(made)


def test_hours_are_a_hard_limit_and_what_was_saved_goes_on_with_more(tmp_path: Path) -> None:
    allowed = 3.0
    record = sweep_of(100, parallel=20, gpu_hours=allowed)
    made = play(tmp_path, record, fate=mishaps(share=0.1), nodes=16)
    last = made.to_the_end()
    assert "limits.gpu_hours" in last.stalled
    saving = 20 * RANKS * 20 / 3600  # twenty jobs take twenty seconds to save
    assert 0.9 * allowed < made.slurm.rank_hours <= allowed + saving
    assert not last.count(State.HELD)
    made.record = sweep_of(100, parallel=20)
    assert made.to_the_end().count(State.COMPLETED) == 100


def test_hours_are_a_hard_limit_while_nobody_watches(tmp_path: Path) -> None:
    made = play(tmp_path, sweep_of(8, parallel=8, gpu_hours=1.0), fate=goes_on_after(40), nodes=16)
    (made.runs / "trials").mkdir(parents=True)
    with closing(open_store(store_path(made.runs))) as store:
        next(made.passes(store))
    made.slurm.pass_time(4 * 3600)  # in which each job would have been followed by others
    assert made.slurm.num_live == 0
    assert 0.8 < made.slurm.rank_hours <= 1.0
    assert "limits.gpu_hours" in made.to_the_end().stalled
    assert made.slurm.rank_hours <= 1.0


def test_place_that_takes_few_jobs_is_filled_and_not_flooded(tmp_path: Path) -> None:
    made = play(tmp_path, sweep_of(60, parallel=40), fate=mishaps(share=0.0), nodes=16, most_jobs=12)
    last = made.to_the_end()
    assert last.count(State.COMPLETED) == 60
    assert sum("takes no more than 12 jobs" in line for line in made.said) >= 1
    assert made.slurm.calls["sbatch"] <= 60 + made.num_passes


def test_silence_of_slurm_is_said_once_and_starts_nothing(tmp_path: Path) -> None:
    made = play(tmp_path, sweep_of(5, parallel=5), fate=mishaps(share=0.0), odds=Odds(silence=1.0))
    with pytest.raises(AssertionError):
        made.to_the_end(most_passes=10)
    assert made.slurm.calls["sbatch"] == 0
    assert len([line for line in made.said if "cannot ask" in line]) == 1
    assert made.last is not None and made.last.count(State.PENDING) == 5
    made.slurm.odds = Odds()
    assert made.to_the_end().count(State.COMPLETED) == 5


def looked_at(made: Play) -> dict[str, Observed]:
    """Look at the end of a sweep with a launcher that has seen nothing of it."""
    launcher = SlurmLauncher(made.record.cluster_config(), made.runs, commands=made.slurm, clock=made.slurm.clock)
    return observe(made.runs, made.record.trial_ids, launcher)


def test_jobs_that_slurm_makes_wait_are_released(tmp_path: Path) -> None:
    made = play(tmp_path, sweep_of(40, parallel=40), fate=killed(share=0.4), nodes=20)
    assert made.to_the_end().count(State.COMPLETED) == 40
    assert len(made.slurm.waits) > 10
    assert max(made.slurm.waits) <= made.look_every + 1  # two minutes, if they were not


def test_accounting_says_of_each_run_what_became_of_it(tmp_path: Path) -> None:
    made = play(tmp_path, sweep_of(40, parallel=40), fate=killed(share=0.4), nodes=20, look_every=350)
    made.to_the_end()
    billed = {(bill.name, int(bill.started)): (bill.state, (bill.node,), int(bill.ended)) for bill in made.slurm.bills}
    ends = [
        ((f"oc-{trial}", int(attempt.started)), attempt.verdict)
        for trial, seen in looked_at(made).items()
        for attempt in seen.attempts
        if attempt.verdict is not None
    ]
    assert sum(verdict.source == "sacct" for _, verdict in ends) > 10
    assert [(verdict.state, verdict.nodes, verdict.ended) for _, verdict in ends] == [billed[key] for key, _ in ends]
    lost = {key for key, (state, _, _) in billed.items() if state in ("NODE_FAIL", "PREEMPTED")}
    assert lost <= {key for key, _ in ends}


def test_hours_are_useful_for_each_step_once(tmp_path: Path) -> None:
    made = play(tmp_path, sweep_of(60, parallel=60), fate=killed(share=0.4), nodes=30)
    assert made.to_the_end().count(State.COMPLETED) == 60
    ledgers = [ledger_of(seen) for seen in looked_at(made).values()]
    num_lost = sum(bill.state != "COMPLETED" for bill in made.slurm.bills)
    per_step = STEP_SECONDS * RANKS / 3600
    assert num_lost > 20
    useful = sum(ledger.useful for ledger in ledgers) / per_step
    # A run that is killed has begun a step, and has been silent for some.
    unsure = num_lost * max(1.0, BEAT_SECONDS / STEP_SECONDS) * 0.5
    assert useful == pytest.approx(60 * STEPS, abs=unsure)
    assert sum(ledger.replayed for ledger in ledgers) / per_step > 2 * unsure


def test_node_on_which_jobs_hang_is_left_out(tmp_path: Path) -> None:
    made = play(tmp_path, sweep_of(80, parallel=8), fate=mishaps(share=0.0), nodes=4, bad_nodes=frozenset({"n0"}))
    assert made.to_the_end().count(State.COMPLETED) == 80
    hung = [bill for bill in made.slurm.bills if bill.node == "n0"]
    assert 0 < len(hung) <= made.slurm.per_node + 2  # those that ran there when it was found out


def test_same_seed_gives_the_same_story(tmp_path: Path) -> None:
    def story(folder: Path) -> list[Any]:
        made = play(folder, sweep_of(50, parallel=20), seed=9, fate=mishaps(share=0.3), odds=EVERYTHING_WRONG)
        made.to_the_end()
        return made.slurm.bills

    assert story(tmp_path / "a") == story(tmp_path / "b")

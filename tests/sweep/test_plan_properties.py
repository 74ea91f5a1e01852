"""Whatever goes wrong in whatever order, a sweep ends, and no trial ever has two live jobs."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.plan import Cancel, Desired, Submit, plan
from orchestrate.sweep.standing import assess

STEPS = 4
FATES = ("goes on", "saves", "done", 75, 86, 87, 88, 1, 137, None)
CRASHES = ("no crash", "before submit", "after submit")


@dataclass
class SimulatedTrial:
    """One trial of a scheduler that does what it is told and suffers what it is dealt."""

    attempts: list[AttemptRecord] = field(default_factory=list)
    live: bool = False
    step: int = 0
    checkpoint: int = 0
    done: bool = False
    cancelled: bool = False
    hidden: bool = False

    def submit(self, attempt: int, now: float) -> None:
        assert not self.live, "two live attempts of one trial"
        assert not self.done, "a completed trial was started again"
        assert attempt > len(self.attempts), "an attempt number was used twice"
        self.attempts.append(AttemptRecord(attempt, now, now, 2, None, checkpoint_before=self.checkpoint))
        self.live, self.step = True, self.checkpoint

    def suffer(self, fate: str | int | None, now: float) -> None:
        if not self.live:
            return
        if fate == "goes on":
            self.step = min(STEPS, self.step + 1)
        elif fate == "saves":
            self.step = min(STEPS, self.step + 1)
            self.checkpoint = self.step
        elif fate == "done":
            self.done = True
            self.end(0, now)
        else:
            self.end(fate if isinstance(fate, int) else None, now)

    def end(self, code: int | None, now: float) -> None:
        last = self.attempts[-1]
        values = {"exit_code": code, "ended": now, "checkpoint_before": last.checkpoint_before}
        self.attempts[-1] = AttemptRecord(last.number, last.started, ranks=2, **values)  # type: ignore[arg-type]
        self.live = False

    def observe(self) -> Observed:
        return Observed(self.done, self.cancelled, self._job(), tuple(self.attempts), self.checkpoint)

    def _job(self) -> JobState | None:
        if not self.attempts:
            return None
        last = self.attempts[-1]
        phase = Phase.RUNNING if self.live else Phase.LOST if last.exit_code is None else Phase.FINISHED
        return JobState(Phase.UNKNOWN if self.hidden else phase, f"x.{last.number}", last.number, "")


def one_pass(world: dict[str, SimulatedTrial], desired: Desired, now: float, crash: str) -> None:
    """Look, decide and act; a crash ends the acting at its first submission."""
    observed = {trial: simulated.observe() for trial, simulated in world.items()}
    actions = plan(desired, observed, now)
    assert actions == plan(desired, observed, now)
    for action in actions:
        if isinstance(action, Cancel):
            world[action.trial_id].suffer(75, now)
            continue
        assert isinstance(action, Submit)
        if crash == "before submit":
            return
        world[action.trial_id].submit(action.attempt, now)
        if crash == "after submit":
            return
    assert sum(simulated.live for simulated in world.values()) <= desired.parallel
    again = plan(desired, {trial: simulated.observe() for trial, simulated in world.items()}, now)
    started = {action.trial_id for action in actions if isinstance(action, Submit)}
    assert not {action.trial_id for action in again if isinstance(action, Submit)} & started


@settings(max_examples=200, deadline=None)
@given(
    count=st.integers(1, 4),
    parallel=st.integers(1, 3),
    faults=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(FATES), st.sampled_from(CRASHES), st.booleans()), max_size=60
    ),
    cancelled=st.sets(st.integers(0, 3), max_size=1),
)
def test_every_trial_ends_whatever_happens(
    count: int, parallel: int, faults: list[tuple[int, str | int | None, str, bool]], cancelled: set[int]
) -> None:
    ids = tuple(f"t{number}" for number in range(count))
    world = {trial: SimulatedTrial() for trial in ids}
    desired = Desired(ids, parallel=parallel)
    now = 0.0
    for number, fate, crash, hidden in faults:
        simulated = world[ids[number % count]]
        simulated.hidden = hidden
        one_pass(world, desired, now, crash)
        simulated.suffer(fate, now)
        now += 30.0  # some retries are due, others still wait
    for number in cancelled:
        world[ids[number % count]].cancelled = True
    for _ in range(20 * count):
        for simulated in world.values():
            simulated.hidden = False
            simulated.suffer("done" if simulated.step == STEPS else "goes on", now)
        one_pass(world, desired, now, "no crash")
        now += 100.0
    assert all(assess(simulated.observe()).state.final for simulated in world.values())


def test_ten_thousand_trials_are_planned_in_a_moment() -> None:
    attempts = (AttemptRecord(1, 0.0, 10.0, 2, 75, checkpoint_before=0),)
    seen = {f"t{n}": Observed(done=n % 3 == 0, attempts=attempts, checkpoint_step=n % 5) for n in range(10_000)}
    actions = plan(Desired(tuple(seen), parallel=64), seen, 1e6)
    assert len(actions) == 64

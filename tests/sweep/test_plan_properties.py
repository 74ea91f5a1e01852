"""Whatever goes wrong in whatever order, a sweep ends, and no trial ever has two live jobs."""

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.launchers.base import JobState, Phase, Verdict
from orchestrate.sweep.observed import Observed
from orchestrate.sweep.plan import Action, Cancel, Desired, Submit, plan
from orchestrate.sweep.standing import assess

STEPS = 4
NOW = 1e6
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


VERDICTS = ("", "PREEMPTED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "CANCELLED", "COMPLETED")


@st.composite
def histories(draw: st.DrawFn) -> tuple[AttemptRecord, ...]:
    """Some attempts, as they may have ended."""
    attempts: list[AttemptRecord] = []
    checkpoint = 0
    for number in range(1, draw(st.integers(0, 6)) + 1):
        code, said = (
            draw(st.sampled_from((None, 0, 1, 2, 74, 75, 76, 86, 87, 88, 89, 137))),
            draw(st.sampled_from(VERDICTS)),
        )
        attempts.append(
            AttemptRecord(
                number,
                float(number),
                number + 0.5,
                draw(st.sampled_from((0, 2))),
                code,
                checkpoint_before=checkpoint,
                verdict=Verdict(said, "sacct") if said else None,
                blamed=draw(st.sampled_from(((), ("m1",), ("m1", "m2")))),
                traceback=draw(st.sampled_from(("", "ab"))),
                asked_to_end=draw(st.booleans()),
            )
        )
        checkpoint += draw(st.integers(0, 1))
    return tuple(attempts)


@st.composite
def sights(draw: st.DrawFn, *, depth: int = 1) -> Observed:
    """What may be seen of a trial."""
    attempts = draw(histories())
    phase = draw(st.sampled_from((None, *Phase)))
    job = None
    if phase is not None:
        number = len(attempts) + draw(st.integers(0, 1))
        job = JobState(phase, f"7{number}", number, "because", held=phase is Phase.QUEUED and draw(st.booleans()))
    return Observed(
        done=draw(st.booleans()) if depth else False,
        cancelled=draw(st.booleans()) if depth else False,
        job=job,
        attempts=attempts,
        checkpoint_step=draw(st.integers(0, 6)),
        forgiven=draw(st.integers(0, 6)),
        trained=draw(st.booleans()) if depth else False,
        to_evaluate=draw(st.sampled_from(((), ("final",), ("step-00000005", "final")))) if depth else (),
        evaluation=draw(st.none() | sights(depth=depth - 1)) if depth else None,
    )


def desires(count: int) -> st.SearchStrategy[Desired]:
    return st.builds(
        Desired,
        st.just(tuple(f"t{number}" for number in range(count))),
        parallel=st.integers(1, 4),
        gpu_hours=st.sampled_from((0.0, 0.001, 1.0)),
        elsewhere=st.integers(0, 2),
        ranks=st.sampled_from((1, 8)),
        evaluate_ranks=st.sampled_from((0, 1)),
        max_ranks=st.sampled_from((0, 8, 17)),
        room=st.none() | st.integers(0, 3),
        next_look_seconds=st.sampled_from((0.5, 30.0)),
    )


def done_to(seen: Observed, action: Action) -> Observed:
    """Return what will be seen of a trial after an action."""
    if isinstance(action, Submit):
        queued = JobState(Phase.QUEUED, f"8{action.attempt}", action.attempt, "submitted")
        if action.stage == "evaluate":
            return replace(seen, evaluation=replace(seen.evaluation or Observed(), job=queued))
        return replace(seen, job=queued)
    stages = {"": seen, "evaluation": seen.evaluation}
    for stage, view in stages.items():
        if view is not None and view.job is not None and view.job.job == action.job and view.live:
            phase = Phase.FINISHED if isinstance(action, Cancel) else Phase.QUEUED
            after = replace(view, job=replace(view.job, phase=phase, held=False))
            seen = replace(seen, evaluation=after) if stage else after
    return seen


@settings(max_examples=300, deadline=None)
@given(data=st.data(), count=st.integers(1, 4))
def test_crash_after_any_action_changes_nothing_in_the_end(data: st.DataObject, count: int) -> None:
    desired = data.draw(desires(count))
    world = {trial: data.draw(sights()) for trial in desired.trials}
    whole, crashed = dict(world), dict(world)
    actions = plan(desired, world, NOW)
    assert actions == plan(desired, dict(world), NOW)
    for action in actions:
        whole[action.trial_id] = done_to(whole[action.trial_id], action)
    for action in actions[: data.draw(st.integers(0, len(actions)))]:
        crashed[action.trial_id] = done_to(crashed[action.trial_id], action)
    again = plan(desired, crashed, NOW)
    for action in again:
        crashed[action.trial_id] = done_to(crashed[action.trial_id], action)
    # What was stopped makes room, so that more may follow than a whole pass had started; never less, and nothing twice.
    expected = {trial for trial, seen in whole.items() if seen.live_jobs}
    assert expected <= {trial for trial, seen in crashed.items() if seen.live_jobs}
    if not any(isinstance(action, Cancel) for action in actions):
        assert crashed == whole


@settings(max_examples=300, deadline=None)
@given(data=st.data(), count=st.integers(1, 4))
def test_plan_keeps_its_limits_and_leaves_alone_what_it_cannot_see(data: st.DataObject, count: int) -> None:
    desired = data.draw(desires(count))
    silent = JobState(Phase.UNKNOWN, "", 0, "no answer")
    world = {trial: data.draw(sights()) for trial in desired.trials}
    hidden = {
        trial: replace(seen, job=silent, evaluation=replace(seen.evaluation, job=silent) if seen.evaluation else None)
        for trial, seen in world.items()
    }
    assert plan(desired, hidden, NOW) == ()
    submits = [action for action in plan(desired, world, NOW) if isinstance(action, Submit)]
    live = sum(seen.num_places for seen in world.values()) + desired.elsewhere
    assert not submits or len(submits) + live <= desired.parallel
    assert len({(action.trial_id, action.stage) for action in submits}) == len(submits)
    for action in submits:
        seen = world[action.trial_id]
        view = (seen.evaluation or Observed()) if action.stage == "evaluate" else seen
        assert not view.live
        assert not seen.done
        assert not seen.cancelled
        assert action.attempt > max((attempt.number for attempt in view.attempts), default=0)

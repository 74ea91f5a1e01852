from orchestrate.launchers.attempts import AttemptRecord
from orchestrate.sweep.suspects import MOST_EXCLUDED, suspects

HOUR = 3600.0


def blaming(code: int | None, *nodes: str, ended: float = 0.0, hint: str = "") -> AttemptRecord:
    return AttemptRecord(1, 0.0, ended, 2, code, hint=hint, blamed=nodes)


def test_failed_preflight_excludes_its_node_at_once_for_a_day() -> None:
    trials = [[blaming(87, "m1")]]
    assert suspects(trials, 23 * HOUR) == ("m1",)
    assert suspects(trials, 25 * HOUR) == ()


def test_other_faults_exclude_a_node_at_the_second_time_within_a_day() -> None:
    lost, hung = blaming(None, "m1", hint="node failure"), blaming(86, "m1", "m2", ended=HOUR)
    assert suspects([[lost]], HOUR) == ()
    assert suspects([[lost], [hung]], HOUR) == ("m1",)
    assert suspects([[lost], [hung]], 24.5 * HOUR) == ()


def test_trial_that_errs_on_every_node_blames_none() -> None:
    errs = [blaming(1, "m1"), blaming(1, "m1"), blaming(1, "m1")]
    assert suspects([errs], HOUR) == ()
    assert suspects([errs, errs], HOUR) == ("m1",)  # but if two trials err on it first, it may be the node


def test_preempted_and_cancelled_jobs_blame_nobody() -> None:
    assert suspects([[blaming(75, "m1")] * 3, [blaming(137, "m1", hint="preempted")] * 3], HOUR) == ()


def test_only_the_newest_suspects_are_excluded() -> None:
    trials = [[blaming(87, f"m{number:02d}", ended=float(number))] for number in range(MOST_EXCLUDED + 3)]
    found = suspects(trials, HOUR)
    assert len(found) == MOST_EXCLUDED
    assert found[0] == f"m{MOST_EXCLUDED + 2}"

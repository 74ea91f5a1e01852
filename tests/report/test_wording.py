from __future__ import annotations

import pytest

from orchestrate.report.curves import Line, spread
from orchestrate.report.wording import (
    Metric,
    budget_name,
    duration,
    epochs,
    line_name,
    moment,
    plural,
    printable,
    short_count,
    tick_duration,
)

ACCURACY, LOSS = Metric("knn_k20_cosine.top1"), Metric("probe.loss")


def plain(text: str) -> str:
    """Numbers and units are joined by no-break spaces."""
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_accuracies_are_percent_and_their_margins_points() -> None:
    assert plain(ACCURACY.value(0.8123)) == "81.2 %"
    assert ACCURACY.margin(0.1432) == "+14.3"
    assert ACCURACY.margin(-0.021) == "\N{MINUS SIGN}2.1"
    assert ACCURACY.margin_unit == " points"
    assert (ACCURACY.label, ACCURACY.title, ACCURACY.probe) == ("top-1 accuracy", "Top-1 accuracy", "knn_k20_cosine")


def test_other_metrics_keep_their_scale() -> None:
    assert (LOSS.value(0.81234), LOSS.margin(12.0), LOSS.margin_unit) == ("0.8123", "+12", "")


def test_margin_that_rounds_to_zero_has_no_sign() -> None:
    assert ACCURACY.margin(-0.0001) == "0.0"
    assert ACCURACY.margin(0.0001) == "0.0"


def test_range_of_one_seed_is_a_dash() -> None:
    assert ACCURACY.range(spread([0.5])) == "\N{EN DASH}"
    assert ACCURACY.range(spread([0.5, 0.6])) == "50.0 to 60.0"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "0.25 s"), (38.4, "38 s"), (59.7, "1 min 00 s"), (252, "4 min 12 s"), (7500, "2 h 05 min"),
     (273600, "3 d 4 h"), (None, "\N{EN DASH}")],
)  # fmt: skip
def test_durations_have_two_units(seconds: float | None, text: str) -> None:
    assert plain(duration(seconds)) == text


def test_axis_durations_have_one_unit() -> None:
    assert [plain(tick_duration(s)) for s in (0.5, 30, 300, 7200, 172800)] == ["0.5 s", "30 s", "5 min", "2 h", "2 d"]
    assert plain(tick_duration(80, unit_of=40)) == "80 s"


def test_short_counts() -> None:
    assert [short_count(v) for v in (12, 1500, 600_000, 1.2e6, 3e9)] == ["12", "1.5k", "600k", "1.2M", "3B"]


def test_epochs_of_budgets_are_not_padded() -> None:
    assert [epochs(v) for v in (0.5, 20.0, 300.0, 2.005, 0.25)] == ["0.5", "20", "300", "2", "0.25"]


@pytest.mark.parametrize(
    ("budget", "name"),
    [("20ep", "20 epochs"), ("1ep", "1 epoch"), ("5Mimg", "5 million images"), ("10kstep", "10 thousand steps"),
     ("8gpuh", "8 GPU-hours"), ("10%", "10%")],
)  # fmt: skip
def test_budgets_are_named(budget: str, name: str) -> None:
    assert budget_name(budget) == name


def test_lines_are_named_by_what_tells_them_apart() -> None:
    line = Line("byol", 256, (("backbone.name", "vit"), ("optim.lr", "0.2")))
    assert line_name(line) == "byol · 256 · backbone=vit · optim.lr=0.2"
    assert line_name(Line("byol", 256), with_dim=False) == "byol"
    assert line_name(Line("byol", None)) == "byol"


def test_moments_are_in_utc() -> None:
    assert moment(1.7e9) == "2023-11-14 22:13 UTC"


def test_plurals() -> None:
    assert (plural(1, "trial"), plural(2, "trial")) == ("1 trial", "2 trials")


def test_text_is_made_fit_for_xml() -> None:
    assert (
        printable("a\x00b\nc\ud800é")
        == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}é"
    )
    assert printable("abcdef", limit=4) == "abc…"

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from orchestrate.report import looks, plots, ticks
from orchestrate.report.curves import EMBED_DIM, Line, build_baselines, build_curves, line_of
from orchestrate.report.plots import Data
from orchestrate.report.sections import metric_section
from orchestrate.report.svg import house_style, new_figure, to_inline_svg
from orchestrate.report.wording import Metric
from tests.report.conftest import METRIC, FakeSweep


@pytest.fixture
def data(study: FakeSweep) -> Data:
    return data_of(study)


def data_of(sweep: FakeSweep) -> Data:
    trials = sweep.write().trials
    lines = tuple(line_of(trials).values())
    return Data(Metric(METRIC), build_curves(trials, METRIC), build_baselines(trials, METRIC), lines)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def test_every_line_and_baseline_is_named_in_the_wide_figure(data: Data) -> None:
    found = texts(plots.wide_figure(data, data.curves, name="a", alt="b"))
    names = {f"{c.line.method} · {c.line.embed_dim}" for c in data.curves}
    assert names | {"random init", "raw pixels"} <= set(found)


def test_epochs_are_marked_at_the_budgets_on_a_logarithmic_axis(data: Data) -> None:
    found = texts(plots.wide_figure(data, data.curves, name="a", alt="b"))
    assert {"2", "5", "10", "20"} <= set(found)


def test_panel_of_numbers_marks_the_dimensions_and_names_the_budget(data: Data) -> None:
    found = texts(plots.number_panel(data, EMBED_DIM, "10ep", width=336, name="a", alt="b"))
    assert {"64", "256", "1024", "After 10 epochs"} <= set(found)


def test_panel_is_drawn_along_any_swept_number(sweep: FakeSweep) -> None:
    for width in (32, 128, 512):
        sweep.finish(sweep.add("a", 64, 10, 0, method__hidden_dim=width), 0.5 + width / 2000)
    data = data_of(sweep)
    section = metric_section(data, goal="max", index=0)
    assert section.figures[-1].caption.startswith("Top-1 accuracy against hidden_dim, a panel for each budget.")
    (panel,) = section.figures[-1].pictures
    assert {"32", "128", "512", "hidden_dim", "After 10 epochs"} <= set(texts(panel))


def test_value_limits_hold_every_seed_and_baseline(data: Data) -> None:
    low, high = data.value_limits
    values = [100 * end for c in data.curves for p in c.points for end in (p.value.low, p.value.high)]
    values += [100 * end for b in data.baselines for end in (b.value.low, b.value.high)]
    assert low < min(values) <= max(values) < high


def test_a_single_value_still_has_an_axis(sweep: FakeSweep) -> None:
    sweep.finish(sweep.add(), 0.5, metrics={f"random_init/{METRIC}": None, f"raw_pixels/{METRIC}": None})
    low, high = data_of(sweep).value_limits
    assert low < 50 < high


def test_figures_are_elements_without_namespaces_scripts_or_styles(data: Data) -> None:
    root = ElementTree.fromstring(plots.wide_figure(data, data.curves, name="fig", alt="what is seen"))
    assert root.tag == "svg"
    assert (root.get("role"), root.get("aria-label")) == ("img", "what is seen")
    assert {"script", "style", "metadata"}.isdisjoint(element.tag for element in root.iter())


def test_ids_are_unique_to_the_figure_and_all_references_resolve(data: Data) -> None:
    root = ElementTree.fromstring(plots.cost_panel(data, data.curves, "images", name="fig", alt=""))
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(str(name).startswith("fig-") for name in ids)
    used = {str(e.get("href")).removeprefix("#") for e in root.iter("use")}
    used |= {clip[5:-1] for e in root.iter() if (clip := e.get("clip-path"))}
    assert used
    assert used <= set(ids)


def test_same_figure_gives_same_bytes(data: Data) -> None:
    first, second = (plots.cost_panel(data, data.curves, "images", name="fig", alt="") for _ in range(2))
    assert first == second


def test_readers_own_matplotlib_settings_do_not_matter(data: Data) -> None:
    import matplotlib

    plain = plots.cost_panel(data, data.curves, "images", name="fig", alt="")
    with matplotlib.rc_context({"font.size": 30, "axes.grid": True}):
        assert plots.cost_panel(data, data.curves, "images", name="fig", alt="") == plain


@pytest.mark.filterwarnings("error")
def test_any_text_can_be_drawn() -> None:
    with house_style():
        figure = new_figure(100, 100)
        figure.text(0, 0.5, '$x$ <b> & "日本語"')
        assert texts(to_inline_svg(figure, name="a", alt='"<&')) == ['$x$ <b> & "日本語"']


def test_labels_move_apart_and_keep_their_order() -> None:
    moved = plots.spread_out([50.0, 10.0, 12.0, 11.0], gap=10, low=0, high=100)
    assert moved[0] == 50.0
    assert moved[1] < moved[3] < moved[2]
    assert all(after - before >= 10 for before, after in pairwise(sorted(moved)))


def test_labels_at_the_top_move_down() -> None:
    assert plots.spread_out([98.0, 99.0], gap=10, low=0, high=100) == [90.0, 100.0]


def test_labels_with_room_stay() -> None:
    assert plots.spread_out([10.0, 30.0], gap=10, low=0, high=100) == [10.0, 30.0]


def test_marks_that_would_touch_are_dropped_from_the_end() -> None:
    assert ticks.clear_of([0, 10, 20, 30], [15, 15, 15, 15], gap=2) == [1, 3]
    assert ticks.clear_of([0, 20, 40], [15, 15, 15], gap=2) == [0, 1, 2]


@pytest.mark.parametrize(("values", "expected"), [([5, 20], False), ([5, 21], True), ([0, 10], False), ([7], False)])
def test_axis_is_logarithmic_above_a_factor_of_four(values: list[float], expected: bool) -> None:
    assert ticks.is_log(values) is expected


def test_round_marks_lie_inside_the_axis() -> None:
    assert ticks.round_marks(17, 95, (10, 20, 30, 60), logarithmic=False) == [20, 40, 60, 80]
    assert ticks.round_marks(3, 300, (1, 10, 100, 1000), logarithmic=True) == [10, 100]


def test_colour_says_the_method_and_dashes_the_dimension() -> None:
    lines = [Line(method, dim) for method in ("a", "b") for dim in (8, 64)]
    found = looks.line_looks(lines)
    a8, a64, b8, b64 = (found[line] for line in lines)
    assert a64.colour != b64.colour
    assert (a8.marker, b8.marker) == (a64.marker, b64.marker)
    assert a8.marker != b8.marker
    assert a64.dashes == b64.dashes == ()
    assert a8.dashes == b8.dashes != ()
    assert a8.colour == looks.lighten(a64.colour, 0.5)


def test_looks_stay_as_results_come_in(sweep: FakeSweep) -> None:
    first, second = sweep.add("a", 8), sweep.add("b", 64)
    sweep.finish(second, 0.8)
    before = data_of(sweep).looks
    sweep.finish(first, 0.7)
    assert data_of(sweep).looks == before


def test_first_thirteen_methods_look_different() -> None:
    found = looks.method_looks([Line(f"method{index:02d}", None) for index in range(13)])
    assert len({(look.colour, look.marker) for look in found.values()}) == 13


def test_every_marker_has_a_shape_for_the_legend() -> None:
    found = looks.method_looks([Line(f"method{index:02d}", None) for index in range(13)])
    assert all(look.marker_path.startswith("M") for look in found.values())


def test_lightening_and_darkening_by_hand() -> None:
    assert looks.lighten("#000000", 0.5) == "#808080"
    assert looks.lighten("#123456", 0) == "#123456"
    assert looks.darken("#000000") == "#000000"
    assert looks.darken("#ffffff") < "#777777"  # 4.5 to 1 on white is reached at #767676

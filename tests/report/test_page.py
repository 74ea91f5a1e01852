from __future__ import annotations

import csv
import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from orchestrate.report.page import write_report
from orchestrate.report.wording import TIMES
from tests.report.conftest import METRIC, FakeSweep

VOID = {"meta", "link", "img", "br", "hr", "input", "wbr"}


class Page(HTMLParser):
    """A strict reading of a page: every tag with its attributes, every text, and that all tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)

    def attribute(self, name: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(name)) is not None]


def render(sweep: FakeSweep) -> str:
    sweep.write()
    return write_report(sweep.sweep_dir, sweep.trials_dir, sweep.root / "report").read_text(encoding="utf-8")


def words(page: str) -> str:
    """The page's text on one line, with plain spaces."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", page.partition("<body>")[2])))


def rows(sweep: FakeSweep, name: str) -> list[dict[str, str]]:
    with (sweep.root / "report" / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hostile_sweep(root: Path, name: str) -> FakeSweep:
    """A sweep in which everything that somebody can name is called `name`."""
    sweep = FakeSweep(root, name=name)
    sweep.fields = {"sweep_yaml": name, "command": ["orchestrate", name], "commit": name, "file": name}
    trial = sweep.add(name, 64, backbone__name=name, optim__lr=name)
    sweep.finish(trial, 0.8, versions={name: name}, device=name, metrics={f"{name.replace('/', '')}.top1": 0.4})
    sweep.losses(trial, [3.0, 2.0, 1.0])
    sweep.put_text(sweep.add(name, 64, seed=1), "status.json", f'"{name}')
    return sweep


@pytest.fixture(scope="module")
def page(study: FakeSweep) -> str:
    return render(study)


def two_methods(sweep: FakeSweep, *, num_seeds: int = 2) -> None:
    for method, values in (("barlow_twins", {5: 0.60, 20: 0.80}), ("disco", {5: 0.55, 20: 0.70})):
        for budget, value in values.items():
            for seed in range(num_seeds):
                sweep.finish(sweep.add(method, 64, budget, seed), value + 0.01 * seed)


def test_answer_names_the_best_method_and_its_margins(sweep: FakeSweep) -> None:
    two_methods(sweep)
    assert (
        "After 20 epochs, barlow_twins with embedding dimension 64 is best: 80.5 % top-1 accuracy, 30.5 points above"
        " the random-init encoder and 5.5 points above raw pixels."
    ) in words(render(sweep))


def test_answer_says_when_raw_pixels_are_better(sweep: FakeSweep) -> None:
    sweep.finish(sweep.add(), 0.7)
    assert "and 5.0 points below raw pixels." in words(render(sweep))


def test_evidence_says_whether_seeds_tell_the_methods_apart(sweep: FakeSweep) -> None:
    two_methods(sweep)
    assert (
        "mean of 2 seeds from 80.0 to 81.0 %. Next comes disco with 70.5 %; the two ranges over seeds do not"
        in words(render(sweep))
    )


def test_evidence_says_when_ranges_overlap(sweep: FakeSweep) -> None:
    for method, values in (("a", (0.6, 0.8)), ("b", (0.5, 0.7))):
        for seed, value in enumerate(values):
            sweep.finish(sweep.add(method, seed=seed), value)
    assert "the two ranges over seeds overlap, so their order may be chance" in words(render(sweep))


def test_single_seed_shows_no_spread_and_says_so(sweep: FakeSweep) -> None:
    two_methods(sweep, num_seeds=1)
    text = words(render(sweep))
    assert "with a single seed their order may be chance" in text
    assert "One seed: no spread is shown." in text
    assert {row["std"] for row in rows(sweep, "curves.csv")} == {""}


def test_goal_min_calls_the_lowest_best(sweep: FakeSweep) -> None:
    sweep.goal, sweep.fields = "min", {"objective": {"metric": "probe.loss", "goal": "min"}}
    for method, value in (("a", 1.0), ("b", 2.0)):
        sweep.finish(sweep.add(method), 0.5, metrics={"probe.loss": value, "random_init/probe.loss": 4.0})
    assert "a with embedding dimension 64 is best: 1 loss, 3 below the random-init encoder." in words(render(sweep))


def test_sweep_without_results_still_has_a_page(sweep: FakeSweep) -> None:
    sweep.status(sweep.add(seed=0), "training", step=1234, total_steps=5000)
    sweep.add(seed=1)
    text = words(render(sweep))
    assert f"No trial has {METRIC} yet" in text
    assert "1 training, 1 not started" in text
    assert "1,234 / 5,000" in text
    assert rows(sweep, "curves.csv") == []


def test_report_that_is_killed_leaves_the_files_of_before_and_the_page_last(
    sweep: FakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.finish(sweep.add(seed=0), 0.8)
    render(sweep)
    folder = sweep.root / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sweep.finish(sweep.add(seed=1), 0.9)
    replace, replaced = Path.replace, list[str]()

    def die_at_the_page(self: Path, target: Path) -> Path:
        if target.name == "index.html":
            raise KeyboardInterrupt
        replaced.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", die_at_the_page)
    with pytest.raises(KeyboardInterrupt):
        render(sweep)
    assert sorted(replaced) == ["baselines.csv", "curves.csv", "trials.csv"]
    assert (folder / "index.html").read_bytes() == before["index.html"]


def test_sweep_without_trials_still_has_a_page(sweep: FakeSweep) -> None:
    assert "0 of 0" in words(render(sweep))


def test_unfinished_trials_are_told_and_left_out_of_the_means(sweep: FakeSweep) -> None:
    two_methods(sweep)
    sweep.status(sweep.add("disco", 64, 20, 7), "diverged")
    sweep.status(sweep.add("barlow_twins", 64, 20, 7), "failed")
    sweep.put_text(sweep.add("barlow_twins", 64, 20, 8), "results/done.json", "{")
    text = words(render(sweep))
    assert "8 done, 1 diverged, 1 failed, 1 unreadable" in text
    assert "2 of 4" in text  # seeds of barlow_twins at 20 epochs
    assert "unreadable: done.json is damaged" in text
    assert text.count("So far, after 20 epochs") == 1


def test_every_trial_is_in_the_table(page: str, study: FakeSweep) -> None:
    assert all(page.count(trial["id"]) == 1 for trial in study.trials)


def test_table_of_trials_shows_settings_that_differ(sweep: FakeSweep) -> None:
    for seed in (0, 1):
        sweep.finish(sweep.add("a", 64, seed=seed, optim__lr=0.5), 0.8)
    table = render(sweep).partition("All trials")[2]
    assert "method.<wbr>name" in table
    assert "train.<wbr>seed" in table
    assert "optim.<wbr>lr" not in table
    assert "method.<wbr>embed_dim" not in table


def test_efficiency_is_tabulated(sweep: FakeSweep) -> None:
    two_methods(sweep, num_seeds=1)
    text = words(render(sweep))
    # Best gain 30 points over 50 %: targets 65, 72.5 and 77 %. barlow_twins has 65 % a quarter of the way from
    # log 5 to log 20, disco two thirds: 5 * 4 ** (1 / 4) and 5 * 4 ** (2 / 3) epochs.
    assert "barlow_twins 64 7.1 11.9 16.2" in text
    assert "disco 64 12.6 > 20 > 20" in text
    # disco's 70 % is half way along barlow_twins' line, at 10 epochs instead of 20.
    assert f"disco 64 70.0 % 20.0 10.0 2.0 {TIMES}" in text


def test_curves_csv_has_a_row_for_each_point(sweep: FakeSweep) -> None:
    two_methods(sweep)
    render(sweep)
    found = rows(sweep, "curves.csv")
    assert [(row["method"], row["embed_dim"], row["budget"]) for row in found] == [
        ("barlow_twins", "64", "5ep"), ("barlow_twins", "64", "20ep"), ("disco", "64", "5ep"), ("disco", "64", "20ep"),
    ]  # fmt: skip
    point = found[1]
    assert (point["metric"], point["n"], point["n_planned"]) == (METRIC, "2", "2")
    assert (point["epochs"], point["images"], point["rank_seconds"]) == ("20.0", "20000.0", "80.0")
    assert (point["min"], point["max"]) == ("0.8", "0.81")
    assert float(point["mean"]) == pytest.approx(0.805)
    assert float(point["over_random_init_mean"]) == pytest.approx(0.305)
    assert float(point["over_raw_pixels_min"]) == pytest.approx(0.05)


def test_trials_csv_has_every_axis_and_metric(sweep: FakeSweep) -> None:
    done, running = sweep.add("disco", 64, 20, 3), sweep.add("disco", 64, 20, 4)
    sweep.finish(done, 0.8)
    sweep.status(running, "training")
    render(sweep)
    first, second = rows(sweep, "trials.csv")
    assert (first["trial"], first["state"], second["state"]) == (done, "done", "training")
    assert (first["method.name"], first["train.budget"], first["train.seed"]) == ("disco", "20ep", "3")
    assert (first["optim.lr"], first["backbone.name"]) == ("0.1", "tiny_resnet")  # not swept, yet there
    assert (first[METRIC], first[f"random_init/{METRIC}"], second[METRIC]) == ("0.8", "0.5", "")


def test_baselines_csv_has_a_row_for_each_encoder(sweep: FakeSweep) -> None:
    sweep.finish(sweep.add(), 0.8)
    render(sweep)
    assert [(row["encoder"], row["backbone"], row["mean"], row["n"]) for row in rows(sweep, "baselines.csv")] == [
        ("random_init", "tiny_resnet", "0.5", "1"), ("raw_pixels", "", "0.75", "1"),
    ]  # fmt: skip


def test_page_says_how_it_was_made(sweep: FakeSweep) -> None:
    sweep.fields = {"sweep_yaml": "name: x\nspace:\n  a: [1, 2]\n", "dirty": True}
    sweep.finish(sweep.add(), 0.8)
    page = render(sweep)
    assert "orchestrate sweep &#39;sweeps/my study.yaml&#39;" in page
    assert "name: x\nspace:\n  a: [1, 2]\n" in page
    text = words(page)
    assert "0123456789abcdef, with changes that were not committed" in text
    assert "launcher: local" in text
    assert "orchestrate 0.1.0, torch 2.14.1" in text
    assert f"cpu {TIMES} 2 ranks" in text
    assert "2023-11-14 22:13 UTC" in text


def test_sweep_whose_code_is_not_in_git_says_so(sweep: FakeSweep) -> None:
    sweep.fields = {"commit": None}
    assert "unknown: the code was not a git checkout" in words(render(sweep))


def test_page_has_no_script_and_nothing_from_outside(page: str) -> None:
    parsed = Page(page)
    assert parsed.count("script") == parsed.count("link") == parsed.count("iframe") == 0
    assert not any(name.startswith("on") for _, attrs in parsed.tags for name in attrs)
    links = parsed.attribute("href") + parsed.attribute("src")
    assert {link for link in links if not link.startswith("#")} == {"trials.csv", "curves.csv", "baselines.csv"}
    assert re.search(r"url\((?!#)|@import|https?://", page) is None


def test_page_is_accessible(page: str) -> None:
    parsed = Page(page)
    assert parsed.count("figure") == parsed.count("figcaption") == 4
    headers = [attrs.get("scope") for tag, attrs in parsed.tags if tag == "th"]
    assert set(headers) == {"col", "row"}
    pictures = [attrs for tag, attrs in parsed.tags if tag == "svg"]
    assert all(attrs.get("aria-hidden") or (attrs["role"] == "img" and attrs["aria-label"]) for attrs in pictures)
    ids = parsed.attribute("id")
    assert len(ids) == len(set(ids))
    assert set(parsed.attribute("aria-labelledby")) <= set(ids)


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "</style></svg><b>",
        "a\"b'c&d",
        "日本語 ünï",
        "$\\frac{1}{2}$",
        "{{ 7 * 7 }}",
        "\x07",
    ],
)
@pytest.mark.filterwarnings("error")
def test_hostile_names_are_shown_and_not_obeyed(tmp_path: Path, name: str) -> None:
    def tags(name: str) -> list[str]:
        pages.append(Page(render(hostile_sweep(tmp_path / str(len(pages)), name))))
        return [tag for tag, _ in pages[-1].tags if tag != "wbr"]

    pages: list[Page] = []
    assert tags(name) == tags("plain")
    shown = name.replace("\x07", "\N{REPLACEMENT CHARACTER}")
    assert any(shown in text for text in pages[0].texts)


def test_same_run_dirs_give_the_same_bytes(study: FakeSweep, tmp_path: Path) -> None:
    contents = []
    for name in ("first", "second"):
        write_report(study.sweep_dir, study.trials_dir, tmp_path / name)
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())})
    assert contents[0] == contents[1]
    assert set(contents[0]) == {"index.html", "trials.csv", "curves.csv", "baselines.csv"}


def test_many_lines_are_thinned_to_the_best_of_each_method(sweep: FakeSweep) -> None:
    for method in range(7):
        for dim in (8, 16, 32):
            sweep.finish(sweep.add(f"m{method}", dim), 0.5 + dim / 100)
    text = words(render(sweep))
    assert "each method at its best dimension" in text
    assert "m0 · 32" in text
    assert "m0 · 8" not in text
    assert len(rows(sweep, "curves.csv")) == 21


def test_report_is_made_without_torch_ray_or_deepspeed(study: FakeSweep, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from orchestrate.report.page import write_report\n"
        "assert 'matplotlib' not in sys.modules and 'jinja2' not in sys.modules\n"
        f"write_report(Path({str(study.sweep_dir)!r}), Path({str(study.trials_dir)!r}), Path({str(tmp_path)!r}))\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded: set[str] = set(done.stdout.split())
    assert loaded.isdisjoint({"torch", "ray", "deepspeed", "torchvision", "timm"})
    assert "pyplot" not in done.stdout


def test_unknown_keys_of_done_json_do_no_harm(sweep: FakeSweep) -> None:
    extra: dict[str, Any] = {"something": {"new": [1, 2]}}
    sweep.finish(sweep.add(), 0.8, **extra)
    assert "1 of 1" in words(render(sweep))

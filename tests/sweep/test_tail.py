from pathlib import Path

import pytest

from orchestrate.sweep.tail import follow, last_lines


@pytest.mark.parametrize("count", [0, 1, 7, 2000])
def test_last_lines_of_a_file_of_any_size(tmp_path: Path, count: int) -> None:
    lines = [f"{number} " + "x" * (number % 900) for number in range(1000)]
    path = tmp_path / "log"
    path.write_text("\n".join(lines) + "\n")
    assert last_lines(path, count) == lines[max(0, 1000 - count) :] * (count > 0)


def test_empty_file_has_no_lines(tmp_path: Path) -> None:
    (tmp_path / "log").touch()
    assert last_lines(tmp_path / "log", 5) == []


def test_last_lines_know_where_to_stop(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("one\ntwo\nthree\n")
    assert last_lines(path, 5, up_to=8) == ["one", "two"]


def test_following_yields_whole_lines_of_old_and_new_files_up_to_the_end(tmp_path: Path) -> None:
    old, new = tmp_path / "a.log", tmp_path / "b.log"
    old.write_text("known\n")
    rounds = iter(
        [
            (old, "one\nhalf"),
            (new, "first\n"),
            (old, " line\n"),
            (old, ""),
            (new, "last words\nwithout an end"),
        ]
    )

    def is_growing() -> bool:
        path, text = next(rounds)
        with path.open("a") as file:
            file.write(text)
        return "last" not in text

    texts = follow(
        lambda: sorted(tmp_path.glob("*.log")), read_up_to={old: 6}, is_growing=is_growing, wait=lambda seconds: None
    )
    assert [(path.stem, line) for path, line in texts] == [
        ("a", "one"),
        ("b", "first"),
        ("a", "half line"),
        ("b", "last words"),
        ("b", "without an end"),
    ]

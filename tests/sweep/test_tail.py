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


def test_following_yields_everything_up_to_the_end_of_the_job(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("old\n")
    rounds = iter(["one\n", "two\n", None])

    def is_growing() -> bool:
        text = next(rounds)
        with path.open("a") as file:
            file.write(text or "last words\n")
        return text is not None

    texts = follow(path, from_byte=4, is_growing=is_growing, wait=lambda seconds: None)
    assert list(texts) == ["one\n", "two\n", "last words\n"]

from pathlib import Path

import pytest

from orchestrate.config.load import parse_document
from orchestrate.errors import ConfigError


def test_every_key_has_its_line() -> None:
    document = parse_document("a: 1\nb:\n  c: [1,\n    2]\n", Path("x.yaml"))
    assert (document.line(("a",)), document.line(("b", "c")), document.line(("b", "c", 1))) == (1, 3, 4)
    assert document.line(("b", "missing")) == 2


@pytest.mark.parametrize(
    ("text", "value"), [("1e-6", 1e-6), ("1.0e-6", 1e-6), ("on", "on"), ("no", "no"), ("true", True)]
)
def test_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    assert parse_document(f"key: {text}", Path("x.yaml")).data == {"key": value}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "x.yaml:2: a: given twice; the first is on line 1"),
        ("a: [1", "x.yaml:1: not YAML"),
        ("- 1\n- 2", "x.yaml:1: the top level is a list"),
        ("a: {b: 1, b: 2}", "x.yaml:1: a.b: given twice"),
    ],
)
def test_broken_files_are_refused_with_their_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[").replace(".", r"\.")):
        parse_document(text, Path("x.yaml"))

from pathlib import Path

import pytest

from orchestrate.config.load import dump_yaml, parse_document
from orchestrate.errors import ConfigError


def test_every_key_has_its_line() -> None:
    document = parse_document("a: 1\nb:\n  c: [1,\n    2]\n", Path("x.yaml"))
    assert (document.line(("a",)), document.line(("b", "c")), document.line(("b", "c", 1))) == (1, 3, 4)
    assert document.line(("b", "missing")) == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1.0e-6", 1e-6),
        ("on", "on"),
        ("no", "no"),
        ("true", True),
        ("-12", -12),
        ("+0", 0),
        ("0x1F", 31),
        ("010", "010"),
        ("1_000", "1_000"),
        ("0b1", "0b1"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("=", "="),
        (".5", 0.5),
        ("-.inf", float("-inf")),
        ("1.5.2", "1.5.2"),
    ],
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
        ("a: 1\nb: \0", "x.yaml:2: not YAML: the character U+0000"),
        ("a: \x07", "x.yaml:1: not YAML: the character U+0007"),
        ('a: 1\nb: "\\0"', "x.yaml:2: not YAML: b: holds a NUL character"),
        ("a: 1\nb: 2024-99-99", "x.yaml:2: not YAML: b: '2024-99-99' is no timestamp; quote it"),
        ("a: !!int x", "x.yaml:1: not YAML: a: 'x' is no int; quote it"),
        ("a: !!bool maybe", "x.yaml:1: not YAML: a: 'maybe' is no bool; quote it"),
        ("a: !!timestamp x", "x.yaml:1: not YAML: a: 'x' is no timestamp; quote it"),
        ("a: " + "9" * 5000, "x.yaml:1: not YAML: a: '999"),
        ("a: &x [*x]", "x.yaml:1: not YAML: nested more than"),
        ("a: &x {b: *x}", "x.yaml:1: not YAML: nested more than"),
        ("a: " + "[" * 3000, "x.yaml:1: not YAML: nested more than"),
        ("a: 1\nb: " + "[" * 300 + "]" * 300, "x.yaml:2: not YAML: nested more than"),
        ("? [a, b]\n: 1", "x.yaml:1: not YAML: a key must be one word"),
    ],
)
def test_broken_files_are_refused_with_their_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_document(text, Path("x.yaml"))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", ["1e5", "1e-6", "010", "1:30", "on", "true", ".inf", "~", "0x1F", 1e-6, 3, True])
def test_what_is_written_reads_back_as_the_same_value(value: object) -> None:
    assert parse_document(dump_yaml({"key": value}), Path("x.yaml")).data == {"key": value}

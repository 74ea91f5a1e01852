"""Names of the classes of indexed shards."""

from pathlib import Path

import pytest

from orchestrate.data.class_names import load_classes
from orchestrate.data.indexing import index
from orchestrate.errors import DataError
from tests.data.tars import shards, write_tar

__all__ = ["shards"]  # fixtures


def test_class_names_come_from_a_file_or_a_dataset(shards: Path, tiny_dataset: str, tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("cat\ndog\nélan\n")
    assert index(str(shards), classes=load_classes(str(file))).manifest.classes == ("cat", "dog", "élan")
    assert index(str(shards)).manifest.classes == ("cat", "dog", "élan")  # those that the index had
    assert load_classes(tiny_dataset) == ("disc", "square", "triangle", "cross")
    with pytest.raises(DataError, match="2 classes given, labels go up to 2"):
        index(str(shards), classes=["cat", "dog"])
    for text, message in (
        ("cat\ncat\n", "the class 'cat' twice"), ("", "is empty"), ("cat\n\ndog\n", r"classes\.txt:2: a blank line")
    ):  # fmt: skip
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            load_classes(str(file))
    with pytest.raises(DataError, match="cannot be read"):
        load_classes(str(tmp_path / "nowhere.txt"))


def test_labels_never_get_the_names_of_others(shards: Path) -> None:
    index(str(shards), classes=["cat", "dog", "élan"])
    with pytest.raises(DataError, match=r"2 classes with other names .*: label 0 is 'cat' there and 'dog' in the list"):
        index(str(shards), classes=["dog", "cat", "élan"])
    longer = ["cat", "dog", "élan", "fox"]
    assert index(str(shards), classes=longer).manifest.classes == tuple(longer)
    corrected = ["dog", "cat", "élan"]
    assert index(str(shards), classes=corrected, overwrite=True).manifest.classes == tuple(corrected)


def test_identifiers_are_not_taken_for_labels(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.jpg", b"1"), ("a.cls", b"20240131")])
    with pytest.raises(DataError, match="a label 20240131: too large"):
        index(str(tmp_path))

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ssl_methods import plugins
from ssl_methods.method import Method


def test_names_are_the_files_of_the_package() -> None:
    folder = Path(plugins.__file__).parent / "methods"
    assert plugins.names("ssl_methods.methods") == tuple(sorted(path.stem for path in folder.glob("[!_]*.py")))


def test_listing_imports_neither_plug_ins_nor_torch() -> None:
    code = (
        "import sys; from ssl_methods import plugins; names = plugins.names('ssl_methods.methods'); "
        "assert names; assert 'torch' not in sys.modules; assert 'ssl_methods.methods.' + names[0] not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", plugins.names("ssl_methods.methods"))
def test_loaded_class_is_the_one_defined_in_the_file(name: str) -> None:
    loaded = plugins.load("ssl_methods.methods", name)
    assert issubclass(loaded, Method)
    assert loaded.__module__ == f"ssl_methods.methods.{name}"


def test_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no 'barlow_twin', did you mean 'barlow_twins'\?; known: .*simclr"):
        plugins.load("ssl_methods.methods", "barlow_twin")


@pytest.mark.parametrize("package", ["ssl_methods.method", "ssl_methods.nothing", "nothing.at.all"])
def test_unknown_package_is_refused(package: str) -> None:
    with pytest.raises(ValueError, match=f"{package}: not a package"):
        plugins.names(package)


@pytest.mark.parametrize(
    ("content", "found"), [("", "none"), ("class _Hidden: ...", "none"), ("class A: ...\nclass B: ...", "A, B")]
)
def test_a_file_defines_one_public_class(
    content: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"plugins_{tmp_path.name}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "sample.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TypeError, match=f"one public class, found {found}$"):
        plugins.load(package, "sample")

from pathlib import Path

import pytest

from orchestrate.errors import ConfigError
from orchestrate.launchers.cluster import load_cluster


def refused(folder: Path, text: str) -> str:
    (folder / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(folder / "cluster.yaml")
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ORCHESTRATE_DEVICE"],
)
def test_variables_that_the_launcher_sets_are_refused(name: str, tmp_path: Path) -> None:
    told = refused(tmp_path, f"launcher: local\nenvironment:\n  OMP_NUM_THREADS: '1'\n  {name}: '0'\n")
    assert f"cluster.yaml:4: environment.{name}: '{name}': is set by the launcher; remove it" in told


def test_variable_that_no_shell_knows_is_refused(tmp_path: Path) -> None:
    assert "environment.A=B: 'A=B': no name of a variable" in refused(
        tmp_path, "launcher: local\nenvironment: {A=B: c}"
    )


@pytest.mark.parametrize(("text", "kind"), [("name: a\nbase: {}\n", "sweep"), ("method: {name: simclr}\n", "run")])
def test_file_of_another_kind_is_named_as_such(text: str, kind: str, tmp_path: Path) -> None:
    assert f"cluster.yaml:1: is a {kind} file, a cluster file is needed here" in refused(tmp_path, text)


def test_misspelt_launcher_key_is_told_and_not_taken_for_another_kind(tmp_path: Path) -> None:
    told = refused(tmp_path, "lancher: local\nresources: 3\n")
    assert "lancher: unknown key; did you mean `launcher`?" in told
    assert "launcher: missing; add `launcher: ...` to the file" in told
    assert "resources: 3: must be a mapping of keys, such as `{nodes: ...}`" in told

"""The sweep that is killed and taken up again has every method, and both stages of those that have two."""

from pathlib import Path

import yaml

from ssl_methods import plugins

FILE = Path(__file__).parents[2] / "sweeps" / "tiny" / "every_method.yaml"


def test_sweep_of_every_method_leaves_none_out() -> None:
    (joined,) = yaml.safe_load(FILE.read_text())["space"].values()
    methods = [method["name"] for method, *_ in joined]
    assert methods == list(plugins.names("ssl_methods.methods"))
    assert {stage for *_, stage in joined} == {0, 1, 2}
    assert [method["name"] for method, _, _, _, stages, *_ in joined if stages] == ["esvit", "s2_bnn"]

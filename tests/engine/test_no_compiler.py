"""The first step waits for no compiler: there is none here to wait for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import shutil, torch
assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang", "ninja", "nvcc")))
from orchestrate.engine.ranks import join_ranks
from tests.engine.trials import engine_of, run_config, take_steps
join_ranks()
for stage in (0, 1, 2):
    take_steps(engine_of(run_config("adamw", engine="deepspeed", zero_stage=stage)), 1, 2)
    print("stage", stage, "stepped")
"""


def test_deepspeed_takes_its_first_steps_where_no_compiler_is(tmp_path: Path) -> None:
    # Somebody else's build would hide that one is needed.
    environment = os.environ | {"PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
    environment |= {"ORCHESTRATE_DEVICE": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment = {key: value for key, value in environment.items() if key not in ("CC", "CXX")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=120
    )
    if result.returncode != 0:
        pytest.fail(result.stderr)
    assert result.stdout.count("stepped") == 3
    assert not (tmp_path / "extensions").exists()

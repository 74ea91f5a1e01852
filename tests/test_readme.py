"""The README's examples work and the files it names exist."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from orchestrate.cli import app
from orchestrate.config.load import parse_document
from orchestrate.sweep.config import sweep_of
from orchestrate.sweep.space import expand, grid_points
from ssl_methods.backbones import build

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def block(language: str, containing: str) -> str:
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if containing in text]
    return str(found)


def test_example_sweep_expands_to_its_trials() -> None:
    document = parse_document(block("yaml", "name: barlow-dims"), Path("README.md"))
    sweep = sweep_of(document)
    assert len(expand(sweep, document, grid_points(sweep.space))) == 5 * 4 * 3


def test_example_method_trains() -> None:
    imports = """
from collections.abc import Sequence
from typing import Annotated, ClassVar
from annotated_types import Gt
from torch import Tensor, nn
from ssl_methods.backbone import Backbone
from ssl_methods.collectives import gather, synchronise_batch_norm
from ssl_methods.indicators import embedding_std
from ssl_methods.method import Method, StepOutput, pair
from ssl_methods.precision import in_full_precision
"""
    names: dict[str, Any] = {}
    exec(imports + block("python", "@in_full_precision"), names)
    method = names["MyMethod"](build.build("tiny_resnet"), embed_dim=8)
    output = method([torch.randn(4, 3, 28, 28), torch.randn(4, 3, 28, 28)])
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in method.parameters())


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?:sweeps|cluster_configs|tests|docs|orchestrate)/[\w/.]+\.\w+", TEXT)))
)
def test_named_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^orchestrate (\w+)", TEXT, re.MULTILINE))))
def test_named_command_exists(command: str) -> None:
    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0

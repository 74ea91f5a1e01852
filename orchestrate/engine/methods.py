"""From a RunConfig to the Method it names."""

import torch

from orchestrate.config.run import METHODS, RunConfig
from ssl_methods import plugins
from ssl_methods.backbones import build
from ssl_methods.method import Method


def build_method(config: RunConfig) -> Method:
    """Build a method with the weights that the config's seed gives: equal on every rank, every time.

    The backbone is built first, so that trials which share backbone and seed start from the same encoder.
    """
    torch.manual_seed(config.train.seed)
    backbone = build.build(config.backbone.name, stem=config.backbone.stem)
    method: Method = plugins.load(METHODS, config.method.name)(backbone, **config.method.params)
    return method


def seed_rank(seed: int, rank: int) -> None:
    """Give each rank its own stream of random numbers for what a method draws inside a step."""
    torch.manual_seed((seed * 1_000_003 + rank + 1) % 2**63)

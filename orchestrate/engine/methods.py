"""From a RunConfig to the Method it names."""

from collections.abc import Callable

import torch

from orchestrate.config.run import METHODS, RunConfig
from orchestrate.config.train import SystemConfig
from ssl_methods import plugins
from ssl_methods.backbone import Backbone
from ssl_methods.backbones import build
from ssl_methods.method import Method
from ssl_methods.recompute import recompute_blocks, recompute_in_parts


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


def tune_method(method: Method, system: SystemConfig, say: Callable[[str], None] = print) -> None:
    """Trade memory and speed as the config says, in place; names of weights and the loss stay."""
    if system.activation_checkpointing:
        recompute_blocks(method.backbone)
    if system.micro_batch != "all":
        recompute_in_parts(method.backbone, system.micro_batch)
    if system.compile:
        say("torch.compile: the first step waits for the compiler, a minute or more on a fresh machine")
        for module in method.modules():
            if isinstance(module, Backbone):
                module.compile()

"""From a RunConfig to the Method it names, and what is done with it before the first step."""

from collections.abc import Callable

import torch

from orchestrate.config.run import METHODS, RunConfig
from orchestrate.config.train import SystemConfig
from orchestrate.engine.base import Engine
from orchestrate.engine.ranks import Ranks
from orchestrate.errors import ConfigError
from ssl_methods import plugins
from ssl_methods.backbone import Backbone, TokenBackbone
from ssl_methods.backbones import build
from ssl_methods.method import Method
from ssl_methods.recompute import recompute_blocks, recompute_in_parts
from ssl_methods.views import recipe


def build_method(config: RunConfig) -> Method:
    """Build a method with the weights that the config's seed gives: equal on every rank, every time.

    The backbone is built first, so that trials which share backbone and seed start from the same encoder.
    """
    torch.manual_seed(config.train.seed)
    backbone = build.build(config.backbone.name, stem=config.backbone.stem, window=config.backbone.window)
    method: Method = plugins.load(METHODS, config.method.name)(backbone, **config.method.params)
    return method


def check_batches(config: RunConfig, method: Method, ranks: Ranks, say: Callable[[str], None] = print) -> None:
    """Refuse batches that a method cannot take on this number of ranks, and tell what it advises.

    Raises:
        ConfigError: what does not fit, and what would.
    """
    num_views = len(recipe(config.views.name, config.views.size).views)
    sizes: dict[str, int] = {"global_batch": config.train.global_batch, "num_ranks": ranks.world_size}
    try:
        method.check_batches(num_views=num_views, **sizes)
    except ValueError as error:
        raise ConfigError(f"method: {config.method.name}: {error}") from error
    for line in method.advice(**sizes):
        say(f"advice: {config.method.name}: {line}")


def load_pretrained(engine: Engine, ranks: Ranks, say: Callable[[str], None] = print) -> None:
    """Load the weights of others that a training begins with; rank 0 reads them for all, and every rank must call it.

    Raises:
        ConfigError: a file is missing, or holds other weights; on every rank.
    """

    def load() -> None:
        try:
            engine.method.load_pretrained(say)
        except ValueError as error:
            raise ConfigError(f"method.{error}") from error

    if not engine.method.pretrained():  # it may still have something to say of that
        ranks.on_main(load)
        return
    with engine.whole():
        ranks.on_main(load)
        ranks.fill_from_main(engine.method.state_dict().values())


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
            if isinstance(module, TokenBackbone):
                module.encode = torch.compile(module.encode)  # type: ignore[method-assign]  # forward has it too

"""Options that trade memory and speed reach the network that is trained, and change no number."""

import torch

from orchestrate.config.run import BackboneConfig
from orchestrate.config.train import SystemConfig
from orchestrate.engine.methods import build_method, tune_method
from ssl_methods.method import Method
from tests.engine.trials import run_config


def three_steps(method: Method) -> list[float]:
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(8, 3, 28, 28, generator=generator) for _ in range(2)]
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = method(views).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tuned(said: list[str], **system: object) -> Method:
    config = run_config("sgd", method="simclr")
    method = build_method(config.model_copy(update={"backbone": BackboneConfig(name="tiny_vit")}))
    tune_method(method, SystemConfig.model_validate(system), said.append)
    return method


def test_micro_batches_and_recomputed_blocks_together_train_as_neither() -> None:
    plain = three_steps(tuned([]))
    saved = three_steps(tuned([], micro_batch=3, activation_checkpointing=True))
    # Matrix products of other heights round differently.
    torch.testing.assert_close(torch.tensor(saved), torch.tensor(plain), rtol=1e-5, atol=0)


def test_compiled_network_trains_as_the_plain_one_and_says_that_it_compiles() -> None:
    said: list[str] = []
    compiled = tuned(said, compile=True)
    assert [name for name in said if "waits for the compiler" in name]
    assert compiled.state_dict().keys() == tuned([]).state_dict().keys()
    # Fused kernels round differently.
    torch.testing.assert_close(
        torch.tensor(three_steps(compiled)), torch.tensor(three_steps(tuned([]))), rtol=1e-4, atol=0
    )

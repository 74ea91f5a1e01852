"""Linear classification on frozen features."""

import math
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import nn
from torch.nn.functional import cross_entropy

from orchestrate.evaluation.probe import Features, Probe

_BATCH = 256
_MOMENTUM = 0.9


class Linear(Probe):
    """Multinomial logistic regression by SGD (momentum 0.9, batch 256, cosine) on standardised features.

    Features are standardised with the training set's mean and deviation, so that one learning rate suits encoders
    of any scale, raw pixels included. The last epoch counts, not the best.
    """

    def __init__(
        self,
        *,
        epochs: Annotated[int, Gt(0)] = 50,
        lr: Annotated[float, Gt(0)] = 0.1,
        weight_decay: Annotated[float, Ge(0)] = 0.0,
        seed: Annotated[int, Ge(0)] = 0,
    ) -> None:
        self._epochs, self._lr, self._weight_decay, self._seed = epochs, lr, weight_decay, seed

    @property
    def key(self) -> str:
        """Name the protocol."""
        decay = f"_wd{self._weight_decay:g}" if self._weight_decay else ""
        return f"linear_ep{self._epochs}_lr{self._lr:g}{decay}" + (f"_seed{self._seed}" if self._seed else "")

    def score(self, train: Features, val: Features) -> dict[str, float]:
        """Return `top1` of the last epoch."""
        mean, deviation = train.values.mean(dim=0), train.values.std(dim=0).clamp_min(1e-6)
        inputs, held_out = (train.values - mean) / deviation, (val.values - mean) / deviation
        head = self._fit(inputs, train.labels, int(max(train.labels.max(), val.labels.max())) + 1)
        with torch.no_grad():
            top1 = (head(held_out).argmax(dim=1) == val.labels).double().mean()
        return {"top1": float(top1)}

    def _fit(self, inputs: torch.Tensor, labels: torch.Tensor, num_classes: int) -> nn.Linear:
        # skip_init draws no random numbers, which belong to the training.
        head: nn.Linear = nn.utils.skip_init(nn.Linear, inputs.shape[1], num_classes)  # type: ignore[no-untyped-call]
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.SGD(head.parameters(), lr=self._lr, momentum=_MOMENTUM, weight_decay=self._weight_decay)
        generator = torch.Generator().manual_seed(self._seed)
        steps_per_epoch = math.ceil(len(inputs) / _BATCH)
        for epoch in range(self._epochs):
            order = torch.randperm(len(inputs), generator=generator)
            for index, batch in enumerate(torch.split(order, _BATCH)):
                progress = (epoch + index / steps_per_epoch) / self._epochs
                optimizer.param_groups[0]["lr"] = self._lr * 0.5 * (1 + math.cos(math.pi * progress))
                optimizer.zero_grad(set_to_none=True)
                cross_entropy(head(inputs[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return head

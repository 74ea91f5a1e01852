"""Half precision: where a forward pass computes in it, and the loss scale that fp16 needs."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ssl_methods.method import Method, StepOutput

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Forward(nn.Module):
    """A method that computes in a precision; parameters, twins and gradients stay fp32.

    Every engine wraps this module, so that all of them compute the same. Losses leave autocast themselves.
    """

    def __init__(self, method: Method, precision: Literal["fp32", "bf16", "fp16"], device: torch.device) -> None:
        super().__init__()
        self.method = method
        self._device, self._dtype = device.type, _DTYPES.get(precision)

    def forward(self, views: Sequence[Tensor], labels: Tensor | None) -> StepOutput:
        """Compute the loss of this rank's part of the global batch."""
        with torch.autocast(self._device, self._dtype, enabled=self._dtype is not None):
            output: StepOutput = self.method(views, labels)
        return output


class LossScale:
    """What the loss is multiplied by so that small gradients survive fp16; 1 for ever unless `dynamic`.

    It doubles after 2000 steps without an overflow and halves at one, but never falls below 1.

    Source: Micikevicius et al. 2018, arXiv:1710.03740, sec. 3.2; the numbers of `torch.amp.GradScaler`.
    """

    first = 2.0**16
    lowest = 1.0
    growth_steps = 2000

    def __init__(self, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = self.first if dynamic else 1.0
        self._good_steps = 0

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss to be differentiated."""
        return loss * self.value if self.dynamic else loss

    def update(self, overflowed: bool) -> None:
        """Learn how a step went."""
        if not self.dynamic:
            return
        self._good_steps = 0 if overflowed else self._good_steps + 1
        if overflowed:
            self.value = max(self.lowest, self.value / 2)
        elif self._good_steps == self.growth_steps:
            self.value, self._good_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        """Return what `load` takes back; empty if the scale is constant."""
        return {"value": self.value, "good_steps": float(self._good_steps)} if self.dynamic else {}

    def load(self, state: dict[str, float]) -> None:
        """Go on from what `state` returned; a constant scale stays 1, and an empty state means the first one."""
        if self.dynamic and state:
            self.value, self._good_steps = state["value"], int(state["good_steps"])

"""What happens to gradients between the backward pass and the optimizer: unscale, check, clip, LARS.

The one place for it, whatever the engine. An engine hands out slices: whole tensors where every rank holds all
averaged gradients (DDP, ZeRO 0), parts of tensors where each rank holds its own (ZeRO 1 to 3). Over parts, norms of
whole tensors are sums over ranks of one vector, so that clipping and LARS stay exact up to the rounding of these sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from orchestrate.config.optim import LarsConfig, OptimConfig
from orchestrate.engine.precision import LossScale
from orchestrate.errors import DivergedError


@dataclass(frozen=True)
class GradientSlice:
    """A parameter's averaged gradient, or this rank's part of it.

    Attributes:
        name: of the parameter in the method.
        gradient: changed in place.
        weight: the same part of the parameter, fp32, not changed.
        group: of the optimizer.
    """

    name: str
    gradient: Tensor
    weight: Tensor
    group: dict[str, Any]


class GradientRules:
    """Prepare averaged gradients for the optimizer as a config says.

    Args:
        config: of the optimizer.
        optimizer: whose groups say what is held still and decayed at a step.
        loss_scale: that the loss was multiplied by; told of every overflow.
        names: of all trained parameters, in the same order on every rank.
        device: of the gradients.
        sharded: whether ranks hold parts of gradients.
    """

    def __init__(
        self,
        config: OptimConfig,
        optimizer: Any,
        *,
        loss_scale: LossScale,
        names: Sequence[str],
        device: torch.device,
        sharded: bool,
    ) -> None:
        self._clip, self._clip_norm = config.clip, config.clip_norm
        self._lars = config if isinstance(config, LarsConfig) else None
        self._optimizer, self._loss_scale, self._device, self._sharded = optimizer, loss_scale, device, sharded
        self._places = {name: place for place, name in enumerate(names)}

    @property
    def idle(self) -> bool:
        """Whether gradients go to the optimizer as they are, so that no slice need be handed out."""
        return self._clip == "none" and not self._loss_scale.dynamic and self._lars is None

    @torch.no_grad()
    def apply(self, slices: Sequence[GradientSlice]) -> dict[str, float]:
        """Change gradients in place; every rank must call it.

        Returns:
            What to log, equal on every rank. `skipped` is 1 if fp16 gradients overflowed: then take no step.

        Raises:
            DivergedError: on every rank: fp16 gradients overflowed although the loss scale can fall no further.
        """
        facts: dict[str, float] = {}
        if self._clip != "none" or self._loss_scale.dynamic:
            facts = self._unscale_and_clip(slices)
        if self._lars is not None and not facts.get("skipped"):
            self._scale_layers(self._lars, slices)
        return facts

    def _unscale_and_clip(self, slices: Sequence[GradientSlice]) -> dict[str, float]:
        """Divide by the loss scale and clip in one pass over the gradients, after one for their norms."""
        gradients = [each.gradient for each in slices]
        scale = self._loss_scale.value
        norms = self._norms(slices, gradients)[0] / scale
        # Of all of them, also of those that are held still: an overflow anywhere asks for a smaller scale.
        overflowed = self._loss_scale.dynamic and not bool(torch.isfinite(norms).all())
        if overflowed and scale == LossScale.lowest:
            raise DivergedError(
                f"gradients are not finite at loss scale {scale:g}, the lowest; use bf16 or lower optim.lr"
            )
        self._loss_scale.update(overflowed)
        facts = {"loss_scale": scale, "skipped": float(overflowed)} if self._loss_scale.dynamic else {}
        if overflowed:
            return facts
        total = torch.linalg.vector_norm(self._without_still(norms, slices))
        if self._clip == "per_tensor":
            _multiply(gradients, self._own(self._clip_factor(norms) / scale, slices))
        elif self._clip == "global":
            _multiply(gradients, self._clip_factor(total) / scale)
        elif scale != 1.0 and gradients:
            torch._foreach_mul_(gradients, 1 / scale)
        return {"grad_norm": float(total), **facts}

    def _clip_factor(self, norm: Tensor) -> Tensor:
        return (self._clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it

    def _without_still(self, norms: Tensor, slices: Sequence[GradientSlice]) -> Tensor:
        """Leave out of the norms what is held still, as if it had no gradient."""
        if not any(group["still"] for group in self._optimizer.param_groups):
            return norms
        still = torch.zeros_like(norms)
        for place, each in enumerate(slices):
            still[self._places[each.name] if self._sharded else place] = float(each.group["still"])
        if self._sharded:
            dist.all_reduce(still)
        return norms.masked_fill(still > 0, 0.0)

    def _scale_layers(self, config: LarsConfig, slices: Sequence[GradientSlice]) -> None:
        """Turn gradients into the updates of LARS, which the optimizer only has to sum with momentum.

        Variant barlow_twins: u = trust * |w| / |g + decay * w| * (g + decay * w), plain if either norm is 0.
        Variant triplet: the ratio is trust * |w| / (|g| + decay * |w|); plain only if both norms are 0, where the
        authors' code divides by 0.
        """
        slices = [each for each in slices if each.group["adapt"]]
        gradients, weights = [each.gradient for each in slices], [each.weight for each in slices]
        decay = next((group["weight_decay"] for group in self._optimizer.param_groups if group["adapt"]), 0.0)
        if config.variant == "triplet":
            weight_norms, below = self._norms(slices, weights, gradients)
            below = below + decay * weight_norms
            plain = below == 0
        if decay and slices:
            torch._foreach_add_(gradients, weights, alpha=decay)
        if config.variant == "barlow_twins":
            weight_norms, below = self._norms(slices, weights, gradients)
            plain = (weight_norms == 0) | (below == 0)
        ratios = torch.where(plain, 1.0, config.trust * weight_norms / below)
        _multiply(gradients, self._own(ratios, slices))

    def _norms(self, slices: Sequence[GradientSlice], *lists: list[Tensor]) -> Tensor:
        """Return the norms of whole tensors, a row for each list: of the slices or, if sharded, of all parameters."""
        own = torch.stack([torch.stack(torch._foreach_norm(each)) for each in lists]) if slices else None
        if not self._sharded:
            assert own is not None, "an optimizer without parameters"
            return own
        squares = torch.zeros(len(lists), len(self._places), dtype=torch.float64, device=self._device)
        if own is not None:
            squares[:, self._places_of(slices)] = own.double().square()
        dist.all_reduce(squares)
        return squares.sqrt()

    def _own(self, values: Tensor, slices: Sequence[GradientSlice]) -> Tensor:
        """Pick the values of the slices from those that `_norms` gave."""
        return values[self._places_of(slices)] if self._sharded else values

    def _places_of(self, slices: Sequence[GradientSlice]) -> list[int]:
        return [self._places[each.name] for each in slices]


def _multiply(tensors: list[Tensor], factors: Tensor) -> None:
    """Multiply tensors in place by one factor, or each by its own."""
    if tensors:
        factors = factors.to(tensors[0].dtype)
        torch._foreach_mul_(tensors, list(factors.unbind()) if factors.ndim else factors)

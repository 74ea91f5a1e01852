"""What every method is: a module from views to a loss, its named terms and its collapse indicators."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from ssl_methods.backbone import Backbone


@dataclass(frozen=True)
class StepOutput:
    """The loss of one step, and what to log beside it.

    Attributes:
        loss: scalar to minimise; fp32 at least. The same number on every rank: the loss of the global batch.
        metrics: detached scalars, named loss terms and indicators. Indicators describe this rank's samples.
    """

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step (`step` counts from 1)."""

    step: int
    total_steps: int
    steps_per_epoch: float


class Method(nn.Module, ABC):
    """Hold everything that is trained or kept between steps, and turn views into a loss.

    The engine averages gradients over ranks. Under that convention a method's gradient equals the gradient of one
    process on the concatenated batch, unless `rank_bound` says otherwise.

    A method's section in a config is made of its constructor's keyword-only parameters.
    """

    default_views: ClassVar[str]
    """Name of the view recipe that the method was published with."""
    num_views: ClassVar[int] = 2
    """How many views of an image a step takes; 0 takes any number."""
    uses_labels: ClassVar[bool] = False
    rank_bound: ClassVar[tuple[str, ...]] = ()
    """What ties the numbers to the rank count, in words; empty if nothing does."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @abstractmethod
    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the loss of one step.

        Args:
            views: one normalised batch a view; row i of each comes from the same image.
            labels: class indices, given to methods with `uses_labels` only.
        """

    def after_step(self, progress: Progress) -> None:
        """Update what the optimiser does not (twins, temperatures); called after each optimiser step."""
        return

    def encoder(self) -> Backbone:
        """Return the backbone that is evaluated and exported."""
        return self.backbone


def pair(views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the two views of a two-view method.

    Raises:
        ValueError: the recipe makes another number of views.
    """
    if len(views) != 2:
        raise ValueError(f"views: this method takes 2, the recipe makes {len(views)}; choose a two-view recipe")
    return views[0], views[1]

"""What every method is: a module from views to a loss, its named terms and its collapse indicators."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    """Where training stands: `step` steps are done, from 0 before the first to `total_steps` after the last.

    `stage` is the stage of the next step, from 0; most trainings have one.
    """

    step: int
    total_steps: int
    steps_per_epoch: float
    stage: int = 0

    @property
    def fraction(self) -> float:
        """Return which part of the training is done, 0 to 1."""
        return self.step / self.total_steps

    @property
    def epochs(self) -> float:
        """Return how many epochs are done."""
        return self.step / self.steps_per_epoch


class Method(nn.Module, ABC):
    """Hold everything that is trained or kept between steps, and turn views into a loss.

    A step is `before_step`, `forward`, the optimizer's update, `after_step`. What outlives it (twins, queues, centres)
    is a parameter without gradient or a buffer, so that `state_dict` holds it; what follows from the progress alone
    (momentum, temperature) is set anew by `before_step`.

    The engine averages gradients over ranks. Under that convention a method's gradient equals the gradient of one
    process on the concatenated batch, unless `rank_bound` says otherwise.

    A method's section in a config is made of its constructor's keyword-only parameters.
    """

    equation: ClassVar[str]
    """The loss in a line of plain text."""
    default_views: ClassVar[str]
    """Name of the view recipe that the method was published with."""
    num_views: ClassVar[int] = 2
    """How many views of an image a step takes; 0 takes any number."""
    uses_labels: ClassVar[bool] = False
    rank_bound: ClassVar[tuple[str, ...]] = ()
    """What ties the numbers to the rank count, in words; empty if nothing does."""
    has_twin: ClassVar[bool] = False
    """Whether it keeps a moving average of trained parameters, for which they must be whole after each step."""
    has_last_layer: ClassVar[bool] = False
    """Whether `last_layer` names parameters."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def num_stages(self) -> int:
        """How many stages its training has; the config says when each begins."""
        return 1

    @abstractmethod
    def forward(
        self, views: Sequence[Float[Tensor, "batch 3 _ _"]], labels: Int[Tensor, " batch"] | None = None
    ) -> StepOutput:
        """Return the loss of one step.

        Args:
            views: one normalised batch a view; row i of each comes from the same image.
            labels: class indices, given to methods with `uses_labels` only.
        """

    def check_batches(self, *, num_views: int, global_batch: int, num_ranks: int = 1) -> None:
        """Refuse batches of a shape that a step could not take; called before any training.

        Raises:
            ValueError: what does not fit, and what would.
        """
        return

    def advice(self, *, global_batch: int, num_ranks: int) -> tuple[str, ...]:
        """Say, a line each, where these sizes are far from those that the method was published with."""
        return ()

    def pretrained(self) -> Mapping[str, str]:
        """Return the weights of others that a training begins with: the knob and the path or URL of each file."""
        return {}

    def load_pretrained(self, say: Callable[[str], None] = print) -> None:
        """Load those files, strictly; called once before the first step, not when training goes on.

        Args:
            say: is told what was loaded.

        Raises:
            ValueError: a file is missing, or holds other weights; names the knob.
        """
        return

    def before_step(self, progress: Progress) -> None:
        """Set what depends on how far training is (momentum, temperature): a pure function of the progress."""
        return

    def after_step(self, progress: Progress) -> None:
        """Update what the optimizer does not (twins); called after each optimizer step, with it counted."""
        return

    def last_layer(self) -> tuple[nn.Parameter, ...]:
        """Return the parameters of the output layer, which an early freeze may hold still; none by default."""
        return ()

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

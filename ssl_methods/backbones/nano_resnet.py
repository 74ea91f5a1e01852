"""A student for 28 to 32 px images: the tiny residual network at a third of its width."""

from ssl_methods.small_resnet import SmallResNet


class NanoResNet(SmallResNet):
    """Stages of 8, 16 and 32 channels: 0.02 M parameters."""

    def __init__(self) -> None:
        super().__init__((8, 16, 32))

"""A residual network for 28 to 32 px images on CPUs."""

from ssl_methods.small_resnet import SmallResNet


class TinyResNet(SmallResNet):
    """Stages of 24, 48 and 128 channels: 0.25 M parameters."""

    def __init__(self) -> None:
        super().__init__((24, 48, 128))

"""Residual networks of any width.

He et al., Deep Residual Learning for Image Recognition (arXiv 1512.03385)

Channels that meet in an addition are one group: the output of a stage (in the CIFAR networks the
stem's, too, which the first stage adds to). The inside of each block is a group of its own.

Differences from the released code: those of `networks.slimmable`.
"""

from collections.abc import Sequence

from torch import nn

from networks.choices import check_choice, layers_of
from networks.slimmable import SlimmableNetwork
from networks.slimmable_units import Channels, SlimmablePool, SlimmableResidual


class SlimmableResNet(SlimmableNetwork):
    """ResNet of bottlenecks, with stride in the 3x3 convolution and projection shortcuts.

    Args:
        depth: 50, 101 or 152.
        num_classes: number of logits.
        in_channels: channels of the images.
        width_mults, width_mult_range, divisor: see `SlimmableNetwork`; the papers' widths are 0.25,
            0.5, 0.75, 1.0, and 0.25 to 1.0.

    Raises:
        ValueError: no network has this depth.
    """

    BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # noqa: RUF012

    def __init__(
        self,
        depth: int = 50,
        num_classes: int = 1000,
        in_channels: int = 3,
        width_mults: Sequence[float] | None = None,
        width_mult_range: tuple[float, float] | None = None,
        divisor: int = 8,
    ):
        super().__init__(num_classes, in_channels, width_mults, width_mult_range, divisor)
        check_choice("depth", depth, self.BLOCKS_PER_STAGE)
        x = self._group(64)
        self.units.append(self._layer(Channels(in_channels), x, 7, 2))
        self.units.append(SlimmablePool(nn.MaxPool2d(3, stride=2, padding=1)))
        for number, num_blocks in enumerate(self.BLOCKS_PER_STAGE[depth]):
            channels = 64 * 2**number
            out = self._group(4 * channels)
            for index in range(num_blocks):
                stride = 2 if number > 0 and index == 0 else 1
                inner = self._group(channels)
                layers = [
                    self._layer(x, inner, 1),
                    self._layer(inner, inner, 3, stride),
                    self._layer(inner, out, 1, activation=None),
                ]
                shortcut = None if x == out else self._layer(x, out, 1, stride, None)
                self.units.append(SlimmableResidual(layers, shortcut, "relu"))
                x = out
        self._finish(x)


class SlimmableCifarResNet(SlimmableNetwork):
    """The CIFAR networks of He et al., with projection shortcuts where the shape changes.

    Args:
        depth: 6n+2 (20, 32, 44, 56, 110, ...).
        num_classes: number of logits.
        in_channels: channels of the images.
        width_mults, width_mult_range, divisor: see `SlimmableNetwork`. At a width of 0.25 a divisor
            of 8 leaves 8 of 16 channels, one of 4 leaves 4.

    Raises:
        ValueError: no network has this depth.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width_mults: Sequence[float] | None = None,
        width_mult_range: tuple[float, float] | None = None,
        divisor: int = 4,
    ):
        super().__init__(num_classes, in_channels, width_mults, width_mult_range, divisor)
        num_blocks = layers_of(depth, 6, 2, (20, 56, 110))
        x = self._group(16)
        self.units.append(self._layer(Channels(in_channels), x, 3))
        for number, channels in enumerate((16, 32, 64)):
            out = x if number == 0 else self._group(channels)
            for index in range(num_blocks):
                stride = 2 if number > 0 and index == 0 else 1
                inner = self._group(channels)
                layers = [
                    self._layer(x, inner, 3, stride),
                    self._layer(inner, out, 3, activation=None),
                ]
                shortcut = None if x == out else self._layer(x, out, 1, stride, None)
                self.units.append(SlimmableResidual(layers, shortcut, "relu"))
                x = out
        self._finish(x)

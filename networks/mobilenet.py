"""MobileNets of any width.

Howard et al., MobileNets (arXiv 1704.04861)
Sandler et al., MobileNetV2: Inverted Residuals and Linear Bottlenecks (arXiv 1801.04381)

    v1: x -> 1x1(depthwise 3x3(x))        v2: x -> x + 1x1(depthwise 3x3(1x1(x)))

Differences from the released slimmable code: those of `networks.slimmable`.
"""

from collections.abc import Sequence

from networks.slimmable import SlimmableNetwork
from networks.slimmable_units import Channels, SlimmableResidual


class SlimmableMobileNetV1(SlimmableNetwork):
    """MobileNet v1; the stem and each of the 13 blocks are a group of channels.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        width_mults, width_mult_range, divisor: see `SlimmableNetwork`; the papers' widths are 0.25,
            0.5, 0.75, 1.0, and 0.25 to 1.0.
    """

    # Output channels and stride of each block.
    BLOCKS = (
        *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
        *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
    )

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        width_mults: Sequence[float] | None = None,
        width_mult_range: tuple[float, float] | None = None,
        divisor: int = 8,
    ):
        super().__init__(num_classes, in_channels, width_mults, width_mult_range, divisor)
        x = self._group(32)
        self.units.append(self._layer(Channels(in_channels), x, 3, 2, "relu6"))
        for out_channels, stride in self.BLOCKS:
            out = self._group(out_channels)
            self.units.append(self._layer(x, x, 3, stride, "relu6", depthwise=True))
            self.units.append(self._layer(x, out, 1, 1, "relu6"))
            x = out
        self._finish(x)


class SlimmableMobileNetV2(SlimmableNetwork):
    """MobileNet v2; the stem, every stage's output and every expansion are a group of channels.

    The last convolution has all of its 1280 outputs at every width.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        cifar_strides: stride 1 in the stem and the second stage, for images of 32x32.
        width_mults, width_mult_range, divisor: see `SlimmableNetwork`; the papers' widths are 0.35,
            0.5, 0.75, 1.0, and 0.35 to 1.0.
    """

    # Expansion, output channels, number of blocks and stride of each stage.
    STAGES = (
        *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
        *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    )

    def __init__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        cifar_strides: bool = False,
        width_mults: Sequence[float] | None = None,
        width_mult_range: tuple[float, float] | None = None,
        divisor: int = 8,
    ):
        super().__init__(num_classes, in_channels, width_mults, width_mult_range, divisor)
        x = self._group(32)
        stem_stride = 1 if cifar_strides else 2
        self.units.append(self._layer(Channels(in_channels), x, 3, stem_stride, "relu6"))
        for number, (expansion, out_channels, num_blocks, stage_stride) in enumerate(self.STAGES):
            out = self._group(out_channels)
            for index in range(num_blocks):
                stride = 1 if index > 0 or (cifar_strides and number == 1) else stage_stride
                layers = []
                hidden = x
                if expansion > 1:
                    # The ratio is that of the input: what is rounded is not yet expanded.
                    hidden = self._group(x.full, expansion)
                    layers.append(self._layer(x, hidden, 1, 1, "relu6"))
                layers.append(self._layer(hidden, hidden, 3, stride, "relu6", depthwise=True))
                layers.append(self._layer(hidden, out, 1, 1, None))
                if stride == 1 and x == out:
                    self.units.append(SlimmableResidual(layers, None, None))
                else:
                    self.units.extend(layers)
                x = out
        features = Channels(1280)
        self.units.append(self._layer(x, features, 1, 1, "relu6"))
        self._finish(features)

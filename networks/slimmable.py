"""Networks of any width: one set of weights, of which a narrow network uses the first channels.

Yu et al., Slimmable Neural Networks (ICLR 2019, arXiv 1812.08928)
Yu and Huang, Universally Slimmable Networks and Improved Training Techniques (ICCV 2019,
arXiv 1903.05134)

    y = BN_w(W[:out, :in] * x),    out = round(width * channels),    in = channels of x

The method chooses the widths. A width is one ratio, or one per group of channels (channels that
meet in an addition are one group). It is an argument of `forward`, which resolves it to numbers of
channels and hands it down from layer to layer; a layer takes the inputs that it gets.

With `width_mults` every BN is private to each of these widths (Slimmable). With `width_mult_range`
its scale and shift are shared, it normalises by the batch in training, and has statistics for those
widths alone that were recalibrated (Universally Slimmable).

Differences from the released code:
    * A width without statistics is an error; the released code would use those of a fresh BN.
    * Rounding never gives a layer more channels than it has. The released S-ResNet cuts off instead
      of rounding: of 64 and 256 channels 22 and 89 at a width of 0.35, here 24 and 88.
    * Non-uniform widths work.
    * The BN behind the last convolution of MobileNet v2, which has all its channels at every width,
      has statistics for each width as well; in the released code all widths share them.
"""

from collections.abc import Sequence
from functools import partial
from reprlib import repr as shown

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from networks.choices import check_counts, check_numbers
from networks.initialization import draw_weights
from networks.narrow import KeptWidths, Residual, fill, gather
from networks.slimmable_layers import (
    Activation,
    Channels,
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLayer,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    Width,
    WidthMult,
    name_of,
)


def round_channels(channels: float, divisor: int = 8) -> int:
    """Returns the nearest multiple of `divisor`, the next one if that is below 0.9 of `channels`.

    As in the released code the smallest result is 1, not the divisor.
    """
    rounded = max(1, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def check_width(width_mult: WidthMult) -> None:
    """Raises ValueError unless a width is a number, or several."""
    is_tensor = isinstance(width_mult, Tensor) and width_mult.dim() == 1
    if isinstance(width_mult, Sequence) or is_tensor:
        fits = all(isinstance(ratio, float | int | Tensor) for ratio in width_mult)
    else:
        fits = isinstance(width_mult, float | int)
    if not fits:
        raise ValueError(f"width is {shown(width_mult)}: give a number, or one per group")


class SlimmableNetwork(nn.Module):
    """Units in a row, global average pooling, a linear layer; subclasses append the units.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images, of which none is ever left out.
        width_mults: makes the network Slimmable: the widths that exist, each with BNs of its own.
        width_mult_range: makes it Universally Slimmable: narrowest and widest width.
        divisor: numbers of channels are multiples of it where that is possible.

    Attributes:
        units: layers and blocks, input to output.
        group_channels: channels at full width of each group.

    Raises:
        ValueError: not exactly one kind of widths, widths outside (0, 1], or a divisor above the
            channels of a group.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        width_mults: Sequence[float] | None,
        width_mult_range: tuple[float, float] | None,
        divisor: int,
    ):
        super().__init__()
        if (width_mults is None) == (width_mult_range is None):
            raise ValueError(
                "give either width_mults (Slimmable) or width_mult_range (Universally Slimmable)"
            )
        check_counts(num_classes=num_classes, in_channels=in_channels, divisor=divisor)
        name = "width_mult_range" if width_mults is None else "width_mults"
        widths = list(width_mult_range if width_mults is None else width_mults)
        check_numbers("(0, 1]", **{name: widths})
        if width_mults is not None and not 0 < len(set(map(name_of, widths))) == len(widths):
            raise ValueError(f"width_mults is {shown(widths)}: give one or more, each once")
        if width_mults is None and not (len(widths) == 2 and widths[0] < widths[1]):
            raise ValueError(
                f"width_mult_range is {shown(widths)}: give the narrowest width, then the widest"
            )
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.width_mults = None if width_mults is None else tuple(width_mults)
        self.width_mult_range = None if width_mult_range is None else tuple(width_mult_range)
        self.divisor = divisor
        self.group_channels: list[int] = []
        self.units = nn.ModuleList()
        self._kept = KeptWidths()

    # --- widths -----------------------------------------------------------------------------------

    @property
    def num_groups(self) -> int:
        """Number of ratios that a non-uniform width has."""
        return len(self.group_channels)

    def width(self, width_mult: WidthMult) -> Width:
        """Resolves a width.

        Args:
            width_mult: one ratio, or one per group.

        Raises:
            ValueError: a ratio outside the range, a width that is none of `width_mults`, or not one
                ratio per group.
        """
        check_width(width_mult)
        name = name_of(width_mult)
        # Made of the name, so that widths of one name are one width.
        ratios = [float(ratio) for ratio in name.split(",") if ratio]
        if isinstance(width_mult, float | int):
            ratios *= self.num_groups
        if len(ratios) != self.num_groups:
            raise ValueError(
                f"{len(ratios)} widths for {self.num_groups} groups: give one per group"
            )
        if self.width_mults is not None:
            names = [name_of(switch) for switch in self.width_mults]
            if name not in names:
                raise ValueError(f"width {name} is none of {', '.join(names)}: choose one of these")
        else:
            low, high = self.width_mult_range
            # A name has six digits.
            if not all(low - 1e-6 <= ratio <= high + 1e-6 for ratio in ratios):
                raise ValueError(f"width {name} is outside the range {low:g} to {high:g}")
        counts = [self._count(*pair) for pair in zip(self.group_channels, ratios, strict=True)]
        return Width(name, tuple(counts))

    def _count(self, channels: int, ratio: float) -> int:
        if ratio == 1:  # also where the divisor does not divide them
            return channels
        return min(channels, round_channels(channels * ratio, self.divisor))

    # --- building ---------------------------------------------------------------------------------

    def _group(self, channels: int, multiplier: int = 1) -> Channels:
        """Returns ``multiplier * channels`` channels that are a new group.

        Raises:
            ValueError: the divisor is more than they are: all widths would have all of them.
        """
        if self.divisor > channels:
            raise ValueError(
                f"divisor {self.divisor} is more than the {channels} channels of a group: give "
                f"{channels} or less"
            )
        self.group_channels.append(channels)
        return Channels(multiplier * channels, self.num_groups - 1, multiplier)

    def _layer(
        self,
        source: Channels,
        out: Channels,
        size: int,
        stride: int = 1,
        activation: Activation = "relu",
        depthwise: bool = False,
    ) -> SlimmableLayer:
        groups = source.full if depthwise else 1
        conv = SlimmableConv2d(
            source.full, out.full, size, stride, size // 2, groups=groups, bias=False
        )
        norm: nn.Module
        if self.width_mults is None:
            norm = SlimmableBatchNorm2d(out.full)
        else:
            counts = {name_of(mult): out.full for mult in self.width_mults}
            if out.group is not None:
                channels = self.group_channels[out.group]
                for mult in self.width_mults:
                    ratio = float(name_of(mult))
                    counts[name_of(mult)] = out.multiplier * self._count(channels, ratio)
            norm = SwitchableBatchNorm2d(counts, tied=out.group is None)
        return SlimmableLayer(conv, norm, activation, out)

    def _finish(self, features: Channels) -> None:
        """Adds the classifier and draws the weights, as the released code does."""
        self.fc = SlimmableLinear(features.full, self.num_classes)
        draw_weights(self, "fan_out", draw_linear=partial(nn.init.normal_, std=0.01))

    # --- running ----------------------------------------------------------------------------------

    def is_calibrated(self, width_mult: WidthMult) -> bool:
        """Tells whether every BN has statistics for a width."""
        name = self.width(width_mult).name
        return all(
            name in norm.statistics
            for norm in self.modules()
            if isinstance(norm, SlimmableBatchNorm2d)
        )

    def train(self, mode: bool = True) -> "SlimmableNetwork":
        self._kept.clear()
        return super().train(mode)

    def forget_statistics(self) -> None:
        """Drops the BN statistics of all widths, which a training step outdates."""
        for norm in self.modules():
            if isinstance(norm, SlimmableBatchNorm2d) and norm.statistics:
                norm.statistics = {}

    def forward(self, images: Tensor, width_mult: WidthMult = 1.0) -> Tensor:
        """Classifies images.

        In evaluation and without gradients the weights of the latest widths are kept, until the
        network's change; see `networks.narrow.KeptWidths`.

        Args:
            images: (N, C, H, W).
            width_mult: one ratio, or one per group.

        Returns:
            Logits, (N, num_classes).

        Raises:
            ValueError: see `width`; in evaluation, a width without BN statistics.
        """
        plain = None
        # A captured graph would go on reading copies of weights that have changed.
        captures = images.is_cuda and torch.cuda.is_current_stream_capturing()
        if not (self.training or torch.is_grad_enabled() or captures):
            plain = self._plain(width_mult)
        return self._run(images, self.width(width_mult)) if plain is None else plain(images)

    def _plain(self, width_mult: WidthMult) -> nn.Module | None:
        check_width(width_mult)
        key = width_mult if isinstance(width_mult, float | int) else tuple(width_mult)

        def make() -> tuple[str, nn.Module]:
            width = self.width(width_mult)
            return width.name, cut_out(self, width)

        return self._kept.get(self, key, make)

    def _run(self, images: Tensor, width: Width) -> Tensor:
        sizes, channels = {}, self.in_channels
        for unit in self.units:
            more, channels = unit.sizes(channels, width)
            sizes |= more
        narrow = gather(sizes | self.fc.sizes(channels))
        x = images
        for unit in self.units:
            x = unit(x, width._replace(narrow=narrow))
        return self.fc(x.mean((2, 3)), narrow)


# --- cutting out ----------------------------------------------------------------------------------


def extract(
    network: SlimmableNetwork, width_mult: WidthMult, fold_bn: bool = False
) -> nn.Sequential:
    """Returns an ordinary network with the weights of one width: what is to be deployed.

    It is made of `nn.Conv2d`, `nn.BatchNorm2d`, `nn.Linear` and the like, is in evaluation mode and
    shares no memory with the slimmable network.

    Args:
        network: recalibrated for this width, if it is Universally Slimmable.
        width_mult: one ratio, or one per group.
        fold_bn: multiply BN into the convolutions.

    Raises:
        ValueError: no such width, or one without BN statistics.
    """
    plain = cut_out(network, network.width(width_mult))
    for tensor in [*plain.parameters(), *plain.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return fold(plain) if fold_bn else plain


def cut_out(network: SlimmableNetwork, width: Width) -> nn.Sequential:
    """Returns an ordinary network of one width, made of slices of the slimmable one's memory."""
    channels, modules = network.in_channels, []
    for unit in network.units:
        layers, channels = unit.extract(channels, width)
        modules += layers
    with torch.device("meta"):
        fc = nn.Linear(channels, network.num_classes)
    fill(fc, {"weight": network.fc.weight[:, :channels], "bias": network.fc.bias})
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc).eval()


def fold(module: nn.Module) -> nn.Module:
    """Returns plain layers whose BNs are multiplied into the convolutions before them."""
    if isinstance(module, Residual):
        return Residual(fold(module.branch), fold(module.shortcut), module.activation)
    if not isinstance(module, nn.Sequential):
        return module
    layers: list[nn.Module] = []
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(fold(layer))
    return nn.Sequential(*layers).eval()

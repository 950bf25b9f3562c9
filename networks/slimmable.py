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
from networks.narrow import gather
from networks.slimmable_base import BlockGates, Slimmable, block_gates, check_width
from networks.slimmable_layers import (
    Activation,
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    Width,
    WidthMult,
    name_of,
)
from networks.slimmable_units import (
    Channels,
    Gates,
    SlimmableLayer,
    SlimmableResidual,
    extract_head,
    extract_units,
    run_units,
    sizes_of_units,
)


def round_channels(channels: float, divisor: int = 8) -> int:
    """Returns the nearest multiple of `divisor`, the next one if that is below 0.9 of `channels`.

    As in the released code the smallest result is 1, not the divisor.
    """
    rounded = max(1, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class SlimmableNetwork(Slimmable):
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

    # --- widths -----------------------------------------------------------------------------------

    @property
    def num_groups(self) -> int:
        """Number of ratios that a non-uniform width has."""
        return len(self.group_channels)

    @property
    def num_blocks(self) -> int:
        """Number of residual blocks, which gates close."""
        return sum(isinstance(unit, SlimmableResidual) for unit in self.units)

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

    def split_gates(self, gates: BlockGates | None) -> Gates:
        """Returns one gate per unit.

        Args:
            gates: one per residual block.

        Raises:
            ValueError: not one per residual block.
        """
        if gates is None:
            return [None] * len(self.units)
        gates = block_gates(gates)
        if len(gates) != self.num_blocks:
            raise ValueError(f"{len(gates)} gates for {self.num_blocks} blocks: give one per block")
        rest = iter(gates)
        return [next(rest) if isinstance(u, SlimmableResidual) else None for u in self.units]

    def forward(
        self, images: Tensor, width_mult: WidthMult | None = None, gates: BlockGates | None = None
    ) -> Tensor:
        """Classifies images.

        In evaluation and without gradients the weights of the latest widths are kept, until the
        network's change; see `networks.narrow.KeptWidths`.

        Args:
            images: (N, C, H, W).
            width_mult: one ratio, or one per group; None: the widest.
            gates: one per residual block, which scales its branch; where it is 0 the branch is not
                executed, and its BNs are left alone. None: all are 1.

        Returns:
            Logits, (N, num_classes).

        Raises:
            ValueError: see `width` and `split_gates`; in evaluation, a width without BN statistics.
        """
        width_mult = self.widest if width_mult is None else width_mult
        plain = self.kept(width_mult, gates)
        if plain is not None:
            return plain(images)
        width, by_unit = self.width(width_mult), self.split_gates(gates)
        sizes, counts = sizes_of_units(self.units, by_unit, self.in_channels, width)
        narrow = gather(sizes | self.fc.sizes(counts[-1]))
        x = run_units(self.units, by_unit, images, width._replace(narrow=narrow))
        return self.fc(x.mean((2, 3)), narrow)

    def cut_out(self, width: Width, gates: BlockGates | None = None) -> nn.Sequential:
        by_unit = self.split_gates(gates)
        modules, channels = extract_units(self.units, self.in_channels, width, by_unit)
        return nn.Sequential(*modules, *extract_head(self.fc, channels)).eval()


# --- cutting out ----------------------------------------------------------------------------------


def extract(
    network: Slimmable,
    width_mult: WidthMult,
    fold_bn: bool = False,
    gates: BlockGates | None = None,
) -> nn.Module:
    """Returns an ordinary network with the weights of one width: what is to be deployed.

    It is made of `nn.Conv2d`, `nn.BatchNorm2d`, `nn.Linear` and the like, is in evaluation mode and
    shares no memory with the slimmable network. Of a network with exits it has exits.

    Args:
        network: recalibrated for this width, if it is Universally Slimmable.
        width_mult: one ratio, or one per group.
        fold_bn: multiply BN into the convolutions.
        gates: see `SlimmableNetwork`; they become part of the network.

    Raises:
        ValueError: no such width, or one without BN statistics.
    """
    plain = network.cut_out(network.width(width_mult), gates)
    for tensor in [*plain.parameters(), *plain.buffers()]:
        tensor.data = tensor.data.clone(memory_format=torch.contiguous_format)
    return fold(plain) if fold_bn else plain


def fold(module: nn.Module) -> nn.Module:
    """Multiplies BNs into the convolutions before them; changes plain layers, and returns them."""
    if not isinstance(module, nn.Sequential):
        for name, child in module.named_children():
            setattr(module, name, fold(child))
        return module
    layers: list[nn.Module] = []
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(fold(layer))
    return nn.Sequential(*layers).eval()

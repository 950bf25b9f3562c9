"""Networks of any width: one set of weights, of which a narrow network uses the first channels.

Yu et al., Slimmable Neural Networks (ICLR 2019, arXiv 1812.08928)
Yu and Huang, Universally Slimmable Networks and Improved Training Techniques (ICCV 2019,
arXiv 1903.05134)

    y = BN_w(W[:out, :in] * x),    out = round(width * channels),    in = channels of x

Which widths run, and when, is not known here. A width is one ratio, or one per group of channels
(channels that meet in an addition are one group). It is an argument of `forward`, becomes numbers
of channels there, and is handed down from layer to layer; a layer takes the inputs that it gets.

With `width_mults` every BN is private to each of these widths (Slimmable). With `width_mult_range`
its scale and shift are shared, it normalises by the batch in training, and has statistics for those
widths alone that were recalibrated (Universally Slimmable).

Differences from the released code:
    * A width without statistics is an error; the released code would use those of a fresh BN.
    * Rounding never gives a layer more channels than it has.
    * Non-uniform widths work.
    * The BN behind the last convolution of MobileNet v2, which has all its channels at every width,
      has statistics for each width as well; in the released code all widths share them.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch.nn.utils.fusion import fuse_conv_bn_eval

from networks.residual import Residual

WidthMult = float | Sequence[float]
Activation = Literal["relu", "relu6"] | None

ACTIVATIONS = {"relu": nn.ReLU(inplace=True), "relu6": nn.ReLU6(inplace=True)}


def round_channels(channels: float, divisor: int = 8) -> int:
    """Returns the nearest multiple of `divisor`, the next one if that is below 0.9 of `channels`.

    As in the released code the smallest result is 1, not the divisor.
    """
    rounded = max(1, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class Width(NamedTuple):
    """A width made out for a network."""

    name: str
    """What BN statistics of this width are filed under: "0.25", or "0.25,0.5,..."."""
    channels: tuple[int, ...]
    """Active channels of each group."""


def name_of(width_mult: WidthMult) -> str:
    """Returns the name of a width: "0.25", or "0.25,0.5,..."."""
    ratios = [width_mult] if isinstance(width_mult, float | int) else width_mult
    return ",".join(f"{ratio:g}" for ratio in ratios)


# --- layers ---------------------------------------------------------------------------------------


class SlimmableConv2d(nn.Conv2d):
    """A convolution that computes its first output channels from the inputs it gets.

    Depthwise, that is as many groups as channels, it has as many outputs as inputs. With other
    groups, every group is slimmed alike.
    """

    def forward(self, x: Tensor, out_channels: int | None = None) -> Tensor:
        """Convolves.

        Args:
            x: (N, in, H, W), at most `in_channels` of them.
            out_channels: number of outputs; None: all, or as many as inputs if depthwise.

        Returns:
            (N, out, H', W').

        Raises:
            ValueError: channels that the groups do not divide.
        """
        weight, bias, groups = self.slice(x.shape[1], out_channels)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def slice(
        self, in_channels: int, out_channels: int | None
    ) -> tuple[Tensor, Tensor | None, int]:
        """Returns weight, bias and groups of the convolution between so many channels."""
        weight, bias, groups = self.weight, self.bias, self.groups
        is_depthwise = groups == self.in_channels == self.out_channels
        if is_depthwise:
            groups = out_channels = in_channels
        elif out_channels is None:
            out_channels = self.out_channels
        if (in_channels, out_channels) == (self.in_channels, self.out_channels):
            return weight, bias, groups
        if is_depthwise or groups == 1:
            bias = None if bias is None else bias[:out_channels]
            return weight[:out_channels, : in_channels // groups], bias, groups
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"{in_channels} inputs and {out_channels} outputs in {groups} groups: choose a "
                f"divisor that is a multiple of {groups}"
            )
        ins, outs = in_channels // groups, out_channels // groups
        weight = weight.unflatten(0, (groups, -1))[:, :outs, :ins].flatten(0, 1)
        bias = None if bias is None else bias.unflatten(0, (groups, -1))[:, :outs].flatten()
        return weight, bias, groups


class SlimmableLinear(nn.Linear):
    """A linear layer on the inputs it gets; all its outputs are always there."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns (N, out) of x (N, in), at most `in_features` of them."""
        return F.linear(x, self.weight[:, : x.shape[1]], self.bias)


class SlimmableBatchNorm2d(nn.Module):
    """BN whose scale and shift all widths share, and whose statistics belong to one width each.

    In training it normalises by the batch, and forgets statistics that its weights outgrow. In
    evaluation it uses those that `networks.recalibrate` has filed for the width.

    Args:
        num_features: channels at full width.

    Attributes:
        statistics: mean and variance, (2, C), by the name of the width; part of the state dict.
        record: called in training with the name of the width, mean and unbiased variance (2, C) of
            the batch, and its number of images; None but during recalibration.
    """

    eps = 1e-5

    def __init__(self, num_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.statistics: dict[str, Tensor] = {}
        self.record: Callable[[str, Tensor, int], None] | None = None

    def forward(self, x: Tensor, width: Width) -> Tensor:
        """Normalises x (N, C, H, W), C of the channels.

        Raises:
            ValueError: in evaluation, a width without statistics.
        """
        channels, weight, bias = x.shape[1], self.weight, self.bias
        if channels < len(weight):
            weight, bias = weight[:channels], bias[:channels]
        if not self.training:
            mean, variance = self.statistics_of(width.name).unbind()
            return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)
        if self.record is None:
            if self.statistics:
                self.statistics = {}
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=self.eps)
        of_batch = torch.zeros(2, channels, device=x.device, dtype=weight.dtype)
        # Momentum 1 keeps mean and unbiased variance of this batch, which are computed anyway.
        out = F.batch_norm(x, *of_batch, weight, bias, training=True, momentum=1.0, eps=self.eps)
        self.record(width.name, of_batch, len(x))
        return out

    def statistics_of(self, name: str) -> Tensor:
        """Returns mean and variance, (2, C), of a width.

        Raises:
            ValueError: there are none.
        """
        if name not in self.statistics:
            known = "; ".join(self.statistics) or "none"
            raise ValueError(
                f"width {name} has no BN statistics (calibrated: {known}): recalibrate it, with "
                "networks.recalibrate or callbacks.BNRecalibration"
            )
        return self.statistics[name]

    def state_at(self, width: Width, num_features: int) -> dict[str, Tensor]:
        """Returns the state dict of an ordinary BN of this width; errors as `statistics_of`."""
        mean, variance = self.statistics_of(width.name)
        return {
            "weight": self.weight[:num_features],
            "bias": self.bias[:num_features],
            "running_mean": mean,
            "running_var": variance,
            "num_batches_tracked": torch.tensor(0),
        }

    def get_extra_state(self) -> dict[str, Tensor]:
        return self.statistics

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self.statistics = {name: values.to(self.weight) for name, values in state.items()}

    def _apply(self, function, recurse: bool = True) -> nn.Module:
        super()._apply(function, recurse)
        self.statistics = {name: function(values) for name, values in self.statistics.items()}
        return self


class SwitchableBatchNorm2d(nn.Module):
    """One ordinary BN per width: scale, shift and statistics are private.

    Args:
        num_features: channels of each width, by its name.
        tied: all widths share scale and shift; needs as many channels at every width.
    """

    def __init__(self, num_features: dict[str, int], tied: bool = False):
        super().__init__()
        self.names = list(num_features)
        self.switches = nn.ModuleList(nn.BatchNorm2d(count) for count in num_features.values())
        if tied:
            for switch in self.switches[1:]:
                switch.weight, switch.bias = self.switches[0].weight, self.switches[0].bias

    def forward(self, x: Tensor, width: Width) -> Tensor:
        """Normalises x (N, C, H, W) by the BN of the width."""
        return self.switches[self.names.index(width.name)](x)

    def state_at(self, width: Width, num_features: int) -> dict[str, Tensor]:
        """Returns the state dict of the BN of the width."""
        return self.switches[self.names.index(width.name)].state_dict()


# --- networks -------------------------------------------------------------------------------------


class Channels(NamedTuple):
    """Channels between two layers: how many there are at a width."""

    full: int
    """At full width."""
    group: int | None = None
    """The group whose ratio they follow; None: all of them at every width."""
    multiplier: int = 1
    """Channels for each one of the group."""

    def at(self, width: Width) -> int:
        return self.full if self.group is None else self.multiplier * width.channels[self.group]


class SlimmableLayer(nn.Module):
    """A convolution, its BN and its activation.

    Args:
        conv: the convolution.
        norm: its BN.
        activation: what follows, if anything.
        out: its outputs.
    """

    def __init__(
        self,
        conv: SlimmableConv2d,
        norm: SlimmableBatchNorm2d | SwitchableBatchNorm2d,
        activation: Activation,
        out: Channels,
    ):
        super().__init__()
        self.conv = conv
        self.norm = norm
        self.activation = activation
        self.out = out

    def forward(self, x: Tensor, width: Width) -> Tensor:
        x = self.norm(self.conv(x, self.out.at(width)), width)
        return x if self.activation is None else ACTIVATIONS[self.activation](x)

    def extract(self, in_channels: int, width: Width) -> tuple[list[nn.Module], int]:
        """Returns plain layers for so many inputs, and the number of their outputs."""
        wide, out_channels = self.conv, self.out.at(width)
        weight, bias, groups = wide.slice(in_channels, out_channels)
        geometry = (wide.kernel_size, wide.stride, wide.padding, wide.dilation)
        like = {"device": weight.device, "dtype": weight.dtype}
        conv = skip_init(
            nn.Conv2d,
            in_channels,
            out_channels,
            *geometry,
            groups,
            bias is not None,
            wide.padding_mode,
            **like,
        )
        state = {"weight": weight, "bias": bias}
        conv.load_state_dict({name: part for name, part in state.items() if part is not None})
        norm = nn.BatchNorm2d(out_channels, **like)
        norm.load_state_dict(self.norm.state_at(width, out_channels))
        layers = [conv, norm]
        if self.activation is not None:
            layers.append(copy.deepcopy(ACTIVATIONS[self.activation]))
        return layers, out_channels


class SlimmablePool(nn.Module):
    """A pooling, which knows no channels.

    Args:
        pool: the pooling.
    """

    def __init__(self, pool: nn.Module):
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor, width: Width) -> Tensor:
        return self.pool(x)

    def extract(self, in_channels: int, width: Width) -> tuple[list[nn.Module], int]:
        return [copy.deepcopy(self.pool)], in_channels


class SlimmableResidual(nn.Module):
    """Layers in a row, and a shortcut around them.

    Args:
        layers: the branch.
        shortcut: a layer, or None: the identity.
        activation: what follows the addition, if anything.
    """

    def __init__(
        self,
        layers: Sequence[SlimmableLayer],
        shortcut: SlimmableLayer | None,
        activation: Activation,
    ):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shortcut = shortcut
        self.activation = activation

    def forward(self, x: Tensor, width: Width) -> Tensor:
        branch = x
        for layer in self.layers:
            branch = layer(branch, width)
        x = branch + (x if self.shortcut is None else self.shortcut(x, width))
        return x if self.activation is None else ACTIVATIONS[self.activation](x)

    def extract(self, in_channels: int, width: Width) -> tuple[list[nn.Module], int]:
        """Returns a plain residual block for so many inputs, and the number of its outputs."""
        branch, channels = [], in_channels
        for layer in self.layers:
            layers, channels = layer.extract(channels, width)
            branch += layers
        shortcut = [] if self.shortcut is None else self.shortcut.extract(in_channels, width)[0]
        activation = ACTIVATIONS.get(self.activation, nn.Identity())
        block = Residual(
            nn.Sequential(*branch), nn.Sequential(*shortcut), copy.deepcopy(activation)
        )
        return [block], channels


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
        ValueError: not exactly one kind of widths, or widths outside (0, 1].
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
        widths = width_mult_range if width_mults is None else width_mults
        if len(widths) == 0 or not all(0 < width <= 1 for width in widths):
            raise ValueError(f"widths {list(widths)}: give numbers above 0, up to 1")
        if width_mults is not None and len(set(map(name_of, widths))) < len(widths):
            raise ValueError(f"width_mults {list(widths)} hold one twice: give each once")
        if width_mults is None and len(width_mult_range) != 2:
            raise ValueError(f"width_mult_range {list(widths)}: give narrowest and widest width")
        if width_mults is None and not widths[0] < widths[1]:
            raise ValueError(
                f"width_mult_range {list(widths)} is empty: give the narrowest width, "
                "then the widest"
            )
        if divisor < 1:
            raise ValueError(f"divisor {divisor}: give 1 or more")
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

    def width(self, width_mult: WidthMult) -> Width:
        """Makes out a width.

        Args:
            width_mult: one ratio, or one per group.

        Raises:
            ValueError: a ratio outside the range, a width that is none of `width_mults`, or not one
                ratio per group.
        """
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
        """Returns ``multiplier * channels`` channels that are a new group."""
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
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    # --- running ----------------------------------------------------------------------------------

    def is_calibrated(self, width_mult: WidthMult) -> bool:
        """Tells whether every BN has statistics for a width."""
        name = self.width(width_mult).name
        return all(
            name in norm.statistics
            for norm in self.modules()
            if isinstance(norm, SlimmableBatchNorm2d)
        )

    def forward(self, images: Tensor, width_mult: WidthMult = 1.0) -> Tensor:
        """Classifies images.

        Args:
            images: (N, C, H, W).
            width_mult: one ratio, or one per group.

        Returns:
            Logits, (N, num_classes).

        Raises:
            ValueError: see `width`; in evaluation, a width without BN statistics.
        """
        width = self.width(width_mult)
        x = images
        for unit in self.units:
            x = unit(x, width)
        return self.fc(x.mean((2, 3)))


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
    width = network.width(width_mult)
    channels, modules = network.in_channels, []
    for unit in network.units:
        layers, channels = unit.extract(channels, width)
        modules += layers
    weight = network.fc.weight[:, :channels]
    like = {"device": weight.device, "dtype": weight.dtype}
    fc = skip_init(nn.Linear, channels, network.num_classes, **like)
    fc.load_state_dict({"weight": weight, "bias": network.fc.bias})
    plain = nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc).eval()
    return fold(plain) if fold_bn else plain


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

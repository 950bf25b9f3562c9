"""Layers of networks of any width: what they compute at a width, and what is cut out for it.

    y = BN_w(W[:out, :in] * x)

Papers, and differences from the released code: see `networks.slimmable`.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.narrow import InPlaceReLU6, Sizes, fill

WidthMult = float | Sequence[float]
Activation = Literal["relu", "relu6"] | None

Narrow = Mapping[Tensor, Tensor]
"""Dense copies of parameters at a width; a layer slices what is not among them."""

NOTHING: Narrow = MappingProxyType({})


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Returns the activation of x, in place."""
    if activation is None:
        return x
    return InPlaceReLU6.apply(x) if activation == "relu6" else x.relu_()


class Width(NamedTuple):
    """A width, resolved for a network."""

    name: str
    """What BN statistics of this width are filed under: "0.25", or "0.25,0.5,..."."""
    channels: tuple[int, ...]
    """Active channels of each group."""
    narrow: Narrow = NOTHING
    """Weights that were gathered for it."""


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

    def forward(
        self, x: Tensor, out_channels: int | None = None, narrow: Narrow = NOTHING
    ) -> Tensor:
        """Convolves.

        Args:
            x: (N, in, H, W), at most `in_channels` of them.
            out_channels: number of outputs; None: all, or as many as inputs if depthwise.
            narrow: weights that were gathered.

        Returns:
            (N, out, H', W').

        Raises:
            ValueError: channels that the groups do not divide.
        """
        weight, bias, groups = self.slice(x.shape[1], out_channels, narrow)
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def slice(
        self, in_channels: int, out_channels: int | None, narrow: Narrow = NOTHING
    ) -> tuple[Tensor, Tensor | None, int]:
        """Returns weight, bias and groups of the convolution between these numbers of channels."""
        weight, bias, groups = self.weight, self.bias, self.groups
        is_depthwise = groups == self.in_channels == self.out_channels
        if is_depthwise:
            groups = out_channels = in_channels
        elif out_channels is None:
            out_channels = self.out_channels
        if (in_channels, out_channels) == (self.in_channels, self.out_channels):
            return weight, bias, groups
        if weight in narrow:
            return narrow[weight], narrow.get(bias, bias), groups
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

    def sizes(self, in_channels: int, out_channels: int) -> Sizes:
        """Returns the sizes of the parameters between these numbers of channels.

        In groups they are not the first of the layer, and are not named.
        """
        if self.groups not in (1, self.out_channels):
            return {}
        ins = in_channels if self.groups == 1 else 1
        bias = {} if self.bias is None else {self.bias: (out_channels,)}
        return {self.weight: (out_channels, ins, *self.kernel_size), **bias}


class SlimmableLinear(nn.Linear):
    """A linear layer on the inputs it gets; all its outputs are always there."""

    def forward(self, x: Tensor, narrow: Narrow = NOTHING) -> Tensor:
        """Returns (N, out) of x (N, in), at most `in_features` of them."""
        weight = narrow.get(self.weight)
        return F.linear(x, self.weight[:, : x.shape[1]] if weight is None else weight, self.bias)

    def sizes(self, in_features: int) -> Sizes:
        """Returns the size of the weight for this number of inputs."""
        return {self.weight: (self.out_features, in_features)}


class SlimmableBatchNorm2d(nn.Module):
    """BN whose scale and shift all widths share, and whose statistics belong to one width each.

    In training it normalises by the batch, and forgets statistics that its weights outgrow. In
    evaluation it uses those that `networks.recalibrate` has filed for the width.

    Args:
        num_features: channels at full width.

    Attributes:
        statistics: mean and variance, (2, C), by the name of the width; part of the state dict.
        record: None but during recalibration: returns for the name of the width and the inputs
            where the mean and the unbiased variance of all batches, (C,) each, shall be updated,
            and with what momentum.
    """

    def __init__(self, num_features: int):
        super().__init__()
        self.eps = 1e-5  # of the instance, where `networks.watch.Watch` looks for it
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.statistics: dict[str, Tensor] = {}
        self.record: Callable[[str, Tensor], tuple[Tensor, Tensor, float]] | None = None

    def forward(self, x: Tensor, width: Width) -> Tensor:
        """Normalises x (N, C, H, W), C of the channels.

        Raises:
            ValueError: in evaluation, a width without statistics.
        """
        channels, weight, bias = x.shape[1], self.weight, self.bias
        if weight in width.narrow:
            weight, bias = width.narrow[weight], width.narrow[bias]
        elif channels < len(weight):
            weight, bias = weight[:channels], bias[:channels]
        if not self.training:
            mean, variance = self.statistics_of(width.name).unbind()
            return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)
        mean = variance = None
        momentum = 0.0
        if self.record is not None:
            mean, variance, momentum = self.record(width.name, x)
        elif self.statistics:
            self.statistics = {}
        return F.batch_norm(x, mean, variance, weight, bias, True, momentum, self.eps)

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

    def sizes(self, num_features: int) -> Sizes:
        """Returns the sizes of scale and shift for this number of channels."""
        return {self.weight: (num_features,), self.bias: (num_features,)}

    def extract(self, width: Width, num_features: int) -> nn.BatchNorm2d:
        """Returns an ordinary BN of this width, slices of this; errors as `statistics_of`."""
        mean, variance = self.statistics_of(width.name)
        state = {
            "weight": self.weight[:num_features],
            "bias": self.bias[:num_features],
            "running_mean": mean,
            "running_var": variance,
            "num_batches_tracked": mean.new_zeros((), dtype=torch.long),
        }
        return plain_norm(num_features, self.eps, state)

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

    def sizes(self, num_features: int) -> Sizes:
        """Returns nothing: no switch is cut."""
        return {}

    def extract(self, width: Width, num_features: int) -> nn.BatchNorm2d:
        """Returns a BN with the tensors of that of the width."""
        switch = self.switches[self.names.index(width.name)]
        return plain_norm(num_features, switch.eps, switch.state_dict())


def plain_norm(num_features: int, eps: float, state: dict[str, Tensor]) -> nn.BatchNorm2d:
    """Returns an ordinary BN with these tensors, not copies of them."""
    with torch.device("meta"):
        norm = nn.BatchNorm2d(num_features, eps)
    return fill(norm, state)

"""Units of networks of any width: what they compute at a width, and what is cut out for it.

    y = activation(shortcut(x) + gate * branch(x))

Papers, and differences from the released code: see `networks.slimmable`.
"""

import copy
from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from networks.narrow import Residual, Sizes, fill
from networks.residual_blocks import add_gated
from networks.slimmable_layers import (
    Activation,
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    Width,
    activate,
)

ACTIVATIONS = {"relu": nn.ReLU(inplace=True), "relu6": nn.ReLU6(inplace=True)}


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
        x = self.norm(self.conv(x, self.out.at(width), width.narrow), width)
        return activate(x, self.activation)

    def sizes(self, in_channels: int, width: Width) -> tuple[Sizes, int]:
        """Returns the sizes of the parameters for these inputs, and the number of outputs."""
        out_channels = self.out.at(width)
        conv, norm = self.conv.sizes(in_channels, out_channels), self.norm.sizes(out_channels)
        return conv | norm, out_channels

    def extract(self, in_channels: int, width: Width) -> tuple[list[nn.Module], int]:
        """Returns plain layers, slices of these, for these inputs, and the number of outputs."""
        wide, out_channels = self.conv, self.out.at(width)
        weight, bias, groups = wide.slice(in_channels, out_channels)
        geometry = (wide.kernel_size, wide.stride, wide.padding, wide.dilation, groups)
        with torch.device("meta"):
            conv = nn.Conv2d(
                in_channels, out_channels, *geometry, bias is not None, wide.padding_mode
            )
        state = {"weight": weight, "bias": bias}
        fill(conv, {name: part for name, part in state.items() if part is not None})
        layers = [conv, self.norm.extract(width, out_channels)]
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

    def sizes(self, in_channels: int, width: Width) -> tuple[Sizes, int]:
        return {}, in_channels

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

    def residual(self, x: Tensor, width: Width) -> Tensor:
        for layer in self.layers:
            x = layer(x, width)
        return x

    def forward(self, x: Tensor, width: Width, gate: float | None = None) -> Tensor:
        """Runs the branch only where the gate is not 0; None: it is 1."""
        shortcut = x if self.shortcut is None else self.shortcut(x, width)
        out = add_gated(shortcut, partial(self.residual, width=width), x, gate)
        # A closed identity block returns x, which the activation of an earlier one has made.
        return x if out is x else activate(out, self.activation)

    def sizes(self, in_channels: int, width: Width, gate: float | None = None) -> tuple[Sizes, int]:
        """Returns the sizes of the parameters that run, and the number of outputs."""
        sizes: Sizes = {}
        channels = in_channels
        for layer in self.layers:
            more, channels = layer.sizes(channels, width)
            sizes |= {} if gate == 0 else more
        if self.shortcut is not None:
            sizes |= self.shortcut.sizes(in_channels, width)[0]
        return sizes, channels

    def extract(
        self, in_channels: int, width: Width, gate: float | None = None
    ) -> tuple[list[nn.Module], int]:
        """Returns a plain residual block for these inputs, and the number of its outputs.

        Of a closed one the shortcut is left.
        """
        branch, channels = extract_units(self.layers, in_channels, width)
        shortcut = [] if self.shortcut is None else self.shortcut.extract(in_channels, width)[0]
        activation = nn.Identity()
        if self.activation is not None:
            activation = copy.deepcopy(ACTIVATIONS[self.activation])
        if gate == 0:
            return ([*shortcut, activation] if shortcut else []), channels
        block = Residual(nn.Sequential(*branch), nn.Sequential(*shortcut), activation, gate)
        return [block], channels


Unit = SlimmableLayer | SlimmablePool | SlimmableResidual
Gates = Sequence[float | None]
"""One per unit; None: the unit has none, or it is open."""


def run_units(units: Iterable[Unit], gates: Gates, x: Tensor, width: Width) -> Tensor:
    """Runs units in a row on x (N, C, H, W)."""
    for unit, gate in zip(units, gates, strict=True):
        x = unit(x, width) if gate is None else unit(x, width, gate)
    return x


def sizes_of_units(
    units: Iterable[Unit], gates: Gates, channels: int, width: Width
) -> tuple[Sizes, list[int]]:
    """Returns the sizes of the parameters of units in a row, and the outputs of each."""
    sizes: Sizes = {}
    counts = []
    for unit, gate in zip(units, gates, strict=True):
        part, channels = unit.sizes(channels, width, *([] if gate is None else [gate]))
        sizes |= part
        counts.append(channels)
    return sizes, counts


def extract_units(
    units: Sequence[Unit], channels: int, width: Width, gates: Gates | None = None
) -> tuple[list[nn.Module], int]:
    """Returns plain layers of units in a row, and the number of outputs of the last."""
    modules: list[nn.Module] = []
    for unit, gate in zip(units, gates or [None] * len(units), strict=True):
        part, channels = unit.extract(channels, width, *([] if gate is None else [gate]))
        modules += part
    return modules, channels


def extract_head(fc: SlimmableLinear, channels: int) -> nn.Sequential:
    """Returns global average pooling and a plain linear layer for these inputs, slices of `fc`."""
    with torch.device("meta"):
        linear = nn.Linear(channels, fc.out_features)
    fill(linear, {"weight": fc.weight[:, :channels], "bias": fc.bias})
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear)

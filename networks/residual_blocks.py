"""Blocks of residual networks: a shortcut, and a branch that runs only where its gate is open.

    H_l = ReLU(shortcut_l(H_{l-1}) + gate_l * residual_l(H_{l-1}))

Papers, and differences from the released code: see `networks.resnet`.
"""

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from networks.choices import check_choice
from networks.rows import Rows, add_rows, split_rows, take_rows

Shortcut = Literal["A", "A-average", "A-prepend", "B", "C"]
Gate = float | Tensor | Rows | None


def add_gated(
    shortcut: Tensor, residual: Callable[[Tensor], Tensor], x: Tensor, gate: Gate
) -> Tensor:
    """Returns ``shortcut + gate * residual(x)`` and runs `residual` only where the gate is not 0.

    Args:
        shortcut: (N, ...).
        residual: the branch, from x's (n, ...) to the shortcut's (n, ...) for any n.
        x: input of the branch, (N, ...).
        gate: None (open), one number, the rows that are open, or a CPU tensor (N,) with a number
            per sample.

    Returns:
        (N, ...). It is `shortcut` itself when nothing was executed.
    """
    if isinstance(gate, Tensor):
        (gate,) = split_rows(gate.unsqueeze(0), x.device)
    if gate is None:
        return shortcut + residual(x)
    if not isinstance(gate, Rows):
        return shortcut if gate == 0 else shortcut.add(residual(x), alpha=gate)
    rows, scale = gate
    branch = residual(x if rows is None else take_rows(x, rows)).to(shortcut.dtype)
    if isinstance(scale, Tensor):
        branch = branch * scale.to(branch).view(-1, *[1] * (branch.dim() - 1))
    elif scale != 1:
        branch = branch * scale
    return shortcut + branch if rows is None else add_rows(shortcut, rows, branch)


class PadShortcut(nn.Module):
    """Option A: no parameters. Strides by subsampling or averaging, adds zero channels."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, kind: Shortcut):
        super().__init__()
        num_new = out_channels - in_channels
        self.padding = (num_new, 0) if kind == "A-prepend" else (0, num_new)
        self.stride = stride
        self.average = kind == "A-average"

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1 and self.average:
            # On odd sizes the strided convolution rounds up, and so must the average.
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        elif self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, *self.padding))


def conv(in_channels: int, out_channels: int, size: int, stride: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=bias)


def make_shortcut(
    kind: Shortcut, in_channels: int, out_channels: int, stride: int, bias: bool, norm: bool
) -> nn.Module | None:
    """Returns the module on the shortcut of a block, None for the identity."""
    check_choice("shortcut", kind, Shortcut)
    same = in_channels == out_channels and stride == 1
    if same and kind != "C":
        return None
    if kind in ("A", "A-average", "A-prepend"):
        return PadShortcut(in_channels, out_channels, stride, kind)
    projection = conv(in_channels, out_channels, 1, stride, bias)
    return nn.Sequential(projection, nn.BatchNorm2d(out_channels)) if norm else projection


class Block(nn.Module):
    """A residual block with its ReLU after the addition. Subclasses build and run the branch.

    Attributes:
        plain: no shortcut at all (He's plain networks).
        downsample: the module on the shortcut, None for the identity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: Shortcut,
        plain: bool,
        bias: bool,
    ):
        super().__init__()
        self.plain = plain
        self.downsample = None
        if not plain:
            self.downsample = make_shortcut(
                shortcut, in_channels, out_channels, stride, bias, norm=True
            )

    @property
    def closes_by_sample(self) -> bool:
        """Whether the closed block treats every sample for itself; a BN does not."""
        return not isinstance(self.downsample, nn.Sequential)

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError("each kind of block has a branch of its own")

    def last_layer(self) -> nn.BatchNorm2d | nn.Conv2d:
        """Returns the layer whose output is the branch's output: scaling it scales the branch."""
        raise NotImplementedError("each kind of block has a branch of its own")

    def forward(self, x: Tensor, gate: Gate = None) -> Tensor:
        if self.plain:
            return F.relu(self.residual(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        out = add_gated(shortcut, self.residual, x, gate)
        # A closed identity block returns x, which an earlier ReLU has made non-negative.
        if out is x:
            return x
        # Per sample, `out` may be a view, and autograd would copy it to change it in place.
        return F.relu(out, inplace=not isinstance(gate, Tensor | Rows))


class BasicBlock(Block):
    """Two 3x3 layers."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        shortcut: Shortcut,
        plain: bool,
        bias: bool,
    ):
        super().__init__(in_channels, channels, stride, shortcut, plain, bias)
        self.conv1 = conv(in_channels, channels, 3, stride, bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, 1, bias)
        self.bn2 = nn.BatchNorm2d(channels)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return self.bn2(self.conv2(x))

    def last_layer(self) -> nn.BatchNorm2d:
        return self.bn2


class Bottleneck(Block):
    """1x1, 3x3, 1x1 layers; the output has 4 times the channels of the middle."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        shortcut: Shortcut,
        plain: bool,
        bias: bool,
        stride_in_1x1: bool = False,
    ):
        out_channels = self.expansion * channels
        super().__init__(in_channels, out_channels, stride, shortcut, plain, bias)
        self.conv1 = conv(in_channels, channels, 1, stride if stride_in_1x1 else 1, bias)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, 1 if stride_in_1x1 else stride, bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1, 1, bias)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def residual(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return self.bn3(self.conv3(x))

    def last_layer(self) -> nn.BatchNorm2d:
        return self.bn3


class PreActivationBlock(nn.Module):
    """A block whose BN and ReLU come before each convolution; nothing follows the addition.

    Where the shape changes, and in the first block of the network, both paths read the first
    activation; elsewhere that activation belongs to the branch, and a closed gate skips it too.
    Subclasses build and run the convolutions.

    Attributes:
        shares_activation: both paths read it.
    """

    def __init__(
        self, in_channels: int, out_channels: int, stride: int, shortcut: Shortcut, bias: bool
    ):
        super().__init__()
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, bias, False)
        self.shares_activation = self.downsample is not None
        self.bn1 = nn.BatchNorm2d(in_channels)

    @property
    def closes_by_sample(self) -> bool:
        """Whether the closed block treats every sample for itself; a BN does not."""
        return not self.shares_activation

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x), inplace=True)

    def convolve(self, x: Tensor) -> Tensor:
        raise NotImplementedError("each kind of block has a branch of its own")

    def last_layer(self) -> nn.Conv2d:
        """Returns the layer whose output is the branch's output: scaling it scales the branch."""
        raise NotImplementedError("each kind of block has a branch of its own")

    def residual(self, x: Tensor) -> Tensor:
        return self.convolve(self.activate(x))

    def forward(self, x: Tensor, gate: Gate = None) -> Tensor:
        if not self.shares_activation:
            return add_gated(x, self.residual, x, gate)
        x = self.activate(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        return add_gated(shortcut, self.convolve, x, gate)


class PreActivationBasicBlock(PreActivationBlock):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(
        self, in_channels: int, channels: int, stride: int, shortcut: Shortcut, bias: bool
    ):
        super().__init__(in_channels, channels, stride, shortcut, bias)
        self.conv1 = conv(in_channels, channels, 3, stride, bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, 1, bias)

    def convolve(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(F.relu(self.bn2(x), inplace=True))

    def last_layer(self) -> nn.Conv2d:
        return self.conv2


class PreActivationBottleneck(PreActivationBlock):
    """1x1, 3x3, 1x1 convolutions; the output has 4 times the channels of the middle."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        shortcut: Shortcut,
        bias: bool,
        stride_in_1x1: bool = False,
    ):
        out_channels = self.expansion * channels
        super().__init__(in_channels, out_channels, stride, shortcut, bias)
        self.conv1 = conv(in_channels, channels, 1, stride if stride_in_1x1 else 1, bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, 1 if stride_in_1x1 else stride, bias)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, out_channels, 1, 1, bias)

    def convolve(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.conv2(F.relu(self.bn2(x), inplace=True))
        return self.conv3(F.relu(self.bn3(x), inplace=True))

    def last_layer(self) -> nn.Conv2d:
        return self.conv3

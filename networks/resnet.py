"""Residual networks whose depth is an argument of `forward`.

He et al., Deep Residual Learning for Image Recognition (arXiv 1512.03385)
He et al., Identity Mappings in Deep Residual Networks (arXiv 1603.05027)
Huang et al., Deep Networks with Stochastic Depth (arXiv 1603.09382)

    H_l = ReLU(shortcut_l(H_{l-1}) + gate_l * residual_l(H_{l-1}))

Who draws the gates, and why, is not known here. `gates=None` is the ordinary network. One number
per block scales its residual branch, and a branch whose gate is 0 is not executed: no compute, no
BN update. One number per block *and sample* runs the branch on the surviving samples alone.

Differences from the released code:
    * Convolutions have no bias: a BN follows each of them. `conv_bias=True` restores those of the
      released Stochastic Depth code (inert before a BN, but counted in its number of parameters).
    * `shortcut="A"` subsamples as He's text says; `"A-average"` is the 2x2 average of the
      Stochastic Depth code. Both append the zero channels after the existing ones; `"A-prepend"`
      is A with the zeros before them, as in the BranchyNet code.
    * In a bottleneck the stride is in the 3x3 convolution, as in torchvision; `stride_in_1x1=True`
      is the paper's network (and gives the paper's FLOPs).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.rows import add_rows, take_rows

Shortcut = Literal["A", "A-average", "A-prepend", "B", "C"]
Gates = Sequence[float] | Tensor


def add_gated(
    shortcut: Tensor, residual: Callable[[Tensor], Tensor], x: Tensor, gate: float | Tensor | None
) -> Tensor:
    """Returns ``shortcut + gate * residual(x)`` and runs `residual` only where the gate is not 0.

    Args:
        shortcut: (N, C, H, W).
        residual: the branch, from (n, ...) to (n, C, H, W) for any n.
        x: input of the branch, (N, ...).
        gate: None (open), one number, or a CPU tensor (N,) with a number per sample.

    Returns:
        (N, C, H, W). It is `shortcut` itself when nothing was executed.
    """
    if gate is None:
        return shortcut + residual(x)
    if not isinstance(gate, Tensor):
        return shortcut if gate == 0 else shortcut.add(residual(x), alpha=gate)

    rows = gate.nonzero().squeeze(1)
    if len(rows) == 0:
        return shortcut
    scale = gate[rows]
    everyone = len(rows) == len(gate)
    rows = rows.to(x.device)
    branch = residual(x if everyone else take_rows(x, rows)).to(shortcut.dtype)
    if (scale != 1).any():
        branch = branch * scale.to(branch).view(-1, 1, 1, 1)
    return shortcut + branch if everyone else add_rows(shortcut, rows, branch)


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

    def residual(self, x: Tensor) -> Tensor:
        raise NotImplementedError("each kind of block has a branch of its own")

    def last_layer(self) -> nn.BatchNorm2d | nn.Conv2d:
        """Returns the layer whose output is the branch's output: scaling it scales the branch."""
        raise NotImplementedError("each kind of block has a branch of its own")

    def forward(self, x: Tensor, gate: float | Tensor | None = None) -> Tensor:
        if self.plain:
            return F.relu(self.residual(x), inplace=True)
        shortcut = x if self.downsample is None else self.downsample(x)
        out = add_gated(shortcut, self.residual, x, gate)
        # A closed identity block returns x, which an earlier ReLU has made non-negative.
        if out is x:
            return x
        # Per sample, `out` may be a view, and autograd would copy it to change it in place.
        return F.relu(out, inplace=not isinstance(gate, Tensor))


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
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        shortcut: Shortcut,
        bias: bool,
        first: bool,
    ):
        super().__init__()
        out_channels = self.expansion * channels
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, bias, False)
        self.shares_activation = first or self.downsample is not None
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.build(in_channels, channels, stride, bias)

    def build(self, in_channels: int, channels: int, stride: int, bias: bool) -> None:
        self.conv1 = conv(in_channels, channels, 3, stride, bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, 1, bias)

    def activate(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(x), inplace=True)

    def convolve(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return self.conv2(F.relu(self.bn2(x), inplace=True))

    def residual(self, x: Tensor) -> Tensor:
        return self.convolve(self.activate(x))

    def last_layer(self) -> nn.Conv2d:
        return self.conv2

    def forward(self, x: Tensor, gate: float | Tensor | None = None) -> Tensor:
        if not self.shares_activation:
            return add_gated(x, self.residual, x, gate)
        x = self.activate(x)
        shortcut = x if self.downsample is None else self.downsample(x)
        return add_gated(shortcut, self.convolve, x, gate)


class PreActivationBottleneck(PreActivationBlock):
    """The pre-activation block with 1x1, 3x3, 1x1 convolutions."""

    expansion = 4

    def build(self, in_channels: int, channels: int, stride: int, bias: bool) -> None:
        self.conv1 = conv(in_channels, channels, 1, 1, bias)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv(channels, channels, 3, stride, bias)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv(channels, self.expansion * channels, 1, 1, bias)

    def convolve(self, x: Tensor) -> Tensor:
        x = super().convolve(x)
        return self.conv3(F.relu(self.bn3(x), inplace=True))

    def last_layer(self) -> nn.Conv2d:
        return self.conv3


class ResidualNetwork(nn.Module):
    """What `CifarResNet` and `ResNet` share: a stem, layers of blocks, a head, and gates.

    Attributes:
        num_blocks: number of residual blocks, which is the number of gates.
        num_classes: number of logits.
    """

    plain: bool
    num_classes: int

    def stem(self, images: Tensor) -> Tensor:
        raise NotImplementedError("the networks for CIFAR and ImageNet begin differently")

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))

    @property
    def blocks(self) -> list[nn.Module]:
        """The residual blocks, shallow to deep."""
        return [
            block
            for name, layer in self.named_children()
            if name.startswith("layer")
            for block in layer
        ]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def forward(self, images: Tensor, gates: Gates | None = None) -> Tensor:
        """Classifies images.

        Args:
            images: (N, C, H, W).
            gates: None runs every block. `num_blocks` numbers, or a tensor (num_blocks,), scale the
                residual branches; a tensor (num_blocks, N) has a number per sample. A branch is
                executed only where its gate is not 0. Keep gates on the CPU: they decide what is
                launched.

        Returns:
            Logits, (N, num_classes).

        Raises:
            ValueError: the gates do not fit the network or the batch.
        """
        x = self.stem(images)
        for block, gate in zip(self.blocks, self.split_gates(gates, len(images)), strict=True):
            x = block(x, gate)
        return self.head(x)

    def split_gates(self, gates: Gates | None, num_images: int) -> Sequence[float | Tensor | None]:
        """Returns one gate per block: None, a number, or a CPU tensor (N,)."""
        if gates is None:
            return [None] * self.num_blocks
        if self.plain:
            raise ValueError("a plain network has no shortcuts, so its blocks cannot be gated")
        if len(gates) != self.num_blocks:
            raise ValueError(f"{len(gates)} gates for {self.num_blocks} blocks: give one per block")
        gates = torch.as_tensor(gates, dtype=torch.float64, device="cpu")
        if gates.dim() == 1:
            return gates.tolist()
        if gates.shape != (self.num_blocks, num_images):
            raise ValueError(
                f"gates of shape {tuple(gates.shape)} for {num_images} images: "
                f"expected ({self.num_blocks}, {num_images})"
            )
        return gates.unbind()

    def initialize(self) -> None:
        """Draws the convolutions from He's normal distribution (fan in) and zeroes their biases."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class CifarResNet(ResidualNetwork):
    """The CIFAR networks of He et al.: three layers, of 16, 32 and 64 channels.

    Args:
        depth: 6n+2 (14, 20, 32, 44, 56, 110, 152, 1202, ...), or 9n+2 (164, 1001, ...) with
            `bottleneck`.
        num_classes: number of logits.
        shortcut: where the shape changes: "A" subsamples and appends zero channels (He),
            "A-average" averages 2x2 and appends zero channels (Stochastic Depth), "A-prepend" is
            "A" with the zeros first (BranchyNet), "B" projects; "C" projects in every block.
        plain: no shortcuts.
        in_channels: channels of the images.
        bottleneck: blocks of three convolutions, 4 times the channels.
        preactivation: BN and ReLU before each convolution.
        conv_bias: convolutions have biases, as in the released Stochastic Depth code.

    Raises:
        ValueError: no network has this depth, or the options exclude each other.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        shortcut: Shortcut = "A",
        plain: bool = False,
        in_channels: int = 3,
        bottleneck: bool = False,
        preactivation: bool = False,
        conv_bias: bool = False,
    ):
        super().__init__()
        convs_per_block = 3 if bottleneck else 2
        blocks_per_layer, remainder = divmod(depth - 2, 3 * convs_per_block)
        if remainder or blocks_per_layer < 1:
            formula, examples = ("9n+2", "29, 164, 1001") if bottleneck else ("6n+2", "20, 56, 110")
            raise ValueError(f"depth {depth} is not {formula}: choose one such as {examples}")
        if plain and preactivation:
            raise ValueError("plain networks are post-activation: drop plain or preactivation")
        self.plain = plain
        self.preactivation = preactivation
        self.num_classes = num_classes

        self.conv1 = conv(in_channels, 16, 3, 1, conv_bias)
        if not preactivation:
            self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for number, width in enumerate((16, 32, 64), start=1):
            layer = nn.Sequential()
            for index in range(blocks_per_layer):
                stride = 2 if number > 1 and index == 0 else 1
                if preactivation:
                    kind = PreActivationBottleneck if bottleneck else PreActivationBlock
                    first = number == 1 and index == 0
                    block = kind(channels, width, stride, shortcut, conv_bias, first)
                else:
                    kind = Bottleneck if bottleneck else BasicBlock
                    block = kind(channels, width, stride, shortcut, plain, conv_bias)
                layer.append(block)
                channels = kind.expansion * width
            self.add_module(f"layer{number}", layer)
        if preactivation:
            self.bn_last = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        self.initialize()

    def stem(self, images: Tensor) -> Tensor:
        x = self.conv1(images)
        return x if self.preactivation else F.relu(self.bn1(x), inplace=True)

    def head(self, x: Tensor) -> Tensor:
        if self.preactivation:
            x = F.relu(self.bn_last(x), inplace=True)
        return super().head(x)


class ResNet(ResidualNetwork):
    """The ImageNet networks of He et al.; with the default options torchvision's state dicts load.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: number of logits.
        shortcut: as in `CifarResNet`; the paper uses "B" from 50 layers on.
        plain: no shortcuts.
        in_channels: channels of the images.
        stride_in_1x1: put a bottleneck's stride in its first 1x1 convolution, as the paper does.

    Raises:
        ValueError: no network has this depth, or `stride_in_1x1` without bottlenecks.
    """

    BLOCKS_PER_LAYER = {  # noqa: RUF012 (a constant)
        18: (2, 2, 2, 2),
        34: (3, 4, 6, 3),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
    }

    def __init__(
        self,
        depth: int,
        num_classes: int = 1000,
        shortcut: Shortcut = "B",
        plain: bool = False,
        in_channels: int = 3,
        stride_in_1x1: bool = False,
    ):
        super().__init__()
        if depth not in self.BLOCKS_PER_LAYER:
            raise ValueError(
                f"depth {depth} is not one of {', '.join(map(str, self.BLOCKS_PER_LAYER))}"
            )
        bottleneck = depth >= 50
        if stride_in_1x1 and not bottleneck:
            raise ValueError(
                f"stride_in_1x1 needs bottlenecks: depth {depth} has none, use 50 or more"
            )
        self.plain = plain
        self.num_classes = num_classes

        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for number, num_blocks in enumerate(self.BLOCKS_PER_LAYER[depth], start=1):
            width = 32 * 2**number
            layer = nn.Sequential()
            for index in range(num_blocks):
                stride = 2 if number > 1 and index == 0 else 1
                if bottleneck:
                    block = Bottleneck(
                        channels, width, stride, shortcut, plain, False, stride_in_1x1=stride_in_1x1
                    )
                else:
                    block = BasicBlock(channels, width, stride, shortcut, plain, False)
                layer.append(block)
                channels = block.expansion * width
            self.add_module(f"layer{number}", layer)
        self.fc = nn.Linear(channels, num_classes)
        self.initialize()

    def stem(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        return F.max_pool2d(x, 3, stride=2, padding=1)


def fold_survival_probs(
    network: ResidualNetwork, survival_probs: Sequence[float]
) -> ResidualNetwork:
    """Returns an ordinary network for deployment, with the outputs of ``gates=survival_probs``.

    Each probability is multiplied into the last BN of its residual branch (the last convolution
    where the BN comes first).

    Raises:
        ValueError: not one probability per block, or a network without shortcuts.
    """
    probabilities = network.split_gates(survival_probs, 0)
    network = copy.deepcopy(network)
    for block, probability in zip(network.blocks, probabilities, strict=True):
        last = block.last_layer()
        last.weight.data.mul_(probability)
        if last.bias is not None:
            last.bias.data.mul_(probability)
    return network

"""Residual networks whose depth is an argument of `forward`.

He et al., Deep Residual Learning for Image Recognition (arXiv 1512.03385)
He et al., Identity Mappings in Deep Residual Networks (arXiv 1603.05027)
Huang et al., Deep Networks with Stochastic Depth (arXiv 1603.09382)

    H_l = ReLU(shortcut_l(H_{l-1}) + gate_l * residual_l(H_{l-1}))

The method draws the gates. `gates=None` is the ordinary network. One number per block scales its
residual branch, and a branch whose gate is 0 is not executed: no compute, no BN update. One number
per block *and sample* runs the branch on the surviving samples alone.

Differences from the released code:
    * Convolutions have no bias: a BN follows each of them. `conv_bias=True` restores those of the
      released Stochastic Depth code (inert before a BN, but counted in its number of parameters).
    * `shortcut="A"` subsamples as He's text says; `"A-average"` is the 2x2 average of the
      Stochastic Depth code. Both append the zero channels after the existing ones; `"A-prepend"`
      is A with the zeros before them, as in the BranchyNet code.
    * In a bottleneck the stride is in the 3x3 convolution, as in torchvision; `stride_in_1x1=True`
      is the network of either paper (and gives the paper's FLOPs).
    * Weights are drawn by fan in, and the last layer is torch's, as in the CIFAR code. The ImageNet
      code of Stochastic Depth draws by fan out and zeroes the last bias.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.choices import check_choice, check_counts, layers_of
from networks.initialization import draw_weights
from networks.residual_blocks import (
    BasicBlock,
    Bottleneck,
    Gate,
    PreActivationBasicBlock,
    PreActivationBottleneck,
    Shortcut,
    conv,
)
from networks.rows import numbers_of, split_rows

Gates = Sequence[float] | Tensor


class ResidualNetwork(nn.Module):
    """What networks with gates share: a stem, blocks with a residual branch each, and a head.

    Attributes:
        num_blocks: number of residual blocks, which is the number of gates.
        num_classes: number of logits.
        plain: no shortcuts, so no gates.
        blocks_per_layer: so many blocks in a row are as deep as each other.
    """

    plain: bool = False
    num_classes: int
    blocks_per_layer: int = 1

    def add_layers(
        self,
        channels: int,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        make_block: Callable[[int, int, int], nn.Module],
    ) -> int:
        """Adds `layer1` and so on; each but the first begins with a stride of 2.

        Args:
            channels: what the stem puts out.
            num_blocks: of each layer.
            widths: channels of each layer, without the expansion of its blocks.
            make_block: from the channels that it reads, its width and its stride to a block.

        Returns:
            The channels behind the last layer.
        """
        for number, (count, width) in enumerate(zip(num_blocks, widths, strict=True), start=1):
            layer = nn.Sequential()
            for index in range(count):
                stride = 2 if number > 1 and index == 0 else 1
                block = make_block(channels, width, stride)
                layer.append(block)
                channels = block.expansion * width
            self.add_module(f"layer{number}", layer)
        return channels

    def stem(self, images: Tensor) -> Tensor:
        raise NotImplementedError("each kind of network begins differently")

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
        for block, gate in zip(self.blocks, self.split_gates(gates, images), strict=True):
            x = block(x, gate)
        return self.head(x)

    def split_gates(self, gates: Gates | None, images: Tensor | None = None) -> Sequence[Gate]:
        """Returns one gate per block: None, a number, or the rows that are open.

        Args:
            gates: see `forward`.
            images: the batch; needed by gates per sample alone.
        """
        if gates is None:
            return [None] * self.num_blocks
        if self.plain:
            raise ValueError("a plain network has no shortcuts, so its blocks cannot be gated")
        if not isinstance(gates, Tensor) or gates.dim() < 2:
            gates = numbers_of(gates)
        if len(gates) != self.num_blocks:
            raise ValueError(f"{len(gates)} gates for {self.num_blocks} blocks: give one per block")
        if not isinstance(gates, Tensor):
            return gates
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            raise RuntimeError(
                "gates per sample cannot be traced or exported: later batches would have those of "
                "the example. Export fold_survival_probs(network, survival_probs) instead"
            )
        gates = gates.to("cpu", torch.float64)
        num_images = 0 if images is None else len(images)
        if gates.shape != (self.num_blocks, num_images):
            raise ValueError(
                f"gates of shape {tuple(gates.shape)} for {num_images} images: "
                f"expected ({self.num_blocks}, {num_images})"
            )
        return split_rows(gates, images.device)


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
        stride_in_1x1: put a bottleneck's stride in its first 1x1 convolution, as He et al. do.

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
        stride_in_1x1: bool = False,
    ):
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        depths = (9, 2, (29, 164, 1001)) if bottleneck else (6, 2, (20, 56, 110))
        blocks_per_layer = layers_of(depth, *depths)
        if plain and preactivation:
            raise ValueError("plain networks are post-activation: drop plain or preactivation")
        if stride_in_1x1 and not bottleneck:
            raise ValueError("stride_in_1x1 needs bottlenecks: set bottleneck, or drop it")
        self.plain = plain
        self.preactivation = preactivation
        self.num_classes = num_classes

        self.conv1 = conv(in_channels, 16, 3, 1, conv_bias)
        if not preactivation:
            self.bn1 = nn.BatchNorm2d(16)
        if preactivation:
            kind = PreActivationBottleneck if bottleneck else PreActivationBasicBlock
            make_block = partial(kind, shortcut=shortcut, bias=conv_bias)
        else:
            kind = Bottleneck if bottleneck else BasicBlock
            make_block = partial(kind, shortcut=shortcut, plain=plain, bias=conv_bias)
        if stride_in_1x1:
            make_block = partial(make_block, stride_in_1x1=True)
        channels = self.add_layers(16, [blocks_per_layer] * 3, (16, 32, 64), make_block)
        if preactivation:
            self.layer1[0].shares_activation = True  # no block before it has one
            self.bn_last = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        draw_weights(self, "fan_in", zero_linear_biases=False)

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
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_choice("depth", depth, self.BLOCKS_PER_LAYER)
        bottleneck = depth >= 50
        if stride_in_1x1 and not bottleneck:
            raise ValueError(
                f"stride_in_1x1 needs bottlenecks: depth {depth} has none, use 50 or more"
            )
        self.plain = plain
        self.num_classes = num_classes

        self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        make_block = partial(
            Bottleneck if bottleneck else BasicBlock, shortcut=shortcut, plain=plain, bias=False
        )
        if stride_in_1x1:
            make_block = partial(make_block, stride_in_1x1=True)
        channels = self.add_layers(
            64, self.BLOCKS_PER_LAYER[depth], (64, 128, 256, 512), make_block
        )
        self.fc = nn.Linear(channels, num_classes)
        draw_weights(self, "fan_in", zero_linear_biases=False)

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
    probabilities = network.split_gates(survival_probs)
    network = copy.deepcopy(network)
    for block, probability in zip(network.blocks, probabilities, strict=True):
        last = block.last_layer()
        last.weight.data.mul_(probability)
        if last.bias is not None:
            last.bias.data.mul_(probability)
    return network

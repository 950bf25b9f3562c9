"""Networks with side branches: an image that is sure of its class leaves through one of them.

Teerapittayanon, McDanel, Kung: BranchyNet: Fast Inference via Early Exiting from Deep Neural
Networks (ICPR 2016, arXiv 1709.01686)

    loss = sum_k w_k CE(logits_k, label);    leave at the first k where entropy(logits_k) < T_k

Differences from the released code:
    * One shared trunk. The released code keeps a copy of it for every exit, each with BN statistics
      of its own, and copies the weights to and fro in every step.
    * Branches tap the raw output of a convolution. What branch and trunk both do to it first (a
      pooling, a ReLU, an LRN: nothing that learns) is done once, in the trunk, and a ReLU follows
      a pooling instead of preceding it; the outputs, the gradients and the MACs are the same.
    * `taps="paper"` puts the branches where the paper's text has them, behind an earlier
      convolution (B-AlexNet) or a later one (B-ResNet) than the released code does.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from reprlib import repr as shown
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.choices import check_choice, check_counts
from networks.early_exit import MultiExitNetwork, Staged, run_all_exits
from networks.initialization import draw_weights
from networks.residual_blocks import BasicBlock, Gate
from networks.resnet import CifarResNet, Gates, ResidualNetwork, ResNet

Taps = Literal["released", "paper"]

MAX_SIZE = 2048
"""Side of images of which a linear layer reads every pixel."""


def draw_as_chainer(network: nn.Module, nonlinearity: Literal["linear", "relu"] = "linear") -> None:
    """Draws weights from N(0, 1 / fan in), Chainer's default, and zeroes biases.

    With "relu" convolutions draw from N(0, 2 / fan in).
    """
    draw_linear = partial(nn.init.kaiming_normal_, nonlinearity="linear")
    draw_weights(network, "fan_in", nonlinearity, draw_linear)


class LocalResponseNorm(nn.Module):
    """Chainer's LRN over 3 channels: ``x / (2 + alpha * sum of squares)^0.75`` with alpha 5e-5.

    The same as ``nn.LocalResponseNorm(3, alpha=1.5e-4, beta=0.75, k=2)``, which divides its alpha
    by 3, and several times faster: torch pools in three dimensions for it. On a CPU a large batch
    is normalised piece by piece, so that what lies between input and output stays in the cache.
    """

    piece = 2**17  # numbers: half a MiB in single precision

    def forward(self, x: Tensor) -> Tensor:
        # An exported program does not know how many images there will be.
        if x.is_cuda or torch.compiler.is_exporting():
            return self.normalize(x)
        num_images = max(1, self.piece * len(x) // max(1, x.numel()))
        if len(x) <= num_images:
            return self.normalize(x)
        return torch.cat([self.normalize(images) for images in x.split(num_images)])

    @staticmethod
    def normalize(x: Tensor) -> Tensor:
        squares = F.pad(x.square().permute(0, 2, 3, 1), (1, 1))
        sums = squares[..., :-2] + squares[..., 1:-1] + squares[..., 2:]
        root = (2 + 5e-5 * sums).rsqrt().permute(0, 3, 1, 2)
        return x * root * root.sqrt()


def relu() -> nn.ReLU:
    """Returns a ReLU that overwrites its input: for use within a stage or an exit."""
    return nn.ReLU(inplace=True)


def pool(size: int) -> nn.MaxPool2d:
    """Returns max pooling with stride 2 that covers every pixel."""
    return nn.MaxPool2d(size, stride=2, ceil_mode=True)


def pooled(side: int, size: int, num_times: int = 1) -> int:
    """Returns the side of an image (in pixels) after it went through ``pool(size)``."""
    for _ in range(num_times):
        side = (side - size + 1) // 2 + 1
    return side


class BranchyLeNet(MultiExitNetwork):
    """B-LeNet: three convolutions, a branch after the first; 2 exits.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: side of the images; 28 is the paper's.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28):
        super().__init__()
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_counts(1, MAX_SIZE, image_size=image_size)
        self.num_classes = num_classes
        self.image_size = image_size
        branch_size = pooled(image_size + 2, 2, 2)
        trunk_size = pooled(pooled(pooled(image_size + 2, 2) + 2, 2) + 2, 2)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(in_channels, 5, 5, padding=3), pool(2), relu()),
                nn.Sequential(
                    *(nn.Conv2d(5, 10, 5, padding=3), pool(2), relu()),
                    *(nn.Conv2d(10, 20, 5, padding=3), pool(2), relu()),
                    nn.Flatten(),
                    nn.Linear(20 * trunk_size**2, 84),
                ),
            ]
        )
        self.exits = nn.ModuleList(
            [
                nn.Sequential(
                    *(nn.Conv2d(5, 10, 3, padding=1), pool(2), relu()),
                    nn.Flatten(),
                    nn.Linear(10 * branch_size**2, num_classes),
                ),
                nn.Linear(84, num_classes),
            ]
        )
        draw_as_chainer(self)


class BranchyAlexNet(MultiExitNetwork):
    """B-AlexNet: five convolutions, two branches; 3 exits.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: side of the images, 16 or more; 32 is the paper's.
        taps: branches behind the 2nd and 3rd convolution ("released"), or the 1st and 2nd
            ("paper", whose text says no more: the branches have the layers of the released ones).

    Raises:
        ValueError: the images are too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        taps: Taps = "released",
    ):
        super().__init__()
        check_choice("taps", taps, Taps)
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_counts(16, MAX_SIZE, image_size=image_size)
        self.num_classes = num_classes
        self.image_size = image_size
        conv1 = nn.Conv2d(in_channels, 32, 5, padding=2)
        conv2 = nn.Conv2d(32, 64, 5, padding=2)
        conv3 = nn.Conv2d(64, 96, 3, padding=1)
        norm1, norm2 = ((pool(3), relu(), LocalResponseNorm()) for _ in range(2))
        top = (
            *(nn.Conv2d(96, 96, 3, padding=1), relu()),
            *(nn.Conv2d(96, 64, 3, padding=1), relu(), pool(3), nn.Flatten()),
            *(nn.Linear(64 * pooled(image_size, 3, 3) ** 2, 256), relu(), nn.Dropout(0.5)),
            *(nn.Linear(256, 128), relu(), nn.Dropout(0.5)),
        )
        if taps == "released":
            stages = [(conv1, *norm1, conv2, *norm2), (conv3, relu()), top]
            channels, second_norm = (64, 96), (pool(3), LocalResponseNorm())
            sizes = pooled(image_size, 3, 3), pooled(image_size, 3, 4)
        else:
            stages = [(conv1, *norm1), (conv2, *norm2), (conv3, relu(), *top)]
            channels, second_norm = (32, 64), ()
            sizes = pooled(image_size, 3, 2), pooled(image_size, 3, 3)
        branch1 = nn.Sequential(
            *(nn.Conv2d(channels[0], 32, 3, padding=1), relu()),
            *(nn.Conv2d(32, 32, 3, padding=1), relu()),
            *(pool(3), nn.Flatten(), nn.Linear(32 * sizes[0] ** 2, num_classes)),
        )
        branch2 = nn.Sequential(
            *(*second_norm, nn.Conv2d(channels[1], 32, 3, padding=1), relu()),
            *(pool(3), nn.Flatten(), nn.Linear(32 * sizes[1] ** 2, num_classes)),
        )
        self.stages = nn.ModuleList(nn.Sequential(*layers) for layers in stages)
        self.exits = nn.ModuleList([branch1, branch2, nn.Linear(128, num_classes)])
        draw_as_chainer(self)


class ResNetWithExits(MultiExitNetwork):
    """A residual network with exits between its blocks: depth times exits, no layer moved.

    Args:
        trunk: its head is the last exit.
        exits_after: number of blocks before each early exit, rising; 0 is right after the stem.
        early_exits: the exits, from what is there (N, C, H, W) to logits; None: global average
            pooling and a linear layer (behind BN and ReLU in a pre-activation network).

    Raises:
        ValueError: exits that do not fit the trunk.
    """

    trunk_prefix = "trunk."

    def __init__(
        self,
        trunk: ResidualNetwork,
        exits_after: Sequence[int],
        early_exits: Sequence[nn.Module] | None = None,
    ):
        super().__init__()
        check_counts(0, exits_after=exits_after)
        bounds = [-1, *exits_after, trunk.num_blocks]
        if not exits_after or any(b <= a for a, b in itertools.pairwise(bounds)):
            raise ValueError(
                f"exits_after is {shown(list(exits_after))}: give rising numbers from 0 to "
                f"{trunk.num_blocks - 1}, blocks of the trunk"
            )
        if early_exits is None:
            early_exits = [pooling_exit(trunk, num_blocks) for num_blocks in exits_after]
        if len(early_exits) != len(exits_after):
            raise ValueError(
                f"{len(early_exits)} early exits for {len(exits_after)} places in exits_after"
            )
        self.num_classes = trunk.num_classes
        self.trunk = trunk
        self.exits_after = tuple(exits_after)
        self.early_exits = nn.ModuleList(early_exits)

    @property
    def num_blocks(self) -> int:
        return self.trunk.num_blocks

    @property
    def stages(self):
        return self.gated(None).stages

    @property
    def exits(self):
        return self.gated(None).exits

    def gated(self, gates: Sequence[float] | None) -> Staged:
        """Returns the stages with these gates, one per block, and the exits: for `early_exit`.

        Raises:
            ValueError: not one gate per block.
        """
        if isinstance(gates, Tensor) and gates.dim() != 1:
            raise ValueError("images leave, so no gates per sample: give one gate per block")
        return self._cut(self.trunk.split_gates(gates))

    def _cut(self, gates: Sequence[Gate]) -> Staged:
        steps = list(zip(self.trunk.blocks, gates, strict=True))
        bounds = [0, *self.exits_after, len(steps)]
        first, *others = (
            partial(_run_blocks, steps[start:stop]) for start, stop in itertools.pairwise(bounds)
        )
        stages = [lambda images: first(self.trunk.stem(images)), *others]
        return Staged(stages, [*self.early_exits, self.trunk.head])

    def forward(self, images: Tensor, gates: Gates | None = None) -> list[Tensor]:
        """Returns the logits (N, num_classes) of every exit; gates as in `ResidualNetwork`."""
        return run_all_exits(self._cut(self.trunk.split_gates(gates, images)), images)

    def in_early_exit(self, key: str) -> bool:
        return key.startswith("early_exits.")


def _run_blocks(steps: Sequence[tuple[nn.Module, Gate]], x: Tensor) -> Tensor:
    for block, gate in steps:
        x = block(x, gate)
    return x


def pooling_exit(trunk: ResidualNetwork, num_blocks: int) -> nn.Sequential:
    """Returns an exit to put after `num_blocks` blocks: global average pooling, linear layer.

    Raises:
        ValueError: a trunk that is no ResNet.
    """
    if not isinstance(trunk, CifarResNet | ResNet):
        raise ValueError(
            f"the exits that are made are those of a ResNet: give a {type(trunk).__name__} its "
            "early_exits, from what is there to logits"
        )
    channels = trunk.conv1.out_channels
    if num_blocks:
        last = trunk.blocks[num_blocks - 1].last_layer()
        channels = last.num_features if isinstance(last, nn.BatchNorm2d) else last.out_channels
    exit_here = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, trunk.num_classes)
    )
    if getattr(trunk, "preactivation", False):
        return nn.Sequential(nn.BatchNorm2d(channels), relu(), *exit_here)
    return exit_here


class BranchyResNet(ResNetWithExits):
    """B-ResNet: a CIFAR network with branches after the stem and after the first layer; 3 exits.

    The trunk differs from He's: its first convolution has no padding, its convolutions have biases,
    its shortcuts put the new zero channels first, its BNs have Chainer's epsilon, and its last
    pooling averages 6x6 windows.

    Args:
        depth: 6n+2; 110 is the paper's.
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: side of the images; 32 is the paper's.
        taps: the first branch behind the first convolution ("released") or behind the second,
            which is inside the first block ("paper").

    Raises:
        ValueError: no network has this depth, or the images are too small.
    """

    def __init__(
        self,
        depth: int = 110,
        num_classes: int = 10,
        in_channels: int = 3,
        image_size: int = 32,
        taps: Taps = "released",
    ):
        check_choice("taps", taps, Taps)
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_counts(23, MAX_SIZE, image_size=image_size)
        size = image_size - 2
        branch1 = nn.Sequential(
            *(nn.Conv2d(16, 64, 5, padding=2), relu(), LocalResponseNorm()),
            *(nn.Conv2d(64, 32, 3, padding=1), relu()),
            *(nn.Conv2d(32, 32, 3, padding=1), relu()),
            *(nn.Flatten(), nn.Linear(32 * size**2, num_classes)),
        )
        branch2 = nn.Sequential(
            BasicBlock(16, 16, 1, "A", plain=False, bias=True),
            *(nn.Flatten(), nn.Linear(16 * size**2, num_classes)),
        )
        trunk = UnpaddedCifarResNet(depth, num_classes, in_channels, image_size)
        super().__init__(trunk, [0, trunk.num_blocks // 3], [branch1, branch2])
        self.image_size = image_size
        self.taps = taps
        # As released: He's variance in the residual blocks and the stem, not in the first branch.
        for part, nonlinearity in ((trunk, "relu"), (branch1, "linear"), (branch2, "relu")):
            draw_as_chainer(part, nonlinearity)
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eps = 2e-5  # Chainer's

    def _cut(self, gates: Sequence[Gate]) -> Staged:
        staged = super()._cut(gates)
        if self.taps == "released":
            return staged
        if gates[0] is not None:
            raise ValueError("a branch inside the first block excludes gates: use taps='released'")
        block, *others = self.trunk.blocks[: self.exits_after[1]]

        def first(images: Tensor) -> tuple[Tensor, Tensor]:
            x = self.trunk.stem(images)
            return x, F.relu(block.bn1(block.conv1(x)), inplace=True)

        def second(state: tuple[Tensor, Tensor]) -> Tensor:
            x, inner = state
            x = F.relu(x + block.bn2(block.conv2(inner)), inplace=True)
            return _run_blocks([(other, None) for other in others], x)

        def branch(state: tuple[Tensor, Tensor]) -> Tensor:
            return self.early_exits[0](state[1])

        return Staged([first, second, staged.stages[2]], [branch, *staged.exits[1:]])


class UnpaddedCifarResNet(CifarResNet):
    """The trunk of B-ResNet."""

    def __init__(self, depth: int, num_classes: int, in_channels: int, image_size: int):
        super().__init__(depth, num_classes, "A-prepend", in_channels=in_channels, conv_bias=True)
        self.conv1.padding = (0, 0)
        size = pooled(image_size - 2, 2, 2) - 5
        self.fc = nn.Linear(64 * size**2, num_classes)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(F.avg_pool2d(x, 6, stride=1).flatten(1))

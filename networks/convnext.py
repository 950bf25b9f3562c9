"""ConvNeXt with a gate per block; torchvision's state dicts load.

Liu et al., A ConvNet for the 2020s (arXiv 2201.03545)

    x = x + gate_l * layer_scale_l * mlp_l(norm(depthwise_l(x)))

A block has one branch. The layers that halve the size between two stages run whether the gate
behind them is open or not.

| size  | depths          | channels                |
|-------|-----------------|-------------------------|
| tiny  | [3, 3, 9, 3]    | [96, 192, 384, 768]     |
| small | [3, 3, 27, 3]   | [96, 192, 384, 768]     |
| base  | [3, 3, 27, 3]   | [128, 256, 512, 1024]   |
| large | [3, 3, 27, 3]   | [192, 384, 768, 1536]   |

Differences from torchvision's network:
    * Any number of stages, `in_channels`, and `patch_size`, which small images want smaller.
    * Stochastic depth is no layer: the method draws the gates.
"""

import itertools
from collections.abc import Sequence
from reprlib import repr as shown

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.choices import MANY_LAYERS, check_counts, check_numbers
from networks.residual_branches import Branch
from networks.resnet import ResidualNetwork

EPS = 1e-6
"""Of the LayerNorms."""
MAX_STAGES = 16
"""Images of 2^16 pixels are one pixel then."""


class LayerNorm2d(nn.LayerNorm):
    """Normalises the channels of each position of (N, C, H, W); channels_last needs no copy."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    """Reorders the dimensions; a place of its own, as torchvision numbers the layers."""

    def __init__(self, *dims: int):
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class ScaledBranch(nn.Module):
    """The branch of a block: 7x7 depthwise, norm, and an MLP of 4 times the channels; scaled."""

    def __init__(self, channels: int, layer_scale: float):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, EPS),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), layer_scale))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer_scale * self.block(x)


class ConvNeXt(ResidualNetwork):
    """A ConvNeXt; without arguments, tiny: a gate per block, `sum(depths)` of them.

    Args:
        depths: number of blocks of each stage.
        channels: of each stage.
        num_classes: number of logits.
        in_channels: channels of the images.
        patch_size: side of the stem's patches, in pixels; 4 is the paper's.
        layer_scale: what each branch is first scaled by.

    Raises:
        ValueError: not one number of channels per stage.
    """

    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        channels: Sequence[int] = (96, 192, 384, 768),
        num_classes: int = 1000,
        in_channels: int = 3,
        patch_size: int = 4,
        layer_scale: float = 1e-6,
    ):
        super().__init__()
        check_counts(most=MANY_LAYERS, depths=depths)
        check_counts(channels=channels, patch_size=patch_size)
        check_counts(num_classes=num_classes, in_channels=in_channels)
        check_numbers("(-inf, inf)", layer_scale=layer_scale)
        if not 1 <= len(depths) <= MAX_STAGES or len(depths) != len(channels):
            raise ValueError(
                f"depths is {shown(list(depths))} and channels {shown(list(channels))}: give each "
                f"stage a number of blocks and one of channels, to {MAX_STAGES} stages at most"
            )
        self.num_classes = num_classes
        self.smallest_size = patch_size * 2 ** (len(depths) - 1)

        stem = nn.Conv2d(in_channels, channels[0], patch_size, stride=patch_size)
        self.features = nn.Sequential(nn.Sequential(stem, LayerNorm2d(channels[0], EPS)))
        for number, (depth, width) in enumerate(zip(depths, channels, strict=True)):
            if number:
                before = channels[number - 1]
                halve = nn.Conv2d(before, width, 2, stride=2)
                self.features.append(nn.Sequential(LayerNorm2d(before, EPS), halve))
            stage = (ScaledBranch(width, layer_scale) for _ in range(depth))
            self.features.append(nn.Sequential(*stage))
        self.classifier = nn.Sequential(
            LayerNorm2d(channels[-1], EPS), nn.Flatten(1), nn.Linear(channels[-1], num_classes)
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    @property
    def blocks(self) -> list[Branch]:
        blocks = []
        halvings = itertools.chain([None], self.features[2::2])
        for halve, stage in zip(halvings, self.features[1::2], strict=True):
            for index, branch in enumerate(stage):
                before = halve if index == 0 else None
                blocks.append(Branch((branch,), branch.block[5], before))
        return blocks

    def stem(self, images: Tensor) -> Tensor:
        """Returns the first stage's input, (N, C, H, W).

        Raises:
            ValueError: the images are too small for the stages.
        """
        height, width = images.shape[2:]
        if min(height, width) < self.smallest_size:
            raise ValueError(
                f"images of {height} x {width} pixels are too small for these stages: give "
                f"{self.smallest_size} x {self.smallest_size}, fewer stages or a smaller patch_size"
            )
        return self.features[0](images)

    def head(self, x: Tensor) -> Tensor:
        # Its gradient, which is the same for all positions, is then in channels_last as well.
        x = x.permute(0, 2, 3, 1).mean((1, 2), keepdim=True)
        return self.classifier(x.permute(0, 3, 1, 2))

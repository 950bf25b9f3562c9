"""Dense networks of several scales, whose exits all read coarse features.

Huang et al., Multi-Scale Dense Networks for Resource Efficient Image Classification (ICLR 2018,
arXiv 1703.09844)

    x[l,s] = [x[l-1,s], down(x[l-1,s-1]), normal(x[l-1,s])];   logits_k = exit_k(x[L_k,S])

A layer l has a cell for each scale, from s = 1 (finest) to S; each scale is half as wide and high
as the one before. Where layer l-1 has no finer scale, nothing comes down, and what does come down
is half of what is new. Scales are dropped on the way, finest first, until one is left; transitions
(1x1 convolutions) cut the channels. In the code, layers and scales count from 0.

`lazy` is the paper's lazy evaluation. An exit behind layer L_k reads the coarsest scale of this
layer, which needs two scales of the layer before, and three of the one before that: a diagonal. So
a stage ends at the diagonal of its exit. What it left out, the next stage begins with, if an image
goes there. Outputs are the same bit for bit, and so is the cost of the last exit.

Differences from the released code:
    * It has no lazy evaluation. Without `lazy`, costs are those that its authors report.
    * Convolutions start from He's normal distribution (fan out) and biases from 0, as in Torch; the
      initialisation of the PyTorch code does not reach its layers.
    * The 7x7 convolution has no bias: a BN follows. In the PyTorch code it has one.
    * Exits end with global average pooling, so images may have any size. With the released 2x2
      pooling they must be 32x32 and 224x224, and the result is the same.
    * Layers that cannot drop the scales one by one are refused: there, cells would be left over
      that no exit reads.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from networks.bypass import ConvLayer, count_batch
from networks.choices import MANY_LAYERS, check_choice, check_counts, check_numbers
from networks.early_exit import MultiExitNetwork
from networks.initialization import draw_weights

StepMode = Literal["even", "lin_grow"]
Prune = Literal["max", "min"]
Variant = Literal["cifar", "imagenet"]

MAX_SCALES = 16
"""Images of 2^16 pixels are one pixel then."""


def conv_bn_relu(in_channels: int, out_channels: int, size: int, stride: int = 1) -> ConvLayer:
    """Returns a convolution with padding and no bias, a BN and a ReLU."""
    return ConvLayer(
        nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class Branch(nn.Sequential):
    """Layers one after the other."""

    def forward(self, x: Tensor, counters: list[Tensor]) -> Tensor:
        for layer in self:
            x = layer(x, counters)
        return x


def branch(in_channels: int, out_channels: int, factor: int, stride: int = 1) -> Branch:
    """Returns a 1x1 bottleneck of at most ``factor * out_channels`` channels, and a 3x3 layer."""
    width = min(in_channels, factor * out_channels)
    return Branch(conv_bn_relu(in_channels, width, 1), conv_bn_relu(width, out_channels, 3, stride))


class Cell(nn.Module):
    """One scale of one layer: it appends features to those that are there.

    Args:
        down: from the next finer scale; None if the layer before has none.
        normal: from the same scale.
        transition: applied to the result, or None.
    """

    def __init__(self, down: nn.Module | None, normal: nn.Module, transition: nn.Module | None):
        super().__init__()
        self.down = down
        self.normal = normal
        self.transition = transition

    def forward(self, x: Tensor, finer: Tensor | None, counters: list[Tensor]) -> Tensor:
        """Returns features of the same size as x (N, C, H, W); `finer` is (N, C', 2H, 2W)."""
        down = () if self.down is None else (self.down(finer, counters),)
        x = torch.cat([x, *down, self.normal(x, counters)], 1)
        return x if self.transition is None else self.transition(x, counters)


def make_layer(
    counts: tuple[int, int],
    channels: int,
    growth_rate: int,
    growth_factors: Sequence[int],
    bottleneck_factors: Sequence[int],
    kept: int | None,
) -> nn.ModuleDict:
    """Returns the cells of a layer; numbers of channels are those before the growth factors.

    Args:
        counts: number of scales before the layer, and behind it.
        channels: what a cell reads of its own scale.
        growth_rate: what it adds.
        growth_factors, bottleneck_factors: see `MSDNet`.
        kept: what its transition leaves; None: it has none.
    """
    before, behind = counts
    num_scales = len(growth_factors)
    layer = nn.ModuleDict()
    for scale in range(num_scales - behind, num_scales):
        factor = growth_factors[scale]
        added, down, transition = growth_rate * factor, None, None
        if scale > num_scales - before:
            added //= 2
            finer = channels * growth_factors[scale - 1]
            down = branch(finer, added, bottleneck_factors[scale - 1], stride=2)
        normal = branch(channels * factor, added, bottleneck_factors[scale])
        if kept is not None:
            transition = conv_bn_relu((channels + growth_rate) * factor, kept * factor, 1)
        layer[f"scale{scale}"] = Cell(down, normal, transition)
    return layer


class CoarseExit(nn.Sequential):
    """An exit: its layers read the coarsest scale."""

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        x, counters = features[-1], []
        for layer in self:
            x = layer(x, counters) if isinstance(layer, ConvLayer) else layer(x)
        count_batch(counters)
        return x


def make_stem(in_channels: int, widths: Sequence[int], variant: Variant) -> nn.ModuleList:
    """Returns what makes the first features of each scale, from the images or the scale before."""
    if variant == "imagenet":
        first = conv_bn_relu(in_channels, widths[0], 7, stride=2)
        first.append(nn.MaxPool2d(3, stride=2, padding=1))
    else:
        first = conv_bn_relu(in_channels, widths[0], 3)
    others = (conv_bn_relu(a, b, 3, stride=2) for a, b in itertools.pairwise(widths))
    return nn.ModuleList([first, *others])


def make_exit(in_channels: int, num_classes: int, variant: Variant) -> CoarseExit:
    """Returns an exit for this number of channels at the coarsest scale."""
    width = 128 if variant == "cifar" else in_channels
    return CoarseExit(
        conv_bn_relu(in_channels, width, 3, stride=2),
        conv_bn_relu(width, width, 3, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )


# --- which cells there are, and when they are computed --------------------------------------------


def find_depths(num_blocks: int, base: int, step: int, step_mode: StepMode) -> tuple[int, ...]:
    """Returns how many layers there are before each exit."""
    check_choice("step_mode", step_mode, StepMode)
    steps = [step if step_mode == "even" else step * i + 1 for i in range(1, num_blocks)]
    return tuple(itertools.accumulate([base, *steps]))


def count_scales(num_layers: int, num_scales: int, prune: Prune) -> list[int]:
    """Returns how many scales, the coarsest ones, there are before and behind each layer."""
    check_choice("prune", prune, Prune)
    if prune == "max":
        interval = math.ceil(num_layers / num_scales)
        return [num_scales, *(num_scales - layer // interval for layer in range(num_layers))]
    return [num_scales, *(min(num_scales, num_layers - layer) for layer in range(num_layers))]


def find_cuts(counts: Sequence[int], prune: Prune) -> list[int]:
    """Returns the layers, from 1, that end with a transition."""
    if prune == "max":
        drops = enumerate(itertools.pairwise(counts), start=1)
        return [layer for layer, (before, behind) in drops if behind < before]
    num_layers = len(counts) - 1
    return [num_layers // 3, 2 * num_layers // 3]


class Plan(NamedTuple):
    """What a stage does."""

    cells: list[tuple[int, int]]
    """Layer and scale, both from 0, in an order in which each cell finds its inputs."""
    finest: int
    """The finest scale that this exit or a later stage reads."""


def make_plans(counts: Sequence[int], depths: Sequence[int], lazy: bool) -> list[Plan]:
    """Divides the cells of all layers among the stages.

    While a stage runs there is one tensor per scale, which a cell replaces. So within a layer
    coarse scales come first: they read finer ones of the layer before. Along a diagonal fine scales
    come first: they are a layer behind.

    Args:
        counts: number of scales before and behind each layer.
        depths: number of layers before each exit.
        lazy: end stages at diagonals instead of layers.
    """
    coarsest = counts[0] - 1

    def turn(layer: int, scale: int) -> tuple[int, int]:
        return (layer + coarsest - scale, scale) if lazy else (layer, -scale)

    cells = [
        (layer, scale)
        for layer, count in enumerate(counts[1:])
        for scale in range(counts[0] - count, counts[0])
    ]
    cells.sort(key=lambda cell: turn(*cell))
    plans = []
    for start, stop in itertools.pairwise([0, *depths]):
        now = [cell for cell in cells if start <= turn(*cell)[0] < stop]
        later = [cell for cell in cells if turn(*cell)[0] >= stop]
        read_later = [max(scale - 1, counts[0] - counts[layer]) for layer, scale in later]
        plans.append(Plan(now, min([coarsest, *read_later])))
    return plans


# --- the network ----------------------------------------------------------------------------------


def require_factors(
    growth_rate: int, growth_factors: Sequence[int], bottleneck_factors: Sequence[int]
) -> None:
    """Raises ValueError unless each scale has its factors and a growth that can be halved."""
    check_counts(growth_factors=growth_factors, bottleneck_factors=bottleneck_factors)
    num_scales = len(growth_factors)
    if not 1 <= num_scales <= MAX_SCALES or num_scales != len(bottleneck_factors):
        raise ValueError(
            f"{num_scales} growth factors and {len(bottleneck_factors)} bottleneck factors: give "
            f"one of each per scale, of which there may be {MAX_SCALES}"
        )
    for factor in growth_factors[1:]:
        if growth_rate * factor % 2:
            raise ValueError(
                f"a growth rate of {growth_rate} times a growth factor of {factor} is odd: make it "
                "even, as all scales but the finest grow by two halves"
            )


def require_layers(num_layers: int, num_scales: int, prune: Prune) -> None:
    """Raises ValueError unless the layers drop the scales one by one; names a number that does."""
    check_counts(most=MANY_LAYERS, number_of_layers=num_layers)

    def fits(number: int) -> bool:
        counts = count_scales(number, num_scales, prune)
        return counts[-1] == 1 and all(a - b <= 1 for a, b in itertools.pairwise(counts))

    if not fits(num_layers):
        fitting = next(number for number in itertools.count(num_layers + 1) if fits(number))
        raise ValueError(
            f"{num_layers} layers do not drop {num_scales} scales one by one (prune={prune!r}): "
            f"choose base, step and num_blocks such that there are {fitting}"
        )


class MSDNet(MultiExitNetwork):
    """A dense network of several scales with an exit behind each of its blocks.

    The state between stages is a list of features (N, C, H, W), one tensor for each scale that is
    still read, fine to coarse. Each is half as wide and high as the one before, odd sizes rounded
    up.

    Args:
        num_blocks: number of blocks, which is the number of exits.
        base: layers of the first block.
        step: layers of every other block ("even"), or ``step * i + 1`` of block i = 1, 2, ...
            behind the first ("lin_grow").
        step_mode: see `step`.
        num_channels: channels behind the stem, times the growth factor of the scale.
        growth_rate: channels that a layer adds, times the growth factor of the scale.
        growth_factors: one per scale, fine to coarse.
        bottleneck_factors: one per scale, fine to coarse: the bottleneck of a branch that reads
            the scale has this many times the channels that the branch adds.
        prune: "max" drops a scale whenever 1/S of the layers is done, and has a transition there;
            "min" drops them in the last layers, and has transitions behind 1/3 and 2/3 of them.
        reduction: share of the channels that a transition keeps.
        num_classes: number of logits.
        in_channels: channels of the images.
        variant: "cifar" begins with a 3x3 convolution and has 128 channels in its exits;
            "imagenet" begins with a 7x7 convolution and max pooling, and its exits have as many
            channels as they read.
        lazy: compute for each exit no more than it needs, and the rest when an image goes on. It
            changes no output and no state dict, and makes exits cheaper while there are several
            scales. (Training runs all exits, for which nothing changes.)

    Attributes:
        depths: number of layers before each exit.

    Raises:
        ValueError: an option that does not exist, numbers of which no network can be made, or a
            number of layers that does not drop the scales one by one.
    """

    def __init__(
        self,
        num_blocks: int,
        base: int,
        step: int,
        step_mode: StepMode = "even",
        num_channels: int = 16,
        growth_rate: int = 6,
        growth_factors: Sequence[int] = (1, 2, 4),
        bottleneck_factors: Sequence[int] = (1, 2, 4),
        prune: Prune = "max",
        reduction: float = 0.5,
        num_classes: int = 10,
        in_channels: int = 3,
        variant: Variant = "cifar",
        lazy: bool = False,
    ):
        super().__init__()
        check_choice("variant", variant, Variant)
        check_counts(most=MANY_LAYERS, num_blocks=num_blocks, base=base, step=step)
        check_counts(num_channels=num_channels, growth_rate=growth_rate)
        check_counts(num_classes=num_classes, in_channels=in_channels)
        require_factors(growth_rate, growth_factors, bottleneck_factors)
        check_numbers("(0, 1]", reduction=reduction)
        self.num_classes = num_classes
        self.depths = find_depths(num_blocks, base, step, step_mode)
        require_layers(self.depths[-1], len(growth_factors), prune)
        counts = count_scales(self.depths[-1], len(growth_factors), prune)
        cuts = find_cuts(counts, prune)

        channels = num_channels
        self.stem = make_stem(in_channels, [channels * f for f in growth_factors], variant)
        self.layers, self.exits = nn.ModuleList(), nn.ModuleList()
        for number, pair in enumerate(itertools.pairwise(counts), start=1):
            grown = channels + growth_rate
            kept = math.floor(reduction * grown) if number in cuts else grown
            if kept < 1:
                raise ValueError(f"a reduction to {reduction} leaves no channels: use 0.5")
            sizes = pair, channels, growth_rate, growth_factors, bottleneck_factors
            self.layers.append(make_layer(*sizes, kept=kept if number in cuts else None))
            channels = kept
            if number in self.depths:
                self.exits.append(make_exit(channels * growth_factors[-1], num_classes, variant))
        self.plans = make_plans(counts, self.depths, lazy)
        draw_weights(self, "fan_out")

    @property
    def stages(self):
        first, *others = (partial(self._run, plan) for plan in self.plans)
        return [lambda images: first(self._enter(images)), *others]

    def _enter(self, x: Tensor) -> list[Tensor]:
        counters = []
        state = [x := layer(x, counters) for layer in self.stem]
        count_batch(counters)
        return state

    def _run(self, plan: Plan, state: Sequence[Tensor]) -> list[Tensor]:
        num_scales = len(self.stem)
        features = dict(zip(range(num_scales - len(state), num_scales), state, strict=True))
        counters = []
        for layer, scale in plan.cells:
            cell = self.layers[layer][f"scale{scale}"]
            features[scale] = cell(features[scale], features.get(scale - 1), counters)
        count_batch(counters)
        return [features[scale] for scale in range(plan.finest, num_scales)]

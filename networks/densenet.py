"""Densely connected networks: a layer reads the outputs of all layers before it in its block.

Huang, Liu, van der Maaten, Weinberger, Densely Connected Convolutional Networks (arXiv 1608.06993)
Pleiss et al., Memory-Efficient Implementation of DenseNets (arXiv 1707.06990)

    x_l = conv(ReLU(BN([x_0, x_1, ..., x_{l-1}])))

Autograd keeps the concatenation of each layer and its activation, so the memory of training grows
with the square of the depth. With `memory_efficient` it keeps each x_l once, and backward computes
the rest again. That changes no number: no output, no gradient, no running statistic.

Differences from the released code:
    * Every convolution but the first is followed by dropout: the 3x3 convolutions, the 1x1
      convolutions of bottlenecks and those of transitions. So do the paper and the released default
      layers; the released memory-efficient layers silently leave dropout out.
    * The stem of a CIFAR network has two growth rates of channels only with bottlenecks and
      compression both (DenseNet-BC), otherwise 16, as in the paper.
    * `memory_efficient` computes every concatenation, BN and ReLU again, also the second of a
      bottleneck and those of stem, transitions and head, and no convolution.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from networks.bypass import has_hooks
from networks.choices import check_choice, check_counts, check_numbers, layers_of
from networks.initialization import draw_weights
from networks.recomputation import (
    Unit,
    recomputable,
    recompute_layers,
    recompute_units,
    run_units,
)


def activate(
    features: Sequence[Tensor],
    norm: nn.Module,
    then: Callable[[Tensor], Tensor],
    memory_efficient: bool,
    drop_rate: float = 0.0,
) -> Tensor:
    """Concatenates features (N, C_i, H, W), normalises, applies ReLU, what comes `then`, dropout.

    Args:
        memory_efficient: what lies between `features` and `then` is computed again in backward,
            unless it is not `recomputable`.
    """
    units = [Unit(norm, then, drop_rate)]
    run = recompute_units if memory_efficient and recomputable(units, features[0]) else run_units
    return run(units, features)


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)


class DenseLayer(nn.Module):
    """BN, ReLU, 3x3 convolution; with `bottleneck`, BN, ReLU and a 1x1 convolution come first."""

    def __init__(self, in_channels: int, growth_rate: int, bottleneck: bool, drop_rate: float):
        super().__init__()
        self.bottleneck = bottleneck
        self.drop_rate = drop_rate
        self.norm1 = nn.BatchNorm2d(in_channels)
        if bottleneck:
            self.conv1 = conv(in_channels, 4 * growth_rate, 1)
            self.norm2 = nn.BatchNorm2d(4 * growth_rate)
            self.conv2 = conv(4 * growth_rate, growth_rate, 3)
        else:
            self.conv1 = conv(in_channels, growth_rate, 3)

    def units(self) -> list[Unit]:
        drop_rate = self.drop_rate if self.training else 0.0
        units = [Unit(self.norm1, self.conv1, drop_rate)]
        return [*units, Unit(self.norm2, self.conv2, drop_rate)] if self.bottleneck else units

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Returns new features (N, growth_rate, H, W) from those before, each (N, C_i, H, W)."""
        return run_units(self.units(), features)


class DenseBlock(nn.Module):
    """Layers, each of which reads the input of the block and the outputs of those before it."""

    def __init__(
        self,
        num_layers: int,
        in_channels: int,
        growth_rate: int,
        bottleneck: bool,
        drop_rate: float,
    ):
        super().__init__()
        for index in range(num_layers):
            channels = in_channels + index * growth_rate
            layer = DenseLayer(channels, growth_rate, bottleneck, drop_rate)
            self.add_module(f"denselayer{index + 1}", layer)

    def forward(self, x: Tensor, memory_efficient: bool) -> list[Tensor]:
        """Returns the input (N, C, H, W) and what each layer adds to it (N, growth_rate, H, W)."""
        layers = list(self.children())
        if memory_efficient and not any(has_hooks(layer) for layer in layers):
            units = [layer.units() for layer in layers]
            if all(recomputable(each, x) for each in units):
                return recompute_layers(units, x)
        features = [x]
        for layer in layers:
            features.append(layer(features))
        return features


class Transition(nn.Module):
    """BN, ReLU, 1x1 convolution and 2x2 average pooling: what lies between two blocks."""

    def __init__(self, in_channels: int, out_channels: int, drop_rate: float):
        super().__init__()
        self.drop_rate = drop_rate
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = conv(in_channels, out_channels, 1)

    def forward(self, features: Sequence[Tensor], memory_efficient: bool) -> Tensor:
        drop_rate = self.drop_rate if self.training else 0.0
        return F.avg_pool2d(
            activate(features, self.norm, self.conv, memory_efficient, drop_rate), 2
        )


class DenselyConnectedNetwork(nn.Module):
    """What `CifarDenseNet` and `DenseNet` share: dense blocks, transitions and a head.

    Attributes:
        num_classes: number of logits.
        memory_efficient: whether training trades time for memory; may change at any time. Gradients
            then cannot be differentiated. Blocks are left as they are if one of their BN is in
            evaluation mode or synchronises ranks, or a module has hooks or is not torch's own.
    """

    def __init__(
        self,
        stem: dict[str, nn.Module],
        layers_per_block: Sequence[int],
        growth_rate: int,
        bottleneck: bool,
        compression: float,
        drop_rate: float,
        num_classes: int,
        memory_efficient: bool,
    ):
        super().__init__()
        check_counts(num_classes=num_classes)
        check_numbers("[0, 1)", drop_rate=drop_rate)
        self.num_classes = num_classes
        self.memory_efficient = memory_efficient
        self.features = nn.ModuleDict(stem)
        channels = stem["conv0"].out_channels
        for number, num_layers in enumerate(layers_per_block, start=1):
            if number > 1:
                out_channels = int(compression * channels)
                if out_channels < 1:
                    raise ValueError(
                        f"compression is {compression}: give more, as of {channels} channels none "
                        "is left"
                    )
                transition = Transition(channels, out_channels, drop_rate)
                self.features[f"transition{number - 1}"] = transition
                channels = out_channels
            block = DenseBlock(num_layers, channels, growth_rate, bottleneck, drop_rate)
            self.features[f"denseblock{number}"] = block
            channels += num_layers * growth_rate
        self.features[f"norm{number + 1}"] = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)
        draw_weights(self, "fan_out")

    def stem(self, images: Tensor) -> Tensor:
        raise NotImplementedError("the networks for CIFAR and ImageNet begin differently")

    def forward(self, images: Tensor) -> Tensor:
        """Classifies images (N, C, H, W). Returns logits (N, num_classes)."""
        features = [self.stem(images)]
        for module in self.features.values():
            if isinstance(module, Transition):
                features = [module(features, self.memory_efficient)]
            elif isinstance(module, DenseBlock):
                features = module(*features, self.memory_efficient)
        *_, norm = self.features.values()
        return self.classifier(
            activate(features, norm, lambda x: x.mean((2, 3)), self.memory_efficient)
        )


class CifarDenseNet(DenselyConnectedNetwork):
    """The CIFAR networks of Huang et al.: three blocks of as many layers.

    Args:
        depth: 3n+4 (40, 100, ...), or 6n+4 with `bottleneck` (40, 100, 190, 250, ...).
        growth_rate: channels that a layer adds.
        bottleneck: a 1x1 convolution to four growth rates of channels before each 3x3 one.
        compression: share of the channels that a transition keeps, rounded down; with `bottleneck`
            and 0.5 the network is a DenseNet-BC, and its stem has two growth rates of channels.
        drop_rate: probability of dropout; the paper uses 0.2 without data augmentation.
        num_classes: number of logits.
        in_channels: channels of the images.
        memory_efficient: see `DenselyConnectedNetwork`.

    Raises:
        ValueError: no network has this depth, growth rate or compression.
    """

    def __init__(
        self,
        depth: int,
        growth_rate: int = 12,
        bottleneck: bool = False,
        compression: float = 1.0,
        drop_rate: float = 0.0,
        num_classes: int = 10,
        in_channels: int = 3,
        memory_efficient: bool = False,
    ):
        depths = (6, 4, (100, 190, 250)) if bottleneck else (3, 4, (40, 100))
        num_layers = layers_of(depth, *depths)
        check_numbers("(0, 1]", compression=compression)
        check_counts(growth_rate=growth_rate, in_channels=in_channels)
        channels = 2 * growth_rate if bottleneck and compression < 1 else 16
        super().__init__(
            stem={"conv0": conv(in_channels, channels, 3)},
            layers_per_block=[num_layers] * 3,
            growth_rate=growth_rate,
            bottleneck=bottleneck,
            compression=compression,
            drop_rate=drop_rate,
            num_classes=num_classes,
            memory_efficient=memory_efficient,
        )

    def stem(self, images: Tensor) -> Tensor:
        return self.features["conv0"](images)


class DenseNet(DenselyConnectedNetwork):
    """The ImageNet networks of Huang et al., DenseNet-BC all; torchvision's state dicts load.

    Args:
        depth: 121, 161 (growth rate 48, the others 32), 169, 201 or 264.
        num_classes: number of logits.
        in_channels: channels of the images.
        drop_rate: probability of dropout.
        memory_efficient: see `DenselyConnectedNetwork`.

    Raises:
        ValueError: no network has this depth.
    """

    LAYERS_PER_BLOCK = {  # noqa: RUF012 (a constant)
        121: (6, 12, 24, 16),
        161: (6, 12, 36, 24),
        169: (6, 12, 32, 32),
        201: (6, 12, 48, 32),
        264: (6, 12, 64, 48),
    }

    def __init__(
        self,
        depth: int,
        num_classes: int = 1000,
        in_channels: int = 3,
        drop_rate: float = 0.0,
        memory_efficient: bool = False,
    ):
        check_choice("depth", depth, self.LAYERS_PER_BLOCK)
        check_counts(in_channels=in_channels)
        growth_rate = 48 if depth == 161 else 32
        conv0 = nn.Conv2d(in_channels, 2 * growth_rate, 7, stride=2, padding=3, bias=False)
        super().__init__(
            stem={"conv0": conv0, "norm0": nn.BatchNorm2d(2 * growth_rate)},
            layers_per_block=self.LAYERS_PER_BLOCK[depth],
            growth_rate=growth_rate,
            bottleneck=True,
            compression=0.5,
            drop_rate=drop_rate,
            num_classes=num_classes,
            memory_efficient=memory_efficient,
        )

    def stem(self, images: Tensor) -> Tensor:
        return activate(
            [self.features["conv0"](images)],
            self.features["norm0"],
            lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
            self.memory_efficient,
        )

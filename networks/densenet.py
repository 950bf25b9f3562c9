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

from collections import Counter
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from networks.initialization import draw_weights


def concatenate(features: Sequence[Tensor]) -> Tensor:
    return features[0] if len(features) == 1 else torch.cat(features, 1)


class Recomputation:
    """Computes the input and the activation of a BN again when backward asks for them.

    `pack` and `unpack` are hooks for the tensors that autograd saves. Unlike a checkpoint, which
    runs its layers twice, they leave forward alone: a BN counts its batch once, autocast and
    dropout have done their work. As with a checkpoint, no error tells if weights change between
    forward and backward.

    Args:
        features: what is concatenated, each (N, C_i, H, W). They are kept, but not copied.
        norm: the BN, in training mode.

    Attributes:
        names: "input" or "activation" by the address where it lies; while forward runs.
        statistics: mean and 1 / std of the input, see `saved_statistics`.
    """

    def __init__(self, features: Sequence[Tensor], norm: nn.BatchNorm2d):
        self.features = tuple(features)  # the list of a block goes on growing
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.statistics: tuple[Tensor, Tensor] | None = None
        self.names: dict[int, str] = {}
        self.num_saved = Counter()
        self.num_asked = Counter()
        self.tensors: dict[str, Tensor] = {}

    def pack(self, tensor: Tensor) -> Tensor | str:
        name = self.names.get(tensor.data_ptr())
        if name is None:
            return tensor
        self.num_saved[name] += 1
        return name

    def unpack(self, saved: Tensor | str) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved not in self.tensors:
            self.compute()
        self.num_asked[saved] += 1
        if self.num_asked[saved] % self.num_saved[saved] == 0:
            return self.tensors.pop(saved)
        return self.tensors[saved]

    @torch.no_grad()
    def compute(self) -> None:
        x = concatenate(self.features)
        if self.statistics is None:
            y = F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        else:
            # In training and evaluation alike, the CPU computes a * x + (bias - a * mean) with
            # a = weight / std. With the std in the weight, evaluation has the same a.
            mean, inverse_std = self.statistics
            one = torch.ones_like(mean)
            y = F.batch_norm(x, mean, one, self.weight * inverse_std, self.bias, eps=0.0)
        self.tensors = {"input": x, "activation": F.relu(y, inplace=True)}


def saved_statistics(y: Tensor) -> tuple[Tensor, Tensor] | None:
    """Returns mean and 1 / std that BN keeps for its backward, if they give `y` again to the bit.

    Only the CPU's BN does, on weights of 32 or 64 bits. It pays: finding the statistics takes
    several times as long as normalising by them.
    """
    if y.device.type != "cpu" or y.grad_fn is None:
        return None
    mean, inverse_std = y.grad_fn._saved_result1, y.grad_fn._saved_result2
    return (mean, inverse_std) if torch.finfo(mean.dtype).bits >= 32 else None


def activate(
    features: Sequence[Tensor],
    norm: nn.Module,
    then: Callable[[Tensor], Tensor],
    memory_efficient: bool,
) -> Tensor:
    """Concatenates, normalises, applies ReLU and what comes `then`.

    Args:
        features: tensors (N, C_i, H, W).
        norm: BN over the sum of C_i channels.
        then: from (N, sum of C_i, H, W) to the output.
        memory_efficient: what lies between `features` and `then` is computed again in backward.
            Where it cannot be (BN in evaluation mode, or one that synchronises ranks), it is kept.

    Returns:
        ``then(ReLU(BN([features])))``.
    """
    recomputable = isinstance(norm, nn.BatchNorm2d) and norm.training
    if not (memory_efficient and recomputable and torch.is_grad_enabled()):
        return then(F.relu(norm(concatenate(features)), inplace=True))

    again = Recomputation(features, norm)
    with saved_tensors_hooks(again.pack, again.unpack):
        x = concatenate(features)
        if len(features) > 1:
            again.names = {x.data_ptr(): "input"}
        y = norm(x)
        again.statistics = saved_statistics(y)
        # From here on the memory of x is free, and its address may be that of another tensor.
        del x
        again.names = {y.data_ptr(): "activation"}
        return then(F.relu(y, inplace=True))


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

    def forward(self, features: Sequence[Tensor], memory_efficient: bool) -> Tensor:
        """Returns new features (N, growth_rate, H, W) from those before, each (N, C_i, H, W)."""
        x = activate(features, self.norm1, self.conv1, memory_efficient)
        x = F.dropout(x, self.drop_rate, self.training)
        if self.bottleneck:
            x = activate([x], self.norm2, self.conv2, memory_efficient)
            x = F.dropout(x, self.drop_rate, self.training)
        return x


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
        features = [x]
        for layer in self.children():
            features.append(layer(features, memory_efficient))
        return features


class Transition(nn.Module):
    """BN, ReLU, 1x1 convolution and 2x2 average pooling: what lies between two blocks."""

    def __init__(self, in_channels: int, out_channels: int, drop_rate: float):
        super().__init__()
        self.drop_rate = drop_rate
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = conv(in_channels, out_channels, 1)

    def forward(self, features: Sequence[Tensor], memory_efficient: bool) -> Tensor:
        x = activate(features, self.norm, self.conv, memory_efficient)
        return F.avg_pool2d(F.dropout(x, self.drop_rate, self.training), 2)


class DenselyConnectedNetwork(nn.Module):
    """What `CifarDenseNet` and `DenseNet` share: dense blocks, transitions and a head.

    Attributes:
        num_classes: number of logits.
        memory_efficient: whether training trades time for memory; may change at any time.
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
        self.num_classes = num_classes
        self.memory_efficient = memory_efficient
        self.features = nn.ModuleDict(stem)
        channels = stem["conv0"].out_channels
        for number, num_layers in enumerate(layers_per_block, start=1):
            if number > 1:
                out_channels = int(compression * channels)
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
        num_layers, remainder = divmod(depth - 4, 6 if bottleneck else 3)
        if remainder or num_layers < 1:
            formula, examples = ("6n+4", "100, 190, 250") if bottleneck else ("3n+4", "40, 100")
            raise ValueError(f"depth {depth} is not {formula}: choose one such as {examples}")
        if not 0 < compression <= 1:
            raise ValueError(f"compression {compression} is not in (0, 1]: 1 keeps all channels")
        if growth_rate < 1:
            raise ValueError(f"growth_rate {growth_rate} is too small: use 1 or more")
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
        if depth not in self.LAYERS_PER_BLOCK:
            raise ValueError(
                f"depth {depth} is not one of {', '.join(map(str, self.LAYERS_PER_BLOCK))}"
            )
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

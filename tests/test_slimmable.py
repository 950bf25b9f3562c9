"""Networks of any width, against the papers' counts, torchvision and narrow networks built here."""

import copy
import io
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from networks import (
    SlimmableBatchNorm2d,
    SlimmableCifarResNet,
    SlimmableConv2d,
    SlimmableLinear,
    SlimmableMobileNetV1,
    SlimmableMobileNetV2,
    SlimmableNetwork,
    SlimmableResNet,
    SwitchableBatchNorm2d,
    count_macs,
    count_params,
    extract,
    recalibrate,
)
from networks.narrow import Residual
from networks.slimmable import round_channels
from networks.slimmable_layers import Width

# Slimmable: stored numbers; active numbers and MACs of every switch.
SWITCHES = {
    SlimmableMobileNetV1: (
        4_264_808,
        {
            1.0: (4_231_976, 568_740_352),
            0.75: (2_585_560, 325_400_448),
            0.5: (1_331_592, 149_497_088),
            0.25: (470_072, 41_030_272),
        },
    ),
    SlimmableMobileNetV2: (
        3_556_456,
        {
            1.0: (3_504_872, 300_774_272),
            0.75: (2_636_424, 209_069_792),
            0.5: (1_968_680, 97_131_840),
            0.35: (1_677_128, 59_285_808),
        },
    ),
    SlimmableResNet: (
        25_636_712,
        {
            1.0: (25_557_032, 4_089_184_256),
            0.75: (14_771_992, 2_322_677_760),
            0.5: (6_917_640, 1_052_311_552),
            0.25: (1_993_976, 278_085_632),
        },
    ),
}

# Universally Slimmable: millions of MACs, to two decimals, and active numbers, from width 1.0 down.
UNIVERSAL_WIDTHS = [percent / 100 for percent in range(100, 20, -5)]
UNIVERSAL = {
    SlimmableMobileNetV1: (
        [
            *("568.74", "517.55", "466.19", "421.07", "366.26", "325.40", "287.16", "249.39"),
            *("217.02", "177.41", "149.50", "124.20", "100.03", "80.41", "64.05", "41.03"),
        ],
        [
            *(4_231_976, 3_888_408, 3_539_768, 3_185_288, 2_868_584, 2_585_560, 2_316_872),
            *(2_046_248, 1_778_296, 1_539_736, 1_331_592, 1_137_784, 945_176, 763_752),
            *(604_336, 470_072),
        ],
    ),
    SlimmableMobileNetV2: (
        [
            *("300.77", "284.54", "269.02", "254.20", "222.48", "209.07", "173.64", "161.91"),
            *("150.96", "106.67", "97.13", "88.65", "80.70", "59.29"),
        ],
        [
            *(3_504_872, 3_316_552, 3_141_800, 2_969_608, 2_792_488, 2_636_424, 2_481_384),
            *(2_346_952, 2_217_000, 2_082_504, 1_968_680, 1_864_840, 1_770_728, 1_677_128),
        ],
    ),
}


# --- Plain networks, made of numbers of channels alone --------------------------------------------


class Shortcut(nn.Module):
    """A residual block; without a projection its shortcut is the identity."""

    def __init__(self, branch: Sequence[nn.Module], projection: Sequence[nn.Module], post):
        super().__init__()
        self.branch = nn.Sequential(*branch)
        self.projection = nn.Sequential(*projection)
        self.post = post

    def forward(self, x: Tensor) -> Tensor:
        return self.post(self.projection(x) + self.branch(x))


def layer(ins: int, outs: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(ins, outs, size, stride, size // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outs)]


def head(features: int, num_classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, num_classes)]


def plain_mobilenet_v1(counts: Iterator[int], num_classes: int) -> nn.Sequential:
    """Groups: the stem, then the output of each block."""
    x = next(counts)
    layers = [*layer(3, x, 3, 2), nn.ReLU6()]
    for stride in (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1):
        out = next(counts)
        layers += [*layer(x, x, 3, stride, groups=x), nn.ReLU6(), *layer(x, out, 1), nn.ReLU6()]
        x = out
    return nn.Sequential(*layers, *head(x, num_classes))


def plain_mobilenet_v2(counts: Iterator[int], num_classes: int, cifar=False) -> nn.Sequential:
    """Groups: the stem, then of each stage its output and a sixth of each block's hidden width."""
    x = next(counts)
    layers = [*layer(3, x, 3, 1 if cifar else 2), nn.ReLU6()]
    num_blocks_and_stride = ((1, 1), (2, 1 if cifar else 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))
    for stage, (num_blocks, stride) in enumerate(num_blocks_and_stride):
        out = next(counts)
        for index in range(num_blocks):
            hidden = x if stage == 0 else 6 * next(counts)
            block = [] if stage == 0 else [*layer(x, hidden, 1), nn.ReLU6()]
            block += layer(hidden, hidden, 3, stride if index == 0 else 1, groups=hidden)
            block += [nn.ReLU6(), *layer(hidden, out, 1)]
            layers += block if index == 0 else [Shortcut(block, [], nn.Identity())]
            x = out
    return nn.Sequential(*layers, *layer(x, 1280, 1), nn.ReLU6(), *head(1280, num_classes))


def plain_resnet_50(counts: Iterator[int], num_classes: int) -> nn.Sequential:
    """Groups: the stem, then of each stage its output and the inside of each block."""
    x = next(counts)
    layers = [*layer(3, x, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for stage, num_blocks in enumerate((3, 4, 6, 3)):
        out = next(counts)
        for index in range(num_blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            inner = next(counts)
            branch = [*layer(x, inner, 1), nn.ReLU(), *layer(inner, inner, 3, stride), nn.ReLU()]
            branch += layer(inner, out, 1)
            projection = layer(x, out, 1, stride) if index == 0 else []
            layers.append(Shortcut(branch, projection, nn.ReLU()))
            x = out
    return nn.Sequential(*layers, *head(x, num_classes))


def plain_cifar_resnet_14(counts: Iterator[int], num_classes: int) -> nn.Sequential:
    """Groups: stem and first stage, its blocks' insides; then as `plain_resnet_50`."""
    x = next(counts)
    layers = [*layer(3, x, 3), nn.ReLU()]
    for stage in range(3):
        out = x if stage == 0 else next(counts)
        for index in range(2):
            changes = stage > 0 and index == 0
            inner = next(counts)
            branch = [*layer(x, inner, 3, 1 + changes), nn.ReLU(), *layer(inner, out, 3)]
            projection = layer(x, out, 1, 2) if changes else []
            layers.append(Shortcut(branch, projection, nn.ReLU()))
            x = out
    return nn.Sequential(*layers, *head(x, num_classes))


# --- Wide networks, and narrow ones that hold their slices ----------------------------------------

NARROW_BUILDERS: dict[str, Callable[[Iterator[int], int], nn.Sequential]] = {
    "mobilenet_v1": plain_mobilenet_v1,
    "mobilenet_v2_cifar": partial(plain_mobilenet_v2, cifar=True),
    "resnet_50": plain_resnet_50,
    "cifar_resnet_14": plain_cifar_resnet_14,
}
WIDE_BUILDERS: dict[str, Callable[..., SlimmableNetwork]] = {
    "mobilenet_v1": SlimmableMobileNetV1,
    "mobilenet_v2": SlimmableMobileNetV2,
    "mobilenet_v2_cifar": partial(SlimmableMobileNetV2, cifar_strides=True),
    "resnet_50": SlimmableResNet,
    "cifar_resnet_14": partial(SlimmableCifarResNet, 14),
}
CPU_SIZED = ["mobilenet_v2_cifar", "cifar_resnet_14"]
DIVISORS = {"cifar_resnet_14": 4}


def make(name: str, dtype: torch.dtype = torch.float64, **widths) -> SlimmableNetwork:
    """Returns a network in which no number is a 0 or 1 that could hide a mistake."""
    torch.manual_seed(0)
    network = WIDE_BUILDERS[name](num_classes=5, **widths)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | SlimmableBatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    nn.init.normal_(network.fc.bias)
    return network.to(dtype)


def make_images(number: int = 4, seed: int = 1, size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, size, size, dtype=torch.float64, generator=generator)


def rounded(channels: int, ratio: float, divisor: int) -> int:
    """The rule in exact arithmetic: the nearest multiple, the one above if that loses over 10%."""
    exact = channels * Fraction(str(ratio))
    nearest = max(1, math.floor(exact / divisor + Fraction(1, 2)) * divisor)
    return min(channels, nearest if nearest >= exact * Fraction(9, 10) else nearest + divisor)


def ratios_for(network: SlimmableNetwork) -> list[float]:
    """Returns a ratio for each group such that neighbours differ."""
    return [(0.35, 0.75, 0.5, 1.0, 0.6)[index % 5] for index in range(network.num_groups)]


def narrow_of(
    name: str, wide: SlimmableNetwork, width_mult: float | Sequence[float]
) -> nn.Sequential:
    """Builds the narrow network of a width and copies the slices of the wide one into it."""
    ratios = [width_mult] * wide.num_groups if isinstance(width_mult, float) else width_mult
    counts = iter(
        rounded(*pair, DIVISORS.get(name, 8))
        for pair in zip(wide.group_channels, ratios, strict=True)
    )
    narrow = NARROW_BUILDERS[name](counts, 5).double()
    assert next(counts, None) is None
    for source, target in pairs(wide, narrow, width_mult):
        target.data.copy_(source.data[tuple(map(slice, target.shape))])
    return narrow


def pairs(
    wide: SlimmableNetwork, narrow: nn.Module, width_mult: float | Sequence[float]
) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yields the parameters of the wide network and their counterparts in the narrow one."""
    kinds = nn.Conv2d | nn.Linear | SlimmableBatchNorm2d | SwitchableBatchNorm2d
    sources = [module for module in wide.modules() if isinstance(module, kinds)]
    inner = [part for module in sources for part in list(module.modules())[1:]]
    sources = [module for module in sources if module not in inner]
    targets = [m for m in narrow.modules() if isinstance(m, kinds | nn.BatchNorm2d)]
    for source, target in zip(sources, targets, strict=True):
        if isinstance(source, SwitchableBatchNorm2d):
            source = source.switches[wide.width_mults.index(width_mult)]
        yield source.weight, target.weight
        assert (getattr(source, "bias", None) is None) == (target.bias is None)
        if target.bias is not None:
            yield source.bias, target.bias


def gradients(network: nn.Module, logits: Tensor) -> None:
    network.zero_grad()
    F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]).backward()


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Compares to within a share of the largest number, which sums in another order need."""
    scale = expected.abs().max().clamp_min(1.0).item()
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=tolerance * scale)


def assert_gradient_in_slice(wide: Tensor, narrow: Tensor) -> None:
    """The gradient of the narrow network, and exactly 0 elsewhere."""
    index = tuple(map(slice, narrow.shape))
    assert_near(wide[index], narrow)
    rest = wide.clone()
    rest[index] = 0
    assert not rest.any()


# --- Counts ---------------------------------------------------------------------------------------


@pytest.fixture
def on_meta() -> Iterator[None]:
    """Counts need no numbers, so the networks of these tests hold none."""
    with torch.device("meta"):
        yield


def macs_both_ways(network: SlimmableNetwork, width_mult: float) -> tuple[int, int, int]:
    """Returns the MACs of the sliced and the extracted network, and the latter's parameters."""
    images = torch.empty(1, 3, 224, 224)
    plain = extract(network, width_mult)
    sliced_macs = count_macs(partial(network, width_mult=width_mult), images)
    return sliced_macs, count_macs(plain, images), count_params(plain)


@pytest.mark.parametrize("kind", SWITCHES)
def test_counts_of_slimmable_networks(on_meta, kind):
    stored, switches = SWITCHES[kind]
    network = kind(width_mults=tuple(switches)).eval()
    assert count_params(network) == stored
    for width_mult, (params, macs) in switches.items():
        assert macs_both_ways(network, width_mult) == (macs, macs, params)


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNIVERSAL)
def test_counts_of_universally_slimmable_networks(on_meta, kind):
    macs, params = UNIVERSAL[kind]
    widths = UNIVERSAL_WIDTHS[: len(macs)]
    network = kind(width_mult_range=(widths[-1], 1.0)).eval()
    assert count_params(network) == params[0]
    runs = [partial(network, width_mult=width) for width in widths]
    recalibrate(network, [torch.empty(1, 3, 64, 64)], runs)
    for width_mult, expected_macs, expected_params in zip(widths, macs, params, strict=True):
        sliced, extracted, active = macs_both_ways(network, width_mult)
        assert sliced == extracted
        assert (f"{sliced / 1e6:.2f}", active) == (expected_macs, expected_params)


def test_counts_of_the_universally_slimmable_resnet(on_meta):
    """No release has one; at widths of whole eighths it is as wide as the Slimmable one."""
    network = SlimmableResNet(width_mult_range=(0.25, 1.0)).eval()
    assert count_params(network) == 25_557_032
    images = torch.empty(1, 3, 224, 224)
    for width_mult, (_, macs) in SWITCHES[SlimmableResNet][1].items():
        run = partial(network, width_mult=width_mult)
        recalibrate(network, [torch.empty(1, 3, 64, 64)], [run])
        assert count_macs(run, images) == macs


# --- Rounding -------------------------------------------------------------------------------------


def test_rounding_as_released():
    """With the oddities below 4, which come from a smallest result of 1."""
    expected = {1: 1, 2: 9, 3: 9, 4: 8, 8: 8, 9: 16, 10: 16, 11: 16, 12: 16, 16: 16, 20: 24, 36: 40}
    assert {channels: round_channels(channels) for channels in expected} == expected
    assert [round_channels(0.35 * channels) for channels in (64, 256)] == [24, 88]
    assert [round_channels(channels, 4) for channels in (1, 2, 3, 5, 6, 11)] == [1, 4, 4, 8, 8, 12]
    assert [round_channels(channels, 1) for channels in (0.2, 1.4, 1.5, 7.6)] == [1, 2, 2, 8]


@pytest.mark.parametrize("divisor", [1, 4, 8, 12, 16])
def test_no_layer_gets_more_channels_than_it_has(divisor):
    """Nor would 12 divide the 16, 32 and 64 of this network."""
    network = SlimmableCifarResNet(8, width_mult_range=(0.01, 1.0), divisor=divisor)
    for percent in range(1, 100):  # the full width is all channels, see below
        ratio = percent / 100
        for full, count in zip(network.group_channels, network.width(ratio).channels, strict=True):
            assert 1 <= count <= full
            assert count == rounded(full, ratio, divisor)


@pytest.mark.parametrize("divisor", [1, 4, 8, 12, 16])
def test_full_width_is_all_channels(divisor):
    network = SlimmableMobileNetV2(width_mult_range=(0.35, 1.0), divisor=divisor)
    assert network.width(1.0).channels == tuple(network.group_channels)
    assert network.width(1).channels == tuple(network.group_channels)


def test_default_divisor_keeps_thin_networks_thin():
    assert SlimmableCifarResNet(8, width_mult_range=(0.25, 1.0)).width(0.25).channels[0] == 4


@pytest.mark.parametrize("kind", ["universal", "switches"])
def test_hidden_width_and_tail_of_mobilenet_v2(kind):
    """The hidden width is six times the rounded input width; the last 1280 stay."""
    widths = {"width_mults": (0.35,)} if kind == "switches" else {"width_mult_range": (0.35, 1.0)}
    network = SlimmableMobileNetV2(num_classes=5, **widths).train()
    shapes = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape[1]))
        for module in network.modules()
        if isinstance(module, SlimmableConv2d)
    ]
    network(torch.randn(2, 3, 32, 32), 0.35)
    for hook in hooks:
        hook.remove()
    # 0.35 of 16, 24, 32, 64, 96, 160, 320 is 5.6, 8.4, 11.2, 22.4, 33.6, 56, 112.
    outs = (8, 8, 8, 16, 16, 16, 24, 24, 24, 24, 32, 32, 32, 56, 56, 56, 112)
    ins = (16, *outs[:-1])
    expected = [16, 16, 8]
    for x, out in list(zip(ins, outs, strict=True))[1:]:
        expected += [6 * x, 6 * x, out]
    assert shapes == [*expected, 1280]


# --- Layers: slicing ------------------------------------------------------------------------------

CONVS = {  # arguments of the wide layer, then inputs, outputs and groups of the narrow one
    "ordinary": ((8, 12, 3, 2, 1, 1, 1, False), (5, 7, 1)),
    "bias": ((8, 12, 3, 1, 2, 2, 1, True), (5, 7, 1)),
    "full": ((8, 12, 3, 1, 1, 1, 1, True), (8, 12, 1)),
    "fewer inputs only": ((8, 12, 1, 1, 0, 1, 1, True), (3, 12, 1)),
    "fewer outputs only": ((8, 12, 1, 1, 0, 1, 1, True), (8, 5, 1)),
    "depthwise": ((12, 12, 3, 2, 1, 1, 12, False), (7, 7, 7)),
    "depthwise bias": ((12, 12, 3, 1, 1, 1, 12, True), (5, 5, 5)),
    "grouped": ((12, 18, 3, 1, 1, 1, 3, False), (6, 9, 3)),
    "grouped bias": ((12, 18, 3, 2, 1, 1, 3, True), (9, 12, 3)),
    "reflected border": ((8, 12, 3, 2, 1, 1, 1, True, "reflect"), (5, 7, 1)),
    "circular depthwise": ((12, 12, 3, 1, 1, 1, 12, True, "circular"), (7, 7, 7)),
    "grouped, fewer inputs only": ((12, 18, 1, 1, 0, 1, 3, True), (6, 18, 3)),
}


@pytest.mark.parametrize("case", CONVS)
def test_narrow_convolution(case):
    """Every group is slimmed alike: out of each its first filters, of each of them the first."""
    arguments, (ins, outs, groups) = CONVS[case]
    torch.manual_seed(0)
    wide = SlimmableConv2d(*arguments).double()
    narrow = nn.Conv2d(ins, outs, *arguments[2:6], groups, *arguments[7:]).double()
    # Row by row, by hand: `kept` are the filters of the wide layer that the narrow one has.
    wide_groups = 1 if groups == ins and groups > 3 else arguments[6]
    per_group = wide.out_channels // wide_groups
    kept = [i for i in range(wide.out_channels) if i % per_group < outs // wide_groups]
    for row, source in enumerate(kept):
        narrow.weight.data[row] = wide.weight.data[source, : narrow.weight.shape[1]]
        if narrow.bias is not None:
            narrow.bias.data[row] = wide.bias.data[source]
    x = torch.randn(2, ins, 6, 6, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()

    out, expected = wide(x, outs), narrow(y)
    assert_near(out, expected)
    direction = torch.randn_like(expected)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_near(x.grad, y.grad)
    for row, source in enumerate(kept):
        assert_gradient_in_slice(wide.weight.grad[source], narrow.weight.grad[row])
    dropped = [i for i in range(wide.out_channels) if i not in kept]
    assert not wide.weight.grad[dropped].any()
    if narrow.bias is not None:
        assert_near(wide.bias.grad[kept], narrow.bias.grad)
        assert not wide.bias.grad[dropped].any()


def test_convolution_without_a_number_of_outputs():
    """All of them; of a depthwise convolution as many as inputs."""
    x = torch.randn(1, 4, 5, 5)
    assert SlimmableConv2d(8, 12, 3)(x).shape[1] == 12
    assert SlimmableConv2d(8, 8, 3, groups=8)(x).shape[1] == 4


def test_groups_that_do_not_divide_the_channels():
    conv = SlimmableConv2d(12, 18, 3, groups=3)
    with pytest.raises(ValueError, match="choose a divisor that is a multiple of 3"):
        conv(torch.randn(1, 7, 5, 5), 9)
    with pytest.raises(ValueError, match="choose a divisor that is a multiple of 3"):
        conv(torch.randn(1, 6, 5, 5), 8)


def test_narrow_linear():
    wide, narrow = SlimmableLinear(8, 5).double(), nn.Linear(3, 5).double()
    narrow.load_state_dict({"weight": wide.weight[:, :3], "bias": wide.bias})
    x = torch.randn(4, 3, dtype=torch.float64)
    out, expected = wide(x), narrow(x)
    assert_near(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert_gradient_in_slice(wide.weight.grad, narrow.weight.grad)
    assert_near(wide.bias.grad, narrow.bias.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["slimmable", "switchable"])
def test_narrow_batch_norm(kind, training):
    width = Width("0.5", (3,))
    narrow = nn.BatchNorm2d(3).double()
    for parameter in narrow.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    nn.init.normal_(narrow.running_mean)
    nn.init.uniform_(narrow.running_var, 0.5, 1.5)
    if kind == "slimmable":
        wide = source = SlimmableBatchNorm2d(8).double()
        wide.statistics["0.5"] = torch.stack([narrow.running_mean, narrow.running_var])
        wide.weight.data[:3], wide.bias.data[:3] = narrow.weight.data, narrow.bias.data
    else:
        wide = SwitchableBatchNorm2d({"1": 8, "0.5": 3}).double()
        source = wide.switches[1]
        source.load_state_dict(narrow.state_dict())
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    out, expected = wide.train(training)(x, width), narrow.train(training)(x)
    assert_near(out, expected)
    direction = torch.randn_like(expected)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_gradient_in_slice(source.weight.grad, narrow.weight.grad)
    assert_gradient_in_slice(source.bias.grad, narrow.bias.grad)


def test_first_layer_by_hand():
    """One number of a narrow layer, in scalar arithmetic."""
    network = make("cifar_resnet_14", width_mult_range=(0.25, 1.0))
    x = make_images(2, size=4)
    stem = network.units[0]
    out = stem(x, network.width(0.25))
    assert out.shape == (2, 4, 4, 4)
    padded = F.pad(x, (1, 1, 1, 1))
    responses = torch.stack(
        [
            (padded[n, :, i : i + 3, j : j + 3] * stem.conv.weight[3]).sum()
            for n in range(2)
            for i in range(4)
            for j in range(4)
        ]
    )
    mean = responses.mean()
    variance = (responses - mean).square().mean()
    normalised = (responses - mean) / (variance + 1e-5).sqrt()
    expected = (normalised * stem.norm.weight[3] + stem.norm.bias[3]).clamp_min(0)
    assert_near(out[:, 3].flatten(), expected)


# --- Networks: slicing ----------------------------------------------------------------------------


@pytest.mark.parametrize("width_mult", [0.35, "non-uniform"])
@pytest.mark.parametrize("name", NARROW_BUILDERS)
def test_width_w_is_the_narrow_network(name, width_mult):
    """In training and in evaluation, where each has gathered statistics in its own way."""
    wide = make(name, width_mult_range=(0.35, 1.0))
    if width_mult == "non-uniform":
        width_mult = ratios_for(wide)
    narrow = narrow_of(name, wide, width_mult)
    assert_same_training(wide, narrow, width_mult, make_images())

    batches = [make_images(seed=2), make_images(seed=3)]
    recalibrate(wide, batches, [partial(wide, width_mult=width_mult)])
    for module in narrow.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the average of all batches
    with torch.no_grad():
        for batch in batches:
            narrow(batch)
        assert_near(wide.eval()(make_images(), width_mult), narrow.eval()(make_images()))


def assert_same_training(wide, narrow, width_mult, images) -> None:
    """Compares logits and gradients; what the width leaves out has a gradient of exactly 0."""
    out, expected = wide.train()(images, width_mult), narrow.train()(images)
    assert_near(out, expected)
    gradients(wide, out)
    gradients(narrow, expected)
    used = set()
    for source, target in pairs(wide, narrow, width_mult):
        assert_gradient_in_slice(source.grad, target.grad)
        used.add(source)
    for parameter in wide.parameters():
        assert parameter in used or parameter.grad is None


@pytest.mark.parametrize("width_mult", [1.0, 0.5])
@pytest.mark.parametrize("name", NARROW_BUILDERS)
def test_switch_is_the_narrow_network(name, width_mult):
    wide = make(name, width_mults=(0.5, 1.0))
    narrow = narrow_of(name, wide, width_mult)
    assert_same_training(wide, narrow, width_mult, make_images())
    # Both have now seen one batch, with the momentum of an ordinary BN, from different beginnings.
    copy_statistics(wide, narrow, width_mult)
    with torch.no_grad():
        wide(make_images(seed=2), width_mult), narrow(make_images(seed=2))
        assert_near(wide.eval()(make_images(), width_mult), narrow.eval()(make_images()))


def copy_statistics(wide: SlimmableNetwork, narrow: nn.Module, width_mult: float) -> None:
    index = wide.width_mults.index(width_mult)
    norms = [module for module in wide.modules() if isinstance(module, SwitchableBatchNorm2d)]
    targets = [module for module in narrow.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, target in zip(norms, targets, strict=True):
        target.load_state_dict(norm.switches[index].state_dict())


def test_producer_defines_consumer():
    """A ratio changes its own group's outputs, and the inputs of whatever reads them."""
    network = make("cifar_resnet_14", width_mult_range=(0.25, 1.0))
    ratios = [1.0] * network.num_groups
    ratios[1] = 0.5  # the inside of the first block
    convs = [module for module in network.modules() if isinstance(module, SlimmableConv2d)]
    shapes = {}
    for conv in convs:
        conv.register_forward_hook(
            lambda conv, inputs, out: shapes.update({conv: (inputs[0].shape[1], out.shape[1])})
        )
    network.train()(make_images(2, size=8), ratios)
    assert shapes[convs[1]] == (16, 8)
    assert shapes[convs[2]] == (8, 16)
    for conv in convs[3:]:
        assert shapes[conv] == (conv.in_channels, conv.out_channels)


@pytest.mark.parametrize(
    ("name", "num_groups"),
    [
        ("mobilenet_v1", 1 + 13),
        ("mobilenet_v2", 1 + 7 + 16),
        ("resnet_50", 1 + 4 + 16),
        ("cifar_resnet_14", 1 + 2 + 6),
    ],
)
def test_layers_that_are_added_share_a_ratio(name, num_groups):
    """One per stage, whatever its number of blocks, and one per inside of a block."""
    network = WIDE_BUILDERS[name](width_mult_range=(0.25, 1.0))
    assert network.num_groups == num_groups


# --- Parity with torchvision ----------------------------------------------------------------------


def load_torchvision(wide: SlimmableNetwork, reference: nn.Module, width_mult: float) -> None:
    """Copies a torchvision network, numbers drawn, into one switch: in order of the modules."""
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    for source, target in pairs(wide, reference, width_mult):
        source.data[tuple(map(slice, target.shape))] = target.data
    index = wide.width_mults.index(width_mult)
    norms = [module for module in wide.modules() if isinstance(module, SwitchableBatchNorm2d)]
    sources = [module for module in reference.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm, source in zip(norms, sources, strict=True):
        norm.switches[index].load_state_dict(source.state_dict())


@pytest.mark.parametrize("width_mult", [1.0, 0.75, 0.5, 0.35])
def test_parity_with_torchvision_mobilenet_v2(width_mult):
    torch.manual_seed(0)
    wide = SlimmableMobileNetV2(10, width_mults=(0.35, 0.5, 0.75, 1.0)).double()
    reference = torchvision.models.MobileNetV2(10, width_mult=width_mult, dropout=0.0).double()
    load_torchvision(wide, reference, width_mult)
    images = make_images(size=32)
    for training in (False, True):
        out = wide.train(training)(images, width_mult)
        assert_near(out, reference.train(training)(images))


def test_parity_with_torchvision_resnet_50():
    torch.manual_seed(0)
    wide = SlimmableResNet(50, 10, width_mults=(1.0,)).double()
    reference = torchvision.models.resnet50(num_classes=10).double()
    load_torchvision(wide, reference, 1.0)
    images = make_images(size=32)
    for training in (False, True):
        assert_near(wide.train(training)(images), reference.train(training)(images))


@pytest.mark.parametrize("depth", [101, 152])
def test_depths_of_torchvision(on_meta, depth):
    network = SlimmableResNet(depth, width_mults=(1.0,))
    assert count_params(network) == count_params(getattr(torchvision.models, f"resnet{depth}")())


# --- Cutting out ----------------------------------------------------------------------------------


def calibrated(name: str, kind: str, dtype: torch.dtype = torch.float64):
    """Returns a network in evaluation mode and a width of it."""
    if kind == "switch":
        return make(name, dtype, width_mults=(0.5, 1.0)).eval(), 0.5
    network = make(name, dtype, width_mult_range=(0.35, 1.0)).eval()
    width_mult = 0.6 if kind == "uniform" else ratios_for(network)
    batches = [make_images(seed=2).to(dtype)]
    recalibrate(network, batches, [partial(network, width_mult=width_mult)])
    return network, width_mult


@pytest.mark.parametrize("kind", ["uniform", "non-uniform", "switch"])
@pytest.mark.parametrize("name", NARROW_BUILDERS)
def test_extract_computes_the_same(name, kind):
    network, width_mult = calibrated(name, kind)
    images = make_images()
    with torch.no_grad():
        expected = network(images, width_mult)
        assert_near(extract(network, width_mult)(images), expected)
        assert_near(extract(network, width_mult, fold_bn=True)(images), expected, 1e-10)


@pytest.mark.parametrize("name", CPU_SIZED)
def test_extract_computes_the_same_in_float32(name):
    network, width_mult = calibrated(name, "uniform", torch.float32)
    images = make_images().float()
    with torch.no_grad():
        expected = network(images, width_mult)
        assert_near(extract(network, width_mult)(images), expected, 1e-6)


@pytest.mark.parametrize("fold_bn", [False, True])
@pytest.mark.parametrize("kind", ["non-uniform", "switch"])
@pytest.mark.parametrize("name", CPU_SIZED)
def test_extract_leaves_no_trace(name, kind, fold_bn):
    """Ordinary modules in evaluation mode, on memory of their own; the network is as before."""
    network, width_mult = calibrated(name, kind)
    network.train()
    before = copy.deepcopy(network.state_dict())
    plain = extract(network, width_mult, fold_bn)
    assert not any(module.training for module in plain.modules())
    for module in plain.modules():
        ordinary = type(module).__module__.startswith("torch.nn.modules")
        assert ordinary or type(module) is Residual
        assert not (fold_bn and isinstance(module, nn.BatchNorm2d))
    assert all(module.training for module in network.modules())
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert memory(plain).isdisjoint(memory(network))


def memory(module: nn.Module) -> set[int]:
    """Returns where the numbers of a network lie, statistics of widths included."""
    tensors = [*module.parameters(), *module.buffers()]
    for part in module.modules():
        if isinstance(part, SlimmableBatchNorm2d):
            tensors += part.statistics.values()
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("name", CPU_SIZED)
def test_extract_draws_no_random_numbers(name):
    network, width_mult = calibrated(name, "uniform")
    before = torch.get_rng_state()
    extract(network, width_mult)
    extract(network, width_mult, fold_bn=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_fold_removes_every_batch_norm_and_nothing_else():
    network, width_mult = calibrated("cifar_resnet_14", "uniform")
    plain, folded = extract(network, width_mult), extract(network, width_mult, fold_bn=True)
    kinds = [type(m) for m in plain.modules() if not isinstance(m, nn.BatchNorm2d)]
    assert [type(m) for m in folded.modules()] == kinds


# --- Widths without statistics --------------------------------------------------------------------

REMEDY = r"width 0\.5 has no BN statistics \(calibrated: 1\): .*networks\.recalibrate"


def test_uncalibrated_width_is_an_error():
    """Running statistics of other widths make it a network of chance, without a word."""
    network = make("cifar_resnet_14", width_mult_range=(0.25, 1.0)).eval()
    with pytest.raises(ValueError, match="calibrated: none"):
        network(make_images())
    recalibrate(network, [make_images()])
    network(make_images())
    with pytest.raises(ValueError, match=REMEDY):
        network(make_images(), 0.5)
    with pytest.raises(ValueError, match=REMEDY):
        extract(network, 0.5)
    network.train()(make_images(), 0.5)


def test_training_leaves_no_statistics():
    """However long it trains, a width has none until it is recalibrated."""
    network = make("cifar_resnet_14", width_mult_range=(0.25, 1.0)).train()
    network(make_images(), 0.5)
    with pytest.raises(ValueError, match="calibrated: none"):
        network.eval()(make_images(), 0.5)


# --- Switches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CPU_SIZED)
def test_batch_norms_of_a_switch_are_private(name):
    network = make(name, width_mults=(0.5, 1.0)).train()
    norms = [m for m in network.modules() if isinstance(m, SwitchableBatchNorm2d)]
    private = [m for m in norms if m.switches[0].weight is not m.switches[1].weight]
    # The tail of MobileNet v2 has one scale and shift, as its 1280 channels are always there.
    assert len(norms) - len(private) == ("mobilenet" in name)
    others = {m: copy.deepcopy(m.switches[1].state_dict()) for m in norms}
    own = {m: copy.deepcopy(m.switches[0].state_dict()) for m in norms}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    gradients(network, network(make_images(), 0.5))
    optimizer.step()
    for norm in norms:
        for key, value in norm.switches[1].state_dict().items():
            unchanged = torch.equal(value, others[norm][key])
            assert unchanged == (norm in private or key not in ("weight", "bias"))
        # Not the shift, which the next BN takes back where there is no activation between.
        for key in ("weight", "running_mean", "running_var", "num_batches_tracked"):
            assert not torch.equal(norm.switches[0].state_dict()[key], own[norm][key]), key


def test_tied_tail_stays_tied():
    network = copy.deepcopy(make("mobilenet_v2", width_mults=(0.35, 0.5, 1.0)).float())
    tail = network.units[-1].norm
    assert len({id(switch.weight) for switch in tail.switches}) == 1
    assert len({id(switch.bias) for switch in tail.switches}) == 1
    assert len({id(switch.running_mean) for switch in tail.switches}) == 3


@pytest.mark.parametrize("width_mult", [0.75, 0.25, [0.5] * 9])
def test_switch_that_does_not_exist(width_mult):
    network = make("cifar_resnet_14", width_mults=(0.5, 1.0))
    with pytest.raises(ValueError, match=r"is none of 0\.5, 1: choose one of these"):
        network(make_images(), width_mult)


# --- State ----------------------------------------------------------------------------------------


def predictions(network: SlimmableNetwork) -> list[Tensor]:
    """Returns the logits of all that `stateful` has calibrated."""
    images = make_images().to(network.fc.weight)
    with torch.no_grad():
        return [network.eval()(images, width) for width in (0.5, 1.0, ratios_for(network))]


@pytest.fixture
def stateful() -> SlimmableNetwork:
    """A network with statistics of three widths."""
    network = make("cifar_resnet_14", width_mult_range=(0.25, 1.0))
    widths = (0.5, 1.0, ratios_for(network))
    runs = [partial(network, width_mult=width) for width in widths]
    recalibrate(network, [make_images(seed=2)], runs)
    return network


def through_state_dict(network: SlimmableNetwork) -> SlimmableNetwork:
    other = SlimmableCifarResNet(14, num_classes=5, width_mult_range=(0.25, 1.0)).double()
    other.load_state_dict(network.state_dict(), strict=True)
    return other


def through_file(network: SlimmableNetwork) -> SlimmableNetwork:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = SlimmableCifarResNet(14, num_classes=5, width_mult_range=(0.25, 1.0)).double()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return other


@pytest.mark.parametrize("way", [through_state_dict, through_file, copy.deepcopy])
def test_statistics_survive(stateful, way):
    torch.testing.assert_close(predictions(way(stateful)), predictions(stateful), rtol=0, atol=0)


def test_loading_drops_statistics_of_other_weights(stateful):
    fresh = SlimmableCifarResNet(14, num_classes=5, width_mult_range=(0.25, 1.0)).double()
    stateful.load_state_dict(fresh.state_dict())
    with pytest.raises(ValueError, match="calibrated: none"):
        stateful.eval()(make_images())


def test_copies_are_independent(stateful):
    """Recalibrating a network changes neither a copy of it nor one that took its state."""
    expected = predictions(stateful)
    others = [copy.deepcopy(stateful), through_state_dict(stateful)]
    recalibrate(stateful, [make_images(seed=3)], [partial(stateful, width_mult=0.5)])
    assert not torch.equal(predictions(stateful)[0], expected[0])
    for other in others:
        torch.testing.assert_close(predictions(other), expected, rtol=0, atol=0)


def test_statistics_follow_the_dtype(stateful):
    expected = predictions(stateful)
    as_float = copy.deepcopy(stateful).float()
    for actual in (as_float, copy.deepcopy(stateful).to(torch.float32)):
        tensors = [*norms_of(actual)[0].statistics.values()]
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        for out, logits in zip(predictions(actual), expected, strict=True):
            torch.testing.assert_close(out.double(), logits, rtol=1e-4, atol=1e-4)
    for out, logits in zip(predictions(as_float.double()), expected, strict=True):
        torch.testing.assert_close(out, logits, rtol=1e-4, atol=1e-4)
    assert {
        value.device.type for value in norms_of(stateful.to("meta"))[0].statistics.values()
    } == {"meta"}


def test_loaded_statistics_take_the_dtype_of_the_network(stateful):
    """As weights and the buffers of an ordinary BN do."""
    other = SlimmableCifarResNet(14, num_classes=5, width_mult_range=(0.25, 1.0))
    other.load_state_dict(stateful.state_dict())
    for out, logits in zip(predictions(other), predictions(stateful), strict=True):
        assert out.dtype == torch.float32
        torch.testing.assert_close(out.double(), logits, rtol=1e-4, atol=1e-4)


def norms_of(network: SlimmableNetwork) -> list[SlimmableBatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, SlimmableBatchNorm2d)]


@pytest.mark.parametrize("name", CPU_SIZED)
@pytest.mark.parametrize("widths", [{"width_mults": (0.5, 1.0)}, {"width_mult_range": (0.5, 1.0)}])
def test_forward_stores_nothing_on_a_layer(name, widths):
    """The width is an argument: no attribute changes, nor a member of one."""
    network = make(name, **widths).train()

    def members() -> dict:
        found = {}
        for path, module in network.named_modules():
            for attribute, value in vars(module).items():
                found[path, attribute] = value
                if isinstance(value, dict):
                    found.update({(path, attribute, key): item for key, item in value.items()})
        return found

    before = members()
    network(make_images(), 0.5).sum().backward()
    network(make_images())
    after = members()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key] is value, key
    assert not any(norm.statistics for norm in norms_of(network))


def test_widths_can_alternate():
    """One width leaves nothing behind that another could see."""
    network = make("cifar_resnet_14", width_mult_range=(0.25, 1.0)).train()
    images = make_images()
    first = network(images, 0.5)
    network(images), network(images, ratios_for(network))
    assert torch.equal(network(images, 0.5), first)


def test_names_tell_widths_apart_that_round_differently():
    """Else they would share statistics, of which there is another number: here 24.5 of 64 channels.

    Random widths are never this close to each other by chance alone, ends of a range may be.
    """
    network = SlimmableCifarResNet(8, width_mult_range=(0.25, 1.0), divisor=1)
    below, above = network.width(0.3828124), network.width(0.3828125)
    assert (below.name == above.name) == (below.channels == above.channels)


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*SWITCHES, partial(SlimmableCifarResNet, 8)])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either width_mults"),
        ({"width_mults": (0.5,), "width_mult_range": (0.25, 1.0)}, "give either width_mults"),
        ({"width_mults": ()}, "give one or more, each once"),
        ({"width_mults": (0.0, 1.0)}, r"give numbers in \(0, 1\]"),
        ({"width_mults": (0.5, 1.25)}, r"width_mults is \[0.5, 1.25\]: give numbers in \(0, 1\]"),
        ({"width_mults": (0.5, math.nan)}, r"give numbers in \(0, 1\]"),
        ({"width_mults": (0.5, 1.0, 0.5)}, "give one or more, each once"),
        ({"width_mult_range": (-0.5, 1.0)}, r"give numbers in \(0, 1\]"),
        ({"width_mult_range": (0.25, 1.5)}, r"give numbers in \(0, 1\]"),
        ({"width_mult_range": (1.0, 0.25)}, r"\[1.0, 0.25\]: give the narrowest"),
        ({"width_mult_range": (0.5, 0.5)}, "give the narrowest width, then"),
        ({"width_mults": (1.0,), "divisor": 0}, "divisor is 0: give a whole number from 1 to"),
        # All widths would have all channels of the group.
        (
            {"width_mult_range": (0.5, 1.0), "divisor": 65},
            r"divisor 65 is more than the \d+ channels",
        ),
    ],
)
def test_bad_widths(kind, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        kind(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bounds", [(0.25,), (0.25, 0.5, 1.0)])
def test_range_has_two_ends(bounds):
    with pytest.raises(ValueError, match="width_mult_range"):
        SlimmableCifarResNet(8, width_mult_range=bounds)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("width_mult", "message"),
    [
        (0.2, "width 0.2 is outside the range 0.25 to 0.9"),
        (0.95, "width 0.95 is outside the range 0.25 to 0.9"),
        (math.nan, "outside the range"),
        ([0.5, 0.5, 0.5], "3 widths for 6 groups: give one per group"),
        ([], "0 widths for 6 groups"),
        ([0.5] * 7, "7 widths for 6 groups"),
        ([0.5] * 5 + [0.1], "outside the range 0.25 to 0.9"),
    ],
)
def test_bad_width(width_mult, message, training):
    network = SlimmableCifarResNet(8, width_mult_range=(0.25, 0.9)).train(training)
    with pytest.raises(ValueError, match=message):
        network(torch.randn(2, 3, 8, 8), width_mult)
    with pytest.raises(ValueError, match=message):
        extract(network, width_mult)


def test_ends_of_the_range_belong_to_it():
    """As do numbers that arithmetic has put a last bit beyond: 3 * 0.2 is above 0.6."""
    network = SlimmableCifarResNet(8, width_mult_range=(0.25, 0.6))
    for width_mult in (0.25, 0.6, 3 * 0.2, [0.25, 0.6] * 3):
        network(torch.randn(2, 3, 8, 8), width_mult)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SlimmableResNet(34, width_mults=(1.0,)), "depth is 34: give 50, 101 or 152"),
        (lambda: SlimmableCifarResNet(21, width_mults=(1.0,)), "depth is 21: give 6n"),
        (lambda: SlimmableCifarResNet(2, width_mults=(1.0,)), "depth is 2: give 6n"),
        (lambda: SlimmableCifarResNet(-4, width_mults=(1.0,)), "depth is -4: give 6n"),
    ],
)
def test_bad_depth(build, message):
    with pytest.raises(ValueError, match=message):
        build()

"""MSDNet, against the counts of the released code and a plain network written from its formulas."""

import copy
import itertools
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from kernel_count import KernelCount
from torch import Tensor, nn

from benchmarks.msdnet_step import PlainMSDNet, total_loss
from networks import (
    MSDNet,
    Staged,
    count_exit_macs,
    count_params,
    early_exit,
    exit_score,
    load_weights,
    run_all_exits,
    run_to_exit,
)
from networks.early_exit import leaves
from networks.rows import take_rows

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()

# --- The formulas of the released code, in plain arithmetic; layers and scales count from 1 ---


class Branch(NamedTuple):
    """Channels of a branch: of what it reads, of its bottleneck, of what it adds."""

    reads: int
    inner: int
    adds: int


class PlainCell(NamedTuple):
    down: Branch | None
    normal: Branch
    transition: tuple[int, int] | None


class Plain(NamedTuple):
    cells: dict[tuple[int, int], PlainCell]
    depths: list[int]
    exit_channels: list[int]


def bottleneck(reads: int, factor: int, adds: int) -> Branch:
    return Branch(reads, min(reads, factor * adds), adds)


def plain(
    num_blocks,
    base,
    step,
    step_mode="even",
    num_channels=16,
    growth_rate=6,
    growth_factors=(1, 2, 4),
    bottleneck_factors=(1, 2, 4),
    prune="max",
    reduction=0.5,
    **others,
) -> Plain:
    """Returns the cells by layer and scale, the depths, and the channels that each exit reads."""
    last = len(growth_factors)
    steps = [base]
    for i in range(1, num_blocks):
        steps.append(step if step_mode == "even" else step * i + 1)
    depths = [sum(steps[: i + 1]) for i in range(num_blocks)]
    total = depths[-1]
    interval = math.ceil(total / last)
    cells, exit_channels, width = {}, [], num_channels
    for layer in range(1, total + 1):
        if prune == "max":
            scales_in = last - max(0, layer - 2) // interval
            scales_out = last - (layer - 1) // interval
            is_cut = scales_out < scales_in
        else:
            scales_in = min(last, total - layer + 2)
            scales_out = min(last, total - layer + 1)
            is_cut = layer in (math.floor(total / 3), math.floor(2 * total / 3))
        wider = width + growth_rate
        kept = math.floor(reduction * wider) if is_cut else wider
        finest = last - scales_out + 1
        for scale in range(finest, last + 1):
            here = growth_factors[scale - 1]
            if scale == finest and scales_in == scales_out:
                down = None
                normal = bottleneck(width * here, bottleneck_factors[scale - 1], growth_rate * here)
            else:
                finer, half = growth_factors[scale - 2], growth_rate * here // 2
                down = bottleneck(width * finer, bottleneck_factors[scale - 2], half)
                normal = bottleneck(width * here, bottleneck_factors[scale - 1], half)
            transition = (wider * here, kept * here) if is_cut else None
            cells[layer, scale] = PlainCell(down, normal, transition)
        width = kept
        if layer in depths:
            exit_channels.append(width * growth_factors[-1])
    return Plain(cells, depths, exit_channels)


class Conv(NamedTuple):
    """A convolution with its BN and ReLU."""

    reads: int
    makes: int
    size: int
    pixels: int

    @property
    def macs(self) -> int:
        return self.reads * self.makes * self.size**2 * self.pixels

    @property
    def params(self) -> int:
        return self.reads * self.makes * self.size**2 + 2 * self.makes

    @property
    def relus(self) -> int:
        return self.makes * self.pixels


class Costs(NamedTuple):
    macs: list[int]
    lazy_macs: list[int]
    params: list[int]
    lazy_params: list[int]
    ops: list[int]
    """MACs and what else the released code counts: ReLUs, pooled numbers, linear biases."""


def needed(cells: dict[tuple[int, int], PlainCell], layer: int, scale: int) -> set:
    """Returns the cells that one cell needs, by going back through what each reads."""
    found, front = set(), {(layer, scale)}
    while front:
        found |= front
        same = {(a - 1, b) for a, b in front if a > 1}
        front = same | {(a - 1, b - 1) for a, b in front if a > 1 and cells[a, b].down}
    return found


def plain_costs(config: dict, side: int) -> Costs:
    """Returns what it costs to leave at each exit, all exits before it included."""
    cells, depths, exit_channels = plain(**config)
    imagenet = config.get("variant") == "imagenet"
    factors = config.get("growth_factors", (1, 2, 4))
    widths = [config.get("num_channels", 16) * factor for factor in factors]
    num_classes = config.get("num_classes", 10)

    first_side = (side + 1) // 2 if imagenet else side
    stem = [Conv(3, widths[0], 7 if imagenet else 3, first_side**2)]
    sides = [(first_side + 1) // 2 if imagenet else side]
    for reads, makes in itertools.pairwise(widths):
        sides.append((sides[-1] + 1) // 2)
        stem.append(Conv(reads, makes, 3, sides[-1] ** 2))

    convs = {}
    for (layer, scale), cell in cells.items():
        here = sides[scale - 1] ** 2
        made = [Conv(cell.normal.reads, cell.normal.inner, 1, here)]
        made.append(Conv(cell.normal.inner, cell.normal.adds, 3, here))
        if cell.down:
            made.append(Conv(cell.down.reads, cell.down.inner, 1, sides[scale - 2] ** 2))
            made.append(Conv(cell.down.inner, cell.down.adds, 3, here))
        if cell.transition:
            made.append(Conv(*cell.transition, 1, here))
        convs[layer, scale] = made

    costs = Costs([], [], [], [], [])
    exits, linear_weights, linear_biases, seen = [], 0, 0, set()
    pooled = 9 * widths[0] * sides[0] ** 2 if imagenet else 0
    for depth, channels in zip(depths, exit_channels, strict=True):
        inner = channels if imagenet else 128
        first, second = (sides[-1] + 1) // 2, ((sides[-1] + 1) // 2 + 1) // 2
        exits += [Conv(channels, inner, 3, first**2), Conv(inner, inner, 3, second**2)]
        linear_weights += inner * num_classes
        linear_biases += num_classes
        pooled += inner * second**2
        seen |= needed(cells, depth, len(widths))
        run = [conv for (layer, _), made in convs.items() if layer <= depth for conv in made]
        run = [*stem, *run, *exits]
        run_lazily = [*stem, *(conv for cell in seen for conv in convs[cell]), *exits]
        costs.macs.append(linear_weights + sum(conv.macs for conv in run))
        costs.lazy_macs.append(linear_weights + sum(conv.macs for conv in run_lazily))
        linear = linear_weights + linear_biases
        costs.params.append(linear + sum(conv.params for conv in run))
        costs.lazy_params.append(linear + sum(conv.params for conv in run_lazily))
        costs.ops.append(linear + sum(conv.macs + conv.relus for conv in run) + pooled)
    return costs


# --- Counts: no tolerance ---

IMAGENET = {
    "num_channels": 32,
    "growth_rate": 16,
    "growth_factors": (1, 2, 4, 4),
    "bottleneck_factors": (1, 2, 4, 4),
    "num_classes": 1000,
    "variant": "imagenet",
}
COUNTS = {  # params; MACs to leave at each exit, M; what the authors count, M; params so far, M
    "c10_even7": (
        {"num_blocks": 7, "base": 4, "step": 2},
        2_986_690,
        [14.96, 25.24, 36.75, 45.93, 56.88, 66.46, 75.41],
        [15.13, 25.48, 37.06, 46.28, 57.28, 66.89, 75.86],
        [0.422, 0.854, 1.240, 1.649, 2.120, 2.534, 2.987],
    ),
    "c100_even7": (
        {"num_blocks": 7, "base": 4, "step": 2, "num_classes": 100},
        3_067_960,
        [14.97, 25.26, 36.78, 45.97, 56.93, 66.53, 75.49],
        [15.14, 25.51, 37.10, 46.33, 57.34, 66.96, 75.94],
        [0.434, 0.877, 1.275, 1.696, 2.178, 2.603, 3.068],
    ),
    "c10_even10": (
        {"num_blocks": 10, "base": 4, "step": 2},
        4_839_544,
        [14.96, 25.24, 37.43, 51.62, 61.69, 73.52, 87.13, 99.39, 109.44, 120.97],
        [15.13, 25.48, 37.75, 52.02, 62.12, 74.00, 87.65, 99.95, 110.02, 121.56],
        [0.422, 0.854, 1.347, 1.781, 2.221, 2.724, 3.288, 3.772, 4.274, 4.840],
    ),
    "c100_even11": (
        {"num_blocks": 11, "base": 4, "step": 2, "num_classes": 100},
        5_597_760,
        [14.97, 25.26, 37.47, 51.67, 61.74, 73.59, 87.21, 99.48, 109.55, 121.09, 134.10],
        [15.14, 25.51, 37.79, 52.06, 62.18, 74.07, 87.73, 100.04, 110.12, 121.68, 134.71],
        [0.434, 0.877, 1.382, 1.828, 2.280, 2.793, 3.370, 3.865, 4.378, 4.956, 5.598],
    ),
    "c10_lin_grow5": (
        {"num_blocks": 5, "base": 1, "step": 1, "step_mode": "lin_grow"},
        2_020_874,
        [6.78, 14.19, 27.24, 41.33, 58.03],
        [6.85, 14.33, 27.50, 41.67, 58.42],
        [0.288, 0.627, 0.983, 1.446, 2.021],
    ),
    "c100_lin_grow5": (
        {"num_blocks": 5, "base": 1, "step": 1, "step_mode": "lin_grow", "num_classes": 100},
        2_078_924,
        [6.79, 14.21, 27.28, 41.37, 58.09],
        [6.86, 14.35, 27.54, 41.71, 58.48],
        [0.300, 0.650, 1.018, 1.492, 2.079],
    ),
    "c10_lin_grow7": (
        {"num_blocks": 7, "base": 1, "step": 1, "step_mode": "lin_grow"},
        3_885_394,
        [6.78, 14.19, 27.01, 48.01, 75.84, 108.12, 136.48],
        [6.85, 14.33, 27.26, 48.40, 76.37, 108.78, 137.20],
        [0.288, 0.627, 1.077, 1.681, 2.327, 2.983, 3.885],
    ),
    "imagenet_4_4": (
        {"num_blocks": 5, "base": 4, "step": 4, **IMAGENET},
        23_958_440,
        [337.21, 681.65, 1003.66, 1249.63, 1355.61],
        [339.90, 685.46, 1008.16, 1254.47, 1360.53],
        [4.239, 8.772, 13.073, 16.748, 23.958],
    ),
    "imagenet_7_4": (
        {"num_blocks": 5, "base": 7, "step": 4, **IMAGENET},
        31_096_088,
        [626.46, 959.65, 1330.16, 1617.43, 1738.13],
        [630.20, 964.20, 1335.31, 1622.93, 1743.71],
        [4.361, 11.519, 17.911, 22.587, 31.096],
    ),
    "imagenet_7_7": (
        {"num_blocks": 5, "base": 7, "step": 7, **IMAGENET},
        62_314_472,
        [612.03, 1430.81, 2276.39, 2959.94, 3246.18],
        [615.69, 1436.39, 2283.21, 2967.42, 3253.79],
        [8.759, 20.155, 31.730, 41.860, 62.314],
    ),
    "imagenet_10_7": (
        {"num_blocks": 5, "base": 10, "step": 7, **IMAGENET},
        80_217_816,
        [968.76, 1881.05, 2812.45, 3571.67, 3883.13],
        [973.39, 1887.38, 2819.93, 3579.82, 3891.41],
        [14.861, 30.879, 45.778, 57.583, 80.218],
    ),
}


def leaving_by_hooks(network: MSDNet, image: Tensor) -> tuple[list[int], list[int]]:
    """Returns MACs and parameters of what was run when each exit answers, in one pass."""
    macs, used, rows = 0, {}, []

    def count(layer, inputs, output):
        nonlocal macs
        assert layer not in used, "a layer ran twice"
        used[layer] = sum(p.numel() for p in layer.parameters())
        if not isinstance(layer, nn.BatchNorm2d):
            macs += output.numel() * layer.weight[0].numel()
        if isinstance(layer, nn.Linear):
            rows.append((macs, sum(used.values())))

    hooks = [m.register_forward_hook(count) for m in network.modules() if hasattr(m, "weight")]
    with torch.no_grad():
        network(image)
    for hook in hooks:
        hook.remove()
    macs_so_far, params_so_far = zip(*rows, strict=True)
    return list(macs_so_far), list(params_so_far)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_of_the_released_code(name):
    config, num_params, macs, ops, params_so_far = COUNTS[name]
    # Small networks are counted sooner on the CPU. The 7x7 convolution has 32 biases, over there.
    device, side, bias = ("meta", 224, 32) if name.startswith("imagenet") else ("cpu", 32, 0)
    image = torch.empty(1, 3, side, side, device=device)
    with torch.device(device):
        network, lazy = MSDNet(**config).eval(), MSDNet(**config, lazy=True).eval()
    expected = plain_costs(config, side)
    assert [round(x / 1e6, 2) for x in expected.macs] == macs
    assert [round((x + bias) / 1e6, 3) for x in expected.params] == params_so_far
    assert [round(x / 1e6, 2) for x in expected.ops] == ops

    assert count_exit_macs(network, image).leaving == expected.macs
    assert leaving_by_hooks(network, image) == (expected.macs, expected.params)
    assert count_params(network) == expected.params[-1] == num_params - bias
    assert leaving_by_hooks(lazy, image) == (expected.lazy_macs, expected.lazy_params)
    assert expected.lazy_macs[0] < expected.macs[0]
    assert expected.lazy_macs[-1] == expected.macs[-1]


TINY = {  # two scales in two layers, then one in two
    "num_blocks": 2,
    "base": 2,
    "step": 2,
    "num_channels": 4,
    "growth_rate": 2,
    "growth_factors": (1, 2),
    "bottleneck_factors": (1, 2),
}


def test_counts_by_hand():
    """Of an image of 8x8 pixels, 64 at the fine scale and 16 at the coarse one."""
    stem = 3 * 4 * 9 * 64 + 4 * 8 * 9 * 16
    fine1 = 4 * 2 * 64 + 2 * 2 * 9 * 64
    coarse1 = 4 * 2 * 64 + 2 * 2 * 9 * 16 + 8 * 4 * 16 + 4 * 2 * 9 * 16
    fine2 = 6 * 2 * 64 + 2 * 2 * 9 * 64
    coarse2 = 6 * 2 * 64 + 2 * 2 * 9 * 16 + 12 * 4 * 16 + 4 * 2 * 9 * 16
    exit1 = 16 * 128 * 9 * 4 + 128 * 128 * 9 + 128 * 10
    coarse3 = 8 * 2 * 64 + 2 * 2 * 9 * 16 + 16 * 4 * 16 + 4 * 2 * 9 * 16 + 20 * 10 * 16
    coarse4 = 10 * 8 * 16 + 8 * 4 * 9 * 16
    exit2 = 14 * 128 * 9 * 4 + 128 * 128 * 9 + 128 * 10

    image = torch.empty(1, 3, 8, 8, device="meta")
    with torch.device("meta"):
        costs, lazy_costs = (
            count_exit_macs(MSDNet(**TINY, lazy=lazy).eval(), image) for lazy in (False, True)
        )
    assert costs == (
        [stem + fine1 + coarse1 + fine2 + coarse2, coarse3 + coarse4],
        [exit1, exit2],
    )
    assert lazy_costs == (
        [stem + fine1 + coarse1 + coarse2, fine2 + coarse3 + coarse4],
        [exit1, exit2],
    )
    assert costs.leaving == [245_888, 472_000]
    assert lazy_costs.leaving == [242_816, 472_000]


@pytest.mark.parametrize(
    ("arguments", "depths"),
    [
        ({"num_blocks": 5, "base": 1, "step": 1, "step_mode": "lin_grow"}, (1, 3, 6, 10, 15)),
        ({"num_blocks": 3, "base": 3, "step": 2, "step_mode": "lin_grow"}, (3, 6, 11)),
        ({"num_blocks": 11, "base": 4, "step": 2}, (4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24)),
        ({"num_blocks": 1, "base": 6, "step": 1}, (6,)),
    ],
)
def test_depths(arguments, depths):
    with torch.device("meta"):
        network = MSDNet(**arguments)
    assert network.depths == depths
    assert network.num_exits == arguments["num_blocks"]
    assert len(network.layers) == depths[-1]


# --- The architecture, written out ---

CONFIGS = {  # factors all different, for a mistaken one to show
    "max": {"num_blocks": 3, "base": 2, "step": 2},
    "lin_grow": {"num_blocks": 4, "base": 1, "step": 1, "step_mode": "lin_grow", "reduction": 0.7},
    "min": {"num_blocks": 3, "base": 2, "step": 2, "prune": "min"},
    "min, two layers": {"num_blocks": 2, "base": 1, "step": 1, "prune": "min"},
    "imagenet": {
        "num_blocks": 2,
        "base": 3,
        "step": 5,
        "growth_factors": (2, 3, 1, 4),
        "bottleneck_factors": (1, 3, 4, 2),
        "variant": "imagenet",
    },
    "one scale": {
        "num_blocks": 2,
        "base": 1,
        "step": 2,
        "growth_factors": (3,),
        "bottleneck_factors": (2,),
    },
}
BATCH_SIZE = 4


def full_config(name: str) -> dict:
    small = {"num_channels": 5, "growth_rate": 2, "num_classes": 7}
    factors = {"growth_factors": (1, 3, 2), "bottleneck_factors": (1, 6, 2)}
    return {**small, **factors, **CONFIGS[name]}


def build(name: str, lazy: bool = False) -> MSDNet:
    """Returns a network in float64, all of whose numbers are drawn."""
    torch.manual_seed(0)
    network = MSDNet(**full_config(name), lazy=lazy)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            nn.init.uniform_(module.bias, 0, 0.5)  # few ReLUs are shut for all images
    return network.double().eval()


def make_images(num_images: int = BATCH_SIZE, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_images, 3, side, side, dtype=torch.float64, generator=generator)


def conv_bn_relu(layers: list[nn.Module], x: Tensor, stride: int = 1) -> Tensor:
    """Applies the next convolution and BN of a list, which it takes out of it."""
    conv, bn = layers.pop(0), layers.pop(0)
    x = F.conv2d(x, conv.weight, None, stride, conv.weight.shape[-1] // 2)
    if bn.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = bn.running_mean, bn.running_var
    scale = bn.weight / (var + 1e-5).sqrt()
    x = x * scale[:, None, None] + (bn.bias - mean * scale)[:, None, None]
    return x.clamp(min=0)


def written(network: MSDNet, config: dict, images: Tensor) -> list[Tensor]:
    """Computes all exits, layer by layer, with the layers of a network in order of definition."""
    cells, depths, _ = plain(**config)
    stem, trunk, *exits = (
        [layer for layer in part.modules() if hasattr(layer, "weight")]
        for part in (network.stem, network.layers, *network.exits)
    )
    last = len(config["growth_factors"])
    if config.get("variant") == "imagenet":
        x = conv_bn_relu(stem, images, 2)
        windows = F.pad(x, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2)  # x is not negative
        features = {1: windows.amax((-2, -1))}
    else:
        features = {1: conv_bn_relu(stem, images)}
    for scale in range(2, last + 1):
        features[scale] = conv_bn_relu(stem, features[scale - 1], 2)

    logits = []
    for layer in range(1, depths[-1] + 1):
        before, features = features, {}
        for scale in range(1, last + 1):
            if (layer, scale) not in cells:
                continue
            parts = [before[scale]]
            if cells[layer, scale].down:
                x = conv_bn_relu(trunk, before[scale - 1])
                parts.append(conv_bn_relu(trunk, x, 2))
            x = conv_bn_relu(trunk, before[scale])
            parts.append(conv_bn_relu(trunk, x))
            features[scale] = torch.cat(parts, 1)
            if cells[layer, scale].transition:
                features[scale] = conv_bn_relu(trunk, features[scale])
        if layer in depths:
            layers = exits[len(logits)]
            x = conv_bn_relu(layers, conv_bn_relu(layers, features[last], 2), 2)
            logits.append(x.mean((2, 3)) @ layers[0].weight.T + layers[0].bias)
    assert not stem
    assert not trunk
    return logits


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_networks_are_those_written_out(name, lazy, training):
    network = build(name, lazy).train(training)
    images = make_images(side=19 if training else 16)
    expected = written(network, full_config(name), images)
    actual = network(images)
    assert [logits.shape for logits in actual] == [(BATCH_SIZE, 7)] * network.num_exits
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    parameters = dict(network.named_parameters())
    labels = torch.arange(BATCH_SIZE)
    ours, theirs = (
        torch.autograd.grad(
            sum(F.cross_entropy(logits, labels) for logits in each), parameters.values()
        )
        for each in (actual, expected)
    )
    for key, mine, other in zip(parameters, ours, theirs, strict=True):
        assert not training or other.any(), key  # an untrained BN may shut a ReLU
        tolerance = 1e-9 * other.abs().max().item() + 1e-12
        torch.testing.assert_close(mine, other, rtol=0, atol=tolerance, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_counts_of_other_networks(name, lazy):
    """Bottlenecks that are no narrower than what they read, other factors, odd sizes."""
    config = full_config(name)
    expected = plain_costs(config, 19)
    expected = (
        (expected.lazy_macs, expected.lazy_params) if lazy else (expected.macs, expected.params)
    )
    network = MSDNet(**config, lazy=lazy).eval()
    assert leaving_by_hooks(network, torch.zeros(1, 3, 19, 19)) == expected


def test_pooling_of_the_released_sizes_is_that_of_all_pixels():
    """At 32x32 and 224x224 the released 2x2 pooling sees all there is."""
    for variant, side in [("cifar", 32), ("imagenet", 224)]:
        config = full_config("imagenet" if variant == "imagenet" else "max")
        with torch.device("meta"):
            network = MSDNet(**config)
            state = network.stages[0](torch.empty(2, 3, side, side))
            assert network.exits[0][:2](state).shape[2:] == (2, 2)


def test_convolutions_have_no_bias():
    with torch.device("meta"):
        network = MSDNet(**full_config("imagenet"))
    assert all(layer.bias is None for layer in network.modules() if isinstance(layer, nn.Conv2d))


def test_weights_start_from_he_fan_out():
    """N(0, 2 / fan out) in the convolutions; linear layers have torch's default and no bias."""
    torch.manual_seed(0)
    network = MSDNet(num_blocks=3, base=2, step=2)
    squares = []  # of the weights in units of their standard deviation
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            unit = layer.weight.detach() / (2 / fan_out) ** 0.5
            bound = 5 * (2 / unit.numel()) ** 0.5
            assert unit.square().mean().item() == pytest.approx(1, abs=bound)
            assert abs(unit.mean().item()) < 5 / unit.numel() ** 0.5
            squares.append(unit.flatten().square())
        elif isinstance(layer, nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert not layer.bias.any()
        elif isinstance(layer, nn.Linear):
            assert not layer.bias.any()
            limit = layer.in_features**-0.5
            assert 0.98 * limit < layer.weight.abs().max().item() <= limit
    squares = torch.cat(squares)  # the fourth moment of a normal distribution
    bound = 5 * (96 / len(squares)) ** 0.5
    assert squares.square().mean().item() == pytest.approx(3, abs=bound)


# --- Stages and lazy evaluation ---


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CONFIGS)
def test_lazy_evaluation_changes_no_bit(name, dtype):
    eager, lazy = build(name).to(dtype), build(name, lazy=True).to(dtype)
    lazy.load_state_dict(eager.state_dict())
    images = make_images().to(dtype)
    expected = eager(images)
    for index, (logits, other) in enumerate(zip(expected, lazy(images), strict=True)):
        assert torch.equal(logits, other)
        assert torch.equal(logits, run_to_exit(eager, index, images))
        assert torch.equal(logits, run_to_exit(lazy, index, images))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_exit_runs_only_what_it_needs_and_nothing_twice(name):
    """With lazy evaluation; what an exit needs is what its gradient reaches."""
    network, images = build(name, lazy=True), make_images()
    runs = []
    hooks = [m.register_forward_hook(lambda m, *_: runs.append(m)) for m in network.modules()]
    network(images)
    ran = [m for m in runs if isinstance(m, nn.Conv2d)]
    assert len(ran) == len(set(ran))
    assert set(ran) == {m for m in network.modules() if isinstance(m, nn.Conv2d)}
    parameters = list(network.parameters())
    for index in range(network.num_exits):
        runs.clear()
        logits = run_to_exit(network, index, images)
        run = {p for module in runs for p in module.parameters(recurse=False)}
        gradients = torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
        reached = {p for p, g in zip(parameters, gradients, strict=True) if g is not None}
        assert run == reached
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_hold_what_is_read_later_and_no_more(name, lazy):
    network = build(name, lazy)
    state = make_images(side=19)
    for index in range(network.num_exits):
        state = [tensor.detach().requires_grad_() for tensor in network.stages[index](state)]
        rest = Staged(network.stages[index + 1 :], network.exits[index + 1 :])
        logits = [network.exits[index](state), *run_all_exits(rest, state)]
        gradients = torch.autograd.grad(sum(each.square().sum() for each in logits), state)
        assert all(gradient.any() for gradient in gradients)
        for finer, coarser in itertools.pairwise(state):
            assert [-(-side // 2) for side in finer.shape[2:]] == list(coarser.shape[2:])


@pytest.mark.parametrize(
    ("base", "lazy", "sides"),
    [  # of ten layers; the 5th drops the finest scale, and the 9th the middle one
        (4, False, [16, 8, 4]),
        (5, False, [8, 4]),
        (8, False, [8, 4]),
        (9, False, [4]),
        # A diagonal from the 5th layer of the coarsest scale to the 4th of the middle one.
        (5, True, [16, 8, 4]),
        (6, True, [8, 4]),
        (8, True, [8, 4]),
        (9, True, [4]),
    ],
)
def test_scales_of_the_states(base, lazy, sides):
    with torch.device("meta"):
        first, last = MSDNet(2, base, 10 - base, lazy=lazy).stages
        state = first(torch.empty(2, 3, 16, 16))
        assert [tensor.shape[2] for tensor in state] == sides
        assert [tensor.shape[2] for tensor in last(state)] == [4]


@torch.no_grad()
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_a_state_are_images(name, lazy):
    network, images = build(name, lazy), make_images(num_images=5)
    rows = torch.tensor([4, 0, 3])
    state, part = images, images[rows]
    for stage, exit_here in zip(network.stages, network.exits, strict=True):
        state, part = stage(state), stage(part)
        for tensor, few in zip(state, part, strict=True):
            torch.testing.assert_close(take_rows(tensor, rows), few, rtol=1e-10, atol=1e-12)
        before = copy.deepcopy(state)
        exit_here(state)  # must leave alone what the next stage reads
        torch.testing.assert_close(state, before, rtol=0, atol=0)
        part = [take_rows(tensor, rows) for tensor in state]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("criterion", ["entropy", "confidence"])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_leaving_early_is_the_full_pass_at_that_exit(name, lazy, criterion, device):
    network, images = build(name, lazy).to(device), make_images(num_images=16).to(device)
    with torch.no_grad():
        full = torch.stack(network(images), 1)
    num_exits = network.num_exits
    scores = torch.stack([exit_score(full[:, index], criterion) for index in range(num_exits)], 1)
    thresholds, inside = [], torch.ones_like(scores[:, 0], dtype=torch.bool)
    for column in scores.T[:-1]:  # half of those who are left leave, and nobody narrowly
        values = column[inside].sort().values
        thresholds.append(values[len(values) // 2 - 1 :][:2].mean().item())
        inside &= ~leaves(column, thresholds[-1], criterion)
    answers = early_exit(network, images, thresholds, criterion)
    assert set(answers.exit_index.tolist()) == set(range(num_exits))
    expected = full[torch.arange(len(images)), answers.exit_index.cpu()]
    torch.testing.assert_close(answers.logits, expected, rtol=1e-10, atol=1e-12)
    for row in range(4):
        alone = early_exit(network, images[row : row + 1], thresholds, criterion)
        torch.testing.assert_close(alone.logits[0], expected[row], rtol=1e-10, atol=1e-12)
        assert alone.exit_index[0] == answers.exit_index[row]


@torch.no_grad()
def test_channels_last_stays_and_agrees():
    network, images = build("max", lazy=True), make_images()
    expected = network(images)
    network = network.to(memory_format=torch.channels_last)
    state = images.to(memory_format=torch.channels_last)
    for stage, exit_here, logits in zip(network.stages, network.exits, expected, strict=True):
        state = stage(state)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in state)
        torch.testing.assert_close(exit_here(state), logits, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_the_trunk_is_all_but_the_early_exits():
    source, network = build("max"), MSDNet(**full_config("max"), lazy=True).double().eval()
    early = copy.deepcopy(network.exits[:-1])
    weights = source.state_dict()
    del weights["exits.0.4.weight"]
    load_weights(network, weights)
    images = make_images()
    assert torch.equal(network(images)[-1], source(images)[-1])
    for exit_here, before in zip(network.exits, early, strict=False):
        torch.testing.assert_close(exit_here.state_dict(), before.state_dict(), rtol=0, atol=0)


# --- Training calls functions instead of modules ---


def train_once(network: MSDNet, autocast: bool = False) -> dict[str, Tensor]:
    """Returns everything that a step leaves behind."""
    network.zero_grad()
    images = make_images(side=19).to(network.stem[0][0].weight.dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = network(images)
        loss = sum(F.cross_entropy(each, torch.arange(BATCH_SIZE)) for each in logits)
    loss.backward()
    return {
        **{str(index): each.detach() for index, each in enumerate(logits)},
        **{f"{name}.grad": parameter.grad for name, parameter in network.named_parameters()},
        **{name: buffer.clone() for name, buffer in network.named_buffers()},
    }


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_training_is_that_of_modules_with_hooks(name, lazy, autocast):
    """A module that has hooks is called; outputs, gradients and statistics are the same bits."""
    if autocast and name == "imagenet":
        pytest.skip("oneDNN's bf16 gradients of its exits differ from run to run")
    network = build(name, lazy).train()
    if autocast:
        network.float()
    twin, called = copy.deepcopy(network), set()
    for key, module in twin.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda *_, key=key: called.add(key))
    actual, expected = train_once(network, autocast), train_once(twin, autocast)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert called == {key for key, module in twin.named_modules() if not list(module.children())}
    counters = [value for key, value in actual.items() if key.endswith("num_batches_tracked")]
    assert counters
    assert all(counter == 1 for counter in counters)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_other_modules_are_called(part):
    """A frozen BN counts nothing; another convolution or activation is what it is."""
    network = build("max").train()
    layer = network.layers[0]["scale1"].down[1]
    if part == 0:
        layer[0] = nn.Sequential(layer[0], nn.Tanh())
    elif part == 1:
        layer[1].eval()
    else:
        layer[2] = nn.Tanh()
    twin = copy.deepcopy(network)
    for module in twin.modules():
        module.register_forward_pre_hook(lambda *_: None)
    torch.testing.assert_close(train_once(network), train_once(twin), rtol=0, atol=0)
    assert layer[1].num_batches_tracked == (part != 1)


@pytest.mark.parametrize("lazy", [False, True])
def test_kernels_of_a_step(lazy):
    """Those of the network in plain PyTorch, without one for the count of each BN's batches."""
    network = MSDNet(num_blocks=5, base=1, step=1, step_mode="lin_grow", lazy=lazy)
    counts = []
    for each in (network, PlainMSDNet()):
        with KernelCount() as count:
            total_loss(each, torch.randn(2, 3, 32, 32), torch.arange(2)).backward()
        counts.append(count.names)
    ours, plain = counts
    assert ours["aten::convolution"] == plain["aten::convolution"] == 110
    assert ours["aten::cat"] == plain["aten::cat"] == 30
    assert ours["aten::_foreach_add_.Scalar"] == 1 + 5 + 5  # stem, stages and exits
    assert ours.total() == plain.total() - 110 + 11


# --- Other sizes, classes, channels; what is refused ---


@pytest.mark.parametrize("variant", ["cifar", "imagenet"])
def test_sizes_classes_and_channels_are_free(variant):
    with torch.device("meta"):
        network = MSDNet(3, 2, 2, num_classes=5, in_channels=1, variant=variant)
        for height, width in [(28, 28), (33, 64), (9, 1)]:
            logits = network(torch.empty(2, 1, height, width))
            assert [tuple(each.shape) for each in logits] == [(2, 5)] * 3
    assert network.num_classes == 5


def test_a_network_can_be_copied():
    network, images = build("max", lazy=True), make_images()
    twin = copy.deepcopy(network)
    nn.init.zeros_(network.exits[0][-1].weight)
    nn.init.zeros_(network.stem[0][0].weight)
    logits, others = network(images), twin(images)
    assert not any(torch.equal(a, b) for a, b in zip(logits, others, strict=True))
    assert torch.equal(others[1], build("max")(images)[1])


FITTING = {"num_blocks": 3, "base": 2, "step": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step_mode": "odd"}, "^step_mode is 'odd': give even or lin_grow$"),
        ({"prune": "none"}, "^prune is 'none': give max or min$"),
        ({"variant": "mnist"}, "^variant is 'mnist': give cifar or imagenet$"),
        ({"num_blocks": 0}, "^num_blocks is 0: give a whole number from 1 to 10000$"),
        ({"base": 0}, "^base is 0: give"),
        ({"step": -1}, "^step is -1: give"),
        ({"num_channels": 0}, "^num_channels is 0: give"),
        ({"growth_rate": 0}, "^growth_rate is 0: give"),
        ({"growth_factors": (1, 2)}, "^2 growth factors and 3 bottleneck factors: give one of"),
        ({"bottleneck_factors": (1, 2, 4, 4)}, "^3 growth factors and 4 bottleneck factors"),
        ({"growth_factors": (), "bottleneck_factors": ()}, "^0 growth factors and 0 bottle"),
        ({"growth_factors": (1, 0, 4)}, r"growth_factors is \[1, 0, 4\]: give whole numbers"),
        (
            {"bottleneck_factors": (0, 2, 4)},
            r"bottleneck_factors is \[0, 2, 4\]: give",
        ),
        ({"growth_rate": 3, "growth_factors": (1, 2, 3)}, "^a growth rate of 3 times .* of 3 is"),
        ({"growth_rate": 5, "growth_factors": (1, 1, 2)}, "^a growth rate of 5 times .* of 1 is"),
        ({"reduction": 0.0}, "^reduction is 0.0: give"),
        ({"reduction": 0.04}, "^a reduction to 0.04 leaves no channels"),
        ({"reduction": -1.0}, "^reduction is -1.0: give"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with torch.device("meta"):
        MSDNet(**FITTING)
        with pytest.raises(ValueError, match=message) as error:
            MSDNet(**{**FITTING, **arguments})
    assert "\n" not in str(error.value)


def test_an_odd_growth_of_the_finest_scale_is_not_halved():
    with torch.device("meta"):
        MSDNet(**FITTING, growth_rate=3, growth_factors=(1, 2, 4))


@pytest.mark.parametrize(
    ("prune", "num_layers", "fitting"),
    [
        *(("max", 1, 3), ("max", 2, 3), ("max", 4, 5), ("max", 7, None)),
        *(("min", 1, 2), ("min", 2, None)),
    ],
)
def test_layers_that_do_not_drop_all_scales_are_refused(prune, num_layers, fitting):
    """Of three scales; in seven layers 3, 3, 3, 2, 2, 2, 1 are left."""
    with torch.device("meta"):
        if fitting is None:
            MSDNet(1, num_layers, 1, prune=prune)
            return
        message = f"^{num_layers} layers do not drop 3 scales .* such that there are {fitting}$"
        with pytest.raises(ValueError, match=message):
            MSDNet(1, num_layers, 1, prune=prune)
        MSDNet(1, fitting, 1, prune=prune)

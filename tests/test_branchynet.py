"""Networks with exits, against the paper's counts and plain ones written from its tables."""

import copy
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from randomize import randomize
from torch import Tensor, nn

from networks import (
    BranchyAlexNet,
    BranchyLeNet,
    BranchyResNet,
    CifarResNet,
    ResNet,
    ResNetWithExits,
    count_exit_macs,
    count_params,
    early_exit,
    exit_score,
    exits_taken,
    load_weights,
    run_all_exits,
)
from networks.branchynet import LocalResponseNorm, pool, pooled
from networks.residual_blocks import PadShortcut

properties = settings(deadline=None, derandomize=True, database=None, max_examples=25)
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
BATCH_SIZE = 4

# --- Counts: no tolerance ---

COUNTS = {  # trunk so far, branch, cost of leaving, branch params; baseline params, MACs; params
    BranchyLeNet: (
        [(112_500, 107_650, 220_150, 6_870), (1_139_230, 840, 1_247_720, 850)],
        (67_824, 1_140_070),
        74_694,
    ),
    BranchyAlexNet: (
        [
            (15_564_800, 1_774_592, 17_339_392, 32_842),
            (19_103_744, 443_648, 21_321_984, 28_970),
            (28_246_016, 1_280, 30_465_536, 1_290),
        ],
        (544_074, 28_247_296),
        605_886,
    ),
    BranchyResNet: (
        [
            (388_800, 48_211_200, 48_600_000, 341_386),
            (75_038_400, 4_291_200, 127_540_800, 148_714),
            (232_406_208, 5_760, 284_914_368, 5_770),
        ],
        (1_737_130, 232_411_968),
        2_227_230,
    ),
}


def one_image(build: type, device: str = "meta") -> Tensor:
    channels, size = (1, 28) if build is BranchyLeNet else (3, 32)
    return torch.empty(1, channels, size, size, device=device)


def macs_by_layer(network: nn.Module, images: Tensor) -> dict[nn.Module, int]:
    """Counts by hooks, from the shapes of what each layer put out, in the order of execution."""
    macs = {}

    def count(layer, inputs, output):
        assert layer not in macs, "a layer of the shared trunk ran twice"
        macs[layer] = output.numel() * layer.weight[0].numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    network(images)
    for hook in hooks:
        hook.remove()
    return macs


def branches_of(network: nn.Module) -> list[nn.Module]:
    early = network.early_exits if isinstance(network, ResNetWithExits) else network.exits[:-1]
    return list(early)


@pytest.mark.parametrize("build", COUNTS)
def test_counts_of_the_paper(build):
    exits, (baseline_params, baseline_macs), num_params = COUNTS[build]
    with torch.device("meta"):
        network = build().eval()
    costs = count_exit_macs(network, one_image(build))
    assert costs.without_branches == [
        trunk + (branch if number == len(exits) else 0)
        for number, (trunk, branch, _, _) in enumerate(exits, start=1)
    ]
    assert list(itertools.accumulate(costs.stages)) == [row[0] for row in exits]
    assert costs.exits == [row[1] for row in exits]
    assert costs.leaving == [row[2] for row in exits]
    assert costs.trunk == baseline_macs

    *branches, last = [row[3] for row in exits]
    assert [count_params(branch) for branch in branches_of(network)] == branches
    linear = network.trunk.fc if build is BranchyResNet else network.exits[-1]
    assert count_params(linear) == last
    assert count_params(network) == num_params == baseline_params + sum(branches)


@pytest.mark.parametrize("build", COUNTS)
def test_counts_by_hooks(build):
    with torch.device("meta"):
        network = build().eval()
    macs = macs_by_layer(network, one_image(build))
    owner = {
        layer: k for k, branch in enumerate(branches_of(network)) for layer in branch.modules()
    }
    trunk, branch, rows = 0, 0, []
    for layer, cost in macs.items():
        if layer in owner:
            if owner[layer] == len(rows):  # its first layer: the trunk stops here for a while
                rows.append([trunk, 0])
            rows[owner[layer]][1] += cost
            branch += cost
        else:
            trunk += cost
            last = cost
    rows.append([trunk - last, last])
    assert rows == [[so_far, own] for so_far, own, _, _ in COUNTS[build][0]]
    assert trunk + branch == COUNTS[build][0][-1][2]


@pytest.mark.parametrize(
    ("build", "so_far"),
    [
        (BranchyAlexNet, [2_457_600, 15_564_800, 28_246_016]),
        (BranchyResNet, [388_800 + 2_073_600, 75_038_400, 232_406_208]),
    ],
)
def test_the_papers_taps_move_the_branches_alone(build, so_far):
    with torch.device("meta"):
        network, released = build(taps="paper").eval(), build().eval()
    costs = count_exit_macs(network, one_image(build))
    assert list(itertools.accumulate(costs.stages)) == so_far
    assert costs.trunk == COUNTS[build][1][1]
    if build is BranchyResNet:  # as many channels and pixels behind the 2nd convolution
        assert costs.exits == count_exit_macs(released, one_image(build)).exits
        assert count_params(network) == count_params(released)


# --- The architectures, written out from the tables of the released code ---
# Every branch and the trunk itself apply their own ReLU, pooling and LRN to a raw convolution.


def cover_all(x: Tensor, size: int) -> Tensor:
    """Max pooling with stride 2 over windows that may stick out, as in Chainer."""
    missing = (-(x.shape[-1] - size)) % 2
    x = F.pad(x, (0, missing, 0, missing), value=float("-inf"))
    windows = x.unfold(2, size, 2).unfold(3, size, 2).flatten(-2)
    return windows.gather(-1, windows.argmax(-1, keepdim=True)).squeeze(-1)


def lrn(x: Tensor) -> Tensor:
    """Normalizes by the sum over three channels, as in Chainer."""
    squares = F.pad(x**2, (0, 0, 0, 0, 1, 1))
    total = squares[:, :-2] + squares[:, 1:-1] + squares[:, 2:]
    return x / (2 + 5e-5 * total) ** 0.75


def conv(layer: nn.Module, x: Tensor, padding: int, stride: int = 1) -> Tensor:
    return F.conv2d(x, layer.weight, layer.bias, stride=stride, padding=padding)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    return x.flatten(1) @ layer.weight.T + layer.bias


def bn(layer: nn.Module, x: Tensor, eps: float = 1e-5) -> Tensor:
    if layer.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = layer.running_mean, layer.running_var
    mean, var = mean.view(1, -1, 1, 1), var.view(1, -1, 1, 1)
    shape = 1, -1, 1, 1
    return (x - mean) / (var + eps).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)


def chainer_bn(layer: nn.Module, x: Tensor) -> Tensor:
    return bn(layer, x, eps=2e-5)


def layers_of(network: nn.Module) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """Returns layers with weights, in the order of definition: of the trunk, of each branch."""
    branches = [
        [layer for layer in branch.modules() if hasattr(layer, "weight")]
        for branch in branches_of(network)
    ]
    in_branch = {layer for branch in branches for layer in branch}
    weighted = [layer for layer in network.modules() if hasattr(layer, "weight")]
    return [layer for layer in weighted if layer not in in_branch], branches


def written_lenet(network: nn.Module, images: Tensor, taps: str) -> list[Tensor]:
    (conv1, conv2, conv3, fc1, fc2), ((branch_conv, branch_fc),) = layers_of(network)
    raw = conv(conv1, images, 3)
    x = cover_all(raw, 2).relu()
    x = cover_all(conv(branch_conv, x, 1), 2).relu()
    exit1 = linear(branch_fc, x)
    x = cover_all(raw, 2).relu()
    x = cover_all(conv(conv2, x, 3), 2).relu()
    x = cover_all(conv(conv3, x, 3), 2).relu()
    return [exit1, linear(fc2, linear(fc1, x))]


def written_alexnet(network: nn.Module, images: Tensor, taps: str) -> list[Tensor]:
    trunk, (branch1, branch2) = layers_of(network)
    conv1, conv2, conv3, conv4, conv5, fc1, fc2, fc3 = trunk
    raw1 = conv(conv1, images, 2)
    raw2 = conv(conv2, lrn(cover_all(raw1.relu(), 3)), 2)
    raw3 = conv(conv3, lrn(cover_all(raw2.relu(), 3)), 1)
    tap1, tap2 = (raw2, raw3) if taps == "released" else (raw1, raw2)

    x = lrn(cover_all(tap1.relu(), 3))
    x = conv(branch1[1], conv(branch1[0], x, 1).relu(), 1).relu()
    exit1 = linear(branch1[2], cover_all(x, 3))
    x = lrn(cover_all(tap2.relu(), 3))
    exit2 = linear(branch2[1], cover_all(conv(branch2[0], x, 1).relu(), 3))
    x = conv(conv5, conv(conv4, raw3.relu(), 1).relu(), 1).relu()
    x = linear(fc2, linear(fc1, cover_all(x, 3)).relu()).relu()  # dropout is off
    return [exit1, exit2, linear(fc3, x)]


def written_block(layers: list[nn.Module], x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Returns the output of a block, and what is behind the ReLU of its first layer."""
    conv1, bn1, conv2, bn2 = layers
    inner = chainer_bn(bn1, conv(conv1, x, 1, stride)).relu()
    if stride == 2:
        x = x[:, :, ::2, ::2]
        x = torch.cat([torch.zeros_like(x), x], 1)
    return (x + chainer_bn(bn2, conv(conv2, inner, 1))).relu(), inner


def written_resnet(network: nn.Module, images: Tensor, taps: str) -> list[Tensor]:
    trunk, (branch1, branch2) = layers_of(network)
    conv1, bn1, *blocks, fc = trunk
    blocks = [blocks[start : start + 4] for start in range(0, len(blocks), 4)]
    num_blocks = len(blocks) // 3

    x = chainer_bn(bn1, conv(conv1, images, 0)).relu()
    tap1 = x
    for index, block in enumerate(blocks):
        x, inner = written_block(block, x, 2 if index in (num_blocks, 2 * num_blocks) else 1)
        if index == 0 and taps == "paper":
            tap1 = inner
        if index == num_blocks - 1:
            tap2 = x
    windows = x.unfold(2, 6, 1).unfold(3, 6, 1)
    exit3 = linear(fc, windows.mean((-2, -1)))

    y = lrn(conv(branch1[0], tap1, 2).relu())
    y = conv(branch1[2], conv(branch1[1], y, 1).relu(), 1).relu()
    exit1 = linear(branch1[3], y)
    y, _ = written_block(branch2[:4], tap2, 1)
    return [exit1, linear(branch2[4], y), exit3]


WRITTEN = [  # build, image size, taps, training
    (lambda taps, **size: BranchyLeNet(**size), 28, "released", True),
    (lambda taps, **size: BranchyLeNet(**size), 13, "released", False),
    (BranchyAlexNet, 32, "released", False),
    (BranchyAlexNet, 19, "released", False),
    (BranchyAlexNet, 32, "paper", False),
    (BranchyAlexNet, 16, "paper", False),
    (lambda **arguments: BranchyResNet(14, **arguments), 32, "released", False),
    (lambda **arguments: BranchyResNet(14, **arguments), 26, "released", True),
    (lambda **arguments: BranchyResNet(14, **arguments), 29, "paper", True),
    (lambda **arguments: BranchyResNet(8, **arguments), 26, "paper", False),
]


@pytest.mark.parametrize(("build", "image_size", "taps", "training"), WRITTEN)
def test_networks_are_those_written_out(build, image_size, taps, training):
    torch.manual_seed(0)
    network = randomize(build(taps=taps, image_size=image_size)).train(training)
    written = {
        "BranchyLeNet": written_lenet,
        "BranchyAlexNet": written_alexnet,
        "BranchyResNet": written_resnet,
    }[type(network).__name__]
    channels = 1 if written is written_lenet else 3
    images = torch.randn(BATCH_SIZE, channels, image_size, image_size, dtype=torch.float64) * 5
    labels = torch.arange(BATCH_SIZE)

    expected = written(network, images, taps)
    actual = network(images)
    scale = max(logits.abs().max().item() for logits in expected)
    assert [logits.shape for logits in actual] == [(BATCH_SIZE, 10)] * len(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * scale)

    parameters = dict(network.named_parameters())
    joint = [sum(F.cross_entropy(logits, labels) for logits in each) for each in (actual, expected)]
    ours, theirs = (
        dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))
        for loss in joint
    )
    for name, gradient in theirs.items():
        tolerance = 1e-10 * gradient.abs().max().item()
        torch.testing.assert_close(
            ours[name], gradient, rtol=0, atol=max(tolerance, 1e-11), msg=lambda m, n=name: n + m
        )


def test_the_loss_of_all_exits_is_the_sum_of_their_losses():
    torch.manual_seed(0)
    network = randomize(BranchyAlexNet(image_size=16)).eval()
    images = torch.randn(BATCH_SIZE, 3, 16, 16, dtype=torch.float64)
    labels, weights = torch.arange(BATCH_SIZE), [1.0, 0.3, 2.0]
    parameters = list(network.parameters())

    def gradients(*weighted):
        logits = network(images)
        loss = sum(weight * F.cross_entropy(logits[index], labels) for index, weight in weighted)
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return [torch.zeros_like(p) if gradient is None else gradient for gradient, p in pairs]

    together = gradients(*enumerate(weights))
    apart = [gradients((index, 1.0)) for index in range(3)]
    for whole, *parts in zip(together, *apart, strict=True):
        expected = sum(weight * part for weight, part in zip(weights, parts, strict=True))
        torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-13)


@torch.no_grad()
def test_no_exit_disturbs_what_the_next_stage_reads():
    """The exits share the trunk's tensors: whatever they do in place would reach the others."""
    torch.manual_seed(0)
    for network, size in [
        (BranchyLeNet(), 28),
        (BranchyAlexNet(), 32),
        (BranchyAlexNet(taps="paper"), 32),
        (BranchyResNet(8), 32),
        (BranchyResNet(8, taps="paper"), 32),
        (ResNetWithExits(CifarResNet(8), [0, 1]), 16),
        (ResNetWithExits(CifarResNet(8, preactivation=True), [0, 1]), 16),
    ]:
        state = torch.randn(2, 1 if size == 28 else 3, size, size)
        network.eval()
        for stage, exit_here in zip(network.stages, network.exits, strict=True):
            before = copy.deepcopy(state)
            after = stage(state)
            torch.testing.assert_close(state, before, rtol=0, atol=0)
            state = after
            before = copy.deepcopy(state)
            exit_here(state)
            torch.testing.assert_close(state, before, rtol=0, atol=0)


# --- Layers ---


@pytest.mark.parametrize("num_channels", [1, 2, 3, 64])
def test_lrn_is_the_closed_form(num_channels):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, num_channels, 3, 3, dtype=torch.float64, generator=generator) * 100
    assert (lrn(x) - x / 2**0.75).abs().max() > 1
    torch.testing.assert_close(LocalResponseNorm()(x), lrn(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("piece", [1, 64 * 9 * 2, 10**9])
@pytest.mark.parametrize("num_images", [0, 1, 5])
def test_lrn_in_pieces_is_lrn(num_images, piece):
    x = torch.randn(num_images, 64, 3, 3, dtype=torch.float64) * 100
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    layer = LocalResponseNorm()
    layer.piece = piece
    expected = lrn(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert num_images == 0 or out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], gradient)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("side", range(3, 34))
def test_pooling_covers_every_pixel(size, side):
    x = torch.randn(1, 2, side, side, generator=torch.Generator().manual_seed(side))
    out = pool(size)(x)
    assert torch.equal(out, cover_all(x, size))
    assert out.shape[-1] == pooled(side, size) == -(-(side - size) // 2) + 1
    assert out.amax() == x.amax()
    assert pooled(side, size, 2) == pooled(pooled(side, size), size)


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [(30, 2, [15, 8]), (17, 2, [9]), (11, 2, [6]), (32, 3, [16, 8, 4, 2])],
)
def test_sizes_of_the_tables(side, size, expected):
    for num_times, result in enumerate(expected, start=1):
        assert pooled(side, size, num_times) == result


@pytest.mark.parametrize("side", [7, 8])
def test_new_channels_come_first(side):
    x = torch.randn(2, 3, side, side)
    out = PadShortcut(3, 5, stride=2, kind="A-prepend")(x)
    assert torch.equal(out[:, 2:], x[:, :, ::2, ::2])
    assert not out[:, :2].any()


def test_trunk_of_b_resnet_is_hes_with_zeros_prepended():
    torch.manual_seed(0)
    network = randomize(BranchyResNet(14)).eval()
    he = CifarResNet(14, conv_bias=True).double().eval()
    for norm in [module for module in he.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.eps = 2e-5  # Chainer's
    state_dict = {k: v for k, v in network.trunk.state_dict().items() if not k.startswith("fc.")}
    missing = he.load_state_dict(state_dict, strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"]
    assert not missing.unexpected_keys

    images = torch.randn(BATCH_SIZE, 3, 32, 32, dtype=torch.float64)
    # Without a border, the convolution sees what He's sees inside.
    x = he.stem(images)[:, :, 1:-1, 1:-1]
    ours = network.trunk.stem(images)
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)
    sizes = []
    for index, (block, mine) in enumerate(zip(he.blocks, network.trunk.blocks, strict=True)):
        shortcut = x
        if index in (2, 4):
            shortcut = torch.cat([torch.zeros_like(x), x], 1)[:, :, ::2, ::2]
            assert block.downsample.padding == mine.downsample.padding[::-1]
        x = (shortcut + block.residual(x)).relu()
        ours = mine(ours)
        torch.testing.assert_close(ours, x, rtol=1e-11, atol=1e-11)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 30, 30)] * 2 + [(32, 15, 15)] * 2 + [(64, 8, 8)] * 2


@pytest.mark.parametrize("build", COUNTS)
def test_weights_start_from_chainers_default(build):
    """N(0, 1 / fan in), and N(0, 2 / fan in) in the residual blocks of the ResNet; no biases."""
    torch.manual_seed(0)
    network = build(20) if build is BranchyResNet else build()
    first_branch = set(branches_of(network)[0].modules())
    squares = {}  # of the weights in units of their standard deviation, pooled over the layers
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            is_he = build is BranchyResNet and layer not in first_branch
            gain = 2 if is_he and isinstance(layer, nn.Conv2d) else 1
            unit = layer.weight.detach() / (gain / layer.weight[0].numel()) ** 0.5
            bound = 5 * (2 / unit.numel()) ** 0.5
            assert unit.square().mean().item() == pytest.approx(1, abs=bound)
            assert abs(unit.mean().item()) < 5 / unit.numel() ** 0.5
            squares.setdefault(type(layer), []).append(unit.flatten().square())
            assert layer.bias is not None
            assert not layer.bias.any()
    for values in squares.values():  # the fourth moment of a normal distribution
        values = torch.cat(values)
        bound = 5 * (96 / len(values)) ** 0.5
        assert values.square().mean().item() == pytest.approx(3, abs=bound)


# --- Other sizes, classes, channels ---


@pytest.mark.parametrize("taps", ["released", "paper"])
@pytest.mark.parametrize("build", COUNTS)
def test_sizes_classes_and_channels_are_free(build, taps):
    arguments = {} if build is BranchyLeNet else {"taps": taps}
    if build is BranchyResNet:
        arguments["depth"] = 8
    for image_size in (26, 27, 33, 40):
        network = build(num_classes=7, in_channels=2, image_size=image_size, **arguments)
        logits = network(torch.randn(2, 2, image_size, image_size))
        assert [tuple(each.shape) for each in logits] == [(2, 7)] * network.num_exits
        assert network.num_classes == 7
        assert network.num_exits == (2 if build is BranchyLeNet else 3)


@pytest.mark.parametrize("taps", ["released", "paper"])
@pytest.mark.parametrize(("build", "too_small"), [(BranchyAlexNet, 15), (BranchyResNet, 22)])
def test_the_smallest_image_is_the_one_the_message_names(build, too_small, taps):
    depth = {"depth": 8} if build is BranchyResNet else {}
    with pytest.raises(ValueError, match=f"image_size is {too_small}: give") as error:
        build(image_size=too_small, taps=taps, **depth)
    smallest = int(re.search(r"from (\d+) to", str(error.value))[1])
    logits = build(image_size=smallest, taps=taps, **depth)(torch.randn(2, 3, smallest, smallest))
    assert [tuple(each.shape) for each in logits] == [(2, 10)] * 3
    assert smallest == too_small + 1


# --- Exits between the blocks of a residual network ---

TRUNKS = {
    "basic-A": lambda: CifarResNet(14),
    "basic-C": lambda: CifarResNet(14, shortcut="C"),
    "bottleneck-A": lambda: CifarResNet(20, bottleneck=True),
    "preact": lambda: CifarResNet(14, preactivation=True),
    "preact-bottleneck-B": lambda: CifarResNet(
        20, bottleneck=True, preactivation=True, shortcut="B"
    ),
    "imagenet": lambda: ResNet(18, num_classes=10),
}
PLACES = [(0, 2, 5), (3,), (0, 1, 2, 3, 4, 5)]


def build_with_exits(kind: str, places: tuple[int, ...], seed: int = 0) -> ResNetWithExits:
    torch.manual_seed(seed)
    return randomize(ResNetWithExits(TRUNKS[kind](), places))


def make_images(kind: str, num_images: int = BATCH_SIZE) -> Tensor:
    size = 33 if kind == "imagenet" else 8  # the last layer has 2x2: BN needs more than one
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_images, 3, size, size, dtype=torch.float64, generator=generator)


def make_gates(form: str, num_blocks: int):
    """Returns gates that close the 2nd block, and scale others."""
    per_block = [0.5, 0.0, 1.0, 0.3, 0.0, 1.0, 0.7, 1.0][:num_blocks]
    if form == "per sample":
        generator = torch.Generator().manual_seed(2)
        gates = torch.rand(num_blocks, BATCH_SIZE, generator=generator).round(decimals=1)
        return gates * (torch.rand(num_blocks, BATCH_SIZE, generator=generator) < 0.6)
    return {
        "none": None,
        "list": per_block,
        "tensor": torch.tensor(per_block),
        "closed": [0.0] * num_blocks,
    }[form]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["none", "list", "tensor", "closed", "per sample"])
@pytest.mark.parametrize("kind", TRUNKS)
def test_the_last_exit_is_the_trunk_bit_for_bit(kind, form, training):
    images = make_images(kind)
    for places in PLACES[:2]:
        network = build_with_exits(kind, places).train(training)
        trunk = copy.deepcopy(network.trunk)
        gates = make_gates(form, network.num_blocks)
        *early, last = network(images, gates)
        assert len(early) == len(places)
        assert torch.equal(last, trunk(images, gates))
        # BN statistics too: of closed blocks they are those from before.
        torch.testing.assert_close(network.trunk.state_dict(), trunk.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", TRUNKS)
def test_each_exit_reads_what_its_number_of_blocks_hands_on(kind):
    images = make_images(kind)
    network = build_with_exits(kind, PLACES[2]).eval()
    trunk, gates = network.trunk, make_gates("list", network.num_blocks)
    x, expected = trunk.stem(images), []
    for index, block in enumerate(trunk.blocks):
        if index in network.exits_after:
            y = x
            head = list(network.early_exits[network.exits_after.index(index)])
            if kind.startswith("preact"):
                y = bn(head[0], y).relu()
            expected.append(linear(head[-1], y.mean((2, 3))))
        x = block(x, gates[index])
    actual = network(images, gates)
    torch.testing.assert_close(actual[:-1], expected, rtol=1e-11, atol=1e-11)


def test_a_closed_block_is_not_executed():
    network = build_with_exits("basic-A", (0, 1, 2)).train()
    before = copy.deepcopy(network.state_dict())
    ran = []
    for index, block in enumerate(network.trunk.blocks):
        block.conv1.register_forward_hook(lambda *_, index=index: ran.append(index))
    network(make_images("basic-A"), [1.0, 0.0, 1.0, 0.5, 0.0, 1.0])
    assert ran == [0, 2, 3, 5]
    for key, value in network.state_dict().items():
        if "running" in key and key.startswith("trunk."):
            closed = key.startswith(("trunk.layer1.1.", "trunk.layer3.0."))
            assert torch.equal(value, before[key]) == closed, key


@pytest.mark.parametrize("form", ["none", "list", "tensor", "closed"])
@pytest.mark.parametrize("kind", TRUNKS)
def test_leaving_early_through_gates_is_the_full_pass(kind, form):
    images = make_images(kind, 6)
    network = build_with_exits(kind, PLACES[0]).eval()
    gates = make_gates(form, network.num_blocks)
    full = network(images, gates)
    for criterion in ("entropy", "confidence"):
        assert_leaves_as_the_full_pass(network.gated(gates), images, full, criterion)


def assert_leaves_as_the_full_pass(network, images, full, criterion, tolerance=1e-10):
    """Puts thresholds half way between two images, so that no rounding decides who leaves."""
    scores = torch.stack([exit_score(logits, criterion) for logits in full], 1)
    thresholds = []
    for index in range(len(full) - 1):
        values = scores[:, index].sort().values
        middle = len(values) // 2
        thresholds.append(values[middle - 1 : middle + 1].mean().item())
    expected = exits_taken(scores, thresholds, criterion)
    assert len(expected.unique()) > 1
    answers = early_exit(network, images, thresholds, criterion)
    assert torch.equal(answers.exit_index, expected)
    rows = torch.arange(len(images), device=images.device)
    expected_logits = torch.stack(full, 1)[rows, expected]
    torch.testing.assert_close(answers.logits, expected_logits, rtol=tolerance, atol=tolerance)


LEAVERS = {
    "lenet": lambda: BranchyLeNet(in_channels=3, image_size=26),
    "alexnet": lambda: BranchyAlexNet(image_size=26),
    "alexnet-paper": lambda: BranchyAlexNet(image_size=26, taps="paper"),
    "resnet": lambda: BranchyResNet(8, image_size=26),
    "resnet-paper": lambda: BranchyResNet(8, image_size=26, taps="paper"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", LEAVERS)
@given(
    num_images=st.integers(2, 8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    memory_format=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    criterion=st.sampled_from(["entropy", "confidence"]),
    seed=st.integers(0, 1000),
)
@settings(properties, max_examples=8)
def test_leaving_early_is_the_full_pass(
    device, kind, num_images, dtype, memory_format, criterion, seed
):
    torch.manual_seed(seed)
    network = randomize(LEAVERS[kind]()).eval().to(device, dtype, memory_format=memory_format)
    images = torch.randn(num_images, 3, 26, 26).to(device, dtype, memory_format=memory_format)
    before = images.clone()
    with torch.no_grad():
        full = run_all_exits(network, images)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-3
    assert_leaves_as_the_full_pass(network, images, full, criterion, tolerance)
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", LEAVERS)
def test_nobody_and_one_image_can_be_asked(kind):
    torch.manual_seed(0)
    network = randomize(LEAVERS[kind]()).eval()
    thresholds = [1.5] * (network.num_exits - 1)
    images = torch.randn(3, 3, 26, 26, dtype=torch.float64)
    empty = early_exit(network, images[:0], thresholds)
    assert empty.logits.shape == (0, 10)
    assert empty.exit_index.shape == (0,)
    together = early_exit(network, images, thresholds)
    for index in range(3):
        alone = early_exit(network, images[index : index + 1], thresholds)
        assert alone.exit_index.item() == together.exit_index[index]
        torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-9, atol=1e-9)


def test_the_state_inside_a_block_is_the_shortcut_and_the_branch():
    torch.manual_seed(0)
    network = randomize(BranchyResNet(14, taps="paper")).eval()
    images = torch.randn(BATCH_SIZE, 3, 32, 32, dtype=torch.float64)
    state = network.stages[0](images)
    assert isinstance(state, tuple)
    stem = network.trunk.stem(images)
    block = network.trunk.blocks[0]
    assert torch.equal(state[0], stem)
    assert torch.equal(state[1], block.bn1(block.conv1(stem)).relu())
    assert torch.equal(network.exits[0](state), network.early_exits[0](state[1]))
    assert torch.equal(network.stages[1](state), network.trunk.layer1(stem))
    assert torch.equal(network(images)[2], network.trunk(images))


@pytest.mark.parametrize("gates", [[1.0] * 3, torch.ones(3), torch.ones(3, 2)])
def test_a_branch_inside_a_block_excludes_gates(gates):
    network = BranchyResNet(8, taps="paper")
    with pytest.raises(ValueError, match="excludes gates: use taps='released'"):
        network(torch.randn(2, 3, 32, 32), gates)
    assert len(BranchyResNet(8)(torch.randn(2, 3, 32, 32), gates)) == 3


@pytest.mark.parametrize(
    ("exits_after", "early_exits", "message"),
    [
        ([], None, r"exits_after is \[\]: give rising numbers from 0 to 5"),
        ([6], None, r"exits_after is \[6\]: give rising"),
        ([-1, 2], None, r"exits_after is \[-1, 2\]: give whole"),
        ([2, 2], None, r"exits_after is \[2, 2\]: give rising"),
        ([3, 1], None, r"exits_after is \[3, 1\]: give rising"),
        ([1, 3], [nn.Identity()], "1 early exits for 2 places"),
        ([1], [nn.Identity(), nn.Identity()], "2 early exits for 1 places"),
        ([1], [], "0 early exits for 1 places"),
    ],
)
def test_exits_that_do_not_fit_are_refused(exits_after, early_exits, message):
    with pytest.raises(ValueError, match=message):
        ResNetWithExits(CifarResNet(14), exits_after, early_exits)


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ([1.0] * 5, "5 gates for 6 blocks: give one per block"),
        (torch.ones(7), "7 gates for 6 blocks"),
    ],
)
def test_gates_that_do_not_fit_are_refused(gates, message):
    network = ResNetWithExits(CifarResNet(14), [1])
    for call in (network.gated, lambda gates: network(torch.randn(2, 3, 8, 8), gates)):
        with pytest.raises(ValueError, match=message):
            call(gates)


def test_gates_per_sample_are_refused_where_images_leave():
    network = ResNetWithExits(CifarResNet(14), [1])
    with pytest.raises(ValueError, match="so no gates per sample: give one gate per block"):
        network.gated(torch.ones(6, 2))
    with pytest.raises(ValueError, match=r"gates of shape \(6, 3\) for 2 images"):
        network(torch.randn(2, 3, 8, 8), torch.ones(6, 3))


def test_a_plain_trunk_has_exits_but_no_gates():
    network = ResNetWithExits(CifarResNet(8, plain=True), [1])
    images = torch.randn(2, 3, 8, 8)
    assert len(network(images)) == 2
    with pytest.raises(ValueError, match="cannot be gated"):
        network(images, [1.0] * 3)


def test_exits_of_ones_own_read_what_is_there():
    trunk = CifarResNet(14).eval()
    network = ResNetWithExits(trunk, [0, 3], [nn.Flatten(), nn.Identity()]).eval()
    images = torch.randn(2, 3, 8, 8)
    first, second, _ = network(images)
    x = trunk.stem(images)
    assert torch.equal(first, x.flatten(1))
    for block in trunk.blocks[:3]:
        x = block(x)
    assert torch.equal(second, x)
    assert network.num_classes == 10
    assert network.num_exits == 3


# --- Weights of the trunk alone ---


@pytest.mark.parametrize("source", ["whole", "trunk"])
def test_exits_join_a_trained_trunk(source):
    torch.manual_seed(0)
    network = randomize(ResNetWithExits(CifarResNet(8), [0, 1]))
    other = randomize(ResNetWithExits(CifarResNet(8), [2]))
    early = copy.deepcopy(network.early_exits.state_dict())
    load_weights(network, (other if source == "whole" else other.trunk).state_dict())
    torch.testing.assert_close(network.trunk.state_dict(), other.trunk.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(network.early_exits.state_dict(), early, rtol=0, atol=0)
    assert torch.equal(
        network.eval()(images := make_images("basic-A"))[-1], other.eval().trunk(images)
    )


@pytest.mark.parametrize("build", COUNTS)
def test_early_exits_come_along_or_stay(build):
    torch.manual_seed(0)
    arguments = {"depth": 8} if build is BranchyResNet else {}
    network, source = randomize(build(**arguments)), randomize(build(**arguments))
    early = {
        id(tensor)
        for branch in branches_of(network)
        for tensor in branch.state_dict(keep_vars=True).values()
    }
    names = [k for k, tensor in network.state_dict(keep_vars=True).items() if id(tensor) in early]
    before, theirs = copy.deepcopy(network.state_dict()), source.state_dict()
    for key in names[1:]:
        del theirs[key]
    report = load_weights(network, theirs)
    assert report.exits == names
    assert report.unused == names[:1]
    for key, value in network.state_dict().items():
        assert torch.equal(value, (before if key in names else theirs)[key]), key
    assert load_weights(network, source.state_dict()).loaded == list(before)
    torch.testing.assert_close(network.state_dict(), source.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("network", "source", "message"),
    [
        (
            ResNetWithExits(CifarResNet(8), [1]),
            CifarResNet(14),
            r"trunk.layer1.1.conv1.weight is \(16, 16, 3, 3\) there and absent here",
        ),
        (
            ResNetWithExits(CifarResNet(14), [1]),
            ResNetWithExits(CifarResNet(8), [1]),
            r"trunk.layer1.1.conv1.weight is absent there",
        ),
        (
            ResNetWithExits(CifarResNet(8), [1]),
            BranchyLeNet(),
            r"trunk.conv1.weight is absent there",
        ),
        (BranchyLeNet(), CifarResNet(8), r"stages.0.0.weight is absent there"),
        (BranchyLeNet(), BranchyAlexNet(), r"stages.0.0.weight is \(32, 3, 5, 5\) there"),
        (BranchyResNet(8), CifarResNet(8), r"trunk.conv1.bias is absent there"),
    ],
)
def test_weights_of_another_trunk_are_refused(network, source, message):
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        load_weights(network, source.state_dict())
    assert "\n" not in str(error.value)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("taps", ["text", None])
@pytest.mark.parametrize("build", [BranchyAlexNet, BranchyResNet])
def test_taps_that_do_not_exist_are_refused(build, taps):
    """They were those of the paper's text."""
    with pytest.raises(ValueError, match=f"^taps is {taps!r}: give released or paper$"):
        build(taps=taps)

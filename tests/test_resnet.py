"""Residual networks and their gates, against torchvision, timm and references written out here."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from randomize import randomize
from timm.layers import DropPath
from torch import Tensor, nn

from networks import CifarResNet, ResidualNetwork, ResNet, fold_survival_probs
from networks.residual_blocks import PadShortcut, PreActivationBlock

# Every kind of block and shortcut. Two blocks per layer: a change of shape and an identity.
KINDS = {
    "basic-A": lambda: CifarResNet(14),
    "basic-A-average": lambda: CifarResNet(14, shortcut="A-average", conv_bias=True),
    "basic-B": lambda: CifarResNet(14, shortcut="B"),
    "basic-C": lambda: CifarResNet(14, shortcut="C"),
    "bottleneck-A": lambda: CifarResNet(20, bottleneck=True),
    "bottleneck-B": lambda: CifarResNet(20, bottleneck=True, shortcut="B"),
    "preact-basic-A": lambda: CifarResNet(14, preactivation=True),
    "preact-basic-B": lambda: CifarResNet(14, preactivation=True, shortcut="B", conv_bias=True),
    "preact-bottleneck-B": lambda: CifarResNet(
        20, bottleneck=True, preactivation=True, shortcut="B"
    ),
    "imagenet-18": lambda: ResNet(18, num_classes=10),
}
BATCH_SIZE = 6


@pytest.fixture(params=KINDS)
def network(request) -> ResidualNetwork:
    """A float64 network of each kind in training mode; nothing hides a mistake by being 0 or 1."""
    torch.manual_seed(0)
    return randomize(KINDS[request.param]())


@pytest.fixture
def images(network) -> Tensor:
    # The smallest that leave the last layer 2x2 positions: BN needs more than one per channel.
    return make_images(64 if isinstance(network, ResNet) else 8)


def make_images(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH_SIZE, 3, size, size, dtype=torch.float64, generator=generator)


def gradients(network: nn.Module, logits: Tensor) -> dict[str, Tensor | None]:
    """Returns the gradient of a loss by every parameter."""
    network.zero_grad()
    F.cross_entropy(logits, torch.arange(len(logits)) % logits.shape[1]).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def branch_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Returns what a closed gate must leave alone."""
    layers = {name: layer for name, layer in block.named_children() if name != "downsample"}
    if isinstance(block, PreActivationBlock) and block.shares_activation:
        del layers["bn1"]
    return layers


def paths(block: nn.Module, x: Tensor):
    """Returns the shortcut, the residual branch and the branch's input, as the papers draw them."""
    if not isinstance(block, PreActivationBlock):
        branch, post = block.residual, F.relu
    elif block.shares_activation:
        x, branch, post = block.activate(x), block.convolve, nn.Identity()
    else:
        branch, post = block.residual, nn.Identity()
    shortcut = x if block.downsample is None else block.downsample(x)
    return shortcut, branch, x, post


def block_inputs(network: ResidualNetwork, images: Tensor) -> list[Tensor]:
    """Returns what each block receives; the features end with the input of the head."""
    features = [network.stem(images)]
    for block in network.blocks:
        features.append(block(features[-1]))
    return features[:-1]


# --- References written out: He et al. 2015 and 2016 in functional form ---


def reference_bn(x: Tensor, state: dict[str, Tensor], name: str, train: bool) -> Tensor:
    if train:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    else:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scale = state[f"{name}.weight"] / (var + 1e-5).sqrt()
    shift = state[f"{name}.bias"] - mean * scale
    return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def reference_shortcut(x: Tensor, average: bool) -> Tensor:
    """Option A from one layer to the next: half the size, then as many channels of zeros behind."""
    if average:
        x = (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    else:
        x = x[..., ::2, ::2]
    return torch.cat([x, torch.zeros_like(x)], dim=1)


def reference_cifar(
    state: dict[str, Tensor],
    images: Tensor,
    train: bool,
    shortcut: str | None,
    preactivation: bool = False,
) -> Tensor:
    """Depth 14. `shortcut` None is the plain network."""

    def conv(x, name, stride=1):
        return F.conv2d(x, state[f"{name}.weight"], stride=stride, padding=1)

    def bn(x, name):
        return reference_bn(x, state, name, train)

    x = conv(images, "conv1")
    if not preactivation:
        x = bn(x, "bn1").relu()
    for layer in (1, 2, 3):
        for index in (0, 1):
            name = f"layer{layer}.{index}"
            changes_shape = layer > 1 and index == 0
            stride = 2 if changes_shape else 1
            skip = x
            if preactivation:
                x = bn(x, f"{name}.bn1").relu()
                if index == 0:  # it is the first block, or the shape changes: a shared activation
                    skip = x
                branch = bn(conv(x, f"{name}.conv1", stride), f"{name}.bn2").relu()
                branch = conv(branch, f"{name}.conv2")
            else:
                branch = bn(conv(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
                branch = bn(conv(branch, f"{name}.conv2"), f"{name}.bn2")
            if changes_shape:
                skip = reference_shortcut(skip, average=shortcut == "A-average")
            x = branch if shortcut is None else skip + branch
            if not preactivation:
                x = x.relu()
    if preactivation:
        x = bn(x, "bn_last").relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("shortcut", "preactivation"),
    [("A", False), ("A-average", False), (None, False), ("A", True), ("A-average", True)],
)
def test_cifar_resnet_is_the_written_out_reference(shortcut, preactivation, train):
    torch.manual_seed(0)
    network = CifarResNet(
        14, shortcut=shortcut or "A", plain=shortcut is None, preactivation=preactivation
    )
    randomize(network).train(train)
    images, state = make_images(16), dict(network.named_parameters())
    expected = reference_cifar(
        {**network.state_dict(), **state}, images, train, shortcut, preactivation
    )
    expected_gradients = gradients(network, expected)
    actual = network(images)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert_same(gradients(network, actual), expected_gradients, tolerance=1e-10)


# --- Parity with torchvision and timm ---


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_resnet_is_torchvisions(depth, train):
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(f"resnet{depth}")
    randomize(theirs).train(train)
    ours = ResNet(depth).double().train(train)
    ours.load_state_dict(theirs.state_dict())

    images = make_images(64)
    our_logits, their_logits = ours(images), theirs(images)
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-9, atol=1e-9)
    assert_same(gradients(ours, our_logits), gradients(theirs, their_logits), tolerance=1e-8)
    assert_same(ours.state_dict(), theirs.state_dict(), tolerance=1e-9)  # BN statistics too


def test_gates_per_sample_are_timms_drop_path():
    """timm's estimator is ours with gates mask / p. BN evaluates: timm's sees the dropped too."""
    torch.manual_seed(0)
    theirs = randomize(timm.create_model("resnet18", drop_path_rate=0.5)).eval()
    ours = ResNet(18).double().eval()
    ours.load_state_dict(theirs.state_dict())
    gates = torch.ones(ours.num_blocks, BATCH_SIZE)

    def record(index):
        def hook(drop_path, inputs, output):
            kept = output.flatten(1).abs().sum(1) > 0
            gates[index] = kept / (1 - drop_path.drop_prob)

        return hook

    for index, block in enumerate(b for layer in list(theirs.children())[4:8] for b in layer):
        if isinstance(block.drop_path, DropPath):
            block.drop_path.train().register_forward_hook(record(index))
    images = make_images(64)
    expected = theirs(images)
    assert 0 < (gates == 0).sum() < gates.numel()
    torch.testing.assert_close(ours(images, gates), expected, rtol=1e-6, atol=1e-6)


def test_preactivation_bottleneck_is_timms():
    torch.manual_seed(0)
    ours = randomize(KINDS["preact-bottleneck-B"]())
    x = torch.randn(BATCH_SIZE, 64, 8, 8, dtype=torch.float64)
    for block, in_channels, stride in zip(ours.layer2, (64, 128), (2, 1), strict=True):
        has_projection = block.downsample is not None
        theirs = timm.models.resnetv2.PreActBottleneck(
            in_channels,
            128,
            bottle_ratio=0.25,
            stride=stride,
            conv_layer=timm.layers.create_conv2d,
            norm_layer=timm.layers.BatchNormAct2d,
            proj_layer=timm.models.resnetv2.DownsampleConv if has_projection else None,
        ).double()
        renamed = {
            key.replace("bn", "norm").replace("downsample.", "downsample.conv."): value
            for key, value in block.state_dict().items()
        }
        theirs.load_state_dict(renamed)
        expected = theirs(x)
        x = block(x)
        torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


# --- Gates ---


@pytest.mark.parametrize("form", ["list", "tensor", "per-sample"])
def test_open_gates_are_the_plain_network_bit_for_bit(network, images, form):
    num_blocks = network.num_blocks
    gates = {
        "list": [1.0] * num_blocks,
        "tensor": torch.ones(num_blocks),
        "per-sample": torch.ones(num_blocks, BATCH_SIZE),
    }[form]
    gated = copy.deepcopy(network)
    logits, gated_logits = network(images), gated(images, gates)
    assert torch.equal(gated_logits, logits)
    assert_same(gradients(gated, gated_logits), gradients(network, logits))
    assert_same(gated.state_dict(), network.state_dict())


@pytest.mark.parametrize("per_sample", [False, True])
def test_a_closed_gate_executes_nothing_and_returns_the_shortcut(network, images, per_sample):
    num_blocks = network.num_blocks
    gates = torch.zeros(num_blocks, BATCH_SIZE) if per_sample else [0.0] * num_blocks
    before = copy.deepcopy(network)
    executed = []
    for block in network.blocks:
        for layer in branch_layers(block).values():
            layer.register_forward_hook(lambda layer, inputs, output: executed.append(layer))

    logits = network(images, gates)
    grads = gradients(network, logits)

    assert not executed
    x = before.stem(images)
    for index, block in enumerate(before.blocks):
        shortcut, _, _, post = paths(block, x)
        x = post(shortcut)
        for name in branch_layers(block):
            now = network.blocks[index].get_submodule(name)
            # running_mean, running_var and num_batches_tracked
            assert_same(dict(now.named_buffers()), dict(getattr(block, name).named_buffers()))
            assert all(parameter.grad is None for parameter in now.parameters())
    assert torch.equal(logits, before.head(x))
    assert grads["conv1.weight"].abs().sum() > 0


@pytest.mark.parametrize("gate", [0.3, 2.0])
def test_a_gate_scales_its_branch(network, images, gate):
    network.eval()
    for block, x in zip(network.blocks, block_inputs(network, images), strict=True):
        shortcut, branch, branch_input, post = paths(block, x)
        expected = post(shortcut + gate * branch(branch_input))
        assert expected.ne(block(x)).any()
        for form in (gate, torch.full((BATCH_SIZE,), gate, dtype=torch.float64)):
            torch.testing.assert_close(block(x, form), expected, rtol=1e-12, atol=1e-12)


def mixed_gates(num_blocks: int) -> Tensor:
    """Returns gates (L, N) from {0, 1/p}; one block is run by everyone, one by nobody."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand(num_blocks, BATCH_SIZE, generator=generator) < 0.5
    gates = mask * torch.linspace(1, 2, num_blocks, dtype=torch.float64)[:, None]
    gates[1], gates[2] = 1, 0
    return gates


def test_gates_per_sample_are_every_sample_alone(network, images):
    network.eval()
    gates = mixed_gates(network.num_blocks)
    alone = [network(images[i : i + 1], gates[:, i].tolist()) for i in range(BATCH_SIZE)]
    torch.testing.assert_close(network(images, gates), torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_branch_statistics_are_those_of_the_surviving_samples(network, images):
    survivors = torch.tensor([0, 3, 4])
    gate = torch.zeros(BATCH_SIZE, dtype=torch.float64)
    gate[survivors] = torch.tensor([1.0, 1.5, 0.5], dtype=torch.float64)
    for block, x in zip(network.blocks, block_inputs(network, images), strict=True):
        reference = copy.deepcopy(block)
        shortcut, branch, branch_input, post = paths(reference, x)
        expected = shortcut.clone()
        expected[survivors] += gate[survivors].view(-1, 1, 1, 1) * branch(branch_input[survivors])
        torch.testing.assert_close(block(x, gate), post(expected), rtol=1e-12, atol=1e-12)
        assert_same(dict(block.named_buffers()), dict(reference.named_buffers()), 1e-12)


def test_gates_per_sample_follow_a_permutation(network, images):
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    gates = mixed_gates(network.num_blocks)
    permuted = copy.deepcopy(network)(images[order], gates[:, order])
    torch.testing.assert_close(permuted, network(images, gates)[order], rtol=1e-9, atol=1e-9)


def test_folding_survival_probs_is_gating_with_them(network, images):
    network.eval()
    before = copy.deepcopy(network.state_dict())
    probs = [1 - 0.5 * (i + 1) / network.num_blocks for i in range(network.num_blocks)]
    folded = fold_survival_probs(network, probs)
    expected = network(images, gates=probs)
    assert expected.ne(network(images)).any()
    torch.testing.assert_close(folded(images), expected, rtol=1e-10, atol=1e-10)
    assert_same(network.state_dict(), before)


# --- Options, sizes, precision, mistakes ---


def test_convolution_biases_are_inert():
    """A BN follows each convolution and takes the bias away again, in training mode."""
    torch.manual_seed(0)
    network = CifarResNet(14, conv_bias=True).double()
    images = make_images(16)
    with_zeros = network(images)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.bias)
    torch.testing.assert_close(network(images), with_zeros, rtol=1e-10, atol=1e-10)


def test_weights_start_from_he_normal():
    torch.manual_seed(0)
    network = CifarResNet(20, conv_bias=True)
    for name, parameter in network.named_parameters():
        if "conv" in name and "weight" in name:
            assert parameter.std().item() == pytest.approx(
                (2 / parameter[0].numel()) ** 0.5, rel=0.15
            )
        elif "conv" in name:
            assert not parameter.any()


@pytest.mark.parametrize("build", [CifarResNet, ResNet])
def test_classes_and_image_channels_are_free(build):
    depth = 18 if build is ResNet else 14
    network = build(depth, num_classes=7, in_channels=1)
    assert network(torch.randn(2, 1, 64, 64)).shape == (2, 7)
    assert network.num_classes == 7


@pytest.mark.parametrize("shortcut", ["A", "A-average", "B"])
def test_odd_sizes_round_up(shortcut):
    """BranchyNet's ResNet sees 30x30 crops: 30, 15, 8."""
    network = CifarResNet(14, shortcut=shortcut)
    sizes = []
    for layer in (network.layer1, network.layer2, network.layer3):
        layer[-1].register_forward_hook(lambda m, inputs, output: sizes.append(output.shape[-2:]))
    assert network(torch.randn(2, 3, 30, 30)).shape == (2, 10)
    assert sizes == [(30, 30), (15, 15), (8, 8)]


def test_average_shortcut_has_no_border():
    """On odd sizes the last window is smaller, and its average is over what is there."""
    x = torch.arange(9.0).view(1, 1, 3, 3)
    out = PadShortcut(1, 2, stride=2, kind="A-average")(x)
    assert out.tolist() == [[[[2.0, 3.5], [6.5, 8.0]], [[0.0, 0.0], [0.0, 0.0]]]]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("kind", ["basic-A", "basic-A-average", "basic-B", "preact-basic-A"])
def test_autocast_keeps_bfloat16_through_the_shortcuts(kind, per_sample):
    torch.manual_seed(0)
    network = KINDS[kind]().eval()
    images = make_images(16).float()
    gates = mixed_gates(network.num_blocks)
    gates = gates if per_sample else gates[:, 0]
    dtypes = set()
    for block in network.blocks:
        block.register_forward_hook(lambda m, inputs, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images, gates)
    assert dtypes == {torch.bfloat16}
    torch.testing.assert_close(logits.float(), network(images, gates), rtol=0.05, atol=0.05)


def test_a_branch_of_lower_precision_is_added_to_its_shortcut():
    block = CifarResNet(14).layer1[0].eval()
    x = torch.rand(BATCH_SIZE, 16, 8, 8)
    gate = mixed_gates(6)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out, everyone = block(x, gate), block(x)
    assert out.dtype == everyone.dtype == torch.float32
    torch.testing.assert_close(out[gate == 1], everyone[gate == 1], rtol=0.02, atol=0.02)
    assert torch.equal(out[gate == 0], x[gate == 0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(21), "depth is 21: give 6n"),
        (lambda: CifarResNet(2), "depth is 2: give 6n"),
        (lambda: CifarResNet(32, bottleneck=True), "depth is 32: give 9n"),
        (lambda: CifarResNet(20, plain=True, preactivation=True), "post-activation"),
        (lambda: ResNet(20), "depth is 20: give 18, 34"),
        (lambda: ResNet(34, stride_in_1x1=True), "needs bottlenecks"),
        (lambda: CifarResNet(20, stride_in_1x1=True), "needs bottlenecks: set bottleneck"),
        (lambda: fold_survival_probs(CifarResNet(14), [0.5] * 5), "5 .* 6 blocks"),
    ],
)
def test_impossible_networks_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("plain", "gates", "message"),
    [
        (False, [1.0] * 5, "5 gates for 6 blocks"),
        (False, torch.ones(7), "7 gates for 6 blocks"),
        (False, torch.ones(6, 3), r"\(6, 3\) for 2 images: expected \(6, 2\)"),
        (True, [1.0] * 6, "plain network"),
    ],
)
def test_gates_that_do_not_fit_are_refused(plain, gates, message):
    with pytest.raises(ValueError, match=message):
        CifarResNet(14, plain=plain)(torch.randn(2, 3, 8, 8), gates)


@pytest.mark.parametrize("shortcut", ["D", "a", None])
@pytest.mark.parametrize(
    "build",
    [
        lambda **choice: CifarResNet(8, **choice),
        lambda **choice: CifarResNet(8, preactivation=True, **choice),
        lambda **choice: CifarResNet(11, bottleneck=True, **choice),
        lambda **choice: ResNet(18, **choice),
    ],
    ids=["cifar", "preactivation", "bottleneck", "imagenet"],
)
def test_a_shortcut_that_does_not_exist_is_refused(build, shortcut):
    """It was option B."""
    message = f"^shortcut is {shortcut!r}: give A, A-average, A-prepend, B or C$"
    with pytest.raises(ValueError, match=message):
        build(shortcut=shortcut)


def test_gates_per_sample_cannot_be_traced():
    """Which samples keep a branch would be those of the example for ever."""
    network = CifarResNet(8).eval().requires_grad_(False)
    gates = torch.ones(3, 2)
    gates[1, 0] = 0
    with pytest.raises(RuntimeError, match="Export fold_survival_probs"):
        torch.jit.trace(lambda images: network(images, gates=gates), torch.zeros(2, 3, 32, 32))

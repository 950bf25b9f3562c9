"""Dense networks: the papers' counts, torchvision's numbers, and memory that changes no number."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from kernel_count import KernelCount
from randomize import randomize
from torch import Tensor, nn

import networks.densenet
from benchmarks.densenet_memory import StorageWatch, kept_bytes
from networks import CifarDenseNet, DenseNet, count_macs, count_params


class SmallDenseNet(DenseNet):
    """The stem of an ImageNet network and few layers."""

    LAYERS_PER_BLOCK = {121: (2, 3, 2, 2)}  # noqa: RUF012


KINDS = {
    "plain": lambda: CifarDenseNet(13, 4),
    "plain-dropout": lambda: CifarDenseNet(13, 4, compression=0.5, drop_rate=0.3),
    "bottleneck": lambda: CifarDenseNet(22, 4, bottleneck=True),
    "BC-dropout": lambda: CifarDenseNet(22, 4, bottleneck=True, compression=0.5, drop_rate=0.3),
    "imagenet": lambda: SmallDenseNet(121, num_classes=10),
    "imagenet-dropout": lambda: SmallDenseNet(121, num_classes=10, drop_rate=0.3),
}


@pytest.fixture(params=KINDS)
def network(request) -> nn.Module:
    """A plain float64 network of each kind in training mode, whose BN hide no mistake."""
    return make_network(request.param)


def make_network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return randomize(KINDS[kind]())


def memory_efficient(network: nn.Module) -> nn.Module:
    """Returns a memory-efficient copy."""
    network = copy.deepcopy(network)
    network.memory_efficient = True
    return network


def make_images(network: nn.Module) -> Tensor:
    size = 32 if isinstance(network, DenseNet) else 14  # 14, 7, 3: pooling drops odd rows
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=generator)


def loss_of(logits: Tensor) -> Tensor:
    labels = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    return F.cross_entropy(logits, labels)


def step(network: nn.Module, images: Tensor, autocast: bool = False) -> dict[str, Tensor | None]:
    """Returns everything that forward and backward leave behind: the generator's state, too."""
    torch.manual_seed(2)
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = network(images)
        loss = loss_of(logits)
    loss.backward()
    return {
        "logits": logits.detach(),
        "generator": torch.get_rng_state(),
        **{f"{name}.grad": p.grad for name, p in network.named_parameters()},
        **{name: buffer.clone() for name, buffer in network.named_buffers()},
    }


def assert_identical(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# --- Counts ---


def macs_of_blocks(
    channels: int,
    growth_rate: int,
    layers_per_block: tuple[int, ...],
    size: int,
    num_classes: int,
    bottleneck: bool = True,
    compression: float = 0.5,
) -> int:
    """Sums over what the paper draws behind the stem, which leaves size x size pixels."""
    macs = 0
    for number, num_layers in enumerate(layers_per_block, start=1):
        for _ in range(num_layers):
            if bottleneck:
                per_pixel = channels * 4 * growth_rate + 9 * 4 * growth_rate * growth_rate
            else:
                per_pixel = 9 * channels * growth_rate
            macs += per_pixel * size**2
            channels += growth_rate
        if number < len(layers_per_block):
            kept = int(compression * channels)
            macs += channels * kept * size**2
            channels, size = kept, size // 2
    return macs + channels * num_classes


def channels_between(network: nn.Module) -> list[int]:
    """Returns the channels after each block and each transition, shallow to deep."""
    channels = []
    for name, module in network.features.items():
        if name.startswith("transition"):
            channels += [module.conv.in_channels, module.conv.out_channels]
    return [*channels, network.classifier.in_features]


@pytest.mark.parametrize(
    ("depth", "growth_rate", "bc", "channels", "params", "params_100_classes", "millions"),
    [
        (40, 12, False, [160, 160, 304, 304, 448], 1_019_722, 1_060_132, 264.81),
        (100, 12, False, [400, 400, 784, 784, 1168], 6_979_642, 7_084_852, 1_770),
        (100, 24, False, [784, 784, 1552, 1552, 2320], 27_249_082, 27_457_972, 6_889),
        (100, 12, True, [216, 108, 300, 150, 342], 769_162, 800_032, 287.93),
        (250, 24, True, [1032, 516, 1500, 750, 1734], 15_324_406, 15_480_556, 5_419),
        (190, 40, True, [1320, 660, 1900, 950, 2190], 25_624_430, 25_821_620, 9_302),
    ],
)
def test_counts_of_cifar_networks(
    depth, growth_rate, bc, channels, params, params_100_classes, millions
):
    arguments = (depth, growth_rate, bc, 0.5 if bc else 1.0)
    with torch.device("meta"):
        network = CifarDenseNet(*arguments).eval()
        macs = count_macs(network, torch.empty(1, 3, 32, 32))
        assert count_params(CifarDenseNet(*arguments, num_classes=100)) == params_100_classes
    assert count_params(network) == params
    assert channels_between(network) == channels
    stem, num_layers = (2 * growth_rate, (depth - 4) // 6) if bc else (16, (depth - 4) // 3)
    expected = macs_of_blocks(stem, growth_rate, (num_layers,) * 3, 32, 10, *arguments[2:])
    assert macs == 9 * 3 * stem * 32**2 + expected
    assert round(macs / 1e6, 2 if millions < 1000 else 0) == millions


@pytest.mark.parametrize(
    ("depth", "growth_rate", "layers", "last_channels", "params", "billions"),
    [
        (121, 32, (6, 12, 24, 16), [1024, 512, 1024], 7_978_856, 2.834),
        (161, 48, (6, 12, 36, 24), [2112, 1056, 2208], 28_681_000, 7.728),
        (169, 32, (6, 12, 32, 32), [1280, 640, 1664], 14_149_480, 3.360),
        (201, 32, (6, 12, 48, 32), [1792, 896, 1920], 20_013_928, 4.291),
        (264, 32, (6, 12, 64, 48), [2304, 1152, 2688], 33_337_704, 5.752),
    ],
)
def test_counts_of_imagenet_networks(depth, growth_rate, layers, last_channels, params, billions):
    with torch.device("meta"):
        network = DenseNet(depth).eval()
        macs = count_macs(network, torch.empty(1, 3, 224, 224))
    assert count_params(network) == params
    assert channels_between(network)[-3:] == last_channels
    stem = 2 * growth_rate
    expected = macs_of_blocks(stem, growth_rate, layers, 56, 1000)
    assert macs == 49 * 3 * stem * 112**2 + expected
    assert round(macs / 1e9, 3) == billions


@pytest.mark.parametrize("depth", [121, 161, 169, 201])
def test_torchvisions_state_dicts_fit(depth):
    with torch.device("meta"):
        ours, theirs = DenseNet(depth), getattr(torchvision.models, f"densenet{depth}")()
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("arguments", "stem", "channels"),
    [
        ({"bottleneck": True}, 16, [28, 28, 40, 40, 52]),
        ({"compression": 0.5}, 16, [40, 20, 44, 22, 46]),
        ({"compression": 0.7}, 16, [40, 28, 52, 36, 60]),  # 36.4 is rounded down
    ],
)
def test_bottleneck_and_compression_apart(arguments, stem, channels):
    """Only both together double the stem."""
    network = CifarDenseNet(22, 4, **arguments)
    assert network.features["conv0"].out_channels == stem
    assert channels_between(network) == channels


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarDenseNet(41), r"depth is 41: give 3n\+4, such as 40, 100"),
        (lambda: CifarDenseNet(4), r"depth is 4: give 3n\+4"),
        (lambda: CifarDenseNet(43, bottleneck=True), r"43: give 6n\+4, such as 100, 190, 250"),
        (
            lambda: CifarDenseNet(40, compression=0.0),
            "compression is 0.0: give a number",
        ),
        (
            lambda: CifarDenseNet(40, compression=1.5),
            "compression is 1.5: give a number",
        ),
        (lambda: DenseNet(100), "depth is 100: give 121, 161, 169, 201 or 264"),
    ],
)
def test_impossible_networks_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_initialization():
    """N(0, 2 / (k * k * C_out)), as in the released code; torchvision has C_in instead."""
    torch.manual_seed(0)
    network = DenseNet(121)
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert module.bias is None
            assert module.weight.mean().item() == pytest.approx(0, abs=0.1 * expected), name
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert (network.classifier.bias == 0).all()


# --- Parity ---


def test_torchvision_has_the_same_outputs_and_gradients():
    torch.manual_seed(0)
    theirs = randomize(torchvision.models.densenet121(num_classes=10))
    ours = DenseNet(121, num_classes=10).double()
    ours.load_state_dict(theirs.state_dict())
    images = make_images(ours)
    expected, actual = step(theirs, images), step(ours, images)
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


def reference(state: dict[str, Tensor], images: Tensor, num_layers: int) -> Tensor:
    """The CIFAR network in functional form, in evaluation mode."""

    def norm_relu_conv(x, norm, conv):
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        scale = state[f"{norm}.weight"] / (var + 1e-5).sqrt()
        x = (x - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + state[f"{norm}.bias"].view(-1, 1, 1)
        if conv is None:
            return x.relu()
        weight = state[f"{conv}.weight"]
        return F.conv2d(x.relu(), weight, padding="same")

    x = F.conv2d(images, state["features.conv0.weight"], padding="same")
    for block in (1, 2, 3):
        for number in range(1, num_layers + 1):
            layer = f"features.denseblock{block}.denselayer{number}"
            new = norm_relu_conv(x, f"{layer}.norm1", f"{layer}.conv1")
            if f"{layer}.conv2.weight" in state:
                new = norm_relu_conv(new, f"{layer}.norm2", f"{layer}.conv2")
            x = torch.cat([x, new], dim=1)
        if block < 3:
            transition = f"features.transition{block}"
            x = norm_relu_conv(x, f"{transition}.norm", f"{transition}.conv")
            height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
            x = x[..., :height, :width]
            x = x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5))
    x = norm_relu_conv(x, "features.norm4", None).mean((2, 3))
    return x @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize("kind", ["plain", "plain-dropout", "bottleneck", "BC-dropout"])
def test_cifar_networks_are_those_of_the_paper(kind):
    network = make_network(kind).eval()
    images = make_images(network)
    torch.testing.assert_close(network(images), reference(network.state_dict(), images, 3))


# --- Dropout ---


def test_dropout_follows_every_convolution_but_the_first(monkeypatch):
    dropped = []

    def spy(x, drop_rate, training):
        assert training
        dropped.append((x.shape[1], drop_rate))
        return x

    monkeypatch.setattr(networks.densenet.F, "dropout", spy)
    network = make_network("BC-dropout")
    network(make_images(network))
    expected = [
        (conv.out_channels, 0.3) for conv in network.modules() if isinstance(conv, nn.Conv2d)
    ]
    assert dropped == expected[1:]


@pytest.mark.parametrize("kind", ["plain-dropout", "BC-dropout", "imagenet-dropout"])
def test_dropout_is_for_training_alone(kind):
    network = make_network(kind)
    images = make_images(network)
    torch.manual_seed(3)
    first, second = network(images), network(images)
    assert not torch.equal(first, second)
    network.eval()
    state = torch.get_rng_state()
    assert torch.equal(network(images), network(images))
    assert torch.equal(torch.get_rng_state(), state)


# --- Memory ---


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16", "autocast"])
def test_memory_efficient_training_is_identical(network, precision, memory_format):
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    network.to(dtype, memory_format=memory_format)
    images = make_images(network).to(dtype).contiguous(memory_format=memory_format)
    efficient = memory_efficient(network)
    expected = step(network, images, precision == "autocast")
    actual = step(efficient, images, precision == "autocast")
    assert_identical(actual, expected)


def test_one_step_is_one_update_of_the_running_statistics(network):
    """A checkpoint that runs a BN twice moves them by 0.19 instead of 0.1 of the way."""
    efficient = memory_efficient(network)
    batches = {}
    for name, norm in network.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_hook(lambda _, x, y, name=name: batches.update({name: x[0]}))
    before = {name: buffer.clone() for name, buffer in efficient.named_buffers()}
    step(network, make_images(network))
    step(efficient, make_images(efficient))
    for name in batches:
        norm = efficient.get_submodule(name)
        mean, var = batches[name].mean((0, 2, 3)), batches[name].var((0, 2, 3))
        expected_mean = 0.9 * before[f"{name}.running_mean"] + 0.1 * mean
        expected_var = 0.9 * before[f"{name}.running_var"] + 0.1 * var
        torch.testing.assert_close(norm.running_mean, expected_mean)
        torch.testing.assert_close(norm.running_var, expected_var)
        assert norm.num_batches_tracked == 1


def test_evaluation_and_no_grad_are_untouched(network):
    efficient = memory_efficient(network)
    images = make_images(network)
    with torch.no_grad():
        torch.manual_seed(2)
        expected = network(images)
        torch.manual_seed(2)
        assert torch.equal(efficient(images), expected)
    assert_identical(dict(efficient.named_buffers()), dict(network.named_buffers()))
    assert_identical(step(efficient.eval(), images), step(network.eval(), images))


@pytest.mark.parametrize("frozen", ["BN statistics", "stem", "all but the head", "BN", "conv"])
def test_memory_efficient_fine_tuning(network, frozen):
    modules = dict(network.named_modules())
    if frozen == "BN statistics":
        modules["features.denseblock1.denselayer2.norm1"].eval()
        modules["features.transition1.norm"].eval()
    elif frozen == "stem":
        modules["features.conv0"].requires_grad_(False)
    elif frozen == "all but the head":
        modules["features"].requires_grad_(False)
    else:
        kind = nn.BatchNorm2d if frozen == "BN" else nn.Conv2d
        for module in modules.values():
            if isinstance(module, kind):
                module.requires_grad_(False)
    images = make_images(network)
    assert_identical(step(memory_efficient(network), images), step(network, images))


def test_kernels_of_a_step():
    """What is computed again is paid by gradients that are added up in one kernel per layer."""
    plain = CifarDenseNet(100, bottleneck=True, compression=0.5)
    counts = []
    for network in (plain, memory_efficient(plain)):
        with KernelCount() as count:
            loss_of(network(torch.randn(2, 3, 8, 8))).backward()
        counts.append(count.names)
    plain, efficient = counts
    assert efficient.total() <= plain.total()
    # The CPU alone needs two small kernels more for each BN that it computes again.
    assert efficient["aten::ones_like"] + efficient["aten::mul.Tensor"] == 2 * 99 + 1
    for name, again in [("cat", 48 + 3), ("relu_", 99), ("native_batch_norm", 99)]:
        assert efficient[f"aten::{name}"] == plain[f"aten::{name}"] + again
    for name in ("convolution", "convolution_backward"):
        assert efficient[f"aten::{name}"] == 99
    assert sum(efficient[name] for name in efficient if "threshold_backward" in name) == 99
    assert plain["aten::add.Tensor"] == 408
    assert efficient["aten::add.Tensor"] == 0
    assert efficient["aten::add_.Tensor"] == 48
    assert efficient["aten::_foreach_add_.Scalar"] == 6


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_can_be_asked_for(network, autocast):
    """As a recorded backward does: of all parameters at once, into no `.grad`."""
    network.float().memory_efficient = True
    images = make_images(network).float()
    expected = step(network, images, autocast)
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(network(images))
    actual = torch.autograd.grad(loss, list(network.parameters()))
    names = [name for name, _ in network.named_parameters()]
    assert_identical(
        dict(zip(names, actual, strict=True)), {name: expected[f"{name}.grad"] for name in names}
    )


def test_what_backward_cannot_do_is_an_error():
    network = memory_efficient(make_network("bottleneck"))
    parameters = list(network.parameters())
    loss = loss_of(network(make_images(network)))
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(each.sum() for each in gradients).backward()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    loss = loss_of(network(make_images(network)))
    with torch.no_grad():
        network.features["denseblock1"].denselayer1.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["norm2", "conv1", ""])
def test_hooks_are_called(name):
    """Then the block keeps what it would compute again; no number changes."""
    network = make_network("bottleneck")
    images = make_images(network)
    expected = step(network, images)
    efficient, seen = memory_efficient(make_network("bottleneck")), []
    layer = efficient.features["denseblock2"].denselayer2
    hook = layer.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
    fewer = kept_bytes(efficient, images)
    assert seen
    hook.remove()
    assert kept_bytes(efficient, images) < fewer
    efficient = memory_efficient(make_network("bottleneck"))
    layer = efficient.features["denseblock2"].denselayer2
    layer.conv1.register_full_backward_hook(lambda *_: seen.append("backward"))
    assert_identical(step(efficient, images), expected)
    assert seen[-1] == "backward"


def test_modules_of_another_kind_are_called():
    network = make_network("bottleneck")
    layer = network.features["denseblock2"].denselayer1
    layer.conv1 = nn.Sequential(layer.conv1, nn.Hardtanh())
    layer.norm2.momentum = None  # a cumulative average
    images = make_images(network)
    assert_identical(step(memory_efficient(network), images), step(network, images))


def test_a_single_value_per_channel_is_refused():
    network = memory_efficient(CifarDenseNet(22, 4, bottleneck=True))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(torch.zeros(1, 3, 4, 4))


def test_backward_can_be_repeated(network):
    """And it leaves nothing behind that it computed again."""
    network.memory_efficient = True
    parameters = list(network.parameters())
    with StorageWatch() as watch:
        loss = loss_of(network(make_images(network)))
        num_bytes = watch.live_bytes(parameters)
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        assert watch.live_bytes([*parameters, *first]) == num_bytes
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_bn_that_synchronises_ranks_is_not_computed_again():
    """One rank alone would find other statistics."""
    plain = make_network("bottleneck")
    efficient = nn.SyncBatchNorm.convert_sync_batchnorm(memory_efficient(plain))
    images = make_images(plain)
    assert kept_bytes(efficient, images) == kept_bytes(plain, images)


def test_ddp_has_the_same_gradients(tmp_path):
    network = make_network("BC-dropout")
    images = make_images(network)
    expected = step(network, images)
    network = memory_efficient(make_network("BC-dropout"))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        actual = step(nn.parallel.DistributedDataParallel(network), images)
    finally:
        torch.distributed.destroy_process_group()
    assert_identical({k.removeprefix("module."): v for k, v in actual.items()}, expected)


def test_bytes_kept_by_densenet_bc_100():
    plain = CifarDenseNet(100, bottleneck=True, compression=0.5)
    images = torch.randn(1, 3, 32, 32)
    assert kept_bytes(memory_efficient(plain), images) < 0.2 * kept_bytes(plain, images)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_memory_grows_linearly_with_depth(bottleneck):
    """A layer keeps its output, and with a bottleneck its 4k channels; a plain one all before."""
    images = torch.randn(1, 3, 32, 32)

    def bytes_per_layer(layers_per_block: int, efficient: bool) -> float:
        depth = layers_per_block * (6 if bottleneck else 3) + 4
        network = CifarDenseNet(depth, 4, bottleneck=bottleneck, memory_efficient=efficient)
        return kept_bytes(network, images) / layers_per_block

    assert bytes_per_layer(16, True) <= bytes_per_layer(8, True)
    assert bytes_per_layer(16, False) > 1.2 * bytes_per_layer(8, False)


def test_a_graph_without_backward_is_freed(network):
    """What is computed again must not hold the graph that holds it."""
    network.memory_efficient = True
    images = make_images(network)
    with StorageWatch() as watch:
        loss = loss_of(network(images))
    del loss
    assert watch.live_bytes([images, *network.parameters(), *network.buffers()]) == 0

"""Parameters and multiply-accumulates against the papers and an independent count: no tolerance.

And the stopwatch, with a clock that the test sets.
"""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from networks import (
    CifarResNet,
    ExitCosts,
    ResNet,
    Staged,
    cost,
    count_macs,
    count_params,
    median_seconds,
    time_exits,
    time_points,
)

CIFAR_PARAMS = [  # depth, option A (and plain), option B; He et al. table 6 rounds them
    (20, 269_722, 272_474),
    (32, 464_154, 466_906),
    (44, 658_586, 661_338),
    (56, 853_018, 855_770),
    (110, 1_727_962, 1_730_714),
    (1202, 19_421_274, 19_424_026),
]
CIFAR_MACS = [(20, 40.55), (32, 68.86), (44, 97.17), (56, 125.49), (110, 252.89), (1202, 2829.24)]


@pytest.fixture(autouse=True)
def meta_device():
    """Counts need no numbers, so the networks of these tests hold none."""
    with torch.device("meta"):
        yield


def macs_by_module(network: nn.Module, images: torch.Tensor, **arguments) -> dict[nn.Module, int]:
    """Counts by hooks, from the shapes of what each layer put out, and only layers that ran."""
    macs = {}

    def count(layer, inputs, output):
        # Every output number is a dot product with one filter, or one row of the matrix.
        macs[layer] = output.numel() * layer.weight[0].numel()

    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    network(images, **arguments)
    for hook in hooks:
        hook.remove()
    return macs


@pytest.mark.parametrize(("depth", "params_a", "params_b"), CIFAR_PARAMS)
def test_params_of_cifar_resnets(depth, params_a, params_b):
    assert count_params(CifarResNet(depth)) == params_a
    assert count_params(CifarResNet(depth, shortcut="A-average")) == params_a
    assert count_params(CifarResNet(depth, plain=True)) == params_a
    assert count_params(CifarResNet(depth, shortcut="B")) == params_b


@pytest.mark.parametrize(
    ("depth", "num_classes", "params"),
    [(110, 10, 1_732_010), (110, 100, 1_737_860), (152, 10, 2_414_090)],
)
def test_params_of_the_released_stochastic_depth_networks(depth, num_classes, params):
    network = CifarResNet(depth, num_classes, shortcut="A-average", conv_bias=True)
    assert count_params(network) == params


@pytest.mark.parametrize(
    ("depth", "bottleneck", "shortcut", "params"),
    [
        (110, False, "A", 1_727_962),
        (164, True, "B", 1_703_258),
        (1001, True, "B", 10_327_706),
    ],
)
def test_params_of_preactivation_resnets(depth, bottleneck, shortcut, params):
    network = CifarResNet(depth, bottleneck=bottleneck, preactivation=True, shortcut=shortcut)
    assert count_params(network) == params


@pytest.mark.parametrize(
    ("depth", "shortcut", "params"),
    [
        (18, "B", 11_689_512),
        (34, "B", 21_797_672),
        (50, "B", 25_557_032),
        (101, "B", 44_549_160),
        (152, "B", 60_192_808),
        (18, "A", 11_515_688),
        (34, "A", 21_623_848),
        (34, "C", 22_716_840),
    ],
)
def test_params_of_imagenet_resnets(depth, shortcut, params):
    assert count_params(ResNet(depth, shortcut=shortcut)) == params


@pytest.mark.parametrize(("depth", "params"), [(18, 11_515_688), (34, 21_623_848)])
def test_params_of_plain_imagenet_networks(depth, params):
    assert count_params(ResNet(depth, plain=True)) == params


@pytest.mark.parametrize(("depth", "millions"), CIFAR_MACS)
def test_macs_of_cifar_resnets(depth, millions):
    """The 3x3 layers behind the stem cost the same, but for two: those that stride cost half."""
    images = torch.empty(1, 3, 32, 32)
    macs = count_macs(CifarResNet(depth).eval(), images)
    assert macs == 9 * 3 * 16 * 32**2 + (depth - 3) * 9 * 16**2 * 32**2 + 64 * 10
    assert round(macs / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"plain": True}, 0),
        ({"shortcut": "A-average"}, 0),
        ({"conv_bias": True}, 0),
        ({"shortcut": "B"}, 16 * 32 * 16**2 + 32 * 64 * 8**2),
        ({"num_classes": 100}, 64 * 90),
        ({"in_channels": 1}, -9 * 2 * 16 * 32**2),
    ],
    ids=str,
)
def test_macs_of_options_relative_to_option_a(arguments, difference):
    ours = CifarResNet(20, **arguments).eval()
    images = torch.empty(1, arguments.get("in_channels", 3), 32, 32)
    base = count_macs(CifarResNet(20).eval(), torch.empty(1, 3, 32, 32))
    assert count_macs(ours, images) - base == difference


@pytest.mark.parametrize(
    ("depth", "stride_in_1x1", "macs"),
    [
        (18, False, 1_814_073_344),
        (34, False, 3_663_761_408),
        (50, False, 4_089_184_256),
        (101, False, 7_801_405_440),
        (152, False, 11_513_626_624),
        (50, True, 3_857_973_248),  # the paper's 3.8e9, 7.6e9 and 11.3e9
        (101, True, 7_570_194_432),
        (152, True, 11_282_415_616),
    ],
)
def test_macs_of_imagenet_resnets(depth, stride_in_1x1, macs):
    network = ResNet(depth, stride_in_1x1=stride_in_1x1).eval()
    images = torch.empty(1, 3, 224, 224)
    assert count_macs(network, images) == macs
    assert sum(macs_by_module(network, images).values()) == macs


@pytest.mark.parametrize(("stride_in_1x1", "macs"), [(True, 244_500_992), (False, 247_646_720)])
def test_macs_of_the_preactivation_resnet_164(stride_in_1x1, macs):
    """Its authors stride in the first 1x1 convolution, which then computes a quarter."""
    network = CifarResNet(
        164, shortcut="B", bottleneck=True, preactivation=True, stride_in_1x1=stride_in_1x1
    ).eval()
    images = torch.empty(1, 3, 32, 32)
    assert count_macs(network, images) == macs
    assert sum(macs_by_module(network, images).values()) == macs


@pytest.mark.parametrize("preactivation", [False, True])
def test_where_a_bottleneck_strides_changes_no_parameter(preactivation):
    arguments = {"bottleneck": True, "preactivation": preactivation, "shortcut": "B"}
    at_3x3, at_1x1 = (CifarResNet(29, stride_in_1x1=at, **arguments) for at in (False, True))
    shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in (at_3x3, at_1x1)]
    assert shapes[0] == shapes[1]
    for network, strides in ((at_3x3, (1, 2, 1)), (at_1x1, (2, 1, 1))):
        block = network.layer2[0]
        convs = block.conv1, block.conv2, block.conv3
        assert tuple(layer.stride[0] for layer in convs) == strides
        assert all(layer.stride == (1, 1) for layer in (network.layer1[0].conv1, block.conv3))


@pytest.mark.parametrize("in_channels", [1, 3])
def test_counts_of_grouped_convolutions_and_linear_layers(in_channels):
    network = nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 16, 5, groups=8, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    images = torch.empty(5, in_channels, 17, 13)
    by_hand = 5 * (9 * in_channels * 8 * 9 * 7 + 25 * 16 * 5 * 3 + 16 * 10)
    assert sum(macs_by_module(network, images).values()) == by_hand
    assert count_macs(network, images) == by_hand
    assert count_params(network) == 72 * in_channels + 8 + 25 * 16 + 170


@pytest.mark.parametrize(
    "arguments",
    [
        {"depth": 20},
        {"depth": 20, "shortcut": "C"},
        {"depth": 20, "preactivation": True},
        {"depth": 29, "bottleneck": True, "shortcut": "B"},
        {"depth": 29, "bottleneck": True, "shortcut": "B", "preactivation": True},
    ],
    ids=str,
)
def test_a_closed_block_saves_exactly_its_branch(arguments):
    network, images = CifarResNet(**arguments).eval(), torch.empty(2, 3, 32, 32)
    macs = macs_by_module(network, images)
    full = count_macs(network, images)
    assert full == sum(macs.values())
    for index, block in enumerate(network.blocks):
        gates = [1.0] * network.num_blocks
        gates[index] = 0.0
        branch = sum(macs[layer] for name, layer in block.named_children() if "conv" in name)
        assert branch > 0
        assert count_macs(lambda x, gates=gates: network(x, gates), images) == full - branch


def test_macs_of_gates_per_sample_are_those_of_the_surviving_samples():
    network = CifarResNet(20).eval()
    num_images = 4
    images = torch.empty(num_images, 3, 32, 32)
    macs = macs_by_module(network, images)
    gates = torch.zeros(network.num_blocks, num_images, device="cpu")
    expected = sum(macs.values())
    for index, block in enumerate(network.blocks):
        num_survivors = index % (num_images + 1)  # from nobody to everybody
        gates[index, :num_survivors] = 1.0
        branch = macs[block.conv1] + macs[block.conv2]
        expected -= branch * (num_images - num_survivors) // num_images
    assert count_macs(lambda x: network(x, gates), images) == expected


# --- Time -----------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Stops the clock of the stopwatch; returns what advances it, by seconds."""
    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


CPU = torch.device("cpu")


def test_contenders_take_turns_in_an_order_of_each_round():
    rounds: dict[int, list[str]] = {}

    def run(name: str, number: int) -> None:
        rounds.setdefault(number, []).append(name)

    contenders = {name: lambda number, name=name: run(name, number) for name in "abcd"}
    times = median_seconds(contenders, 9, CPU, num_warmup_rounds=2)
    assert list(times) == list("abcd")
    assert list(rounds) == list(range(-2, 9))
    assert all(sorted(order) == list("abcd") for order in rounds.values())
    assert len({tuple(order) for order in rounds.values()}) > 4
    again = dict(rounds)
    rounds.clear()
    median_seconds(contenders, 9, CPU, num_warmup_rounds=2)
    assert rounds == again


def test_the_median_of_the_timed_rounds_counts(clock):
    seconds = {-1: 100.0, 0: 1.0, 1: 5.0, 2: 2.0}
    contenders = {"a": lambda n: clock(seconds[n]), "b": lambda n: clock(10 * seconds[n])}
    times = median_seconds(contenders, 3, CPU, num_warmup_rounds=1)
    assert times == pytest.approx({"a": 2.0, "b": 20.0})


def test_time_of_points_is_per_image_and_each_round_takes_the_next_batch(clock):
    seen: dict[str, list[int]] = {"fast": [], "slow": []}

    def run(name: str, images: torch.Tensor) -> None:
        assert not torch.is_grad_enabled()
        seen[name].append(int(images[0]))
        slow = 100.0 if len(seen[name]) == 1 else 1.0  # the first round warms up
        clock(slow * (4.0 if name == "slow" else 1.0))

    points = {name: lambda images, name=name: run(name, images) for name in seen}
    # Batches 0, 4, 8 of four images; the last one is smaller, and would be slower per image.
    batches = torch.arange(14, device=CPU).split(4)
    times = time_points(points, batches)
    assert seen == {"fast": [0, 4, 8] * 2, "slow": [0, 4, 8] * 2}
    assert times == pytest.approx({"fast": 250.0, "slow": 1000.0})


def test_time_of_exits_is_that_of_each_stage_and_each_exit(clock):
    """Every stage and exit reads what the stages before it made; the first round does not count."""
    seconds = {"stage0": 1.0, "exit0": 0.25, "stage1": 3.0, "exit1": 0.5}
    num_calls = dict.fromkeys(seconds, 0)

    def take(name: str, state: torch.Tensor, index: int) -> torch.Tensor:
        assert state.tolist() == [index] * 4
        num_calls[name] += 1
        # The first call of a stage makes the states, the next of all parts is the warm-up.
        is_timed = num_calls[name] > (2 if "stage" in name else 1)
        clock(seconds[name] if is_timed else 100.0)
        return state + 1

    stages = [lambda x, k=k: take(f"stage{k}", x, k) for k in range(2)]
    exits = [lambda x, k=k: take(f"exit{k}", x, k + 1) for k in range(2)]
    costs = time_exits(Staged(stages, exits), torch.zeros(4, device=CPU), num_rounds=3)
    assert num_calls == {"stage0": 5, "exit0": 4, "stage1": 5, "exit1": 4}
    # Milliseconds per image, of four.
    assert costs == ExitCosts([250.0, 750.0], [62.5, 125.0])
    assert costs.leaving == [312.5, 1187.5]

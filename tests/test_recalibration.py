"""Recalibrated statistics against the closed form, computed from what each BN receives."""

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from networks import (
    CifarResNet,
    ResNetWithExits,
    SlimmableBatchNorm2d,
    SlimmableCifarResNet,
    SlimmableMobileNetV2,
    recalibrate,
)

NON_UNIFORM = (0.5, 0.25, 1.0, 0.75, 0.25, 0.5)  # one ratio for each group of depth 8
GATES = [0.5, 0.0, 0.75]


def universal() -> SlimmableCifarResNet:
    return SlimmableCifarResNet(8, width_mult_range=(0.25, 1.0))


def with_exits() -> ResNetWithExits:
    return ResNetWithExits(CifarResNet(8), [0, 2])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[dict]]] = {
    # how to build it, and the arguments of each run
    "plain": (lambda: CifarResNet(8), [{}]),
    "gates": (lambda: CifarResNet(8), [{"gates": GATES}]),
    "gates per sample": (lambda: CifarResNet(8, preactivation=True), [{"gates": None}]),
    "exits": (with_exits, [{}]),
    "exits and gates": (with_exits, [{"gates": GATES}]),
    "switches": (
        lambda: SlimmableCifarResNet(8, width_mults=(0.25, 0.5, 1.0)),
        [{"width_mult": 0.5}, {"width_mult": 1.0}],
    ),
    "universal": (
        universal,
        [{"width_mult": 1.0}, {"width_mult": 0.3}, {"width_mult": NON_UNIFORM}],
    ),
    "tied tail": (
        lambda: SlimmableMobileNetV2(10, cifar_strides=True, width_mults=(0.35, 0.5)),
        [{"width_mult": 0.35}, {"width_mult": 0.5}],
    ),
}


def make(build: Callable[[], nn.Module]) -> nn.Module:
    """Returns a float64 network; no number of a BN is a 0 or 1 that could hide a mistake."""
    torch.manual_seed(0)
    network = build().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | SlimmableBatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 2.0, 3.0)
            module.num_batches_tracked.fill_(7)
    return network


def make_batches(*sizes: int, seed: int = 1) -> list[Tensor]:
    """Batches that differ in size and in what they hold, so that weighting them matters."""
    generator = torch.Generator().manual_seed(seed)
    return [
        number + number * torch.randn(size, 3, 8, 8, dtype=torch.float64, generator=generator)
        for number, size in enumerate(sizes, start=1)
    ]


def runs_of(network: nn.Module, arguments: list[dict]) -> list[Callable[[Tensor], object]]:
    return [partial(network, **kwargs) for kwargs in arguments]


def norms_of(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | SlimmableBatchNorm2d)]


def statistics_of(network: nn.Module) -> list[dict[str, Tensor]]:
    """Returns mean and variance, (2, C), of each BN and width; of an ordinary BN by the name ''."""
    return [
        dict(norm.statistics)
        if isinstance(norm, SlimmableBatchNorm2d)
        else {"": torch.stack([norm.running_mean, norm.running_var])}
        for norm in norms_of(network)
    ]


def closed_form(
    network: nn.Module, batches: Iterable[Tensor], arguments: list[dict]
) -> list[dict[str, Tensor]]:
    """Runs a copy in training mode, and averages what its BNs receive with the images as weights.

    What is not reached keeps what `network` has.
    """
    twin = copy.deepcopy(network).train()
    received: dict[tuple[nn.Module, str], list[Tensor]] = {}

    def remember(norm: nn.Module, inputs: tuple) -> None:
        name = inputs[1].name if isinstance(norm, SlimmableBatchNorm2d) else ""
        received.setdefault((norm, name), []).append(inputs[0].detach().clone())

    for norm in norms_of(twin):
        norm.register_forward_pre_hook(remember)
    for images in batches:
        for kwargs in arguments:
            twin(images, **kwargs)
    expected = statistics_of(network)
    for statistics, norm in zip(expected, norms_of(twin), strict=True):
        for (owner, name), inputs in received.items():
            if owner is norm:
                num_images = sum(len(x) for x in inputs)
                mean = sum(len(x) * x.mean((0, 2, 3)) for x in inputs) / num_images
                variance = sum(len(x) * x.var((0, 2, 3), unbiased=True) for x in inputs)
                statistics[name] = torch.stack([mean, variance / num_images])
    return expected


def assert_same(actual: object, expected: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", NETWORKS)
def test_closed_form(case):
    """The mean over images of each batch's mean and unbiased variance, at every depth."""
    build, arguments = NETWORKS[case]
    network = make(build)
    batches = make_batches(6, 6, 4)
    if case == "gates per sample":
        # A branch that half of the images take counts those alone.
        gates = torch.tensor([[1.0, 0.0] * 3, [1.0] * 6, [0.0, 0.5, 0.5] * 2])
        arguments = [{"gates": gates}]
        batches = make_batches(6, 6)
    expected = closed_form(network, batches, arguments)
    recalibrate(network, batches, runs_of(network, arguments))
    assert_same(statistics_of(network), expected)


def test_first_batch_norm_by_hand():
    network = make(universal)
    batches = make_batches(5, 2)
    recalibrate(network, batches, [partial(network, width_mult=0.25)])
    weight = network.units[0].conv.weight[:4]
    responses = [nn.functional.conv2d(images, weight, padding=1) for images in batches]
    means = [x.transpose(0, 1).flatten(1).mean(1) for x in responses]
    variances = [
        (x.transpose(0, 1).flatten(1) - mean[:, None]).square().sum(1) / (x[:, 0].numel() - 1)
        for x, mean in zip(responses, means, strict=True)
    ]
    expected = [(5 * first + 2 * second) / 7 for first, second in (means, variances)]
    assert_same(network.units[0].norm.statistics["0.25"], torch.stack(expected))


def test_without_runs_the_network_runs():
    """A slimmable one at full width."""
    for build, run in ((lambda: CifarResNet(8), {}), (universal, {"width_mult": 1.0})):
        network = make(build)
        expected = closed_form(network, make_batches(4, 3), [run])
        recalibrate(network, make_batches(4, 3))
        assert_same(statistics_of(network), expected)


def test_all_runs_share_one_pass_over_the_data():
    """A loader is read once, however many widths there are."""
    network = make(universal)
    arguments = NETWORKS["universal"][1]
    expected = closed_form(network, make_batches(4, 3), arguments)
    recalibrate(network, iter(make_batches(4, 3)), runs_of(network, arguments))
    assert_same(statistics_of(network), expected)


@pytest.mark.parametrize("case", ["plain", "exits", "switches", "universal"])
def test_recalibration_resets(case):
    """What was there before, training's or an earlier recalibration's, has no share in it."""
    build, arguments = NETWORKS[case]
    once, twice = make(build), make(build)
    for norm in norms_of(twice):
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.fill_(1e6)
            norm.running_var.fill_(1e6)
    recalibrate(twice, make_batches(4, 2, seed=2), runs_of(twice, arguments))
    for network in (once, twice):
        recalibrate(network, make_batches(5, 3), runs_of(network, arguments))
    reached = closed_form(once, make_batches(5, 3), arguments)
    assert_same(statistics_of(once), reached)
    first, second = statistics_of(once), statistics_of(twice)
    if case == "switches":  # of three switches the first was left alone
        first = [value for index, value in enumerate(first) if index % 3]
        second = [value for index, value in enumerate(second) if index % 3]
    assert_same(first, second, 0.0)


@pytest.mark.parametrize("ruin", [torch.inf, torch.nan])
def test_recalibration_mends_ruined_statistics(ruin):
    """Numbers that nothing can be averaged with are replaced like any other."""
    network = make(lambda: CifarResNet(8))
    expected = closed_form(network, make_batches(4, 3), [{}])
    for norm in norms_of(network):
        norm.running_mean.fill_(ruin)
        norm.running_var.fill_(ruin)
    recalibrate(network, make_batches(4, 3))
    assert_same(statistics_of(network), expected)


def test_other_widths_are_untouched():
    network = make(universal)
    widths = (0.25, 0.5, NON_UNIFORM)
    recalibrate(network, make_batches(4), [partial(network, width_mult=w) for w in widths])
    before = statistics_of(network)
    recalibrate(network, make_batches(4, seed=2), [partial(network, width_mult=0.5)])
    for old, new in zip(before, statistics_of(network), strict=True):
        assert list(new) == list(old) == ["0.25", "0.5", "0.5,0.25,1,0.75,0.25,0.5"]
        for name in old:
            assert torch.equal(old[name], new[name]) == (name != "0.5")


def test_other_switches_are_untouched():
    network = make(lambda: SlimmableCifarResNet(8, width_mults=(0.25, 1.0)))
    before = copy.deepcopy(network.state_dict())
    recalibrate(network, make_batches(4), [partial(network, width_mult=0.25)])
    for name, value in network.state_dict().items():
        is_own = "switches.0.running" in name
        assert torch.equal(value, before[name]) != is_own, name


def test_what_no_run_reaches_keeps_its_statistics():
    """Behind a closed gate nothing runs."""
    network = make(lambda: CifarResNet(8))
    before = copy.deepcopy(network.state_dict())
    recalibrate(network, make_batches(4), [partial(network, gates=[1.0, 0.0, 1.0])])
    for name, value in network.state_dict().items():
        changes = "running" in name and not name.startswith("layer2.")
        assert torch.equal(value, before[name]) != changes, name


def attributes(network: nn.Module) -> list[tuple]:
    """Returns what a recalibration may not change, statistics aside."""
    return [
        (
            module.training,
            getattr(module, "momentum", None),
            getattr(module, "record", None),
            getattr(module, "eps", None),
            len(module._forward_hooks) + len(module._forward_pre_hooks),
            sorted(vars(module)),
        )
        for module in network.modules()
    ]


def not_statistics(network: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.clone()
        for name, value in network.state_dict().items()
        if "running" not in name and "extra_state" not in name
    }


@pytest.mark.parametrize("case", NETWORKS)
def test_nothing_else_changes(case):
    """Weights, flags of training, momentum, the count of batches, gradients, the generator."""
    build, arguments = NETWORKS[case]
    network = make(build).train()
    for number, module in enumerate(network.modules()):
        module.training = number % 3 > 0  # some are frozen
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = (0.1, None, 0.5)[number % 3]
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    weights, flags = not_statistics(network), attributes(network)
    generator = torch.get_rng_state()
    recalibrate(network, make_batches(4, 3), runs_of(network, arguments))
    assert attributes(network) == flags
    assert_same(not_statistics(network), weights, 0.0)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert all((parameter.grad == 1).all() for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    for statistics in statistics_of(network):
        assert not any(value.requires_grad for value in statistics.values())


def test_statistics_stay_what_they_are_in_the_module():
    """Buffers are filled, not replaced: an optimizer's or a compiled graph's reference holds."""
    network = make(lambda: CifarResNet(8))
    before = {name: id(value) for name, value in network.named_buffers()}
    recalibrate(network, make_batches(4))
    assert {name: id(value) for name, value in network.named_buffers()} == before


def test_dropout_stays_off():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4)).double().train()
    batches = make_batches(4, 2)
    recalibrate(network, batches)
    responses = [network[0](images) for images in batches]
    mean = sum(len(x) * x.mean((0, 2, 3)) for x in responses) / 6
    assert_same(network[2].running_mean, mean)
    assert network[1].training


def test_no_graph_is_kept():
    """Its memory is that of evaluation."""
    network, logits = make(universal), []
    recalibrate(network, make_batches(4), [lambda images: logits.append(network(images))])
    assert not logits[0].requires_grad


def test_training_afterwards_is_as_ever():
    """The momentum goes on from the new statistics."""
    network = make(lambda: CifarResNet(8)).train()
    recalibrate(network, make_batches(4))
    mean = network.bn1.running_mean.clone()
    images = make_batches(4, seed=3)[0]
    network(images)
    of_batch = network.conv1(images).mean((0, 2, 3))
    assert_same(network.bn1.running_mean, 0.9 * mean + 0.1 * of_batch)
    assert network.bn1.num_batches_tracked == 8


@pytest.mark.parametrize("case", ["plain", "switches", "universal"])
def test_no_images(case):
    network = make(NETWORKS[case][0]).train()
    before, flags = copy.deepcopy(network.state_dict()), attributes(network)
    with pytest.raises(ValueError, match=r"no training images .* give at least one batch"):
        recalibrate(network, [])
    assert_same(network.state_dict(), before, 0.0)
    assert attributes(network) == flags


@pytest.mark.parametrize("culprit", ["data", "run"])
@pytest.mark.parametrize("case", NETWORKS)
def test_failure_in_the_middle_restores_everything(case, culprit):
    build, arguments = NETWORKS[case]
    network = make(build).train()
    runs = runs_of(network, arguments)
    before, flags = copy.deepcopy(network.state_dict()), attributes(network)

    def broken_data() -> Iterator[Tensor]:
        yield from make_batches(4)
        raise OSError("a broken file")

    def broken_run(images: Tensor) -> None:
        raise OSError("out of memory")

    broken = {"data": (broken_data(), runs), "run": (make_batches(4), [*runs, broken_run])}
    with pytest.raises(OSError, match=r"a broken file|out of memory"):
        recalibrate(network, *broken[culprit])
    assert_same(network.state_dict(), before, 0.0)
    assert attributes(network) == flags


# --- Several ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gates", "switches", "universal"])
def test_ranks_together_equal_one_with_all_images(case):
    """Each rank has images of its own, not as many; `merge` sums what all of them hand to it."""
    build, arguments = NETWORKS[case]
    batches = make_batches(6, 4, 3)
    shares = [batches[:2], batches[2:]]
    alone = make(build)
    recalibrate(alone, batches, runs_of(alone, arguments))

    handed: list[list[Tensor]] = []  # by rank, what it hands over, in order
    for share in shares:
        rank = make(build)
        handed.append([])

        def listen(value: Tensor, calls: list[Tensor] = handed[-1]) -> Tensor:
            calls.append(value.clone())
            return value

        recalibrate(rank, share, runs_of(rank, arguments), merge=listen)
    assert len(handed[0]) == len(handed[1]) > 0
    for own, share in enumerate(shares):
        rank = make(build)
        others = iter(handed[1 - own])
        merge = lambda value, others=others: value + next(others)  # noqa: E731
        recalibrate(rank, share, runs_of(rank, arguments), merge=merge)
        assert next(others, None) is None
        assert_same(statistics_of(rank), statistics_of(alone))


def test_merge_may_sum_in_place():
    """As `torch.distributed.all_reduce` does."""
    network, doubled = make(universal), make(universal)
    recalibrate(network, make_batches(4, 2))
    recalibrate(doubled, make_batches(4, 2), merge=lambda value: value.mul_(2))
    assert_same(statistics_of(doubled), statistics_of(network))


@pytest.mark.parametrize("case", ["plain", "universal"])
def test_merge_gets_tensors_on_the_device_of_the_network(case):
    """NCCL reduces nothing else."""
    devices = set()

    def merge(value: Tensor) -> Tensor:
        devices.add(value.device.type)
        return value

    network = make(NETWORKS[case][0]).to("meta")
    recalibrate(network, [torch.empty(4, 3, 8, 8, device="meta").double()], merge=merge)
    assert devices == {"meta"}


def test_training_outgrows_the_statistics():
    network = SlimmableCifarResNet(8, width_mult_range=(0.25, 1.0))
    images = torch.randn(4, 3, 8, 8)
    recalibrate(network, [images], [partial(network, width_mult=0.5)])
    saved = network.state_dict()
    network.eval()(images, 0.5)
    network.train()(images, 1.0)
    with pytest.raises(ValueError, match=r"width 0\.5 has no BN statistics"):
        network.eval()(images, 0.5)
    network.load_state_dict(saved)
    network(images, 0.5)


def test_a_network_without_bn_is_refused():
    with pytest.raises(ValueError, match="no BN was run"):
        recalibrate(nn.Linear(2, 2), [torch.randn(3, 2)])

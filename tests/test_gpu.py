"""What the CPU tests say of gates, rows, exits and recalibration, on CUDA.

In float64, beside the CPU: what differs is rounding, and nothing else.
"""

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from test_captured import NETWORKS, row_gates
from torch import Tensor, nn

from networks import (
    CifarResNet,
    MSDNet,
    MultiExitNetwork,
    ResNetWithExits,
    confidence,
    count_macs,
    early_exit,
    entropy,
    fold_survival_probs,
    recalibrate,
    time_exits,
    time_points,
)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def pair(build: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """Returns a network in training on the CPU, and the same on the GPU, as modules train it."""
    torch.manual_seed(0)
    network = build().double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network, copy.deepcopy(network).to(CUDA, memory_format=torch.channels_last)


def images(count: int = 6) -> Tensor:
    chance = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 32, 32, dtype=torch.float64, generator=chance)


def assert_equal_step(here: nn.Module, there: nn.Module, gates: Tensor | None) -> None:
    """Compares logits, gradients and BN statistics of a step on both devices."""
    x = images()
    labels = torch.arange(len(x)) % 10
    for network in (here, there):
        logits = network(x.to(next(network.parameters()).device), gates=gates)
        F.cross_entropy(logits, labels.to(logits.device)).backward()
    for (name, one), other in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(other.grad.cpu(), one.grad, **CLOSE)
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), value, **CLOSE)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("kind", ["none", "blocks", "samples"])
def test_a_step_with_gates_is_that_of_a_cpu(name: str, kind: str) -> None:
    here, there = pair(NETWORKS[name])
    counts = [6 - number % 5 for number in range(here.num_blocks)]
    gates = row_gates(3, counts, [1.0] * here.num_blocks)
    gates = {"none": None, "blocks": gates[:, 0], "samples": gates}[kind]
    assert_equal_step(here, there, gates)


def test_all_gates_open_is_the_plain_network() -> None:
    _, network = pair(NETWORKS["A"])
    x = images().to(CUDA)
    expected = network.eval()(x)
    for gates in ([1.0] * 6, torch.ones(6), torch.ones(6, len(x))):
        torch.testing.assert_close(network(x, gates=gates), expected, **CLOSE)


def test_closed_block_is_not_executed() -> None:
    """No gradient, no BN update, no MACs: with gates of a block and of samples."""
    _, network = pair(NETWORKS["A"])
    block = network.blocks[1]
    before = block.bn1.running_mean.clone()
    for gates in (torch.ones(6), torch.ones(6, 6)):
        gates[1] = 0.0
        network(images().to(CUDA), gates=gates).sum().backward()
        assert block.conv1.weight.grad is None
        assert torch.equal(block.bn1.running_mean, before)
    network.eval()
    run = partial(network, gates=torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]))
    x = images(1).to(CUDA)
    assert count_macs(run, x) == count_macs(network, x) - 2 * 16 * 16 * 9 * 32 * 32


def test_folded_probabilities_are_the_gates() -> None:
    _, network = pair(NETWORKS["A-average"])
    probs = [1 - number / 10 for number in range(6)]
    x = images().to(CUDA)
    expected = network.eval()(x, gates=probs)
    torch.testing.assert_close(fold_survival_probs(network, probs)(x), expected, **CLOSE)


# --- exits ----------------------------------------------------------------------------------------

EXITS: dict[str, Callable[[], MultiExitNetwork]] = {
    "residual": lambda: ResNetWithExits(CifarResNet(8), exits_after=[0, 1]),
    "dense": lambda: MSDNet(num_blocks=3, base=1, step=1, num_channels=4, growth_rate=4),
}


@pytest.mark.parametrize("name", EXITS)
@pytest.mark.parametrize("criterion", ["entropy", "confidence"])
def test_early_exit_is_the_full_pass(name: str, criterion: str) -> None:
    """Of a batch, of one image, when all leave, and when none does."""
    _, network = pair(EXITS[name])
    network.eval()
    x = images(16).to(CUDA)
    with torch.no_grad():
        logits = torch.stack(network(x))
    scores = {"entropy": entropy, "confidence": confidence}[criterion](logits[0])
    middle = scores.sort().values[7:9].mean().item()
    nobody, everyone = (-math.inf, math.inf) if criterion == "entropy" else (math.inf, 0.0)
    for thresholds in ([middle, middle], [nobody, nobody], [everyone, everyone], [nobody, middle]):
        for batch, expected in ((x, logits), (x[:1], logits[:, :1])):
            answers = early_exit(network, batch, thresholds, criterion)
            assert answers.logits.device.type == answers.exit_index.device.type == "cuda"
            rows = torch.arange(len(batch), device=CUDA)
            full = expected[answers.exit_index, rows]
            torch.testing.assert_close(answers.logits, full, **CLOSE)


def test_image_that_is_not_finite_is_refused() -> None:
    _, network = pair(EXITS["residual"])
    x = images().to(CUDA)
    x[2] = math.nan
    with pytest.raises(FloatingPointError, match="1 of 6 images have logits that are not finite"):
        early_exit(network.eval(), x, [-math.inf, -math.inf])


# --- statistics, costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("gates", [None, [0.5, 0.0, 0.75]])
def test_recalibrated_statistics_are_those_of_a_cpu(gates: list[float] | None) -> None:
    here, there = pair(lambda: CifarResNet(8))
    for network in (here, there):
        batches = [each.to(next(network.parameters()).device) for each in images(10).split(4)]
        recalibrate(network, batches, [partial(network, gates=gates)])
        assert network.training
    for name, value in here.state_dict().items():
        torch.testing.assert_close(there.state_dict()[name].cpu(), value, **CLOSE)


def test_times_are_those_of_the_device() -> None:
    """Launching is not computing: a matrix product of 4096 takes longer than its launch."""
    matrix = torch.randn(4096, 4096, device=CUDA)
    product = {"long": lambda x: [matrix @ matrix for _ in range(20)], "short": lambda x: x + 1}
    times = time_points(product, [torch.zeros(1, device=CUDA)] * 2)
    assert times["long"] > times["short"]
    _, network = pair(EXITS["residual"])
    costs = time_exits(network.eval(), images(4).to(CUDA))
    assert all(value > 0 for value in [*costs.stages, *costs.exits])

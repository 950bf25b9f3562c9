"""A recorded training step is the eager one, whatever a CUDA graph is in danger of changing.

On a CPU recording is calling again, and bits are compared. On a GPU other kernels may be chosen, so
there it is float64, in which rounding cannot hide a mistake.
"""

import contextlib
import copy
import pickle
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from networks import (
    CapturedNetwork,
    CifarDenseNet,
    CifarResNet,
    MSDNet,
    ResNet,
    ResNetWithExits,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH_SIZE = 6

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "A": lambda: CifarResNet(14),
    "A-average": lambda: CifarResNet(14, shortcut="A-average"),
    "projections": lambda: CifarResNet(14, shortcut="B"),
    "projections everywhere": lambda: CifarResNet(8, shortcut="C"),
    "bottlenecks": lambda: CifarResNet(11, bottleneck=True, conv_bias=True),
    "preactivation": lambda: CifarResNet(14, preactivation=True),
    "preactivated bottlenecks": lambda: CifarResNet(11, preactivation=True, bottleneck=True),
    "ImageNet": lambda: ResNet(18, num_classes=10),
}
WITHOUT_GATES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: CifarResNet(8, plain=True),
    "exits": lambda: ResNetWithExits(CifarResNet(8), exits_after=[0, 1]),
    "MSDNet": lambda: MSDNet(num_blocks=3, base=1, step=1, num_channels=4, growth_rate=4),
    "DenseNet": lambda: CifarDenseNet(16, growth_rate=4, bottleneck=True),
    "DenseNet, memory-efficient": lambda: CifarDenseNet(
        16, growth_rate=4, bottleneck=True, memory_efficient=True
    ),
}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield torch.device(request.param)
    torch.use_deterministic_algorithms(before)


def make(build: Callable[[], nn.Module], device: torch.device, double: bool = True) -> nn.Module:
    torch.manual_seed(0)
    network = build().to(device, memory_format=torch.channels_last).train()
    return network.double() if double and device.type == "cuda" else network


def same(one: object, other: object, device: torch.device, tolerance: float = 1e-8) -> None:
    """Asserts that trees of tensors are equal: to the bit on a CPU, to rounding on a GPU."""
    exact = device.type == "cpu"
    limits = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(one, other, **limits)


class Training:
    """Some steps of a network, by a function that calls it."""

    def __init__(self, network: nn.Module, run: Callable, device: torch.device):
        self.network, self.run, self.device = network, run, device
        self.optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9, weight_decay=1e-3)
        self.losses: list[Tensor] = []
        self.dtype = next(network.parameters()).dtype

    def batch(self, number: int, size: int = BATCH_SIZE) -> tuple[Tensor, Tensor]:
        chance = torch.Generator().manual_seed(number)
        # Maps of one pixel have two memory formats, in which gradients round differently.
        side = 64 if isinstance(self.network, ResNet) else 32
        images = torch.randn(size, 3, side, side, generator=chance).to(self.device, self.dtype)
        labels = torch.randint(10, (size,), generator=chance).to(self.device)
        return images.contiguous(memory_format=torch.channels_last), labels

    def backward(self, number: int, gates: Tensor | None = None, size: int = BATCH_SIZE) -> None:
        images, labels = self.batch(number, size)
        torch.manual_seed(number)  # of dropout, on all devices
        outputs = self.run(images) if gates is None else self.run(images, gates=gates)
        exits = outputs if isinstance(outputs, list) else [outputs]
        loss = sum(F.cross_entropy(logits, labels) for logits in exits)
        self.losses.append(loss.detach())
        loss.backward()

    def step(self, number: int, gates: Tensor | None = None, size: int = BATCH_SIZE) -> None:
        self.optimizer.zero_grad()
        self.backward(number, gates, size)
        self.optimizer.step()

    def results(self) -> list[object]:
        """Returns losses, weights, BN statistics, gradients and momentum."""
        momentum = [
            self.optimizer.state[each].get("momentum_buffer") for each in self.network.parameters()
        ]
        gradients = [each.grad for each in self.network.parameters()]
        state = dict(self.network.state_dict())
        present = [each for each in [*momentum, *gradients] if each is not None]
        return [self.losses, state, present, len(present)]


def both(
    build: Callable[[], nn.Module],
    device: torch.device,
    open_gates: Sequence[float] | None = None,
    double: bool = True,
) -> tuple[Training, Training]:
    """Returns an eager training and a captured one of the same network."""
    eager = make(build, device, double)
    network = copy.deepcopy(eager)
    captured = CapturedNetwork(network, "graphs", open_gates, say=lambda _: None)
    return Training(eager, eager, device), Training(network, captured, device)


def vector(network: nn.Module) -> Tensor:
    return torch.cat([each.detach().flatten() for each in network.parameters()])


def assert_recorded(training: Training, num_recordings: int = 1) -> None:
    """Else both sides were the same eager code."""
    assert training.run.chain is not None, training.run.said
    assert training.run.num_recordings == num_recordings


def row_gates(number: int, counts: Sequence[int], opened: Sequence[float]) -> Tensor:
    chance = torch.Generator().manual_seed(number)
    gates = torch.zeros(len(counts), BATCH_SIZE)
    for row, count, value in zip(gates, counts, opened, strict=True):
        row[torch.randperm(BATCH_SIZE, generator=chance)[:count]] = value
    return gates


# --- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS | WITHOUT_GATES)
def test_constant_depth(name: str, device: torch.device) -> None:
    build = (NETWORKS | WITHOUT_GATES)[name]
    eager, captured = both(build, device)
    for number in range(2 if name == "ImageNet" else 5):
        eager.step(number)
        captured.step(number)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


@pytest.mark.parametrize("name", NETWORKS)
def test_gates(name: str, device: torch.device) -> None:
    """Twenty steps: what a closed block would have used is overwritten meanwhile, or not."""
    eager, captured = both(NETWORKS[name], device)
    num_blocks = eager.network.num_blocks
    chance = random.Random(name)
    for number in range(4 if name == "ImageNet" else 20):
        gates = torch.tensor([float(chance.random() < 0.6) for _ in range(num_blocks)])
        eager.step(number, gates)
        captured.step(number, gates)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_all_gates_alike(gate: float, device: torch.device) -> None:
    eager, captured = both(NETWORKS["A-average"], device)
    for number in range(3):
        gates = torch.full((eager.network.num_blocks,), gate)
        eager.step(number, gates)
        captured.step(number, gates)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


@pytest.mark.parametrize("name", NETWORKS)
def test_gate_per_sample(name: str, device: torch.device) -> None:
    eager, captured = both(NETWORKS[name], device)
    num_blocks = eager.network.num_blocks
    counts = [BATCH_SIZE - number % BATCH_SIZE for number in range(num_blocks)]
    for number in range(3):
        gates = row_gates(number, counts, [1.0] * num_blocks)
        eager.step(number, gates)
        captured.step(number, gates)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


@pytest.mark.parametrize("by_sample", [False, True], ids=["per block", "per sample"])
def test_open_gates_that_scale(by_sample: bool, device: torch.device) -> None:
    opened = torch.tensor([1.25, 2.0, 1.0, 4.0, 1.5, 1.75]).tolist()
    eager, captured = both(NETWORKS["A"], device, opened)
    for number in range(4):
        gates = row_gates(number, [5, 3, 6, 2, 1, 4], opened)
        gates = gates if by_sample else gates[:, 0]
        eager.step(number, gates)
        captured.step(number, gates)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_and_scaled_losses(precision: str, device: torch.device) -> None:
    """Weights are converted anew in every replay: those of the recording soon are old."""
    if precision == "float16" and device.type == "cpu":
        pytest.skip("a CPU has no float16 convolutions to train with")
    trainings = both(NETWORKS["A-average"], device, double=False)
    start = vector(trainings[0].network)
    for training in trainings:
        scaler = torch.amp.GradScaler(device.type, init_scale=128.0)
        chance = random.Random(1)
        for number in range(5):
            gates = torch.tensor([float(chance.random() < 0.7) for _ in range(6)])
            images, labels = training.batch(number)
            training.optimizer.zero_grad()
            with torch.autocast(device.type, getattr(torch, precision)):
                loss = F.cross_entropy(training.run(images, gates=gates), labels)
            training.losses.append(loss.detach())
            scaler.scale(loss).backward()
            scaler.unscale_(training.optimizer)
            clip_grad_norm_(training.network.parameters(), 0.5)
            scaler.step(training.optimizer)
            scaler.update()
    eager, captured = trainings
    assert_recorded(captured)
    if device.type == "cpu":
        same(captured.results(), eager.results(), device)
        return
    ends = [vector(each.network) for each in trainings]
    assert (ends[0] - ends[1]).norm() <= 0.02 * (ends[0] - start).norm()


def test_no_autocast_cache_from_the_recording_stays_behind(device: torch.device) -> None:
    """Eager code in the same autocast region would read memory of the recording."""
    eager, captured = both(NETWORKS["A"], device, double=False)
    images, _ = eager.batch(0)
    with torch.autocast(device.type, torch.bfloat16):
        expected = eager.run(images), eager.network(images)
        answers = captured.run(images), captured.network(images)
    assert_recorded(captured)
    same(answers, expected, device, 0.05)


# --- what a recording might change ----------------------------------------------------------------


def test_recording_leaves_statistics_and_generators_alone(device: torch.device) -> None:
    """Warm-up and recording run BN and dropout; only the one replay counts."""
    eager, captured = both(lambda: CifarDenseNet(13, growth_rate=4, drop_rate=0.3), device)
    eager.backward(0)
    captured.backward(0)
    assert_recorded(captured)
    tracked = [
        int(value) for name, value in captured.network.state_dict().items() if "num_b" in name
    ]
    assert set(tracked) == {1}
    same(captured.results(), eager.results(), device)
    draws = []
    for training in (eager, captured):
        training.backward(1)
        draws.append((torch.rand(3), torch.rand(3, device=device)))
    assert torch.equal(draws[0][0], draws[1][0])  # of the host


def test_dropout_is_that_of_eager_code_with_the_same_seed(device: torch.device) -> None:
    eager, captured = both(lambda: CifarDenseNet(13, growth_rate=4, drop_rate=0.3), device)
    for number in range(4):
        eager.step(number)
        captured.step(number)
    assert_recorded(captured)
    same(captured.results(), eager.results(), device)
    assert len({loss.item() for loss in captured.losses}) == 4


def test_two_accumulated_batches_are_their_sum(device: torch.device) -> None:
    _, captured = both(NETWORKS["A"], device)
    alone = []
    for number in (0, 1):
        captured.optimizer.zero_grad()
        captured.backward(number)
        alone.append([each.grad.clone() for each in captured.network.parameters()])
    captured.optimizer.zero_grad()
    captured.backward(0)
    captured.backward(1)
    assert_recorded(captured)
    together = [each.grad for each in captured.network.parameters()]
    same(together, [one + other for one, other in zip(*alone, strict=True)], device)


def test_gradients_belong_to_the_caller(device: torch.device) -> None:
    """The memory of the recording is overwritten by the next backward; what was given away not."""
    _, captured = both(NETWORKS["A"], device)
    captured.backward(0)
    kept = [each.grad for each in captured.network.parameters()]
    values = [each.clone() for each in kept]
    captured.optimizer.zero_grad()
    captured.backward(1)
    assert_recorded(captured)
    same(kept, values, device)


def test_answers_belong_to_the_caller(device: torch.device) -> None:
    _, captured = both(NETWORKS["A"], device)
    first = captured.run(captured.batch(0)[0])
    value = first.detach().clone()
    captured.run(captured.batch(1)[0])
    assert_recorded(captured)
    assert torch.equal(first, value)


@pytest.mark.gpu
def test_cudnn_has_chosen_before_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tries its kernels out at the first call, which a recording forbids."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    device = torch.device("cuda")
    eager, captured = both(NETWORKS["projections"], device)
    for number in range(3):
        eager.step(number)
        captured.step(number)
    assert_recorded(captured)
    same(captured.results(), eager.results(), device, 1e-6)


# --- when it is recorded anew, and when not at all ------------------------------------------------


@pytest.mark.parametrize("way", ["assign", "to", "storage"])
def test_parameters_that_move_are_recorded_anew(way: str, device: torch.device) -> None:
    eager, captured = both(NETWORKS["A"], device)
    for training in (eager, captured):
        training.step(0)
        network = training.network
        if way == "assign":
            moved = {name: value.clone() + 0.01 for name, value in network.state_dict().items()}
            network.load_state_dict(moved, assign=True)
            network.requires_grad_(True)
        elif way == "to":
            network.to(torch.float32 if device.type == "cuda" else torch.float64)
            network.to(training.dtype)
        else:
            with torch.no_grad():
                network.layer1[0].conv1.weight.data = network.layer1[0].conv1.weight * 2
        training.optimizer = torch.optim.SGD(network.parameters(), 0.05)
        training.step(1)
        training.step(2)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured, 2)


def test_loading_in_place_is_no_move(device: torch.device) -> None:
    eager, captured = both(NETWORKS["A"], device)
    for training in (eager, captured):
        training.step(0)
        state = {name: value + 0.01 for name, value in training.network.state_dict().items()}
        training.network.load_state_dict(state)
        training.step(1)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


def test_smaller_last_batch_runs_eagerly(device: torch.device) -> None:
    """And the next epoch's batches are replayed as before."""
    eager, captured = both(NETWORKS["A"], device)
    for training in (eager, captured):
        for number, size in enumerate((BATCH_SIZE, BATCH_SIZE, 2, BATCH_SIZE, 3)):
            training.step(number, size=size)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


def test_evaluation_runs_eagerly(device: torch.device) -> None:
    eager, captured = both(NETWORKS["A"], device)
    images, _ = eager.batch(9)
    for training in (eager, captured):
        training.step(0)
        with torch.no_grad():
            training.answers = [training.run(images)]  # by the batch, as for recalibration
        training.network.eval()
        training.answers.append(training.run(images))
        training.network.train()
        training.step(1)
    same(captured.answers, eager.answers, device)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


@contextlib.contextmanager
def hooked(network: nn.Module, seen: list[int]) -> Iterator[None]:
    handle = network.layer1[0].register_forward_hook(lambda *_: seen.append(1))
    yield
    handle.remove()


def test_hook_is_run_and_said_once(device: torch.device) -> None:
    network = make(NETWORKS["A"], device)
    said: list[str] = []
    captured = CapturedNetwork(network, say=said.append)
    training, seen = Training(network, captured, device), []
    with hooked(network, seen):
        training.step(0)
        training.step(1)
    assert len(seen) == 2
    assert len(said) == 1
    assert "a module has a hook" in said[0]
    training.step(2)
    assert len(seen) == 2
    assert_recorded(training)


def test_gate_that_was_not_announced_runs_eagerly(device: torch.device) -> None:
    eager, captured = both(NETWORKS["A"], device)
    for training in (eager, captured):
        training.step(0, torch.ones(6))
        training.step(1, torch.tensor([1.0, 0.5, 0.0, 1.0, 1.0, 1.0]))
    same(captured.results(), eager.results(), device)
    assert any("what was announced" in message for message in captured.run.said)


def test_backward_of_a_step_before_is_refused(device: torch.device) -> None:
    """Its activations are gone: the gradients would be wrong in silence."""
    _, captured = both(NETWORKS["A"], device)
    first = captured.run(captured.batch(0)[0]).sum()
    captured.run(captured.batch(1)[0])
    with pytest.raises(RuntimeError, match="call backward once after every forward"):
        first.backward()


def test_more_rows_than_recorded_are_another_recording(device: torch.device) -> None:
    eager, captured = both(NETWORKS["A"], device)
    for number, counts in enumerate(([3] * 6, [4] * 6, [4] * 6)):
        gates = row_gates(number, counts, [1.0] * 6)
        eager.step(number, gates)
        captured.step(number, gates)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured, 2)


def test_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="capture"):
        CapturedNetwork(CifarResNet(8), capture="graph")


@pytest.mark.gpu
def test_compiled_blocks_compute_the_same() -> None:
    device = torch.device("cuda")
    eager, captured = both(lambda: CifarResNet(8), device, double=False)
    captured.run.capture = "compiled"
    for number in range(4):
        gates = torch.tensor([1.0, float(number % 2), 1.0])
        eager.step(number, gates)
        captured.step(number, gates)
    assert_recorded(captured)
    for one, other in zip(captured.losses, eager.losses, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def rewrap(network: nn.Module) -> None:
    network.fc.weight = nn.Parameter(network.fc.weight.data)


def replace_layer(network: nn.Module) -> None:
    network.fc = nn.Linear(64, 10).to(network.fc.weight)


def load_own_tensors(network: nn.Module) -> None:
    network.load_state_dict(network.state_dict(), assign=True)


def schedule_momentum(network: nn.Module) -> None:
    network.bn1.momentum = 0.5


def freeze_statistics(network: nn.Module) -> None:
    network.layer1.eval()


CHANGES = [rewrap, replace_layer, load_own_tensors, schedule_momentum, freeze_statistics]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_change_of_the_network_is_recorded_anew(change: Callable, device: torch.device) -> None:
    """On a CPU stale recordings call the new code all the same, so their number is held."""
    _, training = both(NETWORKS["A"], device)
    training.backward(0)
    change(training.network)
    training.network.zero_grad()
    training.backward(1)
    assert_recorded(training, num_recordings=2)
    assert all(each.grad is not None for each in training.network.parameters())


def test_only_batches_of_the_announced_size_are_recorded(device: torch.device) -> None:
    """So a run that goes on with the last, small batch of an epoch is recorded as any other."""
    network = make(NETWORKS["A"], device)
    run = CapturedNetwork(network, batch_size=BATCH_SIZE, say=lambda _: None)
    training = Training(network, run, device)
    training.step(0, size=BATCH_SIZE - 1)
    assert training.run.num_recordings == 0
    training.step(1)
    assert_recorded(training)


def test_loss_of_some_outputs_is_refused(device: torch.device) -> None:
    """Zeros instead of no gradients would let weight decay move the other exits."""
    _, training = both(WITHOUT_GATES["exits"], device)
    images, labels = training.batch(0)
    loss = F.cross_entropy(training.run(images)[1], labels)
    with pytest.raises(RuntimeError, match="the loss does not use all outputs"):
        loss.backward()


def test_copies_hold_no_recording(device: torch.device) -> None:
    _, training = both(NETWORKS["A"], device)
    training.backward(0)
    training.run.say = print
    for copied in (copy.deepcopy(training.run), pickle.loads(pickle.dumps(training.run))):
        assert copied.chain is None
        assert copied.network is not training.network
        assert copied.run is copied.network


class Normalising(nn.Module):
    """Changes its images in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.sub_(0.5).mean((2, 3)))


def test_images_are_read_once(device: torch.device) -> None:
    eager, captured = both(Normalising, device)
    for training in (eager, captured):
        for number in range(3):
            training.step(number)
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


class TellingMore(Normalising):
    def forward(self, images: Tensor) -> tuple[Tensor, object]:
        logits = super().forward(images.clone())
        return logits, self.more(logits)


@pytest.mark.parametrize("more", [lambda _: None, lambda logits: logits.argmax(1)])
def test_outputs_without_gradients_run_eagerly(more: Callable, device: torch.device) -> None:
    network = make(TellingMore, device)
    network.more = more
    run = CapturedNetwork(network, say=lambda _: None)
    images, _ = Training(network, run, device).batch(0)
    run(images)[0].sum().backward()
    assert run.chain is None
    assert any("it returns something that has no gradient" in line for line in run.said)


def test_tied_weights_of_stem_and_block(device: torch.device) -> None:
    def build() -> nn.Module:
        network = NETWORKS["A"]()
        network.layer1[0].bn1.weight = network.bn1.weight
        return network

    eager, captured = both(build, device)
    for training in (eager, captured):
        training.step(0, torch.ones(training.network.num_blocks))
    same(captured.results(), eager.results(), device)
    assert_recorded(captured)


def test_global_hooks_are_seen(device: torch.device) -> None:
    _, training = both(NETWORKS["A"], device)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        training.step(0)
    finally:
        hook.remove()
    assert training.run.chain is None


def test_too_little_memory_is_told(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CapturedNetwork, "make_chain", fail)
    eager, captured = both(NETWORKS["A"], device)
    for training in (eager, captured):
        training.step(0)
        training.step(1)
    same(captured.results(), eager.results(), device)
    (said,) = captured.run.said
    assert "not enough for" in said
    assert "lower batch_size, or set capture to none" in said


def test_hook_of_a_parameter_is_run_once(device: torch.device) -> None:
    """On a gradient that went through a recording, it would run twice."""
    eager = make(NETWORKS["A"], device)
    network, said = copy.deepcopy(eager), []
    for net in (eager, network):
        net.bn1.weight.register_hook(lambda gradient: 2 * gradient)
    images = torch.randn(4, 3, 32, 32, device=device, dtype=eager.fc.weight.dtype)
    for run in (eager, CapturedNetwork(network, say=said.append)):
        run(images).square().sum().backward()
    same(network.bn1.weight.grad, eager.bn1.weight.grad, device)
    assert "a parameter has a hook" in said[0]

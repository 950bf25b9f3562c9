"""What a recorded step does once, for all parts: the numbers are those of eager code, to the bit.

On a GPU rounding differs: there, gradients are compared by their directions.
"""

import contextlib
import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_count import KernelCount
from test_captured import DEVICES, NETWORKS, make
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from networks import CapturedNetwork, CifarResNet, SlimmableCifarResNet


class Small(nn.Module):
    """Layers that a step reads in some way of its own; the first two have the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 10)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.second(F.relu(self.first(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class Twice(Small):
    """Runs a layer and its BN a second time."""

    def features(self, x: Tensor) -> Tensor:
        return super().features(super().features(x))


class Tied(Small):
    """Two layers have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.second.weight = self.first.weight


class Standardised(Small):
    """Reads a weight in float32, beside the convolution that reads it in 16 bits."""

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * self.second.weight.std()


class Doubled(Small):
    """Reads a weight in float64: a copy, and not one that autocast made."""

    def features(self, x: Tensor) -> Tensor:
        return super().features(x) * self.second.weight.double().square().mean().float()


class Product(torch.autograd.Function):
    """Multiplies channels by a weight that autograd sees, but no function of torch."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        of_x = torch.einsum("nohw,oi->nihw", gradient.float(), weight[:, :, 0, 0].float())
        of_weight = torch.einsum("nohw,nihw->oi", gradient.float(), x.float())
        return of_x.to(x.dtype), of_weight[:, :, None, None] / 3


class WithFunction(Small):
    """Hands the weight of a layer to an autograd function, too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Conv2d(3, 3, 1, bias=False)

    def features(self, x: Tensor) -> Tensor:
        return Product.apply(self.scale(super().features(x)), self.scale.weight)


class Averaged(Small):
    """A BN whose statistics are means over all batches: it reads its counter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = None


class Frozen(Small):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)
        self.norm.eval()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.norm.eval()
        return self


class Listed(Small):
    """Reads a weight from a list, where nothing can stand in for it."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = [self.fc.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.features(x).mean((2, 3)), self.listed[0], self.fc.bias)


class Scaling(nn.Parameter):
    """A weight in a class of its own, which doubles what is computed with it."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        return 2 * result if func is F.linear else result

    def __deepcopy__(self, memo: dict) -> "Scaling":
        return Scaling(self.detach().as_subclass(Tensor).clone())


class Special(Small):
    """A weight of another class, and one that an attribute was hung on."""

    def __init__(self) -> None:
        super().__init__()
        self.fc.weight = Scaling(self.fc.weight.detach())

    def features(self, x: Tensor) -> Tensor:
        self.second.weight.gain = 1.5
        return super().features(x) * self.second.weight.gain


class OtherPrecision(Small):
    """Runs a layer in another type of 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).mean((2, 3))
        with torch.autocast(x.device.type, torch.float16):
            return self.fc(x)


class CountedInPairs(Small):
    """The counters of two BN are views of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.another = nn.BatchNorm2d(3)
        counters = torch.zeros(1, dtype=torch.int64)
        self.norm.num_batches_tracked = counters[0]
        self.another.num_batches_tracked = counters[0]

    def features(self, x: Tensor) -> Tensor:
        return self.another(super().features(x))


KINDS = [
    *(Small, Twice, Tied, Standardised, Doubled, WithFunction, Averaged, Frozen, Listed),
    *(Special, OtherPrecision, CountedInPairs),
]


def steps(run: Callable, network: nn.Module, device: torch.device, num_steps: int = 3) -> None:
    """Trains in bfloat16."""
    optimizer = torch.optim.SGD(network.parameters(), 0.05, 0.9)
    for number in range(num_steps):
        chance = torch.Generator().manual_seed(number)
        images = torch.randn(4, 3, 32, 32, generator=chance).to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(run(images), torch.arange(4, device=device))
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_eager_code(kind: type, place: str) -> None:
    device = torch.device(place)
    if kind is Averaged and place == "cuda":
        pytest.skip("a recording may not read the counter")
    eager = make(kind, device, double=False)
    network = copy.deepcopy(eager)
    run = CapturedNetwork(network, say=lambda _: None)
    steps(eager, eager, device)
    steps(run, network, device)
    assert run.chain is not None, run.said
    exact = place == "cpu"
    for (name, one), other in zip(
        eager.state_dict().items(), network.state_dict().values(), strict=True
    ):
        limit = 0.0 if exact or not one.is_floating_point() else 0.02
        torch.testing.assert_close(other, one, rtol=limit, atol=limit, msg=name)
    gradients = [[each.grad for each in net.parameters()] for net in (eager, network)]
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one.dtype == other.dtype == torch.float32


@pytest.mark.parametrize("place", DEVICES)
@pytest.mark.parametrize(
    ("kind", "left"),
    [
        (Small, []),
        (Standardised, ["second.weight"]),
        (Doubled, ["second.weight"]),
        (WithFunction, ["scale.weight"]),
        (Frozen, ["first.weight", "first.bias"]),
        (Listed, ["fc.weight"]),
        (Special, ["fc.weight"]),
        (OtherPrecision, ["fc.weight", "fc.bias"]),
    ],
)
def test_what_is_converted_together(kind: type, left: list[str], place: str) -> None:
    """Weights that convolutions and matrix products alone read, and autograd sees that."""
    device = torch.device(place)
    network = make(kind, device, double=False)
    run = CapturedNetwork(network, say=lambda _: None)
    steps(run, network, device, 1)
    (_, part) = run.chain.steps[0]
    converted = [
        name for name, each in network.named_parameters() if each in part.stand_ins.converted
    ]
    layers = [name for name, _ in network.named_parameters() if "norm" not in name]
    assert converted == [name for name in layers if name not in left]


def test_a_wide_network_at_full_width_converts_its_weights_together() -> None:
    """It reads their shapes, to know what a width cuts."""
    network = make(
        lambda: SlimmableCifarResNet(8, width_mult_range=(0.5, 1.0)), torch.device("cpu")
    )
    run = CapturedNetwork(
        network, run=functools.partial(network, width_mult=1.0), say=lambda _: None
    )
    steps(run, network, torch.device("cpu"), 1)
    (_, part) = run.chain.steps[0]
    layers = [each for each in network.parameters() if each.dim() == 4]
    assert set(part.stand_ins.converted) >= set(layers)


@pytest.mark.parametrize("place", DEVICES)
def test_network_is_as_it_was(place: str) -> None:
    """While no part runs, and after one that fails, too."""
    device = torch.device(place)
    network = make(Small, device, double=False)
    weight, counter = network.first.weight, network.norm.num_batches_tracked
    run = CapturedNetwork(network, say=lambda _: None)
    steps(run, network, device, 1)
    (_, part) = run.chain.steps[0]
    with contextlib.suppress(KeyboardInterrupt), part.stand_ins.hung():
        assert network.first.weight.dtype == torch.bfloat16
        assert network.norm.num_batches_tracked is None
        raise KeyboardInterrupt
    assert network.first.weight is weight
    assert network.norm.num_batches_tracked is counter
    assert int(counter) == 1


def test_step_has_few_small_kernels() -> None:
    """No conversion and no counter of a layer's own: on a GPU each would be a launch."""
    network = make(NETWORKS["A"], torch.device("cpu"), double=False)
    run = CapturedNetwork(network, say=lambda _: None)
    images = torch.randn(4, 3, 32, 32)
    gates = torch.ones(network.num_blocks)

    def step() -> None:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            run(images, gates=gates).sum().backward()

    step()
    with KernelCount() as count:
        step()
    assert count.names["aten::_to_copy"] <= 4  # of images, logits and their gradients
    assert count.names["aten::add_.Tensor"] == 0
    assert count.names["aten::_foreach_add_.Scalar"] == 1


def test_closed_blocks_count_nothing() -> None:
    network = make(lambda: CifarResNet(8, shortcut="B"), torch.device("cpu"))
    run = CapturedNetwork(network, say=lambda _: None)
    for gates in ([1.0, 0.0, 1.0], [1.0, 0.0, 0.0]):
        run(torch.randn(4, 3, 32, 32), gates=gates).sum().backward()
    counts = [int(block.bn1.num_batches_tracked) for block in network.blocks]
    assert counts == [2, 0, 1]
    projections = [int(block.downsample[1].num_batches_tracked) for block in network.blocks[1:]]
    assert projections == [2, 2]


@pytest.mark.slow
def test_compiled_blocks_read_what_was_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a GPU, and run by torch's own kernels."""
    by_kernels = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", by_kernels)
    eager = make(lambda: CifarResNet(8), torch.device("cpu"))
    network = copy.deepcopy(eager)
    run = CapturedNetwork(network, "compiled", say=lambda _: None)
    steps(eager, eager, torch.device("cpu"))
    steps(run, network, torch.device("cpu"))
    assert all(part.stand_ins.converted for _, part in run.chain.steps)
    for (name, one), other in zip(
        eager.state_dict().items(), network.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=0.02, atol=0.02, msg=name)

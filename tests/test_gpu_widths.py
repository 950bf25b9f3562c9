"""Widths on a CUDA device: gradients, width in place = extracted, recalibration, no waiting."""

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import SlimmableBatchNorm2d, SlimmableMobileNetV2, extract, recalibrate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WIDTHS = (1.0, 0.35, 0.5)
FORMATS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def forbid_waiting() -> Iterator[None]:
    """Whatever waits for the device is an error."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def network(memory_format=torch.contiguous_format, dtype=torch.float64) -> SlimmableMobileNetV2:
    torch.manual_seed(0)
    net = SlimmableMobileNetV2(10, cifar_strides=True, width_mult_range=(0.35, 1.0))
    net.to("cuda", dtype, memory_format=memory_format).eval()
    recalibrate(net, [images(4, memory_format, dtype)], runs_of(net))
    return net


def runs_of(net: nn.Module) -> list[partial]:
    return [partial(net, width_mult=width) for width in WIDTHS]


def images(count: int, memory_format=torch.contiguous_format, dtype=torch.float64) -> Tensor:
    values = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    return values.to("cuda", dtype).to(memory_format=memory_format)


def by_the_batch(plain: nn.Module) -> nn.Module:
    """Makes an extracted network train as the slimmable one does."""
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    return plain.train()


def strides(tensor: torch.Tensor) -> list[int]:
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size > 1]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_gradients_of_a_sandwich_step_are_those_of_extracted_networks(memory_format) -> None:
    net = network(memory_format)
    narrow = [by_the_batch(extract(net, width).to(memory_format=memory_format)) for width in WIDTHS]
    x, labels = images(8, memory_format), torch.arange(8, device="cuda")
    net.train()
    for width in WIDTHS:
        F.cross_entropy(net(x, width), labels).backward()
    expected = [torch.zeros_like(p) for p in net.parameters()]
    for plain in narrow:
        F.cross_entropy(plain(x), labels).backward()
        # Both list the parameters of a layer in the order in which the layers run.
        for total, part in zip(expected, plain.parameters(), strict=True):
            total[tuple(map(slice, part.shape))] += part.grad
    for parameter, total in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, total, rtol=1e-9, atol=1e-11)
        # Of a dimension of size 1 the stride says nothing.
        assert strides(parameter.grad) == strides(parameter)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_in_place_is_extracted_after_an_optimizer_step(memory_format) -> None:
    net = network(memory_format)
    x = images(2, memory_format)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=True)
    with torch.no_grad():
        before = [net(x, width) for width in WIDTHS]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        for old, width in zip(before, WIDTHS, strict=True):
            plain = extract(net, width).to(memory_format=memory_format)
            out = net(x, width)
            assert not torch.allclose(out, old)
            torch.testing.assert_close(out, plain(x), rtol=1e-9, atol=1e-11)


def test_recalibration_is_the_closed_form() -> None:
    """The mean over images of each batch's mean and unbiased variance."""
    net = network()
    batches = [images(6), 2 + 3 * images(4)]
    twin, received = copy.deepcopy(net).train(), {}

    def remember(norm: nn.Module, inputs: tuple) -> None:
        received.setdefault((norm, inputs[1].name), []).append(inputs[0].clone())

    for norm in twin.modules():
        if isinstance(norm, SlimmableBatchNorm2d):
            norm.register_forward_pre_hook(remember)
    with torch.no_grad():
        for batch in batches:
            for run in runs_of(twin):
                run(batch)
    recalibrate(net, batches, runs_of(net))
    for norm, other in zip(net.modules(), twin.modules(), strict=True):
        for name, values in getattr(norm, "statistics", {}).items():
            first, second = received[other, name]
            mean = (6 * first.mean((0, 2, 3)) + 4 * second.mean((0, 2, 3))) / 10
            variance = (6 * first.var((0, 2, 3)) + 4 * second.var((0, 2, 3))) / 10
            expected = torch.stack([mean, variance])
            torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-11)
    assert len(received) == len(WIDTHS) * 52


def test_nothing_waits_for_the_device(forbid_waiting) -> None:
    net = network(dtype=torch.float32)
    x, labels = images(4, dtype=torch.float32), torch.arange(4, device="cuda")
    F.cross_entropy(net.train()(x, 0.5), labels).backward()  # libraries start, and may wait
    net.eval()
    recalibrate(net, [x], runs_of(net))
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(2):  # weights are gathered, then kept
        with torch.no_grad():
            net(x, 0.5)
    net.train()
    for width in WIDTHS:
        F.cross_entropy(net(x, width), labels).backward()
    recalibrate(net, [x, x], runs_of(net))


def test_a_captured_width_reads_the_weights_that_are_there() -> None:
    """Not copies of those that were there when it was captured."""
    net, x = network(), images(2)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                net(x, 0.5)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = net(x, 0.5)
        for parameter in net.parameters():
            parameter.mul_(1.1)
        graph.replay()
        torch.testing.assert_close(out, extract(net, 0.5)(x), rtol=1e-9, atol=1e-11)

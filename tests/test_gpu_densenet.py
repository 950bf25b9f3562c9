"""On a GPU, too, memory-efficient DenseNets change no number, wait for nothing, can be recorded."""

import copy
from contextlib import contextmanager

import pytest
import torch
from randomize import randomize
from test_densenet import KINDS, loss_of, make_images, memory_efficient
from torch import Tensor, nn

from benchmarks.densenet_memory import kept_bytes
from networks import CifarDenseNet
from networks.captured import Recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def cudnn_flags(enabled: bool = True):
    return torch.backends.cudnn.flags(enabled=enabled, deterministic=True, allow_tf32=False)


@pytest.fixture(autouse=True)
def _deterministic_kernels():
    with cudnn_flags():
        yield


def make_network(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return randomize(KINDS[kind]()).to("cuda", dtype)


def images_for(network: nn.Module) -> Tensor:
    return make_images(network).to(next(network.parameters()))


def step(network: nn.Module, images: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Returns everything that forward and backward leave behind: the generator's state, too."""
    torch.manual_seed(2)
    network.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logits = network(images)
        loss = loss_of(logits)
    loss.backward()
    return {
        "logits": logits.detach(),
        "generator": torch.cuda.get_rng_state(),
        **{f"{name}.grad": p.grad for name, p in network.named_parameters()},
        **{name: buffer.clone() for name, buffer in network.named_buffers()},
    }


def loss_on_device(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(network(images), labels)


@pytest.mark.parametrize("cudnn", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_efficient_training_is_identical(kind, precision, memory_format, cudnn):
    """Without cuDNN, torch's own BN runs, which is computed again by other kernels."""
    autocast = precision == "autocast"
    dtype = torch.float32 if autocast else getattr(torch, precision)
    network = make_network(kind, dtype).to(memory_format=memory_format)
    images = images_for(network).contiguous(memory_format=memory_format)
    efficient, again = memory_efficient(network), copy.deepcopy(network)
    with cudnn_flags(enabled=cudnn):
        expected = step(network, images, autocast)
        repeated = step(again, images, autocast)
        actual = step(efficient, images, autocast)
    # Kernels that add in no fixed order differ from themselves; what they put out may differ here.
    fixed = [name for name in expected if torch.equal(repeated[name], expected[name])]
    assert "logits" in fixed
    for name in fixed:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0, msg=name)


def test_most_kernels_have_a_fixed_order():
    """Otherwise the test above compares little."""
    network = make_network("BC-dropout")
    images = images_for(network)
    expected, actual = step(copy.deepcopy(network), images), step(network, images)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_for_nothing(kind):
    network = memory_efficient(make_network(kind))
    images, labels = images_for(network), torch.arange(4, device="cuda")
    loss_on_device(network, images, labels).backward()
    with no_waiting():
        loss_on_device(network, images, labels).backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bottleneck", "imagenet"])
def test_forward_and_backward_can_be_recorded(kind, autocast):
    """As one graph each, replayed on other images than those of the recording."""
    network = memory_efficient(make_network(kind))
    others, labels = images_for(network), torch.arange(4, device="cuda")
    images, parameters = torch.ones_like(others), list(network.parameters())
    before = copy.deepcopy(network.state_dict())

    def forward() -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast, cache_enabled=False):
            return loss_on_device(network, images, labels)

    recorder = Recorder(torch.device("cuda"))
    recorder.warm_up(lambda: torch.autograd.grad(forward(), parameters))
    replay_forward = recorder.record(forward)
    loss = replay_forward()
    replay_backward = recorder.record(lambda: torch.autograd.grad(loss, parameters))

    images.copy_(others)
    for _ in range(2):
        network.load_state_dict(before)
        value = replay_forward()
        gradients = [each.clone() for each in replay_backward()]
        value, state = value.clone(), copy.deepcopy(network.state_dict())
        network.load_state_dict(before)
        expected = forward()
        torch.testing.assert_close(value, expected)
        for mine, other in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
            scale = other.abs().max().item()
            tolerance = (2e-2 if autocast else 1e-4) * scale + 1e-6
            torch.testing.assert_close(mine, other, rtol=0, atol=tolerance)
        torch.testing.assert_close(state, network.state_dict())


def test_a_recording_draws_new_dropout():
    network = memory_efficient(make_network("BC-dropout"))
    images, labels = images_for(network), torch.arange(4, device="cuda")
    parameters = list(network.parameters())
    recorder = Recorder(torch.device("cuda"))

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss_on_device(network, images, labels), parameters)

    recorder.warm_up(run)
    replay = recorder.record(run)
    first = [each.clone() for each in replay()]
    assert any(not torch.equal(a, b) for a, b in zip(first, replay(), strict=True))


def test_bytes_kept_by_densenet_bc_100():
    plain = CifarDenseNet(100, bottleneck=True, compression=0.5).cuda()
    images = torch.randn(8, 3, 32, 32, device="cuda")
    assert kept_bytes(memory_efficient(plain), images) < 0.25 * kept_bytes(plain, images)

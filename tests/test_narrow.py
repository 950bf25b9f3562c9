"""Narrow weights, gathered for a pass or kept in evaluation: the numbers of slices, bit for bit."""

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks import SlimmableCifarResNet, SlimmableMobileNetV2, extract, recalibrate
from networks.narrow import InPlaceReLU6, KeptWidths
from networks.slimmable_layers import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SwitchableBatchNorm2d,
)

WIDTHS = (0.5, [0.5, 0.25, 1.0, 0.75, 0.25, 0.5])
FORMATS = (torch.contiguous_format, torch.channels_last)


def network(**widths) -> SlimmableCifarResNet:
    """Returns a network in evaluation, with statistics of these widths."""
    torch.manual_seed(0)
    net = SlimmableCifarResNet(8, **(widths or {"width_mult_range": (0.25, 1.0)})).eval()
    calibrate(net)
    return net


def calibrate(net: SlimmableCifarResNet, seed: int = 1) -> None:
    if net.width_mults is None:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        recalibrate(net, [images], [partial(net, width_mult=width) for width in WIDTHS])


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(net: nn.Module, width=0.5) -> Tensor:
    return net(images(), width)


def assert_current(net: SlimmableCifarResNet, width=0.5) -> None:
    """What it says in place is what a network cut out now says."""
    plain = extract(net, width)
    with torch.no_grad():
        assert torch.equal(logits(net, width), plain(images()))


# --- with gradients -------------------------------------------------------------------------------


def by_slices(net: nn.Module, run: Callable[[], Tensor], monkeypatch) -> list[Tensor]:
    """Returns logits and gradients of a network whose layers slice, as each can do by itself."""
    with monkeypatch.context() as patch:
        patch.setattr("networks.slimmable.gather", lambda sizes: {})
        return gradients(net, run)


def gradients(net: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    net.zero_grad()
    out = run()
    F.cross_entropy(out, torch.arange(len(out))).backward()
    return [out.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("width", [*WIDTHS, 1.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("widths", [{}, {"width_mults": (0.5, 1.0)}])
def test_gathered_weights_have_the_bits_of_slices(width, training, widths, monkeypatch) -> None:
    if widths and not isinstance(width, float):
        return
    net = network(**widths)
    if not training and width == 1.0 and not widths:
        recalibrate(net, [images()])
    net.train(training)
    run = partial(net, images(), width)
    expected = by_slices(net, run, monkeypatch)
    actual = gradients(net, run)
    assert len(actual) == len(expected)
    for there, here in zip(expected, actual, strict=True):
        if there.shape == net.fc.weight.shape:
            # Some CPUs multiply matrices in another order if one of them is stored transposed.
            torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(here, there)


def test_several_widths_add_up_to_the_bits_of_slices(monkeypatch) -> None:
    torch.manual_seed(0)
    net = SlimmableMobileNetV2(10, cifar_strides=True, width_mult_range=(0.35, 1.0)).train()

    def run() -> Tensor:
        return sum(net(images(), width) for width in (1.0, 0.35, 0.5))

    expected = by_slices(net, run, monkeypatch)
    assert all(map(torch.equal, gradients(net, run), expected))


@pytest.mark.parametrize("memory_format", FORMATS)
def test_weights_and_gradients_have_the_format_of_the_parameter(memory_format) -> None:
    net = network().to(memory_format=memory_format).train()
    seen = []
    convs = [module for module in net.modules() if isinstance(module, SlimmableConv2d)]
    for conv in convs:
        conv.register_forward_pre_hook(lambda conv, inputs: seen.append(inputs[2][conv.weight]))
    net(images().to(memory_format=memory_format), 0.5).sum().backward()
    assert len(seen) == len(convs)
    for conv, narrow in zip(convs, seen, strict=True):
        assert narrow.is_contiguous(memory_format=memory_format) or narrow[0, 0].numel() == 1
        assert conv.weight.grad.stride() == conv.weight.stride()


def test_frozen_weights_get_no_gradient() -> None:
    net = network().train()
    net.units[1].requires_grad_(False)
    net(images(), 0.5).sum().backward()
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == name.startswith("units.1."), name


def test_second_derivatives_are_refused() -> None:
    """Those of weights; not silently left out."""
    net = network().train()
    out = net(images(), 0.5).square().sum()
    grads = torch.autograd.grad(out, [net.units[1].layers[0].conv.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grads[0].square().sum().backward()


def test_relu6_in_place() -> None:
    """At its corners, too, and twice differentiable as torch's."""
    x = torch.tensor([-1.0, 0.0, 1e-7, 3.0, 6.0, 7.0, torch.inf], requires_grad=True)
    direction = torch.arange(1.0, 8.0)
    results = []
    for function in (InPlaceReLU6.apply, F.relu6):
        out = function(x * 1)
        (grad,) = torch.autograd.grad(out, x, direction)
        results.append((out, grad))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)
    y = x.detach()[:6].double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: InPlaceReLU6.apply(y * 1.1 + 0.05), y)


# --- without gradients: whatever changes is seen --------------------------------------------------


def step(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@torch.no_grad()
def edit_in_place(net: nn.Module) -> None:
    net.units[1].layers[0].conv.weight.mul_(2)


def edit_in_inference_mode(net: nn.Module) -> None:
    with torch.inference_mode():
        net.units[1].layers[0].conv.weight.mul_(2)


def edit_scale(net: nn.Module) -> None:
    net.units[1].layers[0].norm.weight.data.mul_(2)


def edit_data_between_modes(net: nn.Module) -> None:
    net.units[1].layers[0].conv.weight.data.mul_(2)
    net.eval()


def assign_data(net: nn.Module) -> None:
    weight = net.units[1].layers[0].conv.weight
    weight.data = weight.data * 2


def replace_parameter(net: nn.Module) -> None:
    conv = net.units[1].layers[0].conv
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def replace_module(net: nn.Module) -> None:
    block = net.units[1].layers[0]
    conv = copy.deepcopy(block.conv)
    conv.weight.data.mul_(2)
    block.conv = conv


def load(net: nn.Module, **how) -> None:
    torch.manual_seed(3)
    other = SlimmableCifarResNet(8, width_mult_range=(0.25, 1.0))
    calibrate(other)
    net.load_state_dict(other.state_dict(), **how)


def recalibrate_again(net: nn.Module) -> None:
    calibrate(net, seed=4)


def edit_statistics(net: nn.Module) -> None:
    net.units[0].norm.statistics["0.5"][1] *= 2


def replace_statistics(net: nn.Module) -> None:
    norm = net.units[0].norm
    norm.statistics = {name: 2 * values for name, values in norm.statistics.items()}


def set_eps(net: nn.Module) -> None:
    net.units[1].layers[0].norm.eps = 0.5


CHANGES = [
    *(step, edit_in_place, edit_in_inference_mode, edit_scale, edit_data_between_modes),
    *(assign_data, replace_parameter, replace_module, load, partial(load, assign=True)),
    *(recalibrate_again, edit_statistics, replace_statistics, set_eps),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_change_is_seen(change, width) -> None:
    net = network()
    before = logits(net, width)
    assert len(net._kept) == 1
    with torch.inference_mode():
        assert torch.equal(net(images(), width), before)
    change(net)
    if width == 0.5 or change is not edit_statistics:
        assert not torch.equal(logits(net, width), before)
    assert_current(net, width)


def test_a_change_without_a_version_is_seen_after_the_next_eval() -> None:
    """Nothing tells of it before that; Lightning's weight averaging swaps weights in this way."""
    net = network()
    before = logits(net)
    net.units[1].layers[0].conv.weight.data.mul_(2)
    assert torch.equal(logits(net), before)
    net.eval()
    assert not torch.equal(logits(net), before)
    assert_current(net)


def test_conversion_is_seen() -> None:
    net = network()
    before = logits(net)
    net.double()
    with torch.no_grad():
        out = net(images().double(), 0.5)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out.float(), before)
    net.float().to(memory_format=torch.channels_last)
    torch.testing.assert_close(logits(net), before)
    weights = [p for p in net._kept.get(net, (0.5, None), None).parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_switches_are_kept_too() -> None:
    net = network(width_mults=(0.5, 1.0))
    before = logits(net)
    net.train()(images(), 0.5)  # its BN has seen a batch
    net.eval()
    assert not torch.equal(logits(net), before)
    assert_current(net)
    before = logits(net)
    for switch in net.units[0].norm.switches:
        switch.eps = 0.5
    assert not torch.equal(logits(net), before)
    assert_current(net)
    step(net)
    assert_current(net)


@pytest.mark.parametrize("widths", [{}, {"width_mults": (0.5, 1.0)}])
def test_plain_networks_have_the_eps_of_their_width(widths) -> None:
    net = network(**widths)
    for module in net.modules():
        if isinstance(module, SlimmableBatchNorm2d):
            module.eps = 0.5
        elif isinstance(module, SwitchableBatchNorm2d):
            module.switches[module.names.index("0.5")].eps = 0.5
    plain = extract(net, 0.5)
    assert {m.eps for m in plain.modules() if isinstance(m, nn.BatchNorm2d)} == {0.5}
    by_layers = net(images(), 0.5).detach()  # with gradients no plain network stands in
    torch.testing.assert_close(plain(images()), by_layers)
    torch.testing.assert_close(logits(net), by_layers)


def test_a_width_that_lost_its_statistics_is_refused() -> None:
    net = network()
    logits(net)
    net.units[0].norm.statistics = {}
    with pytest.raises(ValueError, match=r"width 0\.5 has no BN statistics"):
        logits(net)


def test_a_list_is_not_a_ratio() -> None:
    net = network()
    logits(net)
    with pytest.raises(ValueError, match="1 widths for 6 groups"):
        logits(net, [0.5])


def test_hooks_run() -> None:
    net, seen = network(), []
    before = logits(net)
    hook = net.units[1].layers[0].conv.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(logits(net), before)
    assert seen == [1]
    hook.remove()
    assert torch.equal(logits(net), before)
    assert seen == [1]


def test_a_part_in_training_is_in_training() -> None:
    net = network()
    before = logits(net)
    for module in net.units[0].modules():
        module.training = True
    assert not torch.equal(logits(net), before)


def test_gradients_in_evaluation() -> None:
    net = network()
    before = logits(net)
    out = net(images(), 0.5)
    torch.testing.assert_close(out, before)
    out.sum().backward()
    assert net.units[1].layers[0].conv.weight.grad.any()


def test_weights_without_versions() -> None:
    """Those of inference mode: every pass slices."""
    with torch.inference_mode():
        net = network()
        before = net(images(), 0.5)
        assert len(net._kept) == 0
        net.units[1].layers[0].conv.weight.mul_(2)
        assert not torch.equal(net(images(), 0.5), before)


# --- copies are nobody's state --------------------------------------------------------------------


def test_copies_are_not_copied_or_saved() -> None:
    net = network()
    names, size = list(net.state_dict()), len(pickle.dumps(net))
    logits(net)
    assert list(net.state_dict()) == names
    assert len(pickle.dumps(net)) == size
    other = copy.deepcopy(net)
    assert (len(net._kept), len(other._kept)) == (1, 0)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for twin in (other, torch.load(file, weights_only=False)):
        assert torch.equal(logits(twin), logits(net))
        edit_in_place(twin)
        assert not torch.equal(logits(twin), logits(net))


def test_training_drops_the_copies() -> None:
    net = network()
    logits(net)
    net.train()
    assert len(net._kept) == 0


def test_the_latest_widths_are_kept() -> None:
    net = network(width_mult_range=(0.25, 1.0))
    widths = [0.25 + 0.04 * index for index in range(KeptWidths.LIMIT + 2)]
    recalibrate(net, [images()], [partial(net, width_mult=width) for width in widths])
    for width in [*widths, widths[3]]:
        logits(net, width)
    assert [width for width, _ in net._kept._kept] == [*widths[2:3], *widths[4:], widths[3]]


def test_a_dropped_network_is_freed_at_once() -> None:
    net = network()
    logits(net)
    gc.disable()
    try:
        gone = weakref.ref(net)
        del net
        assert gone() is None
    finally:
        gc.enable()


def test_what_needs_no_copy_is_shared() -> None:
    net = network()
    recalibrate(net, [images()])
    logits(net, 1.0)
    plain = net._kept.get(net, (1.0, None), None)
    own = {p.data_ptr() for p in net.parameters()}
    assert all(p.data_ptr() in own for p in plain.parameters())
    assert not any(p.requires_grad for p in plain.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not set(plain.parameters()) & set(net.parameters())

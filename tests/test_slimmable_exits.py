"""Any width, any exit, any depth in one network: each against the network that has one of them."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from networks import (
    NarrowWithExits,
    SlimmableCifarResNet,
    SlimmableMobileNetV1,
    SlimmableMobileNetV2,
    SlimmableResNet,
    SlimmableWithExits,
    count_exit_macs,
    early_exit,
    early_exit_stream,
    exits_taken,
    extract,
    load_weights,
    recalibrate,
    run_to_exit,
)
from networks.recorded_exits import NetworkWatch, modules_of
from networks.slimmable_units import SlimmableResidual

RANGE = {"width_mult_range": (0.35, 1.0)}
SWITCHES = {"width_mults": (0.35, 1.0)}
NETWORKS = {
    "us_cifar": lambda: SlimmableCifarResNet(8, **RANGE),
    "s_cifar": lambda: SlimmableCifarResNet(8, **SWITCHES),
    "s_resnet": lambda: SlimmableResNet(50, 10, **SWITCHES),
    "us_mobilenet_v1": lambda: SlimmableMobileNetV1(10, **RANGE),
    "us_mobilenet_v2": lambda: SlimmableMobileNetV2(10, cifar_strides=True, **RANGE),
}
QUICK = ("us_cifar", "s_cifar", "us_mobilenet_v2")


def images(count: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def network(name: str = "us_cifar", exits_after=(0, 2), gates=None) -> SlimmableWithExits:
    """Returns a network in evaluation mode, with statistics of the widths 0.35 and 1."""
    torch.manual_seed(0)
    net = SlimmableWithExits(NETWORKS[name](), exits_after)
    for fc in net.heads:
        nn.init.normal_(fc.bias)
    widths = (0.35, 1.0)
    recalibrate(net, [images(seed=2)], [partial(net, width_mult=w, gates=gates) for w in widths])
    return net.eval()


def gates_of(net: SlimmableWithExits) -> list[float] | None:
    return torch.linspace(0.9, 0.5, net.num_blocks).tolist() or None


# --- a width is the network cut out ---------------------------------------------------------------


@pytest.mark.parametrize("width", [0.35, 1.0])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS if n not in QUICK)]
)
def test_a_width_is_the_network_cut_out_at_every_exit(name: str, gated: bool, width: float) -> None:
    """Of slices (with gradients), of what is kept (without), and cut out: one result."""
    net = network(name)
    gates = gates_of(net) if gated else None
    narrow = extract(net, width, gates=gates)
    assert type(narrow) is NarrowWithExits
    with torch.no_grad():
        expected = narrow(images())
        kept = net(images(), width, gates)
    sliced = net(images(), width, gates)
    assert len(expected) == 3
    for one, two, three in zip(expected, kept, sliced, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    folded = extract(net, width, fold_bn=True, gates=gates)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    for one, two in zip(expected, folded.double()(images().double()), strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-3)


def test_an_exit_reads_the_first_channels() -> None:
    net = network().double()
    with torch.no_grad():
        logits = net(images().double(), 0.35)
        state = images().double()
        for stage, fc, out in zip(net.at(0.35).stages, net.heads, logits, strict=True):
            state = stage(state)
            means = state.flatten(2).sum(2) / state[0, 0].numel()
            expected = means @ fc.weight[:, : state.shape[1]].T + fc.bias
            torch.testing.assert_close(out, expected)
    assert [fc.in_features for fc in net.heads] == [16, 32, 64]


def test_without_exits_it_is_the_slimmable_network() -> None:
    torch.manual_seed(0)
    plain = NETWORKS["us_cifar"]().train()
    torch.manual_seed(0)
    net = SlimmableWithExits(NETWORKS["us_cifar"](), []).train()
    assert {f"trunk.{key}" for key in plain.state_dict()} == set(net.state_dict())
    (logits,), expected = net(images(), 0.6), plain(images(), 0.6)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for one, two in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


def test_exits_change_nothing_of_the_trunk() -> None:
    net = network()
    with torch.no_grad():
        assert torch.equal(net(images(), 0.35)[-1], net.trunk(images(), 0.35))


def test_a_trained_slimmable_network_gets_exits() -> None:
    """Its weights and BN statistics load by their names; the exits are new."""
    plain, net = network().trunk, SlimmableWithExits(NETWORKS["us_cifar"](), [0, 2]).eval()
    loaded = load_weights(net, plain.state_dict())
    assert loaded.exits == [
        f"early_exits.{k}.{part}" for k in (0, 1) for part in ("weight", "bias")
    ]
    assert not loaded.unused
    with torch.no_grad():
        assert torch.equal(net(images(), 0.35)[-1], plain(images(), 0.35))


# --- depth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QUICK)
def test_open_gates_are_no_gates(name: str) -> None:
    """Bit for bit, gradients and BN statistics included."""
    found = []
    for gates in (None, [1.0] * network(name).num_blocks):
        net = network(name).train()
        logits = net(images(), 0.35, gates)
        sum(each.square().sum() for each in logits).backward()
        grads = [parameter.grad for parameter in net.parameters()]
        found.append([*logits, *grads, *net.buffers()])
    for one, two in zip(*found, strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize("name", QUICK)
def test_a_closed_block_is_its_shortcut_and_its_branch_is_left_alone(name: str) -> None:
    net = network(name).train()
    before = {key: value.clone() for key, value in net.named_buffers()}
    blocks = [unit for unit in net.trunk.units if isinstance(unit, SlimmableResidual)]
    ran = []
    for block in blocks:
        block.layers[0].register_forward_hook(lambda *_, block=block: ran.append(block))
    gates = [1.0] * len(blocks)
    gates[1] = 0.0  # its shape changes in a CIFAR network, and not in MobileNet v2
    seen = {}
    blocks[1].register_forward_hook(lambda _, inputs, out: seen.update(x=inputs[0], out=out))
    logits = net(images(), 0.35, gates)
    assert ran == [block for block in blocks if block is not blocks[1]]
    width = net.width(0.35)
    if blocks[1].shortcut is None:
        assert seen["out"] is seen["x"]
    else:
        assert torch.equal(seen["out"], blocks[1].shortcut(seen["x"], width).relu())
    sum(each.square().sum() for each in logits).backward()
    assert all(p.grad is None for p in blocks[1].layers.parameters())
    assert all(p.grad is not None for p in net.heads[0].parameters())
    closed = {id(buffer) for buffer in blocks[1].layers.buffers()}
    for key, value in net.named_buffers():
        if id(value) in closed:
            assert torch.equal(value, before[key])
    fresh = network(name)  # training has made the shared BNs forget
    narrow = extract(fresh, 1.0, gates=gates)
    with torch.no_grad():
        assert all(map(torch.equal, narrow(images()), fresh(images(), 1.0, gates)))
    kept = sum(p.numel() for p in narrow.parameters())
    unused = sum(p.numel() for p in blocks[1].layers.parameters())
    if name != "s_cifar":  # whose switches are several BNs
        assert kept == sum(p.numel() for p in net.parameters()) - unused


def test_gates_have_a_kept_network_of_their_own() -> None:
    net = network()
    choices = [None, [1.0, 0.5, 1.0], [1.0, 0.0, 1.0]]
    for run in (net, net.trunk):
        for _ in range(2):
            for gates in choices:
                with torch.no_grad():
                    kept = run(images(), 0.35, gates)
                assert torch.equal(kept[-1], run(images(), 0.35, gates)[-1])
    assert [gates and list(gates) for _, gates in net._kept._kept] == choices


def test_survival_scales_the_branch() -> None:
    net = network().double()
    block = net.trunk.units[1]
    x, width = torch.rand(2, 8, 4, 4).double(), net.width(0.35)
    assert width.channels[0] == 8
    with torch.no_grad():
        expected = torch.relu(x + 0.3 * block.residual(x, width))
        torch.testing.assert_close(block(x, width, 0.3), expected)


# --- leaving early --------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", QUICK)
def test_leaving_early_at_a_width_is_its_exit_of_the_full_pass(name: str, gated: bool) -> None:
    net = network(name)
    gates = gates_of(net) if gated else None
    at_width, x = net.at(0.35, gates), images(12)
    with torch.no_grad():
        logits = at_width(x)
        scores = torch.stack([z.softmax(1).amax(1) for z in logits], 1)
    thresholds = scores.median(0).values[:2].tolist()
    answers = early_exit(at_width, x, thresholds, "confidence")
    assert torch.equal(answers.exit_index, exits_taken(scores, thresholds, "confidence"))
    assert len(answers.exit_index.unique()) == 3
    for row, index in enumerate(answers.exit_index.tolist()):
        torch.testing.assert_close(answers.logits[row], logits[index][row], rtol=1e-4, atol=1e-5)
    (streamed,) = early_exit_stream(at_width, [x], thresholds, "confidence", 12)
    torch.testing.assert_close(streamed.logits, answers.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(streamed.exit_index, answers.exit_index)
    with torch.no_grad():
        assert torch.equal(run_to_exit(at_width, 1, x), logits[1])
    assert count_exit_macs(at_width, x[:1]) == count_exit_macs(extract(net, 0.35), x[:1])


def test_a_view_of_a_network_that_answers_can_be_recorded() -> None:
    view = network().at(0.35)
    assert not NetworkWatch(modules_of(view)).is_training()
    view.network.train()
    assert NetworkWatch(modules_of(view)).is_training()


def test_a_view_sees_what_becomes_of_the_network() -> None:
    net = network()
    view = net.at(0.35)
    before = view(images())
    with torch.no_grad():
        net.trunk.fc.bias += 1
        after = view(images())
        torch.testing.assert_close(after[-1], before[-1] + 1)
        assert torch.equal(run_to_exit(view, 2, images()), after[-1])
    net.train()
    with pytest.raises(ValueError, match=r"call network\.eval"):
        early_exit(view, images(), [0.0, 0.0])


# --- recalibration --------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_one_pass_recalibrates_all_exits_of_a_width(gated: bool) -> None:
    """The statistics are those of a direct computation in float64."""
    net = network(gates=[0.5] * 3)
    gates = gates_of(net) if gated else None
    batches = [images(8, seed=5), images(4, seed=6)]
    narrow = extract(net, 0.35, gates=gates).double().train()
    recalibrate(net, batches, [partial(net, width_mult=0.35, gates=gates)])
    norms = [module for module in narrow.modules() if isinstance(module, nn.BatchNorm2d)]
    sums = {norm: [0.0, 0.0] for norm in norms}

    def gather(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        (x,) = inputs
        sums[norm][0] += len(x) * x.mean((0, 2, 3))
        sums[norm][1] += len(x) * x.transpose(0, 1).flatten(1).var(1)

    for norm in norms:
        norm.register_forward_pre_hook(gather)
    with torch.no_grad():
        for batch in batches:
            narrow(batch.double())
    again = extract(net, 0.35, gates=gates)
    found = [module for module in again.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(found) == len(norms) == 9
    for norm, own in zip(norms, found, strict=True):
        mean, variance = (total / 12 for total in sums[norm])
        torch.testing.assert_close(own.running_mean.double(), mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own.running_var.double(), variance, rtol=1e-4, atol=1e-6)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("exits_after", [[-1], [2, 2], [2, 1], [3], [0, 7]])
def test_exits_that_do_not_fit_are_refused(exits_after: list[int]) -> None:
    with pytest.raises(
        ValueError, match=r"^exits_after is \[.*\]: give (rising|whole) numbers from 0 to"
    ):
        SlimmableWithExits(NETWORKS["us_cifar"](), exits_after)


@pytest.mark.parametrize("call", ["__call__", "at"])
def test_gates_and_widths_that_do_not_fit_are_refused(call: str) -> None:
    net = network()
    run = partial(net, images()) if call == "__call__" else net.at
    with pytest.raises(ValueError, match="2 gates for 3 blocks: give one per block"):
        run(0.35, [1.0, 1.0])
    with pytest.raises(ValueError, match="one per block, not per sample"):
        run(0.35, torch.ones(3, 6))
    with pytest.raises(ValueError, match=r"width 0.2 is outside the range 0.35 to 1"):
        run(0.2)
    with pytest.raises(ValueError, match="1 gates for 0 blocks"):
        network("us_mobilenet_v1").at(1.0, [1.0])

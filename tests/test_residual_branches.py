"""Gates of VisionTransformer and ConvNeXt, against timm's networks and a masked network."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from methods import METHODS, build
from quiet import quiet_trainer
from torch import Tensor, nn

from benchmarks.drop_path import bytes_for_backward
from datamodules import DigitsDataModule
from lightning_modules import LitResNet
from networks import (
    CapturedNetwork,
    ConvNeXt,
    ResidualNetwork,
    ResNetWithExits,
    VisionTransformer,
    count_macs,
    count_params,
    count_params_run,
    fold_survival_probs,
)

NUM_IMAGES = 6
KINDS: dict[str, Callable[[], ResidualNetwork]] = {
    "vit": lambda: VisionTransformer(32, 8, 3, 2, 16, 24, num_classes=10),
    "convnext": lambda: ConvNeXt((2, 1, 3), (8, 12, 16), num_classes=10).to(
        memory_format=torch.channels_last
    ),
}


@pytest.fixture(params=KINDS)
def network(request) -> ResidualNetwork:
    """In float64 and training; no weight is 0, or so small that it hides a mistake."""
    torch.manual_seed(0)
    network = KINDS[request.param]()
    for name, parameter in network.named_parameters():
        parameter.data.add_(torch.randn_like(parameter) * (0.5 if "scale" in name else 0.1))
    return network.double().train()


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(NUM_IMAGES, 3, 32, 32, dtype=torch.float64, generator=generator)


def branches(network: ResidualNetwork) -> list[list[nn.Module]]:
    """Returns the modules of each branch, shallow to deep, by their names."""
    if isinstance(network, VisionTransformer):
        return [
            part
            for layer in network.encoder.layers
            for part in ([layer.ln_1, layer.self_attention], [layer.ln_2, layer.mlp])
        ]
    return [[block] for stage in network.features[1::2] for block in stage]


def masked(network: ResidualNetwork, images: Tensor, gates: Tensor) -> Tensor:
    """The same network as others run it: every branch is computed, and multiplied by its mask.

    Args:
        network: has the modules.
        images: (N, C, H, W).
        gates: (num_blocks, N).
    """
    x = network.stem(images)
    for index, layers in enumerate(branches(network)):
        if isinstance(network, ConvNeXt) and index in (2, 3):
            x = network.features[2 * index - 2](x)
        branch = nn.Sequential(*layers)(x)
        x = x + branch * gates[index].to(x).view(-1, *[1] * (x.dim() - 1))
    return network.head(x)


def some_gates(network: ResidualNetwork) -> Tensor:
    """Returns gates per sample; a branch with all open, one with none, others with some."""
    gates = torch.zeros(network.num_blocks, NUM_IMAGES)
    for index in range(network.num_blocks):
        gates[index, torch.randperm(NUM_IMAGES)[: index + 1]] = 6 / (index + 1)
    gates[1] = 0
    assert gates[-1].all()
    return gates


def answers(network: ResidualNetwork, logits: Tensor) -> dict[str, Tensor]:
    """Returns logits and the gradients of a loss, 0 where there is none."""
    network.zero_grad()
    F.cross_entropy(logits, torch.arange(NUM_IMAGES)).backward()
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in network.named_parameters()
    }
    return {"logits": logits.detach(), **gradients}


def assert_close(one: object, other: object, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_gate_for_every_branch(network: ResidualNetwork) -> None:
    assert network.num_blocks == len(branches(network)) == 6
    for block, layers in zip(network.blocks, branches(network), strict=True):
        inside = {id(p) for layer in layers for p in layer.parameters()}
        own = {id(parameter) for parameter in block.parameters()}
        assert inside <= own
        halving = own - inside  # the layers before the first block of a stage
        assert len(halving) in (0, 4)


def test_open_gates_are_the_original(network: ResidualNetwork, images: Tensor) -> None:
    original = answers(network, network(images))
    expected = answers(network, masked(network, images, torch.ones(6, NUM_IMAGES)))
    assert_close(original, expected, 0.0)
    assert_close(answers(network, network(images, [1.0] * 6)), expected, 0.0)
    assert_close(answers(network, network(images, torch.ones(6, NUM_IMAGES))), expected, 0.0)


def test_gate_per_batch_scales_the_branch(network: ResidualNetwork, images: Tensor) -> None:
    gates = torch.tensor([0.5, 0.0, 2.0, 0.0, 1.0, 0.3], dtype=torch.float64)
    expected = answers(network, masked(network, images, gates.unsqueeze(1).expand(6, NUM_IMAGES)))
    assert_close(answers(network, network(images, gates)), expected)


def test_gate_per_sample_is_the_masked_network(network: ResidualNetwork, images: Tensor) -> None:
    """Logits and gradients, of one scale per block and of one per sample."""
    torch.manual_seed(2)
    gates = some_gates(network)
    for each in (gates, gates * torch.rand_like(gates)):
        expected = answers(network, masked(network, images, each))
        assert_close(answers(network, network(images, each)), expected)


def test_in_float32_survivors_equal_the_mask_to_a_millionth(
    network: ResidualNetwork, images: Tensor
) -> None:
    network, images, gates = network.float(), images.float(), some_gates(network)
    assert_close(network(images, gates), masked(network, images, gates), 1e-6)


def test_closed_branch_is_not_executed(network: ResidualNetwork, images: Tensor) -> None:
    ran: list[nn.Module] = []
    for layers in branches(network):
        for layer in layers:
            layer.register_forward_hook(lambda module, *_: ran.append(module))
    for index, layers in enumerate(branches(network)):
        gates = torch.ones(6)
        gates[index] = 0
        for each in (gates, gates.unsqueeze(1).expand(6, NUM_IMAGES)):
            ran.clear()
            network(images, each)
            assert not set(ran) & set(layers)
            assert len(ran) == sum(map(len, branches(network))) - len(layers)


def test_closed_branch_costs_nothing(network: ResidualNetwork, images: Tensor) -> None:
    """In MACs: of all images with a gate per batch, of those closed with a gate per sample."""
    network.eval()
    full = count_macs(network, images)
    by_branch = [
        full - count_macs(lambda x, g=gates: network(x, g), images)
        for gates in (1 - torch.eye(6)).unbind()
    ]
    assert min(by_branch) > 0
    gates = some_gates(network)
    closed = (gates == 0).sum(1).tolist()
    saved = sum(macs * n // NUM_IMAGES for macs, n in zip(by_branch, closed, strict=True))
    assert count_macs(lambda x: network(x, gates), images) == full - saved
    trunk = count_macs(lambda x: network(x, [0.0] * 6), images)
    assert trunk == full - sum(by_branch)


def test_parameters_that_run_are_counted(network: ResidualNetwork, images: Tensor) -> None:
    assert count_params_run(network, network, images) == count_params(network)
    closed = count_params_run(network, lambda x: network(x, [0.0] * 6), images)
    inside = sum(p.numel() for part in branches(network) for m in part for p in m.parameters())
    assert closed == count_params(network) - inside


def test_gates_that_do_not_fit_are_refused(network: ResidualNetwork, images: Tensor) -> None:
    with pytest.raises(ValueError, match="5 gates for 6 blocks"):
        network(images, [1.0] * 5)
    with pytest.raises(ValueError, match=r"gates of shape \(6, 5\) for 6 images"):
        network(images, torch.ones(6, 5))


def test_survival_probabilities_fold_into_the_weights(
    network: ResidualNetwork, images: Tensor
) -> None:
    probs = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    folded = fold_survival_probs(network, probs)
    assert_close(folded(images), network(images, probs))
    assert not torch.equal(folded(images), network(images))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_run_their_own_modules(
    network: ResidualNetwork, images: Tensor, copied: Callable
) -> None:
    other = copied(network)
    before = other(images, [0.5] * 6)
    assert torch.equal(before, network(images, [0.5] * 6))
    for parameter in network.parameters():
        parameter.data.zero_()
    assert torch.equal(other(images, [0.5] * 6), before)


def test_replaced_layer_is_the_one_that_runs(network: ResidualNetwork, images: Tensor) -> None:
    """As quantisation and adapters replace one."""
    before = network(images)
    if isinstance(network, VisionTransformer):
        network.encoder.layers[0].ln_2 = nn.Identity()
    else:
        network.features[1][0].block[2] = nn.Identity()
    expected = masked(network, images, torch.ones(6, NUM_IMAGES))
    assert_close(network(images), expected, 0.0)
    assert not torch.equal(expected, before)


@pytest.mark.parametrize("gates", ["none", "batch", "row"])
def test_recorded_step_has_the_bits_of_the_eager_one(
    network: ResidualNetwork, images: Tensor, gates: str
) -> None:
    said: list[str] = []
    chosen = {"none": None, "batch": torch.tensor([1.0, 0, 1, 1, 0, 1])}
    torch.manual_seed(4)
    chosen["row"] = some_gates(network)
    network, images = network.float(), images.float()  # which hides no other order of a sum
    captured = CapturedNetwork(network, "graphs", say=said.append)
    eager = answers(network, network(images, chosen[gates]))
    assert_close(answers(network, captured(images, chosen[gates])), eager, 0.0)
    assert captured.chain is not None
    assert len(said) == 1
    assert "is recorded" in said[0]


def test_exits_between_the_branches(network: ResidualNetwork, images: Tensor) -> None:
    """Depth times exits: of a user's own exits; those of a ResNet would not fit."""
    with pytest.raises(ValueError, match=r"give a (VisionTransformer|ConvNeXt) its early_exits"):
        ResNetWithExits(network, [4])
    own = nn.Sequential(nn.Flatten(), nn.LazyLinear(10, dtype=torch.float64))
    early, last = ResNetWithExits(network, [4], [own])(images, [1.0, 0.0, 1, 1, 0, 1])
    assert early.shape == (NUM_IMAGES, 10)
    assert torch.equal(last, network(images, [1.0, 0.0, 1, 1, 0, 1]))


def test_memory_for_backward_is_that_of_the_survivors(
    network: ResidualNetwork, images: Tensor
) -> None:
    """Beside the stem, the head and the halvings, half of the samples save half of the bytes."""

    def saved(num_open: int) -> int:
        gates = torch.zeros(6, NUM_IMAGES)
        gates[:, :num_open] = 2.0
        return bytes_for_backward(network, lambda: network(images, gates).sum())

    shared = saved(0)
    assert (saved(3) - shared) / (saved(6) - shared) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("name", ["vision_transformer", "convnext"])
def test_constant_depth_trains_it_like_any_network(name: str, tmp_path: Path) -> None:
    net = build(METHODS[name]["init_args"]["net"])
    trainer = quiet_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    trainer.fit(LitResNet(net), datamodule=DigitsDataModule(batch_size=32))
    for key, parameter in net.named_parameters():  # the first step leaves a head that is not 0
        assert parameter.grad.any(), key


def test_images_of_another_size_are_refused_before_training(tmp_path: Path) -> None:
    module = LitResNet(VisionTransformer(28, 4, 1, 1, 8, 8, num_classes=10, in_channels=1))
    trainer = quiet_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    with pytest.raises(ValueError, match="of 28 x 28 pixels and the data has 32 x 32: set the net"):
        trainer.fit(module, datamodule=DigitsDataModule(batch_size=32))

"""The claims of Stochastic Depth that live in its training step."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor
from torch.optim import SGD

from lightning_modules import FULL, LitStochasticDepth, survival_probabilities
from networks import CifarResNet, ConvNeXt, VisionTransformer


class Stub(LitStochasticDepth):
    """The module without a Trainer: its place in a run is set by hand."""

    global_step = 0
    current_epoch = 0
    global_rank = 0
    world_size = 1

    @property
    def trainer(self) -> SimpleNamespace:
        return SimpleNamespace(
            world_size=self.world_size,
            accumulate_grad_batches=1,
            log_every_n_steps=1000,
            callback_metrics={},
        )


def module(depth: int = 20, **options: object) -> Stub:
    return Stub(CifarResNet(depth), **options)


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(size, 3, 8, 8), torch.arange(size) % 10


def test_linear_decay_counts_from_one() -> None:
    probs = survival_probabilities(54, 0.5, "linear")
    assert probs[0] == pytest.approx(1 - 0.5 / 54)
    assert probs[-1] == 0.5
    assert sum(probs) == pytest.approx((3 * 54 - 1) / 4)
    for num_blocks, expected in ((75, 56.0), (600, 449.75), (50, 37.25)):
        assert sum(survival_probabilities(num_blocks, 0.5, "linear")) == pytest.approx(expected)
    assert survival_probabilities(3, 0.7, "uniform") == [0.7, 0.7, 0.7]


def test_rates_of_drop_path_are_those_of_timm() -> None:
    """By layer of a ViT, whose two branches have one rate; by block of a ConvNeXt."""
    vit = VisionTransformer(8, 4, 5, 2, 8, 8)
    theirs = timm.models.VisionTransformer(
        8, 4, embed_dim=8, depth=5, num_heads=2, drop_path_rate=0.4
    )
    paths = [path for block in theirs.blocks for path in (block.drop_path1, block.drop_path2)]
    rates = [getattr(path, "drop_prob", 0.0) for path in paths]  # the first are identities
    method = LitStochasticDepth(vit, 0.6, decay="drop_path")
    assert [1 - p for p in method.survival_probs] == pytest.approx(rates)

    convnext = ConvNeXt((1, 2, 1, 3), (4, 4, 4, 4))
    theirs = timm.models.ConvNeXt(depths=(1, 2, 1, 3), dims=(4, 4, 4, 4), drop_path_rate=0.4)
    paths = [block.drop_path for stage in theirs.stages for block in stage.blocks]
    rates = [getattr(path, "drop_prob", 0.0) for path in paths]
    method = LitStochasticDepth(convnext, 0.6, decay="drop_path")
    assert [1 - p for p in method.survival_probs] == pytest.approx(rates)
    assert survival_probabilities(1, 0.6, "drop_path") == [1.0]


@pytest.mark.parametrize("prob", [0.0, -0.1, 1.01, math.nan])
def test_impossible_probability_is_refused(prob: float) -> None:
    with pytest.raises(ValueError, match=r"give a number in \(0, 1\]"):
        survival_probabilities(3, prob, "linear")


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_blocks_survive_as_often_as_they_should(mode: str) -> None:
    method = module(depth=56, mode=mode, row_counts="random")
    num_steps = 2000
    rows = []
    for method.global_step in range(num_steps):
        gates = method.draw_gates(num_images=2, batch_idx=0)
        rows.append(gates if mode == "batch" else gates[:, 0])
    rate = torch.stack(rows).mean(0)
    probs = torch.tensor(method.survival_probs)
    sigma = (probs * (1 - probs) / num_steps).sqrt()
    assert ((rate - probs).abs() <= 4 * sigma).all()
    # The blocks are independent: so many pairs agree as independence says.
    draws = torch.stack(rows)
    both = (draws[:, -1] * draws[:, -2]).mean()
    assert abs(both - probs[-1] * probs[-2]) < 4 * math.sqrt(0.25 * 0.75 / num_steps)


def test_gates_are_a_function_of_seed_and_step() -> None:
    method, same, other = module(seed=3), module(seed=3), module(seed=4)
    for each in (method, same, other):
        each.global_step = 17
    torch.rand(5)  # what others draw from the global generator does not matter
    same.global_rank = 1  # all ranks agree
    gates = [each.draw_gates(8, 0) for each in (method, same)]
    assert torch.equal(*gates)
    assert torch.equal(gates[0], method.draw_gates(2, 5))  # accumulated batches share their gates
    draws = []
    for step in range(20):
        method.global_step = other.global_step = step
        draws.append(torch.equal(method.draw_gates(8, 0), other.draw_gates(8, 0)))
    assert not all(draws)


def test_rows_of_two_ranks_are_those_of_one() -> None:
    one = module(mode="row", row_counts="random")
    table = one.draw_gates(6, 0)
    for rank in (0, 1):
        part = module(mode="row", row_counts="random")
        part.world_size, part.global_rank = 2, rank
        assert torch.equal(part.draw_gates(3, 0), table[:, rank::2])


def test_fixed_counts_keep_every_sample_as_often() -> None:
    """Exactly round(p N) of N samples, on every rank; each of them in round(p N) / N of steps."""
    method = module(depth=20, mode="row")
    num_images, num_steps = 10, 1000
    counts = (10 * torch.tensor(method.survival_probs, dtype=torch.float64)).round()
    total = torch.zeros(9, num_images)
    for method.global_step in range(num_steps):
        gates = []
        for method.global_rank in (0, 1):
            method.world_size = 2
            gates.append(method.draw_gates(num_images, 0))
            assert torch.equal(gates[-1].sum(1).double(), counts)
        total += gates[0]
    assert not torch.equal(*gates)
    probs = (counts / num_images).unsqueeze(1)
    sigma = (probs * (1 - probs) / num_steps).sqrt()
    assert ((total / num_steps - probs).abs() <= 4.5 * sigma).all()


def test_some_sample_always_keeps_a_block() -> None:
    method = module(mode="row", final_survival_prob=0.01, decay="uniform")
    assert method.draw_gates(4, 0).sum(1).tolist() == [1.0] * 9


def test_unknown_row_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="row_counts is 'some': give fixed or random"):
        module(mode="row", row_counts="some")


def test_rescaled_gates_have_mean_one() -> None:
    fixed = module(mode="row", rescale=True).draw_gates(7, 0)
    torch.testing.assert_close(fixed.mean(1), torch.ones(9))
    method = module(mode="row", row_counts="random", rescale=True)
    gates = method.draw_gates(20000, 0)
    assert (gates.mean(1) - 1).abs().max() < 4 / math.sqrt(20000)
    expected = torch.tensor([1 / p for p in method.survival_probs])
    is_open = gates > 0
    assert torch.equal(gates, is_open * expected.unsqueeze(1))


def test_evaluation_scales_by_the_probabilities_unless_training_did() -> None:
    images = batch()[0]
    for rescale in (False, True):
        method = module(rescale=rescale).eval()
        gates = None if rescale else method.survival_probs
        assert torch.equal(method.evaluate(images)[FULL], method.net(images, gates=gates))


def train_one_step(method: Stub) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the parameters before and after a step in which some block is closed."""
    optimizer = SGD(method.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    # One step with all blocks open, so that there is momentum to follow.
    method.survival_probs = [1.0] * method.net.num_blocks
    for probs in (method.survival_probs, [1.0] * (method.net.num_blocks - 1) + [1e-9]):
        method.survival_probs = probs
        before = {name: p.detach().clone() for name, p in method.net.named_parameters()}
        optimizer.zero_grad()
        method.training_step(batch(), 0).backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        method.global_step += 1
    assert method.gates[-1] == 0
    return before, {name: p.detach() for name, p in method.net.named_parameters()}


def test_closed_block_still_gets_weight_decay_and_momentum() -> None:
    torch.manual_seed(0)
    before, after = train_one_step(module())
    closed = [name for name in before if name.startswith("layer3.2.")]
    assert len(closed) == 6
    for name in closed:
        assert not torch.equal(before[name], after[name]), name


def test_closed_block_is_left_alone_on_request() -> None:
    torch.manual_seed(0)
    before, after = train_one_step(module(update_dropped_blocks=False))
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("layer3.2."), name


def test_closed_block_decays_as_plain_sgd_would() -> None:
    """Zero gradient: v = 0.9 v + 0.5 w; w = w - 0.1 v, in float64 by hand."""
    torch.manual_seed(0)
    method = module().double()
    optimizer = SGD(method.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    method.survival_probs = [1e-9] * method.net.num_blocks
    weight = method.net.layer1[0].conv1.weight
    by_hand, velocity = weight.detach().clone(), torch.zeros_like(weight)
    for method.global_step in range(3):
        optimizer.zero_grad()
        images, labels = batch()
        method.training_step((images.double(), labels), 0).backward()
        method.on_before_optimizer_step(optimizer)
        optimizer.step()
        velocity = 0.9 * velocity + 0.5 * by_hand
        by_hand = by_hand - 0.1 * velocity
    torch.testing.assert_close(weight.detach(), by_hand, rtol=0, atol=1e-12)

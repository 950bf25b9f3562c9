"""Anytime prediction and budgets: every number computed another way."""

import csv
import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Trainer, seed_everything
from quiet import quiet_trainer
from torch import Tensor

from callbacks import ExitStatistics
from datamodules import DigitsDataModule
from lightning_modules import LitMSDNet
from lightning_modules import msdnet as lit_msdnet
from networks import (
    ExitCosts,
    MSDNet,
    Staged,
    count_exit_macs,
    count_macs,
    count_params,
    run_all_exits,
)
from running import OperatingPoints, RunCheckpoint

EXITS = ["exit1", "exit2", "exit3", "full"]
ENSEMBLES = ["ensemble2", "ensemble3", "ensemble4"]
BUDGETS = ["budget_exit3", "budget_exit2"]


def network() -> MSDNet:
    seed_everything(3, verbose=False)
    return MSDNet(4, base=2, step=1, num_channels=4, growth_rate=4, in_channels=1, lazy=True)


def make_trainer(folder: Path, **arguments) -> Trainer:
    callbacks = [ExitStatistics(), OperatingPoints()]
    defaults = {"max_epochs": 2, "limit_train_batches": 12, "callbacks": callbacks}
    return quiet_trainer(folder, **(defaults | arguments))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LitMSDNet]:
    folder = tmp_path_factory.mktemp("run")
    module = LitMSDNet(network())
    data = DigitsDataModule(batch_size=64)
    trainer = make_trainer(folder)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "last.ckpt")
    trainer.test(module, datamodule=data, verbose=False)
    return folder, module.eval()


def outputs_of(module: LitMSDNet, split: str) -> tuple[Tensor, Tensor]:
    """Returns probabilities (N, K, C) and labels of a split."""
    data = DigitsDataModule()
    data.setup("test")
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    images, labels = (torch.cat(column) for column in zip(*batches, strict=True))
    with torch.no_grad():
        exits = module.net(images)
    return torch.stack(exits, 1).softmax(2), labels


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def leave(confidences: Tensor, thresholds: list[float]) -> list[int]:
    """Returns where each image leaves, one image at a time."""
    limits = [*thresholds, 0.0]
    return [
        next(exit_here for exit_here, value in enumerate(row) if value >= limits[exit_here])
        for row in confidences.tolist()
    ]


def test_loss_is_the_sum_of_the_exits() -> None:
    module = LitMSDNet(network().double())
    images = torch.randn(8, 1, 32, 32, dtype=torch.float64)
    labels = torch.arange(8)
    module.log_training = lambda *_: None
    loss = module.training_step((images, labels), 0)
    expected = sum(F.cross_entropy(logits, labels) for logits in network().double()(images))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_exits_and_ensembles_are_operating_points(trained) -> None:
    folder, module = trained
    points = {row["name"]: row for row in read(folder / "operating_points.csv")}
    assert list(points) == [*EXITS, *ENSEMBLES, *BUDGETS]
    probabilities, labels = outputs_of(module, "test")
    one = torch.zeros(1, 1, 32, 32)
    leaving = count_exit_macs(module.net, one).leaving
    cut = [Staged(module.net.stages[:k], module.net.exits[:k]) for k in range(1, 5)]
    parts = [count_macs(partial(run_all_exits, staged), one) for staged in cut]
    for index, name in enumerate(EXITS):
        right = (probabilities[:, index].argmax(1) == labels).double().mean().item()
        assert float(points[name]["test_acc"]) == pytest.approx(right)
        assert int(points[name]["macs"]) == parts[index]
    assert int(points["full"]["params"]) == count_params(module.net)
    assert int(points["exit1"]["params"]) < int(points["ensemble2"]["params"])
    for count, name in enumerate(ENSEMBLES, start=2):
        mean = probabilities[:, :count].mean(1)
        right = (mean.argmax(1) == labels).double().mean().item()
        assert float(points[name]["test_acc"]) == pytest.approx(right, abs=1.5 / 360)
        assert int(points[name]["macs"]) == leaving[count - 1]
        images = torch.randn(3, 1, 32, 32)
        with torch.no_grad():
            exits = torch.stack(module.net(images)[:count]).softmax(2).mean(0)
        torch.testing.assert_close(module.evaluated_points()[name](images).exp(), exits)


def test_curve_follows_the_papers_rule(trained) -> None:
    """Of the images that are left the surest leave: a share q^k / sum q^j of all."""
    folder, module = trained
    confidences = outputs_of(module, "val")[0].max(2).values
    assert len(module.exit_curve) == 43
    for number in (1, 7, 20, 39):
        powers = torch.tensor([(number / 20) ** k for k in range(1, 5)], dtype=torch.float64)
        counts = (powers / powers.sum()).float().mul(len(confidences)).floor().long().tolist()
        left = list(range(len(confidences)))
        for exit_here, (count, threshold) in enumerate(
            zip(counts[:3], module.exit_curve[number - 1], strict=True)
        ):
            order = sorted((confidences[row, exit_here].item() for row in left), reverse=True)
            # A share of less than an image is nobody's.
            expected = order[count - 1] if count else math.inf
            assert threshold == pytest.approx(expected, rel=1e-5)
            left = [row for row in left if confidences[row, exit_here] < threshold]
        shares = module.found.shares[number - 1]
        assert shares[3] == pytest.approx(len(left) / len(confidences))
        assert sum(shares) == pytest.approx(1)
    curve, speed = read(folder / "exit_curve.csv"), read(folder / "exit_curve_speed.csv")
    assert len(curve) == len(speed) == 43
    assert [row["macs"] for row in curve] == [row["macs"] for row in speed]
    assert all(float(row["ms_per_image"]) > 0 for row in speed)


def test_all_of_a_budget_can_be_spent(trained) -> None:
    """The paper's 39 ratios end where many images still leave early."""
    _, module = trained
    leaving = count_exit_macs(module.net, torch.zeros(1, 1, 32, 32)).leaving
    means = [
        sum(share * cost for share, cost in zip(shares, leaving, strict=True))
        for shares in module.found.shares
    ]
    assert means[38] < 0.85 * leaving[-1]
    assert max(means) == leaving[-1]
    gaps = [b - a for a, b in itertools.pairwise(sorted([leaving[0], *means]))]
    assert max(gaps) < 0.12 * leaving[-1]


def test_budget_of_an_exit_is_kept_on_validation(trained) -> None:
    _, module = trained
    confidences = outputs_of(module, "val")[0].max(2).values
    leaving = count_exit_macs(module.net, torch.zeros(1, 1, 32, 32)).leaving
    for name in BUDGETS:
        taken = leave(confidences, module.exit_thresholds[name])
        mean = sum(leaving[exit_here] for exit_here in taken) / len(taken)
        budget = leaving[int(name[-1]) - 1]
        assert 0.8 * budget < mean <= budget


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["macs", "ms"])
def test_budget_picks_thresholds(unit: str, trained, tmp_path: Path, monkeypatch) -> None:
    folder, before = trained
    costs = count_exit_macs(before.net, torch.zeros(1, 1, 32, 32))
    if unit == "ms":
        costs = ExitCosts([1.0, 0.5, 0.5, 2.0], [0.25] * 4)
        monkeypatch.setattr(lit_msdnet, "time_exits", lambda network, images: costs)
    leaving = costs.leaving
    budget = (leaving[1] + leaving[2]) / 2
    module = LitMSDNet(network(), **{f"budget_{unit}": budget})
    arguments = {"datamodule": DigitsDataModule(), "ckpt_path": folder / "last.ckpt"}
    make_trainer(tmp_path).test(module, **arguments, verbose=False)

    confidences = outputs_of(before, "val")[0].max(2).values
    means = {}
    for index, thresholds in enumerate(before.exit_curve):
        taken = leave(confidences, thresholds)
        means[index] = sum(leaving[exit_here] for exit_here in taken) / len(taken)
    best = max((mean, index) for index, mean in means.items() if mean <= budget)[1]
    assert module.exit_thresholds["adaptive"] == before.exit_curve[best]
    assert list(module.exit_thresholds) == ["adaptive", *BUDGETS]
    (row,) = [r for r in read(tmp_path / "operating_points.csv") if r["name"] == "adaptive"]
    probabilities, labels = outputs_of(before, "test")
    taken = torch.tensor(leave(probabilities.max(2).values, before.exit_curve[best]))
    answers = probabilities[torch.arange(len(labels)), taken].argmax(1)
    right = (answers == labels).double().mean().item()
    assert float(row["test_acc"]) == pytest.approx(right, abs=1.5 / 360)

    (first, *_) = make_trainer(tmp_path, callbacks=[]).predict(module, **arguments)
    assert first[1].tolist() == [exit_here + 1 for exit_here in taken[: len(first[1])].tolist()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget_macs": 1.0}, "a budget of 1 per image is outside what the exits cost: "),
        ({"budget_macs": 1e12}, "outside what the exits cost"),
    ],
)
def test_budget_that_no_exit_has(arguments, message: str, trained, tmp_path: Path) -> None:
    folder, _ = trained
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        trainer.test(
            LitMSDNet(network(), **arguments),
            datamodule=DigitsDataModule(),
            ckpt_path=folder / "last.ckpt",
            verbose=False,
        )


def test_budget_is_checked_before_an_epoch_is_lost(tmp_path: Path) -> None:
    class Late(LitMSDNet):
        def training_step(self, batch, batch_idx):
            if self.global_step > 2:
                raise AssertionError("went on")
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, limit_train_batches=2)
    with pytest.raises(ValueError, match="outside what the exits cost"):
        trainer.fit(Late(network(), budget_macs=1e12), datamodule=DigitsDataModule())
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="a budget needs thresholds"):
        trainer.fit(Late(network(), budget_ms=1.0), datamodule=DigitsDataModule(val_size=0))


def test_two_exits_have_a_curve_and_no_budget_between(tmp_path: Path) -> None:
    """A StopIteration in a callback would end the training in silence, without a checkpoint."""
    seed_everything(3, verbose=False)
    net = MSDNet(2, base=3, step=3, num_channels=4, growth_rate=4, in_channels=1)
    module = LitMSDNet(net)
    callbacks = [ExitStatistics(), RunCheckpoint(select="best")]
    trainer = make_trainer(
        tmp_path, callbacks=callbacks, enable_checkpointing=True, limit_train_batches=2
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert (tmp_path / "best.ckpt").exists()
    assert module.exit_thresholds == {}
    assert len(module.exit_curve) == 43


def test_budget_needs_a_validation(tmp_path: Path) -> None:
    module = LitMSDNet(network(), budget_macs=4e5)
    leaving = count_exit_macs(module.net.eval(), torch.zeros(1, 1, 32, 32)).leaving
    module.budget_macs = leaving[1]
    with pytest.raises(ValueError, match="hold out validation images"):
        make_trainer(tmp_path).test(module, datamodule=DigitsDataModule(), verbose=False)


def test_one_way_to_say_when_to_leave() -> None:
    for arguments in (
        {"budget_macs": 1.0, "budget_ms": 1.0},
        {"budget_ms": 1.0, "exit_thresholds": [0.5, 0.5, 0.5]},
    ):
        with pytest.raises(ValueError, match="give one of budget_macs, budget_ms and exit_thr"):
            LitMSDNet(network(), **arguments)

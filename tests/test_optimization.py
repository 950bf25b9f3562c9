"""What a training step adds up: losses over images, gradients over batches, rates over time."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import methods
import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from quiet import quiet_trainer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)
from torch.utils.data import DataLoader, IterableDataset

from datamodules import DigitsDataModule
from lightning_modules import LinearDecayLR, LitResNet, WarmupCosineLR, WarmupMultiStepLR
from lightning_modules.metrics import MeanOverImages
from running import CSVHistory


class Linear(nn.Module):
    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1024, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


def test_mean_is_over_images() -> None:
    metric = MeanOverImages()
    for mean, num_images in [(1.0, 128), (3.0, 1)]:
        metric.update(torch.tensor(mean * num_images), num_images)
    assert metric.compute() == pytest.approx(131 / 129)
    metric.update(torch.tensor(math.nan), 1)
    assert metric.compute().isnan()


def test_logged_losses_are_means_over_images(tmp_path: Path) -> None:
    """1,257 images train in batches of 500, 180 validate in batches of 100, 360 test in these."""
    data = DigitsDataModule(batch_size=500, eval_batch_size=100)
    module = LitResNet(Linear(), optimizer=partial(SGD, lr=0.0))
    history = CSVHistory(tmp_path / "metrics.csv")
    trainer = quiet_trainer(tmp_path, logger=history)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    logged = {key: float(value) for row in history.read() for key, value in row.items()}
    loaders = {
        "train/loss_epoch": data.train_epoch(0),
        "val/loss": data.val_dataloader(),
        "test/loss": data.test_dataloader(),
    }
    for name, loader in loaders.items():
        batches = [data.on_after_batch_transfer(batch, 0) for batch in loader]
        images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
        expected = F.cross_entropy(module.net(images), labels).item()
        assert logged[name] == pytest.approx(expected, rel=1e-5), name
        # Means of batches would tell another story.
        by_batch = [F.cross_entropy(module.net(x), y).item() for x, y in batches]
        assert sum(by_batch) / len(by_batch) != pytest.approx(expected, rel=1e-4)


class Steps(Callback):
    """Keeps the batches and the gradient of every optimizer step."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[Tensor, Tensor]]] = [[]]
        self.gradients: list[Tensor] = []

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batches[-1].append(batch)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        self.gradients.append(pl_module.net.fc.weight.grad.clone())
        self.batches.append([])


@pytest.mark.parametrize("period", [1, 2, 4, 16])
def test_step_has_the_mean_gradient_of_its_batches(period: int, tmp_path: Path) -> None:
    steps, history = Steps(), CSVHistory(tmp_path / "metrics.csv")
    module = LitResNet(Linear(), optimizer=partial(SGD, lr=0.0))
    trainer = quiet_trainer(
        tmp_path,
        accumulate_grad_batches=period,
        limit_train_batches=5,
        max_epochs=2,
        log_every_n_steps=1,
        callbacks=[steps],
        logger=history,
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=32))
    steps_per_epoch = math.ceil(5 / period)
    sizes = [len(batches) for batches in steps.batches[:-1]]
    assert sizes == [min(period, 5 - first) for first in range(0, 5, period)] * 2
    for batches, gradient in zip(steps.batches, steps.gradients, strict=False):
        losses = [F.cross_entropy(module.net(images), labels) for images, labels in batches]
        (expected,) = torch.autograd.grad(sum(losses) / len(losses), [module.net.fc.weight])
        torch.testing.assert_close(gradient, expected)
    logged = [row["step"] for row in history.read() if "train/loss" in row]
    assert logged == [str(step) for step in range(2 * steps_per_epoch)]


@pytest.mark.parametrize("method", methods.TRAINED)
def test_short_group_counts_as_much_as_a_full_one(method: str, tmp_path: Path) -> None:
    """Three batches are one step, whether 3 or 16 are asked for."""
    weights = []
    for period in (3, 16):
        seed_everything(3, verbose=False)
        module = methods.build(methods.METHODS[method])
        trainer = quiet_trainer(
            tmp_path, accumulate_grad_batches=period, limit_train_batches=3, limit_val_batches=0
        )
        trainer.fit(module, datamodule=DigitsDataModule(batch_size=16))
        weights.append(torch.cat([p.detach().flatten() for p in module.net.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


# --- schedules ------------------------------------------------------------------------------------


def rates(
    scheduler: Any, folder: Path, interval: str = "epoch", **arguments: Any
) -> tuple[list[float], LitResNet]:
    """Trains, and returns the rate of every step."""

    class Rates(Callback):
        seen: list[float] = []  # noqa: RUF012

        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    callback = Rates()
    callback.seen = []
    module = LitResNet(
        Linear(), optimizer=partial(SGD, lr=1.0), lr_scheduler=scheduler, lr_interval=interval
    )
    arguments = {"limit_train_batches": 2, "limit_val_batches": 0} | arguments
    arguments["callbacks"] = [callback, *arguments.get("callbacks", [])]
    trainer = quiet_trainer(folder, **arguments)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=16))
    return callback.seen, module


def test_linear_decay_is_as_long_as_the_training(tmp_path: Path) -> None:
    by_epoch, _ = rates(LinearDecayLR, tmp_path, max_epochs=4)
    assert by_epoch == pytest.approx([1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25])
    by_step, _ = rates(LinearDecayLR, tmp_path, "step", max_epochs=2)
    assert by_step == pytest.approx([1, 0.75, 0.5, 0.25])
    by_step, _ = rates(LinearDecayLR, tmp_path, "step", max_epochs=-1, max_steps=2)
    assert by_step == pytest.approx([1, 0.5])
    by_epoch, _ = rates(LinearDecayLR, tmp_path, max_epochs=-1, max_steps=4)
    assert by_epoch == pytest.approx([1, 1, 0.5, 0.5])
    given, _ = rates(partial(LinearDecayLR, length=1), tmp_path, max_epochs=2)
    assert given == pytest.approx([1, 1, 0, 0])


@pytest.mark.parametrize("warmup", [0, 3])
def test_warmup_and_cosine_are_those_of_torch(warmup: int, tmp_path: Path) -> None:
    ours, _ = rates(partial(WarmupCosineLR, warmup=warmup), tmp_path, "step", max_epochs=5)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    parts = [
        LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=max(warmup, 1)),
        CosineAnnealingLR(optimizer, T_max=10 - warmup),
    ]
    theirs = SequentialLR(optimizer, parts, milestones=[warmup]) if warmup else parts[1]
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert ours == pytest.approx(expected)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    given, _ = rates(partial(WarmupCosineLR, warmup=1, length=2), tmp_path, max_epochs=2)
    assert given == pytest.approx([0.5, 0.5, 1, 1])


def test_linear_decay_needs_an_end(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"length is not known: set its length"):
        rates(LinearDecayLR, tmp_path, max_epochs=-1)
    scheduling = GradientAccumulationScheduler({1: 2})
    with pytest.raises(ValueError, match=r"length is not known: set its length"):
        rates(LinearDecayLR, tmp_path, "step", max_epochs=2, callbacks=[scheduling])
    with pytest.raises(ValueError, match="length of LinearDecayLR is 0"):
        rates(partial(LinearDecayLR, length=0), tmp_path)


class Endless(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return repeat((torch.zeros(1, 32, 32), torch.tensor(0)))


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_data_without_a_length(interval: str, tmp_path: Path) -> None:
    """A rate must not rise because nobody knows when training ends."""
    arguments = {"max_steps": 3, "max_epochs": -1} if interval == "epoch" else {"max_epochs": 2}
    module = LitResNet(Linear(), lr_scheduler=LinearDecayLR, lr_interval=interval)
    trainer = quiet_trainer(tmp_path, limit_val_batches=0, **arguments)
    with pytest.raises(ValueError, match=r"length is not known: set its length"):
        trainer.fit(module, DataLoader(Endless(), batch_size=4))


def test_linear_decay_goes_on_with_its_length_alone() -> None:
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    state = LinearDecayLR(optimizer, 4).state_dict()
    LinearDecayLR(optimizer, 4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"was 4 in this run, and is 8 now: pass"):
        LinearDecayLR(optimizer, 8).load_state_dict(state)


@pytest.mark.parametrize(
    ("scheduler", "numbers"),
    [
        (partial(CosineAnnealingLR, T_max=20), "until epoch 20, and the training ends after 3"),
        (partial(CosineAnnealingLR, T_max=2), "until epoch 2, and the training ends after 3"),
        (partial(MultiStepLR, milestones=[1, 3]), "until epoch 3, and the training ends after 3"),
        (partial(WarmupMultiStepLR, milestones=[8], warmup=1), "until epoch 8, and the"),
        (partial(WarmupCosineLR, length=5), "until epoch 5, and the training ends after 3"),
        (partial(LinearLR, total_iters=5), "until epoch 5, and the training ends after 3"),
    ],
)
def test_schedule_of_another_length_is_told(scheduler: Any, numbers: str, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=numbers):
        rates(scheduler, tmp_path, max_epochs=3)


@pytest.mark.filterwarnings("error:.*changes the rate until")
@pytest.mark.parametrize(
    "scheduler",
    [
        LinearDecayLR,
        partial(WarmupCosineLR, warmup=2),
        partial(CosineAnnealingLR, T_max=3),
        partial(MultiStepLR, milestones=[1, 2]),
        partial(LinearLR, total_iters=2),
        partial(ExponentialLR, gamma=0.9),
    ],
)
def test_schedule_that_fits_is_not_warned_of(scheduler: Any, tmp_path: Path) -> None:
    rates(scheduler, tmp_path, max_epochs=3)


def not_a_schedule(optimizer: Optimizer) -> Sequence[Optimizer]:
    return [optimizer]


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (partial(ExponentialLR, gamma=-1.0), "gamma of ExponentialLR is -1.0: give a number above"),
        (partial(ExponentialLR, gamma=math.nan), "gamma of ExponentialLR is nan"),
        (partial(MultiStepLR, milestones=[-1, 2]), r"milestones of MultiStepLR are \[-1, 2\]"),
        (partial(WarmupMultiStepLR, milestones=[-3], warmup=1), "milestones of WarmupMultiStepLR"),
        (partial(StepLR, step_size=0), "step_size of StepLR is 0: give 1 or more"),
        (partial(CosineAnnealingLR, T_max=-3), "T_max of CosineAnnealingLR is -3: give 1"),
        (partial(CosineAnnealingLR, T_max=1, eta_min=-0.1), "eta_min of CosineAnnealingLR is -0.1"),
        (partial(WarmupMultiStepLR, milestones=[1], warmup=-1), "warmup of WarmupMultiStepLR is"),
        (partial(WarmupCosineLR, warmup=-1), "warmup of WarmupCosineLR is -1: give a whole"),
        (partial(WarmupCosineLR, warmup=2), "warmup of WarmupCosineLR is 2, and its length 2 epo"),
        (partial(WarmupCosineLR, length=0), "length of WarmupCosineLR is 0: give a whole number"),
        (partial(WarmupCosineLR, length=math.nan), "length of WarmupCosineLR is nan: give a whole"),
        (partial(WarmupCosineLR, warmup=2.5), "warmup of WarmupCosineLR is 2.5: give a whole num"),
        (partial(LinearDecayLR, length=math.nan), "length of LinearDecayLR is nan: give a whole"),
        (
            partial(CyclicLR, base_lr=-0.1, max_lr=0.1, cycle_momentum=False),
            "CyclicLR has a rate below 0",
        ),
        (
            partial(OneCycleLR, max_lr=0.1, total_steps=1, cycle_momentum=False),
            "OneCycleLR is made for 1 epochs and the training has 2: set total_steps to that",
        ),
        (not_a_schedule, "lr_scheduler is a list: give a class of torch.optim.lr_scheduler"),
    ],
)
def test_schedule_that_is_none_is_refused(scheduler: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        rates(scheduler, tmp_path, max_epochs=2)

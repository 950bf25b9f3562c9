"""What a step costs beside its network: operations, and calls that do nothing."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import methods
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import yaml
from kernel_count import KernelCount
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.profilers import SimpleProfiler
from quiet import quiet_trainer
from test_optimization import Linear
from torch import Tensor, nn
from torch.optim import SGD

from datamodules import DigitsDataModule
from lightning_modules import LitResNet
from lightning_modules.epoch_sums import EpochSums
from lightning_modules.metrics import answers_right
from running import ExperimentCLI, NoProfiler, RunCheckpoint


class Plain(LightningModule):
    """What Lightning itself asks for, and no metric."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Linear()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


class CountOneStep(Callback):
    """Counts from the start of the third batch to that of the fourth."""

    def __init__(self) -> None:
        self.operations = KernelCount()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            self.operations.__enter__()
        elif batch_idx == 3:
            self.operations.__exit__(None, None, None)


def operations(module: LightningModule, folder: Path, *callbacks: Callback) -> Counter:
    count = CountOneStep()
    trainer = quiet_trainer(
        folder,
        limit_train_batches=5,
        limit_val_batches=0,
        enable_checkpointing=bool(callbacks),
        callbacks=[count, *callbacks],
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=32))
    return count.operations.names


def test_metrics_of_a_step_are_two_operations(tmp_path: Path) -> None:
    """Of the accuracy; sums, and the loss as it is, cost none."""
    module = LitResNet(Linear(), lambda parameters: SGD(parameters, lr=0.1))
    more = operations(module, tmp_path, RunCheckpoint()) - operations(Plain(), tmp_path)
    assert more == {"aten::argmax": 1, "aten::eq.Tensor": 1}


def test_sums_are_those_of_a_device_bit_for_bit() -> None:
    """However often the host asks, and of whatever sizes the batches are."""
    chance = random.Random(0)
    torch.manual_seed(0)
    sizes = [chance.randint(1, 200) for _ in range(400)]
    losses = torch.rand(len(sizes)) * 3
    is_right = [torch.rand(size) < 0.3 for size in sizes]
    total = torch.tensor(0.0)
    for loss, size in zip(losses, sizes, strict=True):
        total += loss * size
    for checks in ([400], [1] * 400, [150, 7, 243]):
        sums, begin = EpochSums(), 0
        for count in checks:
            part = slice(begin, begin + count)
            sums.add(losses[part], is_right[part])
            sums, before = EpochSums(), sums
            sums.from_checkpoint(before.to_checkpoint())
            begin += count
        assert torch.equal(sums.loss, total)
        assert sums.num_right == sum(int(each.sum()) for each in is_right)
        assert sums.num_images == sum(sizes)
        means = sums.means(torch.device("cpu"))
        assert means["train/loss_epoch"] == (total / torch.tensor(float(sum(sizes)))).item()
    assert float(sum(losses.double() * torch.tensor(sizes))) != total.item()  # nothing is trivial


def test_epoch_of_no_images_has_no_mean() -> None:
    assert all(mean != mean for mean in EpochSums().means(torch.device("cpu")).values())


def test_answers_are_right_where_the_label_has_the_first_largest_logit() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [3.0, 3.0, 1.0], [0.0, 1.0, 2.0]])
    assert answers_right(logits, torch.tensor([1, 1, 2])).tolist() == [True, False, True]


def test_lightning_names_hooks_without_a_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = LitResNet(Linear())
    searched = Counter()

    def searching(self: LightningModule, name: str, value: Any) -> None:
        searched[name] += 1
        nn.Module.__setattr__(self, name, value)

    monkeypatch.setattr(pl.LightningModule, "__setattr__", searching)
    operations(module, tmp_path)
    assert searched  # of the fit, not of its steps, which are five
    assert max(searched.values()) < 5, searched
    module.other = nn.Linear(1, 1)
    assert "other.weight" in module.state_dict()


class Built(ExperimentCLI):
    """Runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def trainer_of(folder: Path, subcommand: str = "fit", **settings: Any) -> Trainer:
    config = methods.config("resnet")
    config["trainer"] |= {"enable_progress_bar": True, **settings}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    return Built([subcommand, "-c", str(path), "--run_dir", str(folder / "run")]).trainer


def test_trainer_of_a_run_takes_its_time_for_nothing_else(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    assert isinstance(trainer.profiler, NoProfiler)
    assert trainer.profiler.profile("this") is trainer.profiler.profile("that")
    (bar,) = (each for each in trainer.callbacks if isinstance(each, RichProgressBar))
    assert bar.refresh_rate < RichProgressBar().refresh_rate
    names = {type(each).__name__ for each in trainer.callbacks}
    assert "OperatingPoints" in names
    assert "PredictionWriter" not in names


def test_profiler_of_the_user_is_kept(tmp_path: Path) -> None:
    assert isinstance(trainer_of(tmp_path, profiler="simple").profiler, SimpleProfiler)


def test_prediction_has_who_writes_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "predict")
    assert "PredictionWriter" in {type(each).__name__ for each in trainer.callbacks}

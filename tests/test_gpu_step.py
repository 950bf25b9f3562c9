"""On a GPU, no training step waits for the device between two that are logged: torch holds it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import methods
import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor, RichProgressBar
from quiet import quiet_trainer
from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR

from lightning_modules import LitResNet, LossNotFinite
from running import CSVHistory, RunCheckpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
FIRST, LAST = 3, 7
"""Batches at whose start it gets forbidden, and allowed, to wait."""


class MayNotWait(Callback):
    """Lets torch raise an error where the host waits for the device. The first of the callbacks."""

    was_strict = False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == FIRST:
            torch.cuda.set_sync_debug_mode("error")
        elif batch_idx == LAST:
            self.was_strict = torch.cuda.get_sync_debug_mode() == 2
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def may_wait_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


class Batches:
    """Serves one batch, which lies on the device, again and again."""

    def __init__(self) -> None:
        chance = torch.Generator("cuda").manual_seed(0)
        images = torch.randn(16, 1, 32, 32, device="cuda", generator=chance)
        self.batch = images, torch.arange(16, device="cuda") % 10

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * len(self))


def train(
    module: LightningModule, folder: Path, callbacks: list[Callback], **arguments: Any
) -> Path:
    """Trains ten batches, some of them without waiting, and returns the file of what is logged."""
    history, strict = CSVHistory(folder / "metrics.csv"), MayNotWait()
    defaults = {"log_every_n_steps": 10, "limit_val_batches": 0, "enable_progress_bar": True}
    trainer = quiet_trainer(
        folder,
        accelerator="gpu",
        logger=history,
        enable_checkpointing=True,
        callbacks=[strict, *callbacks, RichProgressBar(), RunCheckpoint()],
        **(defaults | arguments),
    )
    trainer.fit(module, Batches())
    assert strict.was_strict
    return history.path


@pytest.mark.parametrize("method", methods.TRAINED)
def test_step_does_not_wait(method: str, tmp_path: Path) -> None:
    module = methods.build(methods.METHODS[method])
    module.lr_scheduler, module.lr_interval = partial(MultiStepLR, milestones=[4]), "step"
    names = methods.config(method)["trainer"]["callbacks"]
    # Its images are a data module's, which these batches are not.
    names = [each for each in names if not each["class_path"].endswith("BNRecalibration")]
    callbacks = [*map(methods.build, names), LearningRateMonitor()]
    rows = CSVHistory(train(module, tmp_path, callbacks)).read()
    assert [row["step"] for row in rows if "train/loss" in row] == ["9"]
    assert (tmp_path / "last.ckpt").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 2, "log_every_n_steps": 5},
        {"gradient_clip_val": 1.0},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_step_under_other_settings_does_not_wait(arguments: dict[str, Any], tmp_path: Path) -> None:
    train(methods.build(methods.METHODS["resnet"]), tmp_path, [], **arguments)


class Waiting(LitResNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        loss.item()
        return loss


def test_wait_would_be_seen(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        train(Waiting(methods.build(methods.SMALL_NET)), tmp_path, [])


class Ruined(LitResNet):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step(
            (images * (1 if batch_idx < 4 else torch.nan), labels), batch_idx
        )


def test_bad_loss_is_named_by_the_step_where_it_began(tmp_path: Path) -> None:
    with pytest.raises(LossNotFinite, match=r"the loss is nan at step 4 \(epoch 0\)"):
        train(Ruined(methods.build(methods.SMALL_NET)), tmp_path, [])
    assert not (tmp_path / "last.ckpt").exists()

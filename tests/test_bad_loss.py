"""A loss that is not finite: it may reach weights, never a checkpoint, and it is named."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from quiet import quiet_trainer
from test_optimization import Linear
from torch import Tensor
from torch.optim import SGD

from datamodules import DigitsDataModule
from lightning_modules import LitResNet, LossNotFinite
from lightning_modules.losses import LossWatch
from running import CSVHistory, RunCheckpoint


class Ruin(Callback):
    """Ruins the weights by an optimizer step, as a rate that is too high does."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            pl_module.net.fc.weight.data.fill_(torch.inf)


def train(folder: Path, callbacks: list[Callback], **arguments: Any) -> Trainer:
    """Trains for ten steps."""
    defaults = {"limit_train_batches": 10, "limit_val_batches": 0, "log_every_n_steps": 1000}
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer = quiet_trainer(
        folder,
        enable_checkpointing=True,
        logger=CSVHistory(folder / "metrics.csv"),
        callbacks=callbacks,
        **(defaults | arguments),
    )
    module = LitResNet(Linear(), optimizer=partial(SGD, lr=0.01))
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=16), ckpt_path=ckpt_path)
    return trainer


def saved(folder: Path) -> dict[str, int]:
    """Returns the step of every checkpoint, all of whose weights have to be finite."""
    steps = {}
    for path in folder.glob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in checkpoint["state_dict"].values()), path
        steps[path.stem] = checkpoint["global_step"]
    return steps


@pytest.mark.parametrize("log_every_n_steps", [1, 1000])
@pytest.mark.parametrize(
    ("step", "left"),
    [
        (2, {}),
        (3, {}),  # what was saved after it is no good, and nothing was before
        (4, {"last": 3}),  # noticed when step 6 is to be saved
        (6, {"last": 3}),  # saved, and found out when step 9 is to be saved
        (7, {"last": 6, "previous": 3}),
        (9, {"last": 6}),  # found out at the end of the epoch
    ],
)
def test_bad_loss_reaches_no_checkpoint(
    step: int, left: dict[str, int], log_every_n_steps: int, tmp_path: Path
) -> None:
    """Saved after steps 3, 6, 9 and 10."""
    callbacks = [Ruin(step), RunCheckpoint(every_n_steps=3)]
    with pytest.raises(
        LossNotFinite, match=rf"^the loss is (nan|inf) at step {step} \(epoch 0\): "
    ):
        train(tmp_path, callbacks, log_every_n_steps=log_every_n_steps)
    assert saved(tmp_path) == left
    history = CSVHistory(tmp_path / "metrics.csv").read()
    logged = [int(row["step"]) for row in history if "train/loss" in row]
    assert logged == (list(range(step)) if log_every_n_steps == 1 else [])
    if left:
        more = {"ckpt_path": tmp_path / "last.ckpt"}
        assert train(tmp_path, [RunCheckpoint()], **more).global_step == 10


def test_validation_of_ruined_weights_is_not_taken_for_the_cause(tmp_path: Path) -> None:
    arguments = {"limit_val_batches": 1.0, "val_check_interval": 5}
    with pytest.raises(LossNotFinite, match=r"at step 4 \(epoch 0\)"):
        train(tmp_path, [Ruin(4), RunCheckpoint()], **arguments)
    assert saved(tmp_path) == {}
    # No loss of a training batch has seen these weights.
    with pytest.raises(LossNotFinite, match=r"at step 5 \(epoch 0\)"):
        train(tmp_path, [Ruin(5), RunCheckpoint()], **arguments)
    assert saved(tmp_path) == {}


def test_checkpoints_of_others_are_refused_as_well(tmp_path: Path) -> None:
    own = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    with pytest.raises(LossNotFinite, match="at step 3"):
        train(tmp_path, [Ruin(3), own])
    assert saved(tmp_path) == {"step=2": 2}


def test_a_new_training_forgets_the_bad_loss(tmp_path: Path) -> None:
    module = LitResNet(Linear())
    module.losses.add(torch.tensor(torch.nan), torch.tensor([False]), 3, 0)
    module.losses.sums.num_images = 10**6
    history = CSVHistory(tmp_path / "metrics.csv")
    trainer = quiet_trainer(tmp_path, limit_train_batches=2, limit_val_batches=0, logger=history)
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=16))
    (loss,) = (row["train/loss_epoch"] for row in history.read() if row.get("train/loss_epoch"))
    assert float(loss) > 1  # of 32 images, not of a million


def test_ranks_agree_about_the_first_bad_loss_and_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks, each with three losses since the last check."""
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device="cpu"))

    def check(mine: list[float], others: list[int], flag: int) -> int:
        """Checks the losses of this rank, beside another that sends two numbers."""

        def all_reduce(numbers: Tensor, operation: object) -> None:
            assert operation == torch.distributed.ReduceOp.MAX
            numbers.copy_(numbers.maximum(torch.tensor(others)))

        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        watch = LossWatch()
        for step, loss in enumerate(mine, start=7):
            watch.add(torch.tensor(loss), torch.tensor([True]), step, 1)
        return watch.check(trainer, flag)

    with pytest.raises(LossNotFinite, match=r"the loss is inf at step 8 \(epoch 1\)"):
        check([1.0, torch.inf, torch.nan], [0, -3], 0)
    with pytest.raises(LossNotFinite, match=r"the loss is not finite at step 8 \(epoch 1\)"):
        check([1.0, 2.0, torch.nan], [0, -1], 0)
    assert check([1.0, 2.0, 3.0], [5, -3], 0) == 5
    assert check([1.0, 2.0, 3.0], [0, -3], 5) == 5

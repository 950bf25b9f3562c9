"""Checkpoints of a run: written so that a kill at any moment leaves a valid one to go on from."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint

from callbacks.csv_history import CSVHistory

LAST = "last.ckpt"
BEST = "best.ckpt"


class RunCheckpoint(Checkpoint):
    """Keeps `last.ckpt` and `best.ckpt` in the trainer's `default_root_dir`.

    `last.ckpt` is saved after every validation, every epoch, and every `every_n_steps` optimizer
    steps; `best.ckpt` when the monitored metric improves. With both goes the number of rows of the
    CSV history.

    Args:
        select: which of the two the test set is evaluated with, by the paper's rule.
        monitor: metric that decides which is best.
        mode: whether the best is the "min" or the "max".
        every_n_steps: optimizer steps between two saves within an epoch.

    Raises:
        ValueError: `every_n_steps` is below 1, or the monitored metric is never logged.
    """

    def __init__(
        self,
        select: Literal["best", "last"] = "last",
        monitor: str = "val/acc",
        mode: Literal["min", "max"] = "max",
        every_n_steps: int = 200,
    ):
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}: use 1 or more")
        self.select = select
        self.monitor = monitor
        self.mode = mode
        self.every_n_steps = every_n_steps
        self.best_score: float | None = None
        self.saved_step = 0

    def path(self, trainer: Trainer, name: str) -> Path:
        return Path(trainer.default_root_dir, name)

    def selected(self, trainer: Trainer) -> Path:
        """Returns the checkpoint that the test set is evaluated with."""
        path = self.path(trainer, BEST if self.select == "best" else LAST)
        if not path.exists():
            raise FileNotFoundError(
                f"no {path}: train first (fit), name one with --ckpt_path, or set "
                "checkpoint.select to last if nothing is validated"
            )
        return path

    def save(self, trainer: Trainer, name: str) -> None:
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(self.path(trainer, name), weights_only=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        due = trainer.global_step % self.every_n_steps == 0
        if due and trainer.global_step != self.saved_step and not _hands_over(trainer, batch_idx):
            self.save(trainer, LAST)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            if self.improved(trainer):
                self.save(trainer, BEST)
            self.save(trainer, LAST)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self.save(trainer, LAST)

    def improved(self, trainer: Trainer) -> bool:
        if self.select == "last":
            return False
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(
                f"checkpoint.monitor {self.monitor!r} is not logged; there are: {known}"
            )
        score = trainer.callback_metrics[self.monitor].item()
        best = self.best_score
        if best is None or (score > best if self.mode == "max" else score < best):
            self.best_score = score
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVHistory):
                checkpoint["num_history_rows"] = logger.num_rows

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            return  # a test of the best checkpoint forgets nothing of what came after it
        self.saved_step = checkpoint["global_step"]
        for logger in trainer.loggers:
            if isinstance(logger, CSVHistory):
                logger.truncate(checkpoint.get("num_history_rows", 0))


def _hands_over(trainer: Trainer, batch_idx: int) -> bool:
    """Tells whether validation or the end of the epoch follows this batch.

    Their checkpoints come soon. One in between is no place to go on from: Lightning would take the
    validation for done.
    """
    period = trainer.val_check_batch
    by_epoch = trainer.check_val_every_n_epoch is not None
    batches = batch_idx + 1 if by_epoch else trainer.fit_loop.total_batch_idx + 1
    return trainer.is_last_batch or (period is not None and batches % period == 0)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file and then renames, so that a checkpoint is either the old one or the
    new one.

    Loads tensors and plain data only: a checkpoint that holds other pickles is refused, not
    executed.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Path, storage_options: Any | None = None
    ) -> None:
        part = Path(f"{path}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def load_checkpoint(
        self,
        path: Path,
        map_location: Callable | None = lambda storage, location: storage,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no checkpoint {path}: correct --ckpt_path")
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{path} is not a checkpoint of tensors and plain data: use another, or delete it"
            ) from error

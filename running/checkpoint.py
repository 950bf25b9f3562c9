"""When a run saves: such that a kill at any moment leaves a checkpoint to go on from."""

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, Timer, WeightAveraging
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

import preemption
from lightning_modules import LossNotFinite, accuracy_name
from networks import check_choice
from running.checkpoint_checks import check_parts, check_structure, check_validated
from running.history import CSVHistory
from running.wandb_logger import FaultTolerantWandbLogger

LAST = "last.ckpt"
BEST = "best.ckpt"
PREVIOUS = "previous.ckpt"
Select = Literal["best", "last"]
Mode = Literal["auto", "min", "max"]
FORMAT = 3
"""Version of what a checkpoint holds beside Lightning's part; another version does not go on."""
TIME_IS_OVER = 1
"""A reason to leave, beside the numbers of the warnings."""
STEPS_BETWEEN_ASKING = 10
"""Within an epoch, before several processes agree whether to leave: a collective, and a wait."""


class RunCheckpoint(Checkpoint):
    """Keeps `last.ckpt` and `best.ckpt` in the trainer's `default_root_dir`.

    `last.ckpt` is saved after every validation, every epoch, and every `every_n_steps` optimizer
    steps; `best.ckpt` when the monitored metric improves. `previous.ckpt` is the one before the
    last: if the loss right after a save is not finite, it takes the place of `last.ckpt`. Losses
    are checked before every save. Beside what Lightning saves, each holds what the rest of the
    training depends on: the metrics that callbacks read, whether one of them has asked to stop, and
    the number of rows of the CSV history.

    A scheduler's warning (see `preemption`) on any rank makes all ranks save after the optimizer
    step they are in, or the validation that follows it, and leave with `preemption.Preempted`. When
    the timer says that time is over they do the same, and leave with `preemption.TimeIsOver`.
    Several processes ask each other every few steps, and go on until then.

    Args:
        select: which of the two the test set is evaluated with, by the paper's rule.
        monitor: metric that decides which is best.
        mode: whether the best is the "min" or the "max"; "auto": the least loss, the highest
            accuracy.
        every_n_steps: optimizer steps between two saves within an epoch.

    Attributes:
        timer: tells when time is over. It is asked here, and is no callback of the trainer: that
            would end the epoch early, and a run that goes on would begin with the next one.
        on_begin: called on all ranks when nothing can be refused any more.

    Raises:
        ValueError: `every_n_steps` is below 1, the monitored metric is never logged, or "auto" does
            not know it.
    """

    def __init__(
        self,
        select: Select = "last",
        monitor: str = accuracy_name("val"),
        mode: Mode = "auto",
        every_n_steps: int = 200,
    ):
        check_choice("checkpoint.select", select, Select)
        check_choice("checkpoint.mode", mode, Mode)
        if every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps is {every_n_steps}: use 1 or more")
        self.select = select
        self.monitor = monitor
        self.mode = best_mode(monitor) if mode == "auto" else mode
        self.every_n_steps = every_n_steps
        self.best_score: float | None = None
        self.saved_step = 0
        self.is_step_whole = True
        self.restored: dict[str, Any] | None = None
        self.loaded: dict[str, Any] | None = None
        self.timer = Timer()
        self.on_begin: Callable[[], None] = lambda: None
        self.has_begun = False

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
        trainer.lightning_module.losses.check(trainer)
        # What a checkpoint knows of is not logged again by a run that goes on from it.
        for logger in trainer.loggers:
            if isinstance(logger, FaultTolerantWandbLogger):
                logger.flush()
        if name == LAST:
            self.saved_step = trainer.global_step
            self.keep_previous(trainer)
        trainer.save_checkpoint(self.path(trainer, name), weights_only=False)

    def keep_previous(self, trainer: Trainer) -> None:
        last = self.path(trainer, LAST)
        if trainer.is_global_zero and last.exists():
            previous = self.path(trainer, PREVIOUS)
            previous.unlink(missing_ok=True)
            try:
                os.link(last, previous)
            except OSError:  # a file system without hard links
                part = self.path(trainer, f"{PREVIOUS}.part")
                shutil.copyfile(last, part)
                os.replace(part, previous)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.state.fn != "fit" or not isinstance(exception, FloatingPointError):
            return
        # The first loss that is not finite came right after this save: the step before it ruined
        # the weights, and what was saved is no good. Training may have gone on meanwhile.
        step = exception.step if isinstance(exception, LossNotFinite) else trainer.global_step
        if step == self.saved_step and trainer.is_global_zero:
            if self.path(trainer, PREVIOUS).exists():
                os.replace(self.path(trainer, PREVIOUS), self.path(trainer, LAST))
            else:
                self.path(trainer, LAST).unlink(missing_ok=True)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            # Whether rank 0 has got SIGTERM, told to all in every step. `preemption` knows.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is not None:
            # Lightning hands over no checkpoint that is without callbacks.
            check_parts(self.loaded or {}, str(trainer.ckpt_path))
            check_structure(self.loaded, trainer, pl_module, str(trainer.ckpt_path))
            self.loaded = None
        if self.select == "best" and not pl_module.validates:
            raise ValueError(
                "checkpoint.select is best, but nothing is validated: hold out a validation split "
                "(val_size), or set checkpoint.select to last"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.is_step_whole = pl_module.ends_step(batch_idx)
        if not self.is_step_whole or _hands_over(trainer, batch_idx):
            return
        step = trainer.global_step
        due = step % self.every_n_steps == 0
        asks = due or trainer.world_size == 1 or step % STEPS_BETWEEN_ASKING == 0
        reason = self.reason_to_leave(trainer) if asks else 0
        if (due or reason) and step != self.saved_step:
            self.save(trainer, LAST)
        leave_for(reason, trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            check_averaged(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            # A metric that is not reduced differs between the ranks.
            if trainer.strategy.broadcast(self.improved(trainer)):
                self.save(trainer, BEST)
            # After a part of a step there are gradients, which no checkpoint holds. Where training
            # stops, the end of the epoch saves: a run that went on from here would skip it.
            if self.is_step_whole and not trainer.should_stop:
                self.save(trainer, LAST)
                leave_for(self.reason_to_leave(trainer), trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self.save(trainer, LAST)
            leave_for(self.reason_to_leave(trainer), trainer)

    def reason_to_leave(self, trainer: Trainer) -> int:
        """Returns a warning that any rank has got, `TIME_IS_OVER`, or 0; the same on all ranks."""
        seconds = self.timer.time_remaining()
        is_over = seconds is not None and seconds <= 0
        reason = preemption.received() or is_over * TIME_IS_OVER
        if trainer.world_size == 1:
            return reason  # no need to wait for the losses
        return trainer.lightning_module.losses.check(trainer, reason)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.restored is not None:
            # Lightning begins every fit without metrics, and what a callback sets at the start of
            # an epoch is not set again in the middle of it.
            metrics = self.restored["callback_metrics"]
            trainer._logger_connector._callback_metrics.update(metrics)
            trainer.accumulate_grad_batches = self.restored["accumulate_grad_batches"]
            if not self.path(trainer, BEST).exists():
                self.best_score = None  # that of another folder, from where this run goes on
            if not hasattr(trainer.train_dataloader, "load_state_dict"):
                rank_zero_warn(
                    "goes on with a training loader that is not ours and does not know its order: "
                    "the result will not be that of an uninterrupted run"
                )
        step = trainer.global_step
        if max_over_ranks(step, trainer) != -max_over_ranks(-step, trainer):
            raise ValueError(
                f"not all processes of this run see {self.path(trainer, LAST)}: pass a --run_dir "
                "that all nodes share"
            )
        if self.select == "best" and not self.path(trainer, BEST).exists():
            check_validated(trainer)
        self.begin(trainer)
        self.timer.on_train_start(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.has_begun:  # as there was nothing left to train
            self.begin(trainer)
        check_averaged(trainer)

    def begin(self, trainer: Trainer) -> None:
        """Forgets what was logged after the checkpoint: it will be logged again."""
        self.has_begun = True
        for logger in trainer.loggers:
            if isinstance(logger, CSVHistory) and self.restored is not None:
                logger.truncate(self.restored["num_history_rows"])
        self.on_begin()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        leave_for(max_over_ranks(preemption.received(), trainer), trainer)

    def improved(self, trainer: Trainer) -> bool:
        if self.monitor not in trainer.callback_metrics:
            if self.select == "last":
                return False
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(
                f"checkpoint.monitor {self.monitor!r} is not logged; there are: {known}"
            )
        score = trainer.callback_metrics[self.monitor].item()
        best = self.best_score
        if (
            best is None
            or math.isnan(best)
            or (score > best if self.mode == "max" else score < best)
        ):
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
        histories = [each for each in trainer.loggers if isinstance(each, CSVHistory)]
        metrics = trainer.callback_metrics.items()
        image_format = getattr(trainer.datamodule, "image_format", None)
        if image_format is not None:  # so that the network can answer without its data set
            checkpoint["images"] = image_format.to_checkpoint()
        checkpoint["run"] = {
            "format": FORMAT,
            "images_per_step": images_per_step(trainer.datamodule, trainer),
            "num_history_rows": histories[0].num_rows if histories else 0,
            "callback_metrics": {name: value.detach().cpu().clone() for name, value in metrics},
            "should_stop": trainer.should_stop,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "optimizers": [type(each).__name__ for each in trainer.optimizers],
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit":
            # What a checkpoint calls its weights is evaluated. After a fit, Lightning's
            # WeightAveraging puts those of the latest step in their place.
            pl_module.load_state_dict(checkpoint["state_dict"])
            return
        run = checkpoint.get("run", {})
        if run.get("format") != FORMAT:
            raise ValueError(
                "the checkpoint was written by another version of this project, which may continue "
                "differently: use that version (attempts.yaml names its commit), or pass another "
                "--run_dir"
            )
        check_images_per_step(run.get("images_per_step"), trainer.datamodule, trainer)
        self.restored, self.loaded = run, checkpoint
        trainer.should_stop = run.get("should_stop", False)
        self.saved_step = checkpoint["global_step"]


def check_averaged(trainer: Trainer) -> None:
    """Raises ValueError if the weights that a callback averages are those before training."""
    for callback in trainer.callbacks:
        average = callback._average_model if isinstance(callback, WeightAveraging) else None
        if average is not None and average.n_averaged == 0:
            raise ValueError(
                f"{type(callback).__name__} has averaged nothing yet, and what is validated and "
                "kept would be the weights before training: let it begin before the first "
                "validation (update_starting_at_step)"
            )


def images_per_step(data: LightningDataModule | None, trainer: Trainer) -> int | None:
    """Returns the size of a training batch over all processes; None for data that has none."""
    batch_size = getattr(data, "batch_size", None)
    return batch_size and batch_size * trainer.world_size


def check_images_per_step(
    there: int | None, data: LightningDataModule | None, trainer: Trainer
) -> None:
    """Raises ValueError if a run goes on with another number of images in a step.

    Args:
        there: the number before.
        data: what the run goes on with.
        trainer: of the run that goes on.
    """
    here = images_per_step(data, trainer)
    if there is None or there == here:
        return
    fitting, odd = divmod(there, trainer.world_size)
    raise ValueError(
        f"the run was trained with {there} images per step (batch_size times processes), and this "
        f"command has {here}: "
        + ("use another number of processes" if odd else f"set batch_size to {fitting}")
        + ", or pass another --run_dir"
    )


def guess_mode(monitor: str) -> Literal["min", "max"] | None:
    """Returns "min" for a loss, "max" for an accuracy, None for another metric."""
    if re.search(r"(^|[/_])loss", monitor):
        return "min"
    return "max" if re.search(r"(^|[/_])acc", monitor) else None


def best_mode(monitor: str) -> Literal["min", "max"]:
    """Returns what the best of a metric is.

    Raises:
        ValueError: it is neither a loss nor an accuracy.
    """
    mode = guess_mode(monitor)
    if mode is None:
        raise ValueError(
            f"checkpoint.monitor {monitor!r} is no loss and no accuracy: set checkpoint.mode to "
            "min or max"
        )
    return mode


def max_over_ranks(number: int, trainer: Trainer) -> int:
    """Returns the largest number that any rank has passed; all of them have to call it."""
    if trainer.world_size == 1:
        return number
    tensor = torch.tensor(number, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(tensor, reduce_op="max"))


def leave_for(reason: int, trainer: Trainer) -> None:
    """Raises TimeIsOver or Preempted for a reason on which all ranks have agreed; 0 is none."""
    if reason == TIME_IS_OVER:
        raise preemption.TimeIsOver(preemption.GOES_ON)
    if reason:
        # Otherwise Lightning would kill this process as soon as one that it has started is gone.
        getattr(trainer.strategy.launcher, "procs", []).clear()
        raise preemption.Preempted(reason)


def _hands_over(trainer: Trainer, batch_idx: int) -> bool:
    """Tells whether validation, or the end of the epoch or of the run, follows this batch.

    Their checkpoints come soon. A run cannot go on from one in between: Lightning would skip what
    follows.
    """
    period = trainer.val_check_batch
    by_epoch = trainer.check_val_every_n_epoch is not None
    batches = batch_idx + 1 if by_epoch else trainer.fit_loop.total_batch_idx + 1
    ends = trainer.is_last_batch or trainer.global_step == trainer.max_steps
    ends |= trainer.should_stop and trainer.fit_loop._can_stop_early  # it validates, then ends
    every = trainer.check_val_every_n_epoch or 1
    validates = any(trainer.num_val_batches) and (trainer.current_epoch + 1) % every == 0
    return ends or (validates and batches % period == 0)

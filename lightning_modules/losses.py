"""Losses that are not finite: noticed when somebody asks, so that no step waits for its device."""

import math
from typing import NamedTuple

import torch
from pytorch_lightning import Trainer
from torch import Tensor


class LossNotFinite(FloatingPointError):
    """The loss of a training, or of a validation in it, is not finite.

    Attributes:
        step: how many optimizer steps had made the weights of that loss.
    """

    def __init__(self, message: str, step: int = 0):
        super().__init__(message)
        self.step = step


class Seen(NamedTuple):
    """The loss of one batch, on its device, and where in the training it was."""

    loss: Tensor
    step: int
    epoch: int


class LossWatch:
    """Keeps the latest losses of a training on their device, until they are checked.

    To read a loss is to wait for the device. So they are read together: when metrics are logged,
    before a validation, at the end of an epoch, and before every save. A bad loss may reach the
    weights meanwhile, never a checkpoint.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []

    def add(self, loss: Tensor, step: int, epoch: int) -> None:
        """Keeps a loss, a tensor () that nobody changes any more, for the next check."""
        self.seen.append(Seen(loss, step, epoch))

    def check(self, trainer: Trainer, flag: int = 0) -> int:
        """Forgets the losses if all of them are finite; all ranks have to call it.

        Returns:
            The largest flag that any rank has passed.

        Raises:
            LossNotFinite: on all ranks, if a loss of any of them is not finite.
        """
        values = torch.stack([each.loss for each in self.seen]).tolist() if self.seen else []
        first = next((i for i, v in enumerate(values) if not math.isfinite(v)), len(values))
        if trainer.world_size > 1:
            # The ranks have seen the same batches of the same steps. Lightning's reduce would add a
            # barrier.
            both = torch.tensor([flag, -first], device=trainer.strategy.root_device)
            torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
            flag, minus_first = both.tolist()
            first = -minus_first
        if first < len(values):
            value = values[first] if not math.isfinite(values[first]) else "not finite"
            raise stopped(value, self.seen[first].step, self.seen[first].epoch)
        self.seen.clear()
        return flag


def stopped(loss: float | str, step: int, epoch: int) -> LossNotFinite:
    """Returns the error that ends a training."""
    return LossNotFinite(
        f"the loss is {loss} at step {step} (epoch {epoch}): stopped, and no checkpoint holds it; "
        "lower the learning rate and pass another --run_dir",
        step,
    )

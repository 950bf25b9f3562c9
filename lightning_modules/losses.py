"""What training batches gave, read when somebody asks, so that no step waits for its device."""

import math
from typing import NamedTuple

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from lightning_modules.epoch_sums import EpochSums


class LossNotFinite(FloatingPointError):
    """The loss of a training, or of a validation in it, is not finite.

    Attributes:
        step: how many optimizer steps had made the weights of that loss.
    """

    def __init__(self, message: str, step: int = 0):
        super().__init__(message)
        self.step = step


class Seen(NamedTuple):
    """What one batch gave, on its device, and where in the training it was."""

    loss: Tensor
    is_right: Tensor
    step: int
    epoch: int


class LossWatch:
    """Keeps what the latest batches of a training gave on their device, until it is checked.

    To read a loss is to wait for the device. So they are read together: when metrics are logged,
    before a validation, at the end of an epoch, and before every save. A bad loss may reach the
    weights meanwhile, never a checkpoint.

    Attributes:
        sums: of the epoch so far, up to the latest check.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.sums = EpochSums()

    def add(self, loss: Tensor, is_right: Tensor, step: int, epoch: int) -> None:
        """Keeps what a batch gave for the next check; nobody changes these tensors any more.

        Args:
            loss: the mean over the images, ().
            is_right: whether each answer is right, (N,).
            step: how many optimizer steps have made the weights.
            epoch: from 0.
        """
        self.seen.append(Seen(loss, is_right, step, epoch))

    def forget(self) -> None:
        """Starts another training."""
        self.seen.clear()
        self.sums.reset()

    def check(self, trainer: Trainer, flag: int = 0) -> int:
        """Adds up the losses and forgets them, if all are finite; all ranks have to call it.

        Returns:
            The largest flag that any rank has passed.

        Raises:
            LossNotFinite: on all ranks, if a loss of any of them is not finite.
        """
        seen = [each.loss for each in self.seen]
        losses = torch.stack(seen).cpu() if seen else torch.empty(0)
        values = losses.tolist()
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
        if seen:
            self.sums.add(losses, [each.is_right for each in self.seen])
        self.seen.clear()
        return flag


def stopped(loss: float | str, step: int, epoch: int) -> LossNotFinite:
    """Returns the error that ends a training."""
    return LossNotFinite(
        f"the loss is {loss} at step {step} (epoch {epoch}): stopped, and no checkpoint holds it; "
        "lower the learning rate and pass another --run_dir",
        step,
    )

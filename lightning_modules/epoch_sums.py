"""What the training batches of an epoch sum up to, without a kernel per batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_modules.metrics import MeanOverImages


class EpochSums:
    """Sums over the images that one rank has trained on in an epoch.

    They are kept on the host, as a GPU would launch a kernel for each of them in every step. The
    sum of the losses has the bits that it would have there: float32, batch by batch.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Starts another epoch."""
        self.loss, self.num_right, self.num_images = torch.tensor(0.0), 0, 0

    def add(self, losses: Tensor, is_right: Sequence[Tensor]) -> None:
        """Counts batches, in their order.

        Args:
            losses: the mean of each batch, (num_batches,), on the CPU.
            is_right: of each batch, whether each answer is right, (N,), on any device.
        """
        sizes = [len(each) for each in is_right]
        for loss in losses * torch.tensor(sizes):
            self.loss += loss  # one by one: another order would round differently
        self.num_right += int(torch.cat(list(is_right)).sum())
        self.num_images += sum(sizes)

    def means(self, device: torch.device) -> dict[str, float]:
        """Returns the mean loss and the accuracy over the images of all ranks, NaN of no images.

        Args:
            device: where the ranks meet.
        """
        means = {}
        for name, total in (("train/loss_epoch", self.loss), ("train/acc", self.num_right)):
            metric = MeanOverImages().to(device)
            metric.update(total, self.num_images)
            means[name] = metric.compute().item()
        return means

    def to_checkpoint(self) -> dict[str, Tensor]:
        """Returns the sums by the names that they have in checkpoints."""
        sums = {
            "train_loss.total": self.loss,
            "train_loss.num_images": self.num_images,
            "train_acc.total": self.num_right,
            "train_acc.num_images": self.num_images,
        }
        return {name: torch.tensor(float(value)) for name, value in sums.items()}

    def from_checkpoint(self, sums: Mapping[str, Tensor]) -> None:
        """Goes on from what `to_checkpoint` has returned."""
        self.loss = sums["train_loss.total"].cpu().clone()
        self.num_right = int(sums["train_acc.total"])
        self.num_images = int(sums["train_acc.num_images"])

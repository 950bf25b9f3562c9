"""The images that callbacks measure costs with."""

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor


class FirstTestImages(Callback):
    """Keeps the first images of a test, on rank 0, for what a subclass does at its end.

    Args:
        num_images: how many at most.
    """

    def __init__(self, num_images: int):
        self.num_images = num_images
        self._batches: list[Tensor] = []

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.is_global_zero:
            return
        if batch_idx == 0:
            self._batches = []
        missing = self.num_images - sum(map(len, self._batches))
        if missing > 0:
            # A copy, which does not keep the rest of the batch in memory.
            self._batches.append(batch[0][:missing].clone())

    def take_images(self) -> Tensor:
        """Returns the images, (N, C, H, W), and forgets them."""
        images = torch.cat(self._batches)
        self._batches = []
        return images

"""The images that callbacks measure costs with."""

import math
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor


class SampledTestImages(Callback):
    """Keeps images from all over a test, on rank 0, for what a subclass does at its end.

    Image folders are sorted by class, so their first images are of one class, and leave early, say,
    as those of this class do.

    Args:
        num_images: how many at most.

    Attributes:
        again: whether the run folder has, or awaits, a result that this test is not, so that the
            files have names that end in `_again`; set by who runs the test.
    """

    again = False
    num_tested = 0

    def __init__(self, num_images: int):
        self.num_images = num_images
        self._samples: list[Tensor] = []

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
            self._samples, self.num_tested = [], 0
        images = batch[0]
        self.num_tested += len(images)
        share = max(1, math.ceil(self.num_images / trainer.num_test_batches[0]))
        # A copy, which does not keep the rest of the batch in memory.
        self._samples.append(images[:: max(1, len(images) // share)][:share].clone())

    def path(self, trainer: Trainer, name: str) -> Path:
        """Returns the path of a CSV file in the run folder."""
        return result_file(Path(trainer.default_root_dir), name, self.again)

    def take_images(self) -> Tensor:
        """Returns the images, (N, C, H, W), in random order, and forgets them."""
        images = torch.cat(self._samples)
        self._samples = []
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return images[order[: self.num_images].to(images.device)]


def result_file(folder: Path, name: str, again: bool) -> Path:
    """Returns the path of a CSV file that a test writes; see `SampledTestImages.again`."""
    return folder / f"{name}{'_again' if again else ''}.csv"

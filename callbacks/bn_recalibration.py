"""BN statistics that fit the weights, for every way in which the network is evaluated."""

import math
from collections.abc import Iterator

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from networks import recalibrate


class BNRecalibration(Callback):
    """Gathers the statistics of every BN anew from training images, augmented as in training.

    Before every validation of a fit and after every epoch, so that the checkpoints that follow hold
    them; before other evaluations where they are missing. All operating points are run in one pass
    over the images; see `networks.recalibrate`.

    Reads of the module: `net`, `evaluated_points()`, `uncalibrated_points()`; of the data module:
    `train_epoch()`, `on_after_batch_transfer()`.

    Args:
        num_images: training images, over all ranks; about 1,000 are enough in the paper.

    Raises:
        ValueError: `num_images` is below 1, or there is no data module.
    """

    def __init__(self, num_images: int = 1024):
        if num_images < 1:
            raise ValueError(f"num_images is {num_images}: give 1 or more")
        self.num_images = num_images
        self.step = -1  # at which the statistics were gathered

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.run(trainer, pl_module, list(pl_module.evaluated_points()))
        else:
            self.run(trainer, pl_module, pl_module.uncalibrated_points())

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run(trainer, pl_module, pl_module.uncalibrated_points())

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run(trainer, pl_module, pl_module.uncalibrated_points())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.step != trainer.global_step:
            self.run(trainer, pl_module, list(pl_module.evaluated_points()))

    def run(self, trainer: Trainer, pl_module: LightningModule, names: list[str]) -> None:
        if not names:
            return
        if trainer.datamodule is None:
            raise ValueError("BNRecalibration needs training images: give a data module")
        self.step = trainer.global_step
        points = pl_module.evaluated_points()

        def merge(values: Tensor) -> Tensor:
            if trainer.world_size == 1:
                return values
            values = values.to(pl_module.device)
            return trainer.strategy.reduce(values, reduce_op="sum")

        with trainer.precision_plugin.forward_context():
            recalibrate(
                pl_module.net,
                self.batches(trainer, pl_module.device),
                [points[name] for name in names],
                merge,
            )

    def batches(self, trainer: Trainer, device: torch.device) -> Iterator[Tensor]:
        """Yields images of the first batches of an epoch, on the device."""
        data = trainer.datamodule
        data.setup("fit")
        missing = math.ceil(self.num_images / trainer.world_size)
        for batch in data.train_epoch(trainer.current_epoch):
            batch = [values.to(device) for values in batch]
            images, _ = data.on_after_batch_transfer(batch, 0)
            yield images[:missing]
            missing -= len(images)
            if missing <= 0:
                return

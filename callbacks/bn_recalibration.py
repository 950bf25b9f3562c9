"""BN statistics that fit the weights, for every way in which the network is evaluated."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from networks import Slimmable, check_counts, check_numbers, recalibrate


class BNRecalibration(Callback):
    """Gathers the statistics of every BN anew from training images, augmented as in training.

    Before every validation of a fit and after every epoch, so that the checkpoints that follow hold
    them; before other evaluations where they are missing. All operating points are run in one pass
    over the images, the exits of a width together; see `networks.recalibrate`.

    Reads of the module: `net`, `evaluated_points()`, `uncalibrated_points()`, `calibration_runs()`,
    and `eval_gates` if it has them; of the data module: `train_epoch()` and what Lightning calls of
    it around a transfer. Modules that need recalibration look for a callback with `recalibrates`.

    Args:
        num_images: training images, over all ranks; None: 1,024, which are enough in the paper.
        num_batches: training batches of each rank, instead of `num_images`.
        widths: widths of a slimmable network that the checkpoints shall be able to run besides
            those that the module evaluates.

    Raises:
        ValueError: a number below 1, both numbers, `widths` that the network does not have, or no
            data module.
    """

    recalibrates = True

    def __init__(
        self,
        num_images: int | None = None,
        num_batches: int | None = None,
        widths: Sequence[float] = (),
    ):
        if num_images is not None and num_batches is not None:
            raise ValueError("BNRecalibration takes num_images or num_batches: give one of them")
        if num_images is None and num_batches is None:
            num_images = 1024
        for name, number in (("num_images", num_images), ("num_batches", num_batches)):
            if number is not None:
                check_counts(1, 2**31, **{name: number})
        check_numbers("(0, 1]", widths=widths)
        self.num_images = num_images
        self.num_batches = num_batches
        self.widths = list(dict.fromkeys(widths))
        self.step = -1  # at which the statistics were gathered

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.widths and not isinstance(pl_module.net, Slimmable):
            raise ValueError(
                "BNRecalibration's widths need a slimmable network, and this is a "
                f"{type(pl_module.net).__name__}: remove them"
            )
        for width in self.widths:
            pl_module.net.width(width)
        if stage == "fit" and any(isinstance(c, WeightAveraging) for c in trainer.callbacks):
            raise ValueError(
                "BNRecalibration gathers statistics for the weights of the latest step, and "
                "WeightAveraging evaluates others: remove one of them from trainer.callbacks"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.run_all(trainer, pl_module)
        else:
            self.run_missing(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_missing(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.run_missing(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.step != trainer.global_step:
            self.run_all(trainer, pl_module)

    def run_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gates = getattr(pl_module, "eval_gates", None)
        widths = [partial(pl_module.net, width_mult=w, gates=gates) for w in self.widths]
        runs = pl_module.calibration_runs(pl_module.evaluated_points())
        self.run(trainer, pl_module, [*runs, *widths])

    def run_missing(self, trainer: Trainer, pl_module: LightningModule) -> None:
        missing = pl_module.calibration_runs(pl_module.uncalibrated_points())
        if missing:
            self.run(trainer, pl_module, missing)

    def run(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        runs: Sequence[Callable[[Tensor], object]],
    ) -> None:
        merge = partial(trainer.strategy.reduce, reduce_op="sum")
        self.step = trainer.global_step
        images = training_images(trainer, pl_module.device, self.num_images, self.num_batches)
        with trainer.precision_plugin.forward_context():
            recalibrate(pl_module.net, images, runs, merge if trainer.world_size > 1 else None)


def training_images(
    trainer: Trainer, device: torch.device, num_images: int | None, num_batches: int | None = None
) -> Iterator[Tensor]:
    """Yields this rank's first batches of an epoch, (N, C, H, W), augmented, on the device.

    Args:
        trainer: has a data module.
        device: where the images shall be.
        num_images: how many, over all ranks; None: no limit.
        num_batches: how many batches; None: no limit.

    Raises:
        ValueError: there is no data module, or none that has `train_epoch`.
    """
    data = trainer.datamodule
    if not hasattr(data, "train_epoch"):
        raise ValueError(
            "BNRecalibration needs training images: give a data module of this project, or one "
            "that has train_epoch() as they do"
        )
    data.setup("fit")
    missing = math.inf if num_images is None else math.ceil(num_images / trainer.world_size)
    for number, batch in enumerate(data.train_epoch(trainer.current_epoch), start=1):
        batch = data.on_before_batch_transfer(batch, 0)
        batch = data.transfer_batch_to_device(batch, device, 0)
        images, _ = data.on_after_batch_transfer(batch, 0)
        yield images[: min(missing, len(images))]
        missing -= len(images)
        if missing <= 0 or number == num_batches:
            return

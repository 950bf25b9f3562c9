"""How fast it trains."""

import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from callbacks.outlets import log_metrics


class ThroughputMonitor(Callback):
    """Logs `time/epoch_seconds` and `time/images_per_second` of the training part of every epoch.

    Loading, and the checkpoints within an epoch, count; validation and what was lost to a kill do
    not. Images are those of all ranks.
    """

    only_observes = True

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_images = 0
        self.since: float | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.since is None:
            self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.seconds += now - self.since
        self.since = now
        self.num_images += len(batch[0]) * trainer.world_size

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {
            "time/epoch_seconds": self.seconds,
            "time/images_per_second": self.num_images / self.seconds if self.seconds else 0.0,
        }
        self.seconds, self.num_images, self.since = 0.0, 0, None
        log_metrics(trainer, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "num_images": self.num_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

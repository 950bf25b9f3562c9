"""Answers for images."""

import csv
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

FILE = "predictions.csv"


class PredictionWriter(Callback):
    """After `predict`, writes `predictions.csv` in the run folder: image, class, probability.

    Reads of the data module: `class_names`, and `predict_names`, one name per image in order.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, float]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data = trainer.datamodule
        for prob, label in zip(*(values.tolist() for values in outputs.max(1)), strict=True):
            self.rows.append((data.predict_names[len(self.rows)], data.class_names[label], prob))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir, FILE)
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("image", "class", "probability"), *self.rows])
        print(f"{len(self.rows)} predictions in {path}")

"""Answers for images."""

import csv
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

FILE = "predictions.csv"


class PredictionWriter(Callback):
    """After `predict`, writes `predictions.csv` in the run folder: image, class, probability.

    Reads of the data module: `class_names`, and `predict_names`, one name per image of this rank,
    in order.
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
        rows = self.rows
        if trainer.world_size > 1:
            parts: list[list] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self.rows)
            # Images were dealt out like cards.
            rows = [row for turn in zip_longest(*parts) for row in turn if row is not None]
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, FILE)
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([("image", "class", "probability"), *rows])
            print(f"{len(rows)} predictions in {path}")

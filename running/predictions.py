"""Answers for images."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks import Table

FILE = "predictions.csv"


class PredictionWriter(Callback):
    """After `predict`, writes `predictions.csv` in the run folder: image, class, probability.

    A method whose `predict_step` returns the exit of each image, from 1, beside the probabilities
    gets a fourth column. Reads of the data module: `class_names`, and `predict_names`, one name per
    image of this rank, in order; numbers stand for what it does not have.
    """

    def __init__(self) -> None:
        self.rows: list[tuple] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | tuple[Tensor, Tensor],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        data = trainer.datamodule
        probs, *exits = outputs if isinstance(outputs, tuple) else (outputs,)
        columns = (values.tolist() for values in (*probs.max(1), *exits))
        names = getattr(data, "predict_names", None)
        classes = getattr(data, "class_names", None)
        for prob, label, *exit_number in zip(*columns, strict=True):
            number = len(self.rows)
            name = names[number] if names else number * trainer.world_size + trainer.global_rank
            self.rows.append((name, classes[label] if classes else label, prob, *exit_number))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = self.rows
        if trainer.world_size > 1:
            parts: list[list] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self.rows)
            # Images were dealt out like cards.
            rows = [row for turn in zip_longest(*parts) for row in turn if row is not None]
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, FILE)
            header = ("image", "class", "probability", "exit")
            Table(header[: len(rows[0])] if rows else header, rows).write(path)
            print(f"{len(rows)} predictions in {path}")

"""Answers for images, as the rows of a file.

A spreadsheet takes a text that begins with one of ``= + - @``, a tab or a carriage return for a
formula, and file and class names come from anywhere. In CSV files such a text gets an apostrophe in
front, as OWASP advises; JSON lines hold it as it is.
"""

import csv
import json
import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks import class_names
from lightning_modules import FULL

FILE = "predictions.csv"
NUM_TOP = 5
ANSWER = ("class", "probability")
COLUMNS = ("file", "label", *ANSWER, "exit", "point", "error")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a text begins that a spreadsheet would run."""


class Prediction(NamedTuple):
    """One row."""

    file: str
    """Name of the image."""
    label: str | None
    """Name of its class, if it is known."""
    top: list[tuple[str, float]]
    """The most probable classes and their probabilities, in order; empty after an error."""
    exit: int | None
    """The exit that it took, from 1, where images leave early."""
    point: str
    """Name of the operating point."""
    error: str | None = None
    """Why there is no answer."""


def top_classes(probs: Tensor, class_names: Sequence[str]) -> list[list[tuple[str, float]]]:
    """Returns the most probable classes of every image, of probabilities (N, num_classes)."""
    # Stable, so that the first of several maxima comes first, as with argmax.
    values, labels = probs.sort(dim=1, descending=True, stable=True)
    rows = zip(labels[:, :NUM_TOP].tolist(), values[:, :NUM_TOP].tolist(), strict=True)
    return [[(class_names[k], prob) for k, prob in zip(*row, strict=True)] for row in rows]


class PredictionFile:
    """Writes predictions: as JSON lines if the name ends in ``.jsonl``, or else as CSV.

    A context: what was written is beside the file until the context ends well, and then takes its
    place. Columns: file, label, class, probability, exit, point, error, and class2, probability2
    and so on, up to class5. A JSON line has a list ``top`` instead, from the first class on.

    Args:
        path: of the file, ``.csv`` or ``.jsonl``.
        num_classes: that the network knows.
        overwrites: whether it may take the place of another.

    Raises:
        ValueError: the file exists and may not be replaced, or its name ends in something else.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, num_classes: int, overwrites: bool = False):
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"{path} ends neither in .csv nor in .jsonl: pass another --out")
        self.path, self.overwrites = path, overwrites
        self.num_top = min(num_classes, NUM_TOP)
        self._refuse_existing("")
        self._part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            self._file = self._part.open("w", newline="", encoding="utf-8")
        except OSError as error:
            raise OSError(f"cannot write {path} ({error.strerror}): pass another --out") from error
        self._table = csv.writer(self._file)
        if path.suffix == ".csv":
            more = [f"{name}{k}" for k in range(2, self.num_top + 1) for name in ANSWER]
            self._table.writerow([*COLUMNS, *more])

    def _refuse_existing(self, remark: str) -> None:
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a folder: pass a file as --out")
        if self.path.exists() and not self.overwrites:
            raise ValueError(f"{self.path} exists{remark}: pass another --out, or --overwrite")

    def write(self, row: Prediction) -> None:
        name, prob = row.top[0] if row.top else (None, None)
        first = (row.file, row.label, name, prob, row.exit, row.point, row.error)
        if self.path.suffix == ".jsonl":
            top = [dict(zip(ANSWER, each, strict=True)) for each in row.top]
            line = dict(zip(COLUMNS, first, strict=True)) | {"top": top}
            self._file.write(json.dumps(line) + "\n")
        else:
            top = row.top or [(None, None)] * self.num_top
            cells = [*first, *(cell for pair in top[1:] for cell in pair)]
            self._table.writerow(map(harmless, cells))

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
        except OSError:  # the disk is full, and what is left cannot be written
            self._part.unlink()
            raise
        if kind is not None:
            self._part.unlink()
            return
        self._refuse_existing(f" by now, and the answers are in {self._part}")
        os.replace(self._part, self.path)


def harmless(cell: Any) -> Any:
    """Returns what a spreadsheet shows and does not run; see the head of this file."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


class PredictionWriter(Callback):
    """After `predict`, writes `predictions.csv` in the run folder, in place of an earlier one.

    See `PredictionFile` for its columns. A `predict_step` may return the exit of each image, from
    1, beside the probabilities. Reads of the data module: `class_names`, and `predict_names`, one
    name per image of this rank, in order; numbers stand for what it does not have. Labels (N,) are
    the second part of a batch, if it has one; one that is no class is unknown.
    """

    def __init__(self) -> None:
        self.num_classes = 0
        self.answers: list[tuple[list[tuple[str, float]], int | None]] = []
        self.labels: list[str | None] = []  # which answers may follow later

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Tensor | tuple[Tensor, Tensor],
        batch: Sequence[Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        probs, exits = outputs if isinstance(outputs, tuple) else (outputs, None)
        self.num_classes = probs.shape[1]
        names = [str(name) for name in class_names(trainer, self.num_classes)]
        taken = [None] * len(probs) if exits is None else exits.tolist()
        self.answers += zip(top_classes(probs, names), taken, strict=True)
        known = dict(enumerate(names))
        labels = batch[1].tolist() if len(batch) > 1 else [None] * len(batch[0])
        self.labels += [known.get(label) for label in labels]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = getattr(trainer.datamodule, "predict_names", None)
        point = next(iter(getattr(pl_module, "exit_thresholds", {})), FULL)
        rows = []
        for number, (top, taken) in enumerate(self.answers):
            position = number * trainer.world_size + trainer.global_rank
            name = names[number] if names else str(position)
            rows.append(Prediction(name, self.labels[number], top, taken, point))
        if trainer.world_size > 1:
            parts: list[list[Prediction]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, rows)
            # Images were dealt out like cards.
            rows = [row for turn in zip_longest(*parts) for row in turn if row is not None]
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir, FILE)
            with PredictionFile(path, self.num_classes, overwrites=True) as file:
                for row in rows:
                    file.write(row)
            print(f"{len(rows)} predictions in {path}")

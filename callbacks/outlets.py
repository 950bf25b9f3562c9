"""Where callbacks tell what they have found: loggers, files in the run folder, the terminal."""

import csv
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import WandbLogger
from rich.console import Console
from rich.table import Table as RichTable


class Column(NamedTuple):
    """One column of a table."""

    key: str
    """Name in files and in W&B."""
    title: str = ""
    """Heading on the terminal."""
    format: str = ""
    """How a number is shown there, as in ``format(number, ".2%")``; "" for text."""
    is_extra: bool = False
    """Whether it is left out there where the table would not fit."""


class Table:
    """Rows under columns, for a file, for the terminal and for W&B.

    Args:
        columns: in their order.
        rows: values in the order of the columns; None is an empty cell.
    """

    def __init__(self, columns: Iterable[Column | str], rows: Iterable[Sequence[Any]]):
        self.columns = [Column(each) if isinstance(each, str) else each for each in columns]
        self.rows = [list(row) for row in rows]

    @property
    def keys(self) -> list[str]:
        return [column.key for column in self.columns]

    def write(self, path: Path) -> None:
        """Writes a CSV file: the old one or the new one, whatever happens meanwhile."""
        part = path.with_suffix(".part")
        # Names of classes are those of folders, whose bytes may be no characters.
        with part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            csv.writer(file).writerows([self.keys, *self.rows])
        os.replace(part, path)

    @classmethod
    def read(cls, path: Path, columns: Sequence[Column]) -> "Table":
        """Reads those of the columns that a CSV file has, without format as text."""
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            there = [column for column in columns if column.key in (reader.fieldnames or [])]
            rows = [
                [float(row[c.key]) if c.format and row[c.key] else row[c.key] for c in there]
                for row in reader
            ]
        return cls(there, rows)

    def show(self, title: str) -> None:
        """Prints the table."""
        console = Console()
        table = self._to_rich(title, self.columns)
        unlimited = console.options.update(max_width=sys.maxsize)
        if console.measure(table, options=unlimited).maximum > console.width:
            table = self._to_rich(title, [each for each in self.columns if not each.is_extra])
            left_out = [each.title for each in self.columns if each.is_extra]
            table.caption = f"in the file, too: {', '.join(left_out)}" if left_out else None
        console.print(table)

    def _to_rich(self, title: str, shown: Sequence[Column]) -> RichTable:
        table = RichTable(title=title)
        for number, column in enumerate(shown):
            # The first is the name of a row, of which no letter may be left out.
            justify = "right" if column.format else "left"
            table.add_column(column.title, justify=justify, no_wrap=number == 0, overflow="fold")
        for row in self.rows:
            cells = [pair for pair in zip(self.columns, row, strict=True) if pair[0] in shown]
            texts = ("" if each in (None, "") else format(each, c.format) for c, each in cells)
            table.add_row(*texts)
        return table

    def to_wandb(self) -> Any:
        """Returns the same as a `wandb.Table`."""
        import wandb  # slow to import, and only those who log to it pay

        return wandb.Table(columns=self.keys, data=self.rows)


def class_names(trainer: Trainer, num_classes: int) -> Sequence[str | int]:
    """Returns what the data calls its classes; numbers, if it has no name for each of them."""
    names = getattr(trainer.datamodule, "class_names", None) or ()
    return names if len(names) == num_classes else range(num_classes)


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Gives numbers to every logger, under the latest step and its epoch."""
    for logger in trainer.loggers:
        row = {**metrics, "epoch": trainer.current_epoch}
        logger.log_metrics(row, trainer.global_step - 1)


def log_panels(trainer: Trainer, make: Callable[[Any], Mapping[str, Any]]) -> None:
    """Gives tables and plots to W&B, if the run is tracked there.

    Args:
        trainer: has the loggers.
        make: from the module `wandb`, which is slow to import, to panels by name.
    """
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            import wandb

            logger.log_metrics(make(wandb))

"""The metrics of a run as a CSV file that a resumed run continues without gap or repetition."""

import csv
import os
from pathlib import Path

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class CSVHistory(Logger):
    """Writes one row per call of `log_metrics`, at once, and remembers how many rows it holds.

    A checkpoint stores `num_rows` (see `RunCheckpoint`); whoever goes on from that checkpoint
    truncates the file to it, because what was logged after it will be logged again.

    Args:
        path: the file; an existing one is continued.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.columns: list[str] = []
        self.rows: list[dict[str, str]] = []
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.rows = [{key: value for key, value in row.items() if value} for row in reader]
                self.columns = list(reader.fieldnames or [])

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        """The run folder holds `config.yaml`; nothing to do here."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": str(step), **{key: repr(float(value)) for key, value in metrics.items()}}
        self.rows.append(row)
        if row.keys() <= set(self.columns):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow(row)
        else:
            self.rewrite()

    @rank_zero_only
    def truncate(self, num_rows: int) -> None:
        """Forgets all rows after the first `num_rows`, and the columns that only they had."""
        self.rows = self.rows[:num_rows]
        self.rewrite()

    def rewrite(self) -> None:
        self.columns = list(dict.fromkeys(key for row in self.rows for key in row))
        part = self.path.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(part, self.path)

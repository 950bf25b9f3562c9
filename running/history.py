"""The metrics of a run as a CSV file that a resumed run continues without gap or repetition."""

import csv
import os
from pathlib import Path

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only


class CSVHistory(Logger):
    """Writes one row per call of `log_metrics`, at once.

    A checkpoint stores `num_rows` (see `RunCheckpoint`); whoever goes on from that checkpoint
    truncates the file to it, because what was logged after it will be logged again.

    The file is the only state: processes that share a run, and forks of them, never disagree.

    Args:
        path: the file; an existing one is continued.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def num_rows(self) -> int:
        return len(self.read())

    @rank_zero_only
    def log_hyperparams(self, params: dict) -> None:
        """The run folder holds `config.yaml`; nothing to do here."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": str(step), **{key: repr(float(value)) for key, value in metrics.items()}}
        columns = self.columns()
        if row.keys() <= set(columns):
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerow(row)
        else:
            self.write([*self.read(), row])

    @rank_zero_only
    def truncate(self, num_rows: int) -> None:
        """Forgets all rows after the first `num_rows`, and the columns that only they had."""
        self.write(self.read()[:num_rows])

    def columns(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file).fieldnames or [])

    def read(self) -> list[dict[str, str]]:
        """Returns the rows, without their empty cells."""
        if not self.path.exists():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]

    def write(self, rows: list[dict[str, str]]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        part = self.path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(part, self.path)

"""How a training went: `metrics.csv`, a value per epoch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reports.files import number, read_columns

Curve = dict[int, float]
"""Value by epoch, counted from 0."""
MAX_EPOCH = 10**9
"""Nobody trains that long: such a number is no epoch."""


@dataclass
class History:
    """The metrics of a run.

    Attributes:
        epoch: number of epochs that were begun.
        monitor: the metric that chooses the best checkpoint.
        best: its best value; None if it was never logged.
        curves: by metric.
    """

    epoch: int = 0
    monitor: str = "val/acc"
    best: float | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)


def read_history(folder: Path, monitor: str) -> History:
    """Reads the metrics of a run folder.

    Of an epoch the last value counts, as a run that went on has logged it, but of the training loss
    of steps the mean.

    Raises:
        reports.files.Unreadable: the file is no CSV.
    """
    header, rows = read_columns(folder / "metrics.csv")
    curves = _curves(header, rows)
    if "train/loss_epoch" not in curves and "train/loss" in header:
        curves["train/loss_epoch"] = _mean_of_steps(header, rows)
    values = curves.get(monitor, {}).values()
    pick = max if "acc" in monitor else min
    best = pick(values) if values else None
    epochs = [epoch for curve in curves.values() for epoch in curve]
    return History(max(epochs, default=-1) + 1, monitor, best, curves)


def _curves(header: list[str], rows: list[list[str]]) -> dict[str, Curve]:
    if "epoch" not in header:
        return {}
    at = header.index("epoch")
    curves: dict[str, Curve] = {}
    for row in rows:
        epoch = number(row[at]) if len(row) > at else None
        if epoch is None or not 0 <= epoch < MAX_EPOCH:
            continue
        for name, cell in zip(header, row, strict=False):
            if cell and name not in ("epoch", "step") and not name.startswith("test/"):
                value = number(cell)
                if value is not None:
                    curves.setdefault(name, {})[int(epoch)] = value
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def _mean_of_steps(header: list[str], rows: list[list[str]]) -> Curve:
    at, where = header.index("epoch") if "epoch" in header else 0, header.index("train/loss")
    losses: dict[int, list[float]] = {}
    for row in rows:
        if len(row) > max(at, where):
            epoch, loss = number(row[at]), number(row[where])
            if epoch is not None and 0 <= epoch < MAX_EPOCH and loss is not None:
                losses.setdefault(int(epoch), []).append(loss)
    return {epoch: sum(values) / len(values) for epoch, values in sorted(losses.items())}

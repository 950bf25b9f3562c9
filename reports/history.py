"""How a training went: `metrics.csv`, a value per epoch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

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


def read_history(folder: Path, monitor: str, mode: str) -> History:
    """Reads the metrics of a run folder.

    Of an epoch the last value counts, as a run that went on has logged it, but of the training loss
    of steps the mean.

    Args:
        folder: of the run.
        monitor: the metric that chooses the best checkpoint.
        mode: "max" or "min"; anything else: the most of an accuracy, the least of another metric.

    Raises:
        reports.files.Unreadable: the file is no CSV.
    """
    curves = _curves(*read_columns(folder / "metrics.csv"))
    values = curves.get(monitor, {}).values()
    pick = {"max": max, "min": min}.get(mode) or (max if "acc" in monitor else min)
    best = pick(values) if values else None
    epochs = [epoch for curve in curves.values() for epoch in curve]
    return History(max(epochs, default=-1) + 1, monitor, best, curves)


def _curves(header: list[str], rows: list[list[str]]) -> dict[str, Curve]:
    """Returns the curve of each metric, and `train/loss_epoch` where only steps have a loss."""
    at = header.index("epoch") if "epoch" in header else len(header)
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        epoch = number(row[at]) if len(row) > at else None
        if epoch is None or not 0 <= epoch < MAX_EPOCH:
            continue
        for name, cell in zip(header, row, strict=False):
            if cell and name not in ("epoch", "step") and not name.startswith("test/"):
                value = number(cell)
                if value is not None:
                    values.setdefault(name, {}).setdefault(int(epoch), []).append(value)
    last = {name: {epoch: each[-1] for epoch, each in of.items()} for name, of in values.items()}
    losses = values.get("train/loss", {})
    mean = {epoch: fmean(each) for epoch, each in losses.items()}
    curves = ({"train/loss_epoch": mean} if mean else {}) | last
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}

"""One run, read from its folder, whatever is left of it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from reports.configuration import data_set, device_of, experiment_of, seed_of, settings
from reports.files import Row, Unreadable, last_line, number, part, read_rows, read_yaml, text
from reports.history import History, read_history
from reports.state import BROKEN, FINISHED, is_locked, state_of

RESULT = "operating_points.csv"
TABLES: dict[str, tuple[str, ...]] = {
    "survival": ("block", "survival_prob", "survival_rate"),
    "exits": ("point", "exit", "share", "acc"),
    "exit_entropy": ("from", "to"),
    "exit_curve": ("test_acc", "macs"),
    "exit_calibration": ("exit", "ece_before", "ece_after"),
    "recalibration": ("name",),
    "confusion": ("point", "true", "predicted", "num_images"),
    "exit_images": ("exit", "kind", "rank", "file"),
}
"""What figures are made of, and the columns that they need."""


class PointResult(NamedTuple):
    """What a test measured of one operating point.

    Attributes:
        name: "full", "w0.5", "exit1", ...
        test_acc: 0 to 1.
        macs: multiply-accumulates per image.
        params: parameters that it needs.
        ms_per_image: milliseconds, in batches of 64.
        ece: expected calibration error, 0 to 1.
        test_top5: share of the images whose class is among the five most probable.
    """

    name: str
    test_acc: float
    macs: float | None
    params: float | None
    ms_per_image: float | None
    ece: float | None
    test_top5: float | None


@dataclass
class RunRecord:
    """What is known of a run.

    Attributes:
        path: of its folder.
        experiment: ``<method>/<yaml stem>``.
        data: name of the data set.
        seed: of the run.
        settings: of its configuration, what makes the experiment; see `configuration.settings`.
        state: "running", "finished", "resumable", "broken" or "empty".
        why: in one line, where the state needs one.
        points: its result; empty if it has none, or has gone on since.
        is_again: whether the result is of a later `test`, because the fit has none.
        history: of its training.
        max_epochs: that it is to be trained for.
        paper: accuracy that the paper reports, by operating point.
        paper_source: where the paper does.
        device, commit, started: of its latest start.
        changed: when a file of the folder last changed, in seconds since 1970.
        tables: other CSV files, by name.
    """

    path: Path
    experiment: str
    data: str = "unknown data"
    seed: int | None = None
    settings: dict[str, str] = field(default_factory=dict)
    state: str = BROKEN
    why: str = ""
    points: list[PointResult] = field(default_factory=list)
    is_again: bool = False
    history: History = field(default_factory=History)
    max_epochs: int | None = None
    paper: dict[str, float] = field(default_factory=dict)
    paper_source: str = ""
    device: str = ""
    commit: str = ""
    started: str = ""
    changed: float = 0.0
    tables: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def age(self) -> float:
        """Seconds since a file of the folder last changed."""
        return max(0.0, time.time() - self.changed)


NOTHING_SAID = "there is no config.yaml that says what is trained"


def read_run(folder: Path, ask_lock: bool = True) -> RunRecord:
    """Reads a run folder. Never raises for what lies in it: the record's `why` says what is wrong.

    Args:
        folder: of the run.
        ask_lock: whether to ask if a process trains there. The process that does must not.
    """
    problems: list[str] = []

    def attempt(read: Any, *arguments: Any, default: Any = None) -> Any:
        try:
            return read(*arguments)
        except Unreadable as error:
            problems.append(str(error))
            return default

    config = attempt(read_yaml, folder / "config.yaml")
    if not isinstance(config, Mapping):
        refusal = last_line(folder / "error.txt")
        began = f"training never began: {refusal}" if refusal else NOTHING_SAID
        problems += [] if problems else [began]
    starts = attempt(read_yaml, folder / "attempts.yaml")
    start = starts[-1] if isinstance(starts, list) and starts else None
    record = RunRecord(folder, experiment_of(folder, config, part(start, "command")))
    describe(record, config, start)
    monitor, mode = (part(config, "checkpoint", key) for key in ("monitor", "mode"))
    monitor = monitor if isinstance(monitor, str) else "val/acc"
    record.history = attempt(read_history, folder, monitor, str(mode), default=History())
    points, record.is_again = attempt(read_result, folder, default=([], False))
    for name, columns in TABLES.items():
        rows, _ = attempt(_own_or_again, folder, name, columns, default=([], False))
        if rows:
            record.tables[name] = rows
    is_running = ask_lock and is_locked(folder / "lock")
    record.state, record.why = state_of(folder, problems[0] if problems else "", is_running)
    if record.state in (FINISHED, BROKEN):
        record.points = points
        if not points and part(attempt(read_yaml, folder / "finished.yaml"), "tested"):
            record.why = record.why or f"it was tested, and {RESULT} is lost"
    elif points:
        record.why = record.why or "went on after its last test: that result is left out"
    return record


def describe(record: RunRecord, config: Any, start: Any) -> None:
    """Fills in what the configuration and the latest start say."""
    record.data, record.settings = data_set(config), settings(config)
    record.seed = seed_of(record.path, config)
    epochs = part(config, "trainer", "max_epochs")
    record.max_epochs = epochs if isinstance(epochs, int) and epochs > 0 else None
    paper = part(config, "paper", "test_acc")
    for name, accuracy in (paper if isinstance(paper, Mapping) else {}).items():
        if (value := number(accuracy)) is not None and 0 <= value <= 1:
            record.paper[text(name)] = value
    record.paper_source = text(part(config, "paper", "source"))
    record.device = device_of(start, config)
    record.commit = text(part(start, "git_commit"))[:9]
    if record.commit and part(start, "git_changes"):
        record.commit += "+changes"
    record.started = text(part(start, "started"))
    record.changed = _last_change(record.path)


def read_result(folder: Path) -> tuple[list[PointResult], bool]:
    """Returns the operating points, and whether they are of a later test than the fit's own.

    Raises:
        Unreadable: an accuracy is none, a number is negative, or a point stands there twice.
    """
    rows, is_again = _own_or_again(folder, RESULT.removesuffix(".csv"), ("name", "test_acc"))
    points: list[PointResult] = []
    for row in rows:
        name, accuracy = row["name"], number(row["test_acc"])
        if accuracy is None or not 0 <= accuracy <= 1 or not name:
            raise Unreadable(f"{RESULT}: the accuracy of {name!r:.60} is no number in 0..1")
        if any(name == point.name for point in points):
            raise Unreadable(f"{RESULT} has the point {name!r:.60} twice")
        costs = [number(row.get(key)) for key in PointResult._fields[2:]]
        if any(cost is not None and cost < 0 for cost in costs):
            raise Unreadable(f"{RESULT}: a number of {name!r:.60} is negative")
        points.append(PointResult(name, accuracy, *costs))
    return points, is_again


def _own_or_again(folder: Path, name: str, columns: tuple[str, ...]) -> tuple[list[Row], bool]:
    """Returns a table as the fit wrote it, or else as a later test did, and which it is."""
    if rows := read_rows(folder / f"{name}.csv", columns):
        return rows, False
    rows = read_rows(folder / f"{name}_again.csv", columns)
    return rows, bool(rows)


def _last_change(folder: Path) -> float:
    times = []
    for name in ("metrics.csv", "last.ckpt", "finished.yaml", "attempts.yaml", RESULT, "."):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)

"""Tables of a report: the points of every experiment, and the runs that they are made of."""

import csv
import io
from collections.abc import Mapping, Sequence

from reports.aggregate import Experiment, Measured, PointSummary, pareto_front
from reports.files import text
from reports.run_record import RunRecord
from reports.state import STATES

COLUMNS = (
    *("data", "experiment", "point", "seeds", "num_seeds", "test_acc", "test_acc_std"),
    *("paper_acc", "difference", "macs", "params", "ms_per_image", "device", "test_top5", "ece"),
    *("is_pareto", "commit", "state"),
)
"""Of `points.csv`: a row per point and device; accuracies 0 to 1, empty cells where not known."""
UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def in_units(number: float) -> str:
    """Returns four digits of a number, in thousands (k), millions (M) or more: 40.55M."""
    for unit, name in UNITS:
        if number >= unit:
            return f"{number / unit:.4g}{name}"
    return f"{number:.4g}"


def large(number: Measured | None) -> str:
    """Returns the mean of a large number; "" for none."""
    return "" if number is None else in_units(number.mean)


def percent(number: Measured | None) -> str:
    """Returns a share, and its deviation over several seeds: 71.45 +- 0.31 %."""
    if number is None:
        return ""
    spread = "" if number.std is None else f" \u00b1 {number.std * 100:.2f}"
    return f"{number.mean * 100:.2f}{spread} %"


def milliseconds(point: PointSummary) -> str:
    """Returns the time of each device; names them where there are several."""
    times = [f"{ms.mean:.3g}" for ms, _ in point.ms.values()]
    if len(times) > 1:
        times = [f"{time} ({device})" for time, device in zip(times, point.ms, strict=True)]
    return ", ".join(times)


def distinct(values: Sequence[object]) -> str:
    """Returns the values that there are, each once, on a line."""
    return ", ".join(dict.fromkeys(text(value) for value in values if value not in ("", None)))


def seeds(experiment: Experiment) -> str:
    return ", ".join("?" if seed is None else str(seed) for seed in experiment.seeds)


def states(records: Sequence[RunRecord]) -> str:
    """Returns how many runs are in each state: 3 finished, 1 broken."""
    counts = {state: sum(record.state == state for record in records) for state in STATES}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def progress(record: RunRecord) -> str:
    """Returns the epochs that were trained, of how many: 3/30."""
    return f"{record.history.epoch}/{record.max_epochs or '?'}"


def age(seconds: float) -> str:
    """Returns a time in its largest whole unit: 3 h."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def fronts(experiments: Sequence[Experiment]) -> set[tuple[str, str]]:
    """Returns the points of one data set that are on its front of accuracy against MACs."""
    points = [(each.name, point) for each in experiments for point in each.points if point.macs]
    flags = pareto_front([p.macs.mean for _, p in points], [p.acc.mean for _, p in points])
    return {(name, p.name) for (name, p), flag in zip(points, flags, strict=True) if flag}


def findings(experiments: Sequence[Experiment]) -> list[str]:
    """Returns what to see first of one data set: the best, and what almost it costs less."""
    points = [(each, point) for each in experiments for point in each.points]
    if not points:
        return ["No run has a test result yet."]
    best_of, best = max(points, key=lambda pair: pair[1].acc.mean)
    cost = f" at {large(best.macs)} MACs" if best.macs else ""
    lines = [f"Best: {best_of.name}, {best.name}, {percent(best.acc)}{cost}."]
    near = [
        (each, point)
        for each, point in points
        if point.macs and best.acc.mean - point.acc.mean <= 0.01
    ]
    if best.macs and near:
        each, point = min(near, key=lambda pair: pair[1].macs.mean)
        times = best.macs.mean / point.macs.mean if point.macs.mean else 0.0
        if times > 1.005:
            lines.append(
                f"Within one percentage point of it and cheapest: {each.name}, {point.name}, "
                f"{percent(point.acc)} at {large(point.macs)} MACs, {times:.1f} times fewer."
            )
    return lines


def points_csv(groups: Mapping[str, Sequence[Experiment]]) -> str:
    """Returns `points.csv`, see `COLUMNS`."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for data, experiments in groups.items():
        front = fronts(experiments)
        for experiment in experiments:
            commits = distinct([run.commit for run in experiment.counted])
            state = states(experiment.counted)
            for point in experiment.points:
                names = ["?" if seed is None else seed for seed in point.seeds]
                first = [data, experiment.name, point.name, " ".join(map(str, names)), len(names)]
                first += [point.acc.mean, point.acc.std, point.paper, point.difference]
                first += [_mean(point.macs), _mean(point.params)]
                last = [_mean(point.top5), _mean(point.ece)]
                last += [(experiment.name, point.name) in front, commits, state]
                for device, (ms, _) in point.ms.items():
                    writer.writerow([*first, ms.mean, device, *last])
                if not point.ms:
                    writer.writerow([*first, None, None, *last])
    return file.getvalue()


def _mean(number: Measured | None) -> float | None:
    return None if number is None else number.mean

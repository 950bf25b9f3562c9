"""From runs to experiments: what differs in nothing but the seed is one, with mean and spread."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import NamedTuple, TypeVar

from reports.files import text
from reports.run_record import PointResult, RunRecord
from reports.state import BROKEN

Key = TypeVar("Key")


class Measured(NamedTuple):
    """A number over runs: mean, sample standard deviation (None for one run), how many runs."""

    mean: float
    std: float | None
    count: int


@dataclass
class PointSummary:
    """An operating point of an experiment, over its seeds.

    Attributes:
        name: of the point.
        is_adaptive: whether each image leaves where it is sure enough, so that the point lies on
            the curve of thresholds, not among widths or exits.
        seeds: of the runs that have it.
        ms: milliseconds per image by device, each with the accuracy of the runs measured there.
        paper: accuracy that the paper reports.
    """

    name: str
    is_adaptive: bool
    seeds: list[int | None]
    acc: Measured
    macs: Measured | None
    params: Measured | None
    ms: dict[str, tuple[Measured, Measured]]
    ece: Measured | None
    top5: Measured | None
    paper: float | None

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's."""
        return None if self.paper is None else self.acc.mean - self.paper


@dataclass
class Experiment:
    """Runs of one configuration.

    Attributes:
        name: with the keys that tell it from another one of the same name, unique in its data set.
        data: name of the data set.
        runs: all of them, by seed.
        one_a_seed: those that count, one for each seed.
        notes: what a reader must know of it, a sentence each.
    """

    name: str
    data: str
    runs: list[RunRecord]
    one_a_seed: list[RunRecord] = field(default_factory=list)
    points: list[PointSummary] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def counted(self) -> list[RunRecord]:
        """The runs that have a result, one for each seed."""
        return [run for run in self.one_a_seed if run.points]

    @property
    def seeds(self) -> list[int | None]:
        return [run.seed for run in self.counted]


def measured(values: Iterable[float | None]) -> Measured | None:
    """Returns the mean of the values that there are, and how they spread; None without any."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Measured(fmean(there), stdev(there) if len(there) > 1 else None, len(there))


def experiments_of(records: Sequence[RunRecord]) -> dict[str, list[Experiment]]:
    """Groups runs by data set and configuration.

    Two configurations under one name stay two, and their names say which key differs.
    """
    names: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    for record in records:
        if not record.points and not record.history.curves:
            continue  # a row among the runs, and nothing to draw
        names[record.data, record.experiment].append(record)
    groups: dict[str, list[Experiment]] = defaultdict(list)
    for (data, name), runs in sorted(names.items()):
        kinds: dict[tuple, list[RunRecord]] = defaultdict(list)
        for run in runs:
            kinds[tuple(sorted(run.settings.items()))].append(run)
        labels = _labels(name, [dict(kind) for kind in kinds])
        groups[data] += [
            _experiment(label, data, of_kind)
            for label, of_kind in zip(labels, kinds.values(), strict=True)
        ]
    return dict(groups)


def _labels(name: str, kinds: Sequence[dict[str, str]]) -> list[str]:
    """Returns a name for each configuration, with the keys whose values are not all the same."""
    keys = sorted({key for kind in kinds for key in kind})
    differing = [key for key in keys if len({kind.get(key) for kind in kinds}) > 1]
    most = 3
    labels = []
    for kind in kinds:
        said = [f"{_short(key)}={kind.get(key, 'not said')}" for key in differing[:most]]
        labels.append(f"{name} ({', '.join(said)})" if said else name)
    return [
        f"{label} no. {labels[:i].count(label) + 1}" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]


def _short(key: str) -> str:
    """Returns a dotted key without what every YAML has: its last two parts say which it is."""
    return ".".join([part for part in key.split(".") if part != "init_args"][-2:])


def _experiment(name: str, data: str, runs: list[RunRecord]) -> Experiment:
    runs = sorted(runs, key=lambda run: (run.seed is None, run.seed or 0, str(run.path)))
    experiment = Experiment(name, data, runs)
    # Of two runs of one seed one counts: the same number twice would narrow the spread.
    by_worth = sorted(runs, key=lambda run: (not run.points, -run.changed))
    for run in by_worth:
        if run.seed is not None and any(run.seed == each.seed for each in experiment.one_a_seed):
            note = f"{text(run.path)} has seed {run.seed} too, and is not counted."
            experiment.notes.append(note)
        else:
            experiment.one_a_seed.append(run)
    experiment.one_a_seed.sort(key=runs.index)
    for run in experiment.counted:
        if run.state == BROKEN:
            experiment.notes.append(f"{text(run.path)} is broken ({run.why}); its test is counted.")
        if run.is_again:
            note = f"{text(run.path)}: the fit was not tested; the numbers are of a later test."
            experiment.notes.append(note)
    names = dict.fromkeys(point.name for run in experiment.counted for point in run.points)
    unknown = {name for run in experiment.counted for name in run.paper if name not in names}
    if unknown:
        note = f"The paper's numbers of {', '.join(sorted(unknown))} are of no point of these runs."
        experiment.notes.append(note)
    adaptive = {row["point"] for run in experiment.counted for row in run.tables.get("exits", ())}
    experiment.points = [_summary(point, point in adaptive, experiment.counted) for point in names]
    return experiment


def _summary(name: str, is_adaptive: bool, runs: Sequence[RunRecord]) -> PointSummary:
    having = [(run, point) for run in runs for point in run.points if point.name == name]
    by_device: dict[str, list[PointResult]] = defaultdict(list)
    for run, point in having:
        if point.ms_per_image is not None:
            by_device[run.device or "unknown device"].append(point)
    results = [point for _, point in having]
    papers = [run.paper[name] for run, _ in having if name in run.paper]
    return PointSummary(
        name=name,
        is_adaptive=is_adaptive,
        seeds=[run.seed for run, _ in having],
        acc=measured(point.test_acc for point in results),
        macs=measured(point.macs for point in results),
        params=measured(point.params for point in results),
        ms={
            device: (
                measured(point.ms_per_image for point in points),
                measured(point.test_acc for point in points),
            )
            for device, points in by_device.items()
        },
        ece=measured(point.ece for point in results),
        top5=measured(point.test_top5 for point in results),
        paper=papers[0] if papers else None,
    )


def pareto_front(costs: Sequence[float], accuracies: Sequence[float]) -> list[bool]:
    """Tells of each point whether none is as cheap and as accurate, and better in one of the two.

    Args:
        costs: less is better.
        accuracies: more is better.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -accuracies[i]))
    is_on_front = [False] * len(costs)
    best, at = float("-inf"), None
    for i in order:
        same = at is not None and (costs[i], accuracies[i]) == (costs[at], accuracies[at])
        if accuracies[i] > best or same:
            is_on_front[i], best, at = True, accuracies[i], i
    return is_on_front


def mean_curve(runs: Sequence[RunRecord], metric: str) -> dict[int, Measured]:
    """Returns a metric of the history by epoch, over the runs that have reached it."""
    means = mean_rows(runs, lambda run: run.history.curves.get(metric, {}).items())
    return dict(sorted(means.items()))


def mean_rows(
    runs: Sequence[RunRecord], read: Callable[[RunRecord], Iterable[tuple[Key, float | None]]]
) -> dict[Key, Measured]:
    """Returns the mean over runs of what `read` yields of each: a key and a value."""
    cells: dict[Key, list[float]] = defaultdict(list)
    for run in runs:
        for key, value in read(run):
            if value is not None:
                cells[key].append(value)
    return {key: measured(values) for key, values in cells.items()}

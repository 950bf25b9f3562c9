"""`report.md`: the tables, and links to the figures."""

import re
from collections.abc import Mapping, Sequence

from reports.aggregate import Experiment
from reports.files import text
from reports.run_record import RunRecord
from reports.style import Figure
from reports.tables import (
    age,
    distinct,
    findings,
    fronts,
    large,
    milliseconds,
    percent,
    progress,
    seeds,
    states,
)

HEADINGS = (
    *("point", "paper", "ours", "difference", "top 5", "ECE", "MACs", "parameters"),
    *("ms per image", "Pareto"),
)


def report_md(
    records: Sequence[RunRecord],
    groups: Mapping[str, Sequence[Experiment]],
    figures: Mapping[str, Sequence[tuple[str, Figure]]],
) -> str:
    """Returns the report as Markdown.

    Args:
        records: every run.
        groups: experiments by data set.
        figures: by data set, each with the path of its PNG.
    """
    lines = ["# Report", "", f"{len(records)} runs: {states(records)}.", ""]
    for data, experiments in groups.items():
        lines += [f"## {plain(data)}", "", *(f"* {plain(line)}" for line in findings(experiments))]
        front = fronts(experiments)
        for experiment in experiments:
            lines += ["", f"### {plain(experiment.name)}", "", plain(provenance(experiment)), ""]
            lines += table(HEADINGS, point_cells(experiment, front))
        lines.append("")
        for path, figure in figures.get(data, ()):
            lines += [f"![{plain(figure.title)}]({path})", "", plain(figure.caption), ""]
    return "\n".join([*lines, "## Runs", "", *table(RUN_HEADINGS, map(run_cells, records)), ""])


def provenance(experiment: Experiment) -> str:
    """Returns what the numbers of an experiment are made of, in a line."""
    runs = experiment.counted
    parts = [
        f"seeds: {seeds(experiment)}" if runs else "no result yet",
        states(experiment.runs),
        f"commit: {distinct([run.commit for run in runs])}",
        f"device: {distinct([run.device for run in runs])}",
        f"paper: {distinct([run.paper_source for run in runs])}",
    ]
    return "; ".join(part for part in parts if not part.endswith(": "))


def point_cells(experiment: Experiment, front: set[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Returns a row per point, under `HEADINGS`."""
    return [
        (
            point.name,
            "" if point.paper is None else f"{100 * point.paper:.2f} %",
            percent(point.acc),
            "" if point.difference is None else f"{point.difference * 100:+.2f}",
            percent(point.top5),
            "" if point.ece is None else f"{point.ece.mean:.3f}",
            large(point.macs),
            large(point.params),
            milliseconds(point),
            "yes" if (experiment.name, point.name) in front else "",
        )
        for point in experiment.points
    ]


RUN_HEADINGS = ("run", "state", "epoch", "best", "seed", "commit", "device", "changed")


def run_cells(record: RunRecord) -> tuple[str, ...]:
    """Returns the row of a run, under `RUN_HEADINGS`."""
    best = record.history.best
    return (
        text(record.path),
        f"{record.state}: {record.why}" if record.why else record.state,
        progress(record),
        "" if best is None else f"{record.history.monitor} {best:.4g}",
        "" if record.seed is None else str(record.seed),
        record.commit,
        record.device,
        f"{age(record.age)} ago",
    )


def table(headings: Sequence[str], rows: object) -> list[str]:
    rule = "|".join("---" for _ in headings)
    lines = [f"| {' | '.join(headings)} |", f"|{rule}|"]
    return lines + [f"| {' | '.join(map(plain, row))} |" for row in rows]


def plain(words: str) -> str:
    """Returns text that Markdown and HTML take for text, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&#])", r"\\\1", " ".join(words.split()))

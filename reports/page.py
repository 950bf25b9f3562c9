"""`index.html`: the report as one file, which needs no network."""

import json
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

from reports.aggregate import Experiment
from reports.markdown import HEADINGS, RUN_HEADINGS, point_cells, provenance, run_cells
from reports.page_parts import CSS, POLICY, SCRIPT, libraries
from reports.run_record import RunRecord
from reports.state import BROKEN
from reports.style import Figure
from reports.tables import findings, fronts, states

GENERATOR = "main.py report"
MAX_OPEN = 6
"""Experiments of a data set up to which all their figures are unfolded."""
NUMBERS = {"paper", "ours", "difference", "top 5", "ECE", "MACs", "parameters", "ms per image"}


class Detail(NamedTuple):
    """The figures of one experiment, and sentences on those that it lacks."""

    name: str
    figures: Sequence[Figure]
    notes: Sequence[str]


class Section(NamedTuple):
    """What a report says of one data set."""

    data: str
    experiments: Sequence[Experiment]
    figures: Sequence[Figure]
    details: Sequence[Detail]
    notes: Sequence[str]


def page(records: Sequence[RunRecord], sections: Sequence[Section]) -> str:
    """Returns the page."""
    specs: dict[str, Any] = {}
    body = [_section(f"data{i}", section, specs) for i, section in enumerate(sections)]
    links = [f'<a href="#data{i}">{escape(each.data)}</a>' for i, each in enumerate(sections)]
    num_experiments = sum(len(each.experiments) for each in sections)
    sets = ", ".join(escape(each.data) for each in sections) or "none"
    # A "</script>" in a name would end the script.
    content = json.dumps(specs, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>Report: {sets}</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>Accuracy and what it costs</h1>
<p>{len(records)} runs of {num_experiments} experiments ({escape(states(records))}).
Data: {sets}.</p>
<noscript><p>The figures need JavaScript; as PNG files they lie beside this page.</p></noscript>
</header>
<nav><div>{"".join(links)}<a href="#runs">Runs</a></div></nav>
<main>
{"".join(body)}
{_runs(records)}
<footer class="soft">Written by {GENERATOR}. The numbers are in points.csv.</footer>
</main>
<script type="application/json" id="specs">{content}</script>
<script>{libraries()}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _section(anchor: str, section: Section, specs: dict[str, Any]) -> str:
    lines = "".join(f"<li>{escape(line)}</li>" for line in findings(section.experiments))
    details = "".join(
        _detail(f"{anchor}-{i}", detail, len(section.details) <= MAX_OPEN, specs)
        for i, detail in enumerate(section.details)
    )
    parts = [
        f'<section id="{anchor}"><h2>{escape(section.data)}</h2>',
        f"<ul>{lines}</ul>",
        _figures(anchor, section.figures, specs),
        "<h3>Operating points</h3>",
        _points(section.experiments),
        "<h3>Each experiment</h3>" if details else "",
        details,
        *(f'<p class="soft">{escape(note)}</p>' for note in section.notes),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _points(experiments: Sequence[Experiment]) -> str:
    front = fronts(experiments)
    headings = HEADINGS[:-1]  # a mark at the name says what the last column says
    rows = {each.name: point_cells(each, front) for each in experiments}
    all_rows = [row for of_one in rows.values() for row in of_one]
    kept = [i for i in range(len(headings)) if i == 0 or any(row[i] for row in all_rows)]
    bodies = []
    for experiment in experiments:
        notes = "".join(f"<span>{escape(note)}</span>" for note in experiment.notes)
        head = f"{escape(experiment.name)}<span>{escape(provenance(experiment))}</span>{notes}"
        lines = [f'<tr><th colspan="{len(kept)}" scope="rowgroup"><div>{head}</div></th></tr>']
        for row in rows[experiment.name]:
            cells = "".join(_cell(headings[i], row[i]) for i in kept)
            lines.append(f"<tr{' class=front' if row[-1] else ''}>{cells}</tr>")
        bodies.append(f"<tbody>{''.join(lines)}</tbody>")
    heads = "".join(_cell(headings[i], headings[i], "th") for i in kept)
    return (
        f'<div class="wide"><table class="points"><thead><tr>{heads}</tr></thead>'
        f"{''.join(bodies)}</table></div>"
        '<p class="soft">Mean &plusmn; sample standard deviation over the seeds. '
        "&#9670; on the Pareto front of accuracy against MACs.</p>"
    )


def _cell(heading: str, content: str, tag: str = "td") -> str:
    kind = ' class="number"' if heading in NUMBERS else ""
    return f"<{tag}{kind}>{escape(content)}</{tag}>"


def _figures(anchor: str, figures: Iterable[Figure], specs: dict[str, Any]) -> str:
    parts = []
    for figure in figures:
        name = f"{anchor}-{figure.name}"
        specs[name] = figure.spec
        title, caption = escape(figure.title), escape(figure.caption)
        parts.append(
            f"<figure><figcaption><b>{title}</b><p>{caption}</p></figcaption>"
            f'<div class="chart" data-spec="{escape(name)}" role="img" aria-label="{title}"></div>'
            "</figure>"
        )
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _detail(anchor: str, detail: Detail, is_open: bool, specs: dict[str, Any]) -> str:
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in detail.notes)
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(detail.name)}</summary>"
        f"{_figures(anchor, detail.figures, specs)}{notes}</details>"
    )


def _runs(records: Sequence[RunRecord]) -> str:
    """Returns the table of runs, those first that a reader must know of."""
    rows = []
    for record in sorted(records, key=lambda record: not record.why):
        cells = "".join(
            f"<td{' class=text' if i < 2 else ''}>{escape(cell)}</td>"
            for i, cell in enumerate(run_cells(record))
        )
        rows.append(f"<tr{' class=broken' if record.state == BROKEN else ''}>{cells}</tr>")
    heads = "".join(f"<th>{heading}</th>" for heading in RUN_HEADINGS)
    return (
        f'<section id="runs"><h2>Runs</h2><div class="wide"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )

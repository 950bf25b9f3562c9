"""How figures look: colours that colour-blind people tell apart, each with a shape and a dash."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito (2008), without their yellow, which is too pale on white."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross")
DASHES = ([1, 0], [7, 3], [2, 2], [8, 3, 2, 3], [12, 4])
# No two of these lengths have a common divisor, so that pairs repeat after 7 * 6 names, not 7.
DASH_SIZE = 500
"""Of a line in a legend, its length squared: a dash must fit in it."""
INK, FAINT = "#1a1a1a", "#8c8c8c"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
WIDTH, HEIGHT = 620, 340
"""Of a PNG, in points; in the page a figure is as wide as there is room."""


class Figure(NamedTuple):
    """One figure.

    Attributes:
        name: for files and links: lower case, digits, "_" and "-".
        title: for people.
        caption: what is shown and how to read it, in a sentence or two.
        spec: Vega-Lite, its width that of whatever holds it.
    """

    name: str
    title: str
    caption: str
    spec: dict[str, Any]


def slug(text: str) -> str:
    """Returns a name that any file system takes."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:80] or "unnamed"


def values(rows: Sequence[dict[str, Any]]) -> alt.Data:
    return alt.Data(values=list(rows))


def colour(field: str, names: Sequence[str], title: str | None = None) -> alt.Color:
    """Returns a colour for each name, the same ones whatever else is shown."""
    return alt.Color(f"{field}:N", title=title, legend=legend()).scale(
        domain=list(names), range=_cycle(OKABE_ITO, len(names))
    )


def shape(field: str, names: Sequence[str], title: str | None = None) -> alt.Shape:
    return alt.Shape(f"{field}:N", title=title, legend=legend()).scale(
        domain=list(names), range=_cycle(SHAPES, len(names))
    )


def dash(field: str, names: Sequence[str], title: str | None = None) -> alt.StrokeDash:
    return alt.StrokeDash(f"{field}:N", title=title, legend=legend(DASH_SIZE)).scale(
        domain=list(names), range=_cycle(DASHES, len(names))
    )


def legend(symbol_size: int = 90) -> alt.Legend:
    """Returns a legend below the figure, in as many columns as there is room for."""
    return alt.Legend(
        orient="bottom",
        columns=alt.ExprRef("width > 640 ? 3 : width > 420 ? 2 : 1"),
        labelLimit=290,
        symbolLimit=42,
        symbolSize=symbol_size,
        titleLimit=290,
    )


def finished(chart: alt.TopLevelMixin, height: int = HEIGHT) -> dict[str, Any]:
    """Returns the specification of a chart, in this project's looks."""
    chart = chart.properties(
        width="container",
        height=height,
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        background="white",
        padding={"left": 4, "top": 6, "right": 14, "bottom": 4},
    ).configure(
        font=FONT,
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(
            labelColor=INK,
            titleColor=INK,
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
            titlePadding=8,
            domainColor=FAINT,
            tickColor=FAINT,
            gridColor="#e6e6e6",
            labelOverlap="greedy",
            labelSeparation=6,
            labelLimit=140,
        ),
        legend=alt.LegendConfig(
            labelColor=INK,
            titleColor=INK,
            labelFontSize=12,
            titleFontSize=12,
            symbolOpacity=1,
        ),
    )
    spec = chart.to_dict()
    # Legends one below the other: side by side, a phone shows the first alone. Vega-Lite hands this
    # to Vega, and altair's schema does not know it.
    layout = {"bottom": {"direction": "vertical", "anchor": "start", "margin": 6}}
    spec["config"]["legend"]["layout"] = layout
    return spec


def _cycle(choices: Sequence[Any], length: int) -> list[Any]:
    return [choices[i % len(choices)] for i in range(length)]

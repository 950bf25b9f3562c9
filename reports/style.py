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
SYMBOL_SIZE, DASH_SIZE = 90, 500
"""In a legend, squared: of a shape, and of a line that must hold a dash."""
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


def colour(
    field: str, names: Sequence[str], title: str | None = None, among: Sequence[str] = ()
) -> alt.Color:
    """Returns a colour for each name: its own `among` more names, whichever of them are shown."""
    colours = _of(OKABE_ITO, names, among)
    return alt.Color(f"{field}:N", title=title, legend=legend()).scale(
        domain=list(names), range=colours
    )


def shape(
    field: str, names: Sequence[str], title: str | None = None, among: Sequence[str] = ()
) -> alt.Shape:
    """Returns a shape for each name; see `colour`."""
    return alt.Shape(f"{field}:N", title=title, legend=legend()).scale(
        domain=list(names), range=_of(SHAPES, names, among)
    )


def dash(
    field: str, names: Sequence[str], title: str | None = None, symbol_size: int = SYMBOL_SIZE
) -> alt.StrokeDash:
    """Returns a dash for each name; where dashes alone tell names apart, with `DASH_SIZE`."""
    return alt.StrokeDash(f"{field}:N", title=title, legend=legend(symbol_size)).scale(
        domain=list(names), range=_of(DASHES, names)
    )


def legend(symbol_size: int = SYMBOL_SIZE) -> alt.Legend:
    """Returns a legend below the figure, in as many columns as there is room for."""
    return alt.Legend(
        orient="bottom",
        columns=alt.ExprRef("width > 700 ? 3 : width > 460 ? 2 : 1"),
        labelLimit=290,
        symbolLimit=42,
        symbolSize=symbol_size,
        titleLimit=290,
    )


def finished(
    chart: alt.TopLevelMixin, rows: list[dict[str, Any]], height: int = HEIGHT
) -> dict[str, Any]:
    """Returns the specification of a chart over rows, in this project's looks."""
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
    # altair would compare every row with its schema, which takes longer than all the rest.
    spec = chart.to_dict(validate=False) | {"data": {"values": rows}}
    for layer in spec.get("layer", ()):
        layer.pop("data", None)  # altair says that they have none, which hides that of the whole
    # Legends one below the other: side by side, a phone shows the first alone. Vega-Lite hands this
    # to Vega, and altair's schema does not know it.
    layout = {"bottom": {"direction": "vertical", "anchor": "start", "margin": 6}}
    spec["config"]["legend"]["layout"] = layout
    return spec


def _of(choices: Sequence[Any], names: Sequence[str], among: Sequence[str] = ()) -> list[Any]:
    places = {name: i for i, name in enumerate(among or names)}
    return [choices[places[name] % len(choices)] for name in names]

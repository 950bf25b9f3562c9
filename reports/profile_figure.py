"""The picture of a profile: what operating points cost, and which stages they pay for."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from reports.style import OKABE_ITO, SHAPES

WIDTH = 560
METRICS = {
    "macs": "MACs",
    "params": "parameters",
    "kept_bytes": "bytes kept for backward",
    "ms_in_batch": "ms in a batch",
}


def profile_figure(rows: Sequence[Mapping[str, Any]]) -> alt.VConcatChart:
    """Draws measured time against multiply-accumulates, and the shares of the stages below.

    Args:
        rows: of `profile.csv`, numbers as numbers: experiment, kind ("point" or "stage"), name,
            macs, params, kept_bytes, ms_in_batch, batch_size, device.
    """
    points = [dict(row) for row in rows if row["kind"] == "point"]
    stages = [dict(row) for row in rows if row["kind"] == "stage"]
    return alt.vconcat(_scatter(points), *_shares(stages)).resolve_scale(
        color="independent", shape="independent"
    )


def _scatter(points: list[dict[str, Any]]) -> alt.LayerChart:
    batch_size, device = points[0]["batch_size"], points[0]["device"]
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("macs:Q", title="MACs per image", axis=alt.Axis(format="~s")).scale(type="log"),
        y=alt.Y(
            "ms_in_batch:Q",
            title=f"ms per image, batch of {batch_size}",
            scale=alt.Scale(type="log"),
        ),
    )
    legend = alt.Legend(orient="top", direction="vertical", labelLimit=WIDTH)
    marks = base.mark_point(filled=True, size=70).encode(
        color=alt.Color("experiment:N", title=None, legend=legend).scale(range=list(OKABE_ITO)),
        shape=alt.Shape("experiment:N", title=None, legend=legend).scale(range=list(SHAPES)),
    )
    names = base.mark_text(align="left", dx=6, dy=-6, fontSize=10).encode(text="name:N")
    return alt.layer(marks, names).properties(
        width=WIDTH, height=300, title=f"operating points on {device}"
    )


def _shares(stages: list[dict[str, Any]]) -> list[alt.Chart]:
    """Returns a chart for each experiment: bars of all costs, cut at the stages."""
    charts = []
    for experiment in dict.fromkeys(row["experiment"] for row in stages):
        own = [row for row in stages if row["experiment"] == experiment]
        order = [row["name"] for row in own]
        values = [
            {"stage": row["name"], "number": number, "of": title, "value": row[key]}
            for number, row in enumerate(own)
            for key, title in METRICS.items()
        ]
        charts.append(
            alt.Chart(alt.Data(values=values))
            .mark_bar(stroke="white", strokeWidth=0.5)
            .encode(
                x=alt.X(
                    "value:Q", stack="normalize", title=None, axis=alt.Axis(format="%", tickCount=5)
                ),
                y=alt.Y("of:N", title=None, sort=list(METRICS.values())),
                order="number:O",
                color=alt.Color(
                    "stage:O", title=None, sort=order, scale=alt.Scale(scheme="viridis")
                ),
            )
            .properties(width=WIDTH, height=90, title=f"stages of {experiment}")
        )
    return charts

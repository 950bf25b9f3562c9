"""Figures that compare experiments on one data set."""

from collections.abc import Sequence
from typing import Any

import altair as alt

from reports.aggregate import Experiment, Measured, PointSummary, mean_curve, pareto_front
from reports.style import DASH_SIZE, INK, Figure, colour, dash, finished, shape

Rows = list[dict[str, Any]]
MAX_POINTS = 200
"""Of a line by epoch."""
MAX_MARKS = 10
"""Of a line by epoch: shapes that tell it from others."""
MAX_NAMED = 12
"""Points of a figure that are named in it; of more, names would lie on each other."""
FIXED = "the same width or exit for all images"
ADAPTIVE = "each image leaves when it is sure"


def comparisons(experiments: Sequence[Experiment]) -> list[Figure]:
    """Returns accuracy against every cost, and how trainings went."""
    names = [each.name for each in experiments]
    devices = sorted({d for each in experiments for point in each.points for d in point.ms})
    found = [
        cost_figure(experiments, names, "macs", "MACs per image", ".3s"),
        *(ms_figure(experiments, names, device, len(devices)) for device in devices),
        cost_figure(experiments, names, "params", "parameters", ".3s"),
        history_figure(experiments, names, "accuracy", ("val/acc", "train/acc")),
        history_figure(experiments, names, "loss", ("val/loss", "train/loss_epoch")),
        gradient_figure(experiments, names),
    ]
    return [figure for figure in found if figure]


def cost_figure(
    experiments: Sequence[Experiment], names: Sequence[str], cost: str, title: str, style: str
) -> Figure | None:
    """Returns accuracy against MACs or parameters."""
    rows = []
    for experiment in experiments:
        for point in experiment.points:
            if (value := getattr(point, cost)) and value.mean > 0:
                rows.append(cost_row(experiment, point, value, point.acc, style))
    chart = cost_chart(rows, names, f"{title} (logarithmic)")
    caption = (
        "Mean over the seeds, with a bar of one standard deviation. The grey steps are the Pareto "
        "front: no point is both cheaper and more accurate."
    )
    return chart and Figure(f"accuracy_{cost}", f"Accuracy against {title}", caption, chart)


def ms_figure(
    experiments: Sequence[Experiment], names: Sequence[str], device: str, num_devices: int
) -> Figure | None:
    """Returns accuracy against the milliseconds that one device has measured."""
    rows = []
    for experiment in experiments:
        for point in experiment.points:
            if device in point.ms:
                ms, accuracy = point.ms[device]
                if ms.mean > 0:
                    rows.append(cost_row(experiment, point, ms, accuracy, ".3r"))
    chart = cost_chart(rows, names, "ms per image (logarithmic)", "~r")
    name = f"accuracy_ms_{device}" if num_devices > 1 else "accuracy_ms"
    title = f"Accuracy against measured time, on {device}"
    caption = f"Milliseconds per image in batches of 64, as {device} has measured them."
    if num_devices > 1:
        caption += " Other devices have figures of their own: their times do not compare."
    return chart and Figure(name, title, caption, chart)


def cost_row(
    experiment: Experiment, point: PointSummary, cost: Measured, acc: Measured, style: str
) -> dict[str, Any]:
    spread = acc.std or 0.0
    return {
        "experiment": experiment.name,
        "point": point.name,
        "kind": kind_of(point, [each.name for each in experiment.points]),
        "seeds": ", ".join("?" if seed is None else str(seed) for seed in point.seeds),
        "acc": acc.mean,
        "low": acc.mean - spread,
        "high": acc.mean + spread,
        "std": "one seed" if acc.std is None else f"{acc.std:.2%}",
        "cost": cost.mean,
        "style": style,
    }


def kind_of(point: PointSummary, names: Sequence[str]) -> str:
    """Returns what tells points of one experiment that lie on different curves.

    MSDNet's ensembles of exits, say, cost what their last exit does. A width with exits has curves
    of its own: "w0.5" is the last of "w0.5_exit1", "w0.5_exit2".

    Args:
        point: the point.
        names: of all points of the experiment.
    """
    width = point.name.partition("_")[0]
    if f"{width}_exit1" in names:
        return f"{width}: {ADAPTIVE if point.is_adaptive else FIXED}"
    if point.is_adaptive:
        return ADAPTIVE
    family = point.name.rstrip("0123456789.")
    return FIXED if family in ("full", "exit", "w") else family


def cost_chart(
    rows: Rows, names: Sequence[str], title: str, tick: str = "~s"
) -> dict[str, Any] | None:
    """Returns a curve per experiment, error bars and the Pareto front; None without points."""
    if not rows:
        return None
    fronts = pareto_front([row["cost"] for row in rows], [row["acc"] for row in rows])
    for row, is_on_front in zip(rows, fronts, strict=True):
        row["front"] = is_on_front
    rows = sorted(rows, key=lambda row: row["cost"])
    x = alt.X("cost:Q", title=title, axis=alt.Axis(format=tick, grid=False)).scale(
        type="log", nice=False, padding=18
    )
    y = alt.Y("acc:Q", title="test accuracy", axis=alt.Axis(format=".1~%")).scale(zero=False)
    base = alt.Chart().encode(x=x, y=y)
    front = (
        base.transform_filter("datum.front")
        .mark_line(interpolate="step-after", stroke="#cfcfcf", strokeWidth=7, opacity=0.75)
        .encode(order="cost:Q")
    )
    shown = [name for name in names if any(row["experiment"] == name for row in rows)]
    kinds = [FIXED, *sorted({row["kind"] for row in rows} - {FIXED})]
    line = base.mark_line(strokeWidth=1.8, opacity=0.85).encode(
        color=colour("experiment", shown, among=names),
        strokeDash=dash("kind", kinds, symbol_size=DASH_SIZE) if len(kinds) > 1 else alt.Undefined,
        detail="kind:N",
        order="cost:Q",
    )
    bars = base.mark_rule(strokeWidth=1.5).encode(
        y=alt.Y("low:Q", title="test accuracy").scale(zero=False),
        y2="high:Q",
        color=colour("experiment", shown, among=names),
    )
    layers = [front, line, bars]
    if len(rows) <= MAX_NAMED:
        layers.append(base.mark_text(dy=-12, fontSize=11, color=INK).encode(text="point:N"))
    # Above all others, so that a mouse finds them.
    points = cost_points(base, title, rows[0]["style"])
    points = points.encode(
        color=colour("experiment", shown, among=names),
        shape=shape("experiment", shown, among=names),
    )
    layers.append(points)
    return finished(alt.layer(*layers), rows)


def cost_points(base: alt.Chart, title: str, style: str) -> alt.Chart:
    """Returns the operating points, those of the Pareto front with a black rim."""
    return base.mark_point(filled=True, size=110, opacity=1, strokeWidth=1).encode(
        stroke=alt.condition("datum.front", alt.value("black"), alt.value(None)),
        tooltip=[
            alt.Tooltip("experiment:N"),
            alt.Tooltip("point:N"),
            alt.Tooltip("acc:Q", title="accuracy", format=".2%"),
            alt.Tooltip("std:N", title="std over seeds"),
            alt.Tooltip("cost:Q", title=title.split(" (")[0], format=style),
            alt.Tooltip("seeds:N"),
            alt.Tooltip("kind:N"),
        ],
    )


def history_figure(
    experiments: Sequence[Experiment], names: Sequence[str], what: str, metrics: Sequence[str]
) -> Figure | None:
    """Returns accuracy or loss by epoch, of validation and training."""
    rows = [
        row
        for metric, of in zip(metrics, ("validation", "training"), strict=True)
        for each in experiments
        for row in curve_rows(each, metric, of)
    ]
    if not rows:
        return None
    style = ".2%" if what == "accuracy" else ".4r"
    axis = alt.Axis(format=".1~%") if what == "accuracy" else alt.Axis()
    chart = line_chart(
        rows, names, alt.Y("value:Q", title=what, axis=axis).scale(zero=False), style
    )
    caption = "By epoch, mean over the seeds: validation drawn through, training dashed."
    return Figure(f"learning_{what}", f"Learning curves: {what}", caption, chart)


def line_chart(
    rows: Rows, names: Sequence[str], y: alt.Y, style: str, title: str = "experiment"
) -> dict[str, Any]:
    """Returns lines by epoch, a colour for each experiment and a dash for what they are of."""
    shown = [name for name in names if any(row["experiment"] == name for row in rows)]
    base = alt.Chart().encode(
        x=alt.X("epoch:Q", axis=alt.Axis(tickMinStep=1)).scale(nice=False),
        y=y,
        color=colour("experiment", shown, among=names),
    )
    parts = list(dict.fromkeys(row["of"] for row in rows))
    lines = base.mark_line(strokeWidth=1.8).encode(
        strokeDash=dash("of", parts, symbol_size=DASH_SIZE) if parts != [""] else alt.Undefined
    )
    marks = base.transform_filter("datum.mark").mark_point(filled=True, size=45, opacity=1)
    marks = marks.encode(shape=shape("experiment", shown, among=names))
    hover = base.mark_point(filled=True, size=120, opacity=0).encode(
        tooltip=[
            alt.Tooltip("experiment:N", title=title),
            *([alt.Tooltip("of:N")] if parts != [""] else []),
            alt.Tooltip("epoch:Q"),
            alt.Tooltip("value:Q", format=style),
            alt.Tooltip("seeds:Q", title="number of seeds"),
        ],
    )
    return finished(alt.layer(lines, marks, hover), rows, 300)


def curve_rows(experiment: Experiment, metric: str, of: str) -> Rows:
    """Returns a metric by epoch, from 1, as `line_chart` draws it."""
    curve = thinned(list(mean_curve(experiment.one_a_seed, metric).items()))
    step = max(1, len(curve) // MAX_MARKS)
    return [
        {"experiment": experiment.name, "of": of, "epoch": epoch + 1}
        | {"value": value.mean, "seeds": value.count, "mark": i % step == 0}
        for i, (epoch, value) in enumerate(curve)
    ]


def thinned(line: Sequence[Any]) -> Sequence[Any]:
    """Returns `MAX_POINTS` of a line at most, evenly spaced, both of its ends among them."""
    if len(line) <= MAX_POINTS:
        return line
    return [line[round(i * (len(line) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def gradient_figure(experiments: Sequence[Experiment], names: Sequence[str]) -> Figure | None:
    """Returns the mean gradient of the first convolution by epoch."""
    rows = [
        row
        for each in experiments
        for row in curve_rows(each, "gradients/first_conv", "")
        if row["value"] > 0
    ]
    if not rows:
        return None
    y = alt.Y("value:Q", title="mean |gradient|", axis=alt.Axis(format=".1~e", tickCount=4))
    return Figure(
        "gradients",
        "Gradient magnitude at the first convolution",
        "Mean absolute gradient by epoch, mean over the seeds (figure 7 of Stochastic Depth).",
        line_chart(rows, names, y.scale(type="log"), ".3e"),
    )

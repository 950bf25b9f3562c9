"""Figures of one experiment: what its depth, widths and exits did."""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import altair as alt
from PIL import Image

from reports.aggregate import Experiment, Measured, mean_rows
from reports.figures import curve_rows, line_chart
from reports.files import Row, number, opened
from reports.run_record import RunRecord
from reports.style import INK, Figure, colour, dash, finished, shape

MAX_CLASSES = 100
"""Of a confusion matrix: with more, a cell is less than a dot."""
MAX_COUNTED = 12
"""Classes of a confusion matrix up to which each cell holds its number."""
MAX_DIGITS = 10
"""Of a class that is called by its number."""
IMAGES_PER_ROW = 8
MAX_PIXELS = 10**7
"""Of an image that is shown: one of a data set has less, and a larger one takes its time."""
THUMBNAIL = 96
"""Pixels of the longer side of an image in the page."""


def details(experiment: Experiment) -> tuple[list[Figure], list[str]]:
    """Returns the figures of an experiment, and a sentence for each that was left out."""
    notes: list[str] = []
    found = [
        points_figure(experiment),
        survival_figure(experiment),
        *exit_figures(experiment),
        entropy_figure(experiment),
        thresholds_figure(experiment),
        calibration_figure(experiment),
        recalibration_figure(experiment),
        confusion_figure(experiment, notes),
        images_figure(experiment, notes),
    ]
    return [figure for figure in found if figure], notes


def points_figure(experiment: Experiment) -> Figure | None:
    """Returns the validation accuracy of each operating point by epoch; None for one point."""
    metrics = dict.fromkeys(
        name
        for run in experiment.one_a_seed
        for name in run.history.curves
        if name.startswith("val/acc_")
    )
    if not metrics:
        return None
    rows = []
    for metric in [*metrics, "val/acc"]:
        name = metric.removeprefix("val/acc").removeprefix("_") or "full"
        rows += [{**row, "experiment": name} for row in curve_rows(experiment, metric, "")]
    names = list(dict.fromkeys(row["experiment"] for row in rows))
    y = alt.Y("value:Q", title="validation accuracy", axis=alt.Axis(format=".1~%"))
    chart = line_chart(rows, names, y.scale(zero=False), ".2%", "point")
    caption = "Validation accuracy of each operating point by epoch, mean over the seeds."
    return Figure("points", "Each point while training", caption, chart)


def survival_figure(experiment: Experiment) -> Figure | None:
    """Returns the planned and the realised survival of each block."""

    def cells(run: RunRecord, column: str) -> list[tuple[tuple, float | None]]:
        table = run.tables.get("survival", ())
        return [((int(number(row["block"]) or 0),), number(row[column])) for row in table]

    rows = []
    for column, of in (("survival_prob", "planned"), ("survival_rate", "realised")):
        means = mean_rows(experiment.one_a_seed, lambda run, column=column: cells(run, column))
        rows += [{"block": block, "of": of, "value": m.mean} for (block,), m in means.items()]
    if not rows:
        return None
    base = alt.Chart().encode(
        x=alt.X("block:Q", axis=alt.Axis(tickMinStep=1)),
        y=alt.Y("value:Q", title="survival", axis=alt.Axis(format=".1~%")).scale(domain=[0, 1]),
        color=colour("of", ["planned", "realised"]),
    )
    lines = base.transform_filter("datum.of == 'planned'").mark_line(strokeWidth=2)
    dots = base.mark_point(filled=True, size=70, opacity=1).encode(
        shape=shape("of", ["planned", "realised"]),
        tooltip=["block:Q", alt.Tooltip("of:N"), alt.Tooltip("value:Q", format=".2%")],
    )
    caption = "The probability p_l of each block, and the share of steps in which it was open."
    chart = finished(alt.layer(lines, dots), rows, 260)
    return Figure("survival", "Survival of each block", caption, chart)


def exit_figures(experiment: Experiment) -> list[Figure]:
    """Returns who leaves where, and how right they are."""
    found = []
    for column, label, title, caption in (
        ("share", "share of images", "Who leaves at each exit", "By point of thresholds."),
        ("acc", "accuracy", "How right those are who leave", "By exit and point of thresholds."),
    ):
        means = mean_rows(
            experiment.counted,
            lambda run, column=column: [
                ((row["exit"], row["point"]), number(row[column]))
                for row in run.tables.get("exits", ())
            ],
        )
        if means:
            y = alt.Y("value:Q", title=label, axis=alt.Axis(format=".1~%"))
            chart = marked_lines(means, "exit", "point", y.scale(zero=column == "share"))
            found.append(Figure(f"exit_{column}", title, caption, chart))
    return found


def marked_lines(
    means: Mapping[tuple[str, str], Measured], x: str, by: str, y: alt.Y, title: str | None = None
) -> dict[str, Any]:
    """Returns a line for each name of `by`, over those of `x`, in the order of the means.

    Args:
        means: by names of `x` and of `by`.
        x: what the horizontal axis holds.
        by: what tells the lines apart.
        y: the vertical axis, of `value`.
        title: of the legend.
    """
    rows = [{x: at, by: name, "value": mean.mean} for (at, name), mean in means.items()]
    ticks, names = ([*dict.fromkeys(row[key] for row in rows)] for key in (x, by))
    chart = (
        alt.Chart()
        .mark_line(strokeWidth=1.6, point=alt.OverlayMarkDef(size=80, opacity=1))
        .encode(
            x=alt.X(f"{x}:N", sort=ticks, axis=alt.Axis(labelAngle=0)),
            y=y,
            color=colour(by, names, title),
            shape=shape(by, names, title),
            strokeDash=dash(by, names, title),
            tooltip=[f"{x}:N", f"{by}:N", alt.Tooltip("value:Q", format=".2%")],
        )
    )
    return finished(chart, rows, 260)


def entropy_figure(experiment: Experiment) -> Figure | None:
    """Returns a histogram of the entropy at each exit, over all seeds."""
    counts: Counter[tuple[float, float, str]] = Counter()
    for run in experiment.counted:
        for row in run.tables.get("exit_entropy", ()):
            low, high = number(row["from"]), number(row["to"])
            for name in row:
                if name not in ("from", "to") and low is not None and high is not None:
                    counts[low, high, name] += number(row[name]) or 0.0
    if not counts:
        return None
    names = list(dict.fromkeys(name for *_, name in counts))
    totals = {name: sum(n for key, n in counts.items() if key[2] == name) or 1 for name in names}
    rows = [
        {"from": low, "to": high, "exit": name, "share": count / totals[name]}
        for (low, high, name), count in sorted(counts.items())
    ]
    last = max(row["to"] for row in rows)
    rows += [{**row, "from": last} for row in rows if row["to"] == last]
    chart = (
        alt.Chart()
        .mark_line(interpolate="step-after", strokeWidth=2)
        .encode(
            x=alt.X("from:Q", title="entropy (nats)"),
            y=alt.Y("share:Q", title="share of images", axis=alt.Axis(format=".1~%")),
            color=colour("exit", names),
            strokeDash=dash("exit", names),
        )
    )
    caption = "Histogram over all test images: 0 is certainty, the right end a uniform guess."
    return Figure("exit_entropy", "Entropy at each exit", caption, finished(chart, rows, 260))


def thresholds_figure(experiment: Experiment) -> Figure | None:
    """Returns accuracy against mean MACs along the curve of thresholds, a line per seed."""
    rows = [
        {"seed": str(run.seed), "acc": number(row["test_acc"]), "macs": number(row["macs"])}
        for run in experiment.counted
        for row in run.tables.get("exit_curve", ())
    ]
    rows = [row for row in rows if row["acc"] is not None and (row["macs"] or 0) > 0]
    if not rows:
        return None
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    ticks = alt.Axis(format="~s", tickCount=6)
    chart = (
        alt.Chart()
        .mark_line(strokeWidth=1.6, point=alt.OverlayMarkDef(size=24, opacity=1))
        .encode(
            x=alt.X("macs:Q", title="mean MACs per image", axis=ticks).scale(zero=False),
            y=alt.Y("acc:Q", title="test accuracy", axis=alt.Axis(format=".1~%")).scale(zero=False),
            order="macs:Q",
            color=colour("seed", seeds, "seed"),
            strokeDash=dash("seed", seeds, "seed"),
            tooltip=[
                "seed:N",
                alt.Tooltip("acc:Q", title="accuracy", format=".2%"),
                alt.Tooltip("macs:Q", title="MACs", format=".3s"),
            ],
        )
    )
    caption = "Test accuracy and mean cost as the thresholds move from strict to loose."
    return Figure("exit_curve", "Curve of thresholds", caption, finished(chart, rows, 260))


def calibration_figure(experiment: Experiment) -> Figure | None:
    """Returns the calibration error of each exit without and with its temperature."""
    means = mean_rows(
        experiment.counted,
        lambda run: [
            ((row["exit"], when), number(row[f"ece_{when}"]))
            for row in run.tables.get("exit_calibration", ())
            for when in ("before", "after")
        ],
    )
    if not means:
        return None
    rows = [{"exit": e, "temperature": when, "value": m.mean} for (e, when), m in means.items()]
    exits = list(dict.fromkeys(row["exit"] for row in rows))
    chart = (
        alt.Chart()
        .mark_line(strokeWidth=1.6, point=alt.OverlayMarkDef(size=80, opacity=1))
        .encode(
            x=alt.X("exit:N", sort=exits, axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title="expected calibration error"),
            color=colour("temperature", ["before", "after"]),
            shape=shape("temperature", ["before", "after"]),
            strokeDash=dash("temperature", ["before", "after"]),
            tooltip=["exit:N", "temperature:N", alt.Tooltip("value:Q", format=".4f")],
        )
    )
    caption = "On validation images, before and after its temperature."
    return Figure(
        "exit_calibration", "How calibrated each exit is", caption, finished(chart, rows, 260)
    )


def recalibration_figure(experiment: Experiment) -> Figure | None:
    """Returns the accuracy of each width by the origin of its BN statistics."""
    means = mean_rows(
        experiment.counted,
        lambda run: [
            ((row["name"], origin), number(cell))
            for row in run.tables.get("recalibration", ())
            for origin, cell in row.items()
            if origin != "name"
        ],
    )
    if not means:
        return None
    y = alt.Y("value:Q", title="test accuracy", axis=alt.Axis(format=".1~%"))
    chart = marked_lines(means, "width", "origin", y, "BN statistics")
    caption = "With the BN statistics of the widest, and recalibrated on so many training images."
    title = "Widths before and after recalibration"
    return Figure("recalibration", title, caption, chart)


def confusion_figure(experiment: Experiment, notes: list[str]) -> Figure | None:
    """Returns the confusion matrix of the full network, over all seeds."""
    tables = [row for run in experiment.counted for row in run.tables.get("confusion", ())]
    names = dict.fromkeys(row["point"] for row in tables)
    if not names:
        return None
    point = "full" if "full" in names else list(names)[-1]
    counts: Counter[tuple[str, str]] = Counter()
    for row in tables:
        if row["point"] == point:
            counts[row["true"], row["predicted"]] += int(number(row["num_images"]) or 0)
    classes = _class_order({name for pair in counts for name in pair}, tables)
    if len(classes) > MAX_CLASSES:
        notes.append(f"No confusion matrix of {len(classes)} classes is drawn: see confusion.csv.")
        return None
    totals = Counter()
    for (true, _), count in counts.items():
        totals[true] += count
    rows = [
        {"true": t, "predicted": p, "images": n, "share": n / (totals[t] or 1)}
        for (t, p), n in counts.items()
    ]
    label = alt.Axis(labelAngle=-45 if max(map(len, classes)) > 3 else 0, labelLimit=90)
    base = alt.Chart().encode(
        x=alt.X("predicted:N", sort=classes, axis=label),
        y=alt.Y("true:N", sort=classes, axis=alt.Axis(labelLimit=90)),
    )
    cells = base.mark_rect(stroke="#eeeeee").encode(
        color=alt.Color("share:Q", title="share of the true class", legend=None).scale(
            scheme="blues", domain=[0, 1]
        ),
        tooltip=["true:N", "predicted:N", "images:Q", alt.Tooltip("share:Q", format=".1%")],
    )
    layers = [cells]
    if len(classes) <= MAX_COUNTED:
        ink = alt.condition("datum.share > 0.55", alt.value("white"), alt.value(INK))
        layers.append(base.mark_text(fontSize=11).encode(text="images:Q", color=ink))
    height = max(240, min(560, 26 * len(classes)))
    caption = f"Images by true and predicted class, at the point {point}, over all seeds."
    chart = finished(alt.layer(*layers), rows, height)
    return Figure("confusion", "Confusion matrix", caption, chart)


def _class_order(classes: set[str], rows: Sequence[Row]) -> list[str]:
    """Returns class names in the order of the file, numbers by value."""
    if all(name.isascii() and name.isdigit() and len(name) < MAX_DIGITS for name in classes):
        return sorted(classes, key=int)
    order = dict.fromkeys(row["true"] for row in rows)
    return [*(name for name in order if name in classes), *sorted(classes - order.keys())]


def images_figure(experiment: Experiment, notes: list[str]) -> Figure | None:
    """Returns the easiest and hardest images of each exit, those of the first run that has any."""
    for run in experiment.counted:
        rows = [row for row in map(_tile, run.tables.get("exit_images", ())) if row]
        rows = [row | {"url": url} for row in rows if (url := thumbnail(run.path, row["file"]))]
        if rows:
            return _tiles(rows, run)
        if "exit_images" in run.tables:
            notes.append("The images that exit_images.csv names could not be read.")
    return None


def _tile(row: Row) -> dict[str, Any] | None:
    rank = number(row["rank"])
    if rank is None or rank > IMAGES_PER_ROW:
        return None
    true, predicted = row.get("true") or "", row.get("predicted") or ""
    return {
        "row": f"{row['exit']}, {row['kind']}",
        "rank": int(rank),
        "file": row["file"],
        "true": true,
        "predicted": predicted,
        "score": row.get("score") or "",
        "label": predicted if true == predicted else f"{predicted}, not {true}",
        "is_right": true == predicted,
    }


def _tiles(rows: list[dict[str, Any]], run: RunRecord) -> Figure:
    order = list(dict.fromkeys(row["row"] for row in rows))
    base = alt.Chart().encode(
        x=alt.X("rank:O", axis=None),
        y=alt.Y("row:N", sort=order, title=None, axis=alt.Axis(domain=False, ticks=False)),
    )
    size = alt.ExprRef("clamp(width / 8 - 4, 1, 52)")
    tooltip = ["row:N", "rank:O", "true:N", "predicted:N", "score:N"]
    images = base.mark_image(width=size, height=size, smooth=False, yOffset=-7).encode(
        url="url:N", tooltip=tooltip
    )
    names = base.mark_text(dy=29, fontSize=10, limit=70).encode(
        text="label:N", color=alt.condition("datum.is_right", alt.value(INK), alt.value("#B34700"))
    )
    chart = finished(alt.layer(images, names), rows, 76 * len(order))
    seed = "" if run.seed is None else f" (seed {run.seed})"
    caption = f"Test images that each exit was most and least sure of, with its answer{seed}."
    return Figure("exit_images", "Easiest and hardest images of each exit", caption, chart)


def thumbnail(folder: Path, file: str) -> str | None:
    """Returns an image of a run folder as a data URI; None if it is none, or lies elsewhere."""
    try:
        path = (folder / file).resolve()
        if not path.is_relative_to(folder.resolve()):
            return None
        with opened(path) as content, Image.open(content) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.thumbnail((THUMBNAIL, THUMBNAIL))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG", optimize=True)
    except Exception:  # what Pillow raises differs with the damage
        return None
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

"""Run folders that nothing has trained: every file of a run, with numbers by formula."""

import csv
import io
import math
import random
import zipfile
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

EXITS = ("exit1", "exit2", "full")
WIDTHS = ("w0.25", "w0.5", "full")
CLASSES = tuple(str(digit) for digit in range(10))
METHODS = {
    "resnet": ("full",),
    "densenet": ("full",),
    "stochastic_depth": ("full",),
    "slimmable": WIDTHS,
    "branchynet": (*EXITS, "adaptive_best"),
    "msdnet": (*EXITS, "ensemble2", "budget_exit2"),
}
"""By method, the names of its operating points."""
HOSTILE = "<script>alert('\"x\",&|')</script>\n[a](b) `c`, \u00fc\u4e2d\u202e"


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def checkpoint() -> bytes:
    """Returns an archive, as torch saves it, of nothing."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return content.getvalue()


def config(method: str, seed: int, **changes: Any) -> dict[str, Any]:
    """Returns a configuration; `changes` are `lr`, `data`, `epochs`, `paper`, `accelerator`."""
    return {
        "seed_everything": seed,
        "trainer": {
            "accelerator": changes.get("accelerator", "cpu"),
            "max_epochs": changes.get("epochs", 5),
            "callbacks": [{"class_path": "callbacks.ThroughputMonitor"}],
        },
        "model": {
            "class_path": f"lightning_modules.Lit{method.title().replace('_', '')}",
            "init_args": {"optimizer": {"init_args": {"lr": changes.get("lr", 0.1)}}, "seed": seed},
        },
        "data": {
            "class_path": f"datamodules.{changes.get('data', 'Digits')}DataModule",
            "init_args": {"batch_size": 64, "seed": seed},
        },
        "checkpoint": {"select": "best", "monitor": "val/acc"},
        "paper": changes.get("paper"),
    }


def accuracy(method: str, index: int, seed: int) -> float:
    """Returns a test accuracy by formula."""
    base = 0.80 + 0.02 * list(METHODS).index(method)
    return min(1.0, base + 0.03 * index + 0.003 * math.sin(7.0 * seed + index))


def make_run(
    folder: Path,
    method: str = "msdnet",
    seed: int = 0,
    points: Sequence[str] | None = None,
    classes: Sequence[str] = CLASSES,
    is_old: bool = False,
    gpu: str = "",
    **changes: Any,
) -> Path:
    """Writes a finished run.

    Args:
        folder: of the run.
        method: one of `METHODS`.
        seed: of the run.
        points: names of its operating points, instead of the method's.
        classes: names of the classes.
        is_old: whether it lacks what older versions did not write.
        gpu: that it was measured on.
        changes: see `config`.
    """
    folder.mkdir(parents=True)
    epochs = changes.get("epochs", 5)
    content = config(method, seed, **changes)
    if is_old:
        del content["paper"]
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    start = {
        "started": "2026-01-02T03:04:05+00:00",
        "command": f"main.py fit -c experiments/{method}/x.yaml",
        "git_commit": "0123456789abcdef",
        "git_changes": False,
        "cpu": "x86_64, 2 cores",
        "gpus": [gpu] if gpu else [],
    }
    (folder / "attempts.yaml").write_text(yaml.safe_dump([start]))
    (folder / "finished.yaml").write_text(yaml.safe_dump({"max_epochs": epochs, "tested": True}))
    (folder / "lock").touch()
    for name in ("last", "best"):
        (folder / f"{name}.ckpt").write_bytes(checkpoint())
    names = METHODS[method] if points is None else points
    write_points(folder, method, seed, names, is_old)
    write_metrics(folder, names, epochs)
    if method == "stochastic_depth":
        rows = [(b, 1 - b / 12, 1 - b / 12 + 0.01 * (-1) ** b) for b in range(1, 7)]
        header = ("block", "survival_prob", "survival_rate")
        write_csv(folder / "survival.csv", header, rows)
    if method == "slimmable":
        rows = [(name, 0.1 + 0.2 * i, 0.6 + 0.1 * i, 0.7 + 0.1 * i) for i, name in enumerate(names)]
        header = ("name", "of the widest", "64 images", "1024 images")
        write_csv(folder / "recalibration.csv", header, rows)
    if method in ("branchynet", "msdnet"):
        write_exits(folder, names[-1])
    if not is_old:
        write_confusion(folder, classes)
        if method in ("branchynet", "msdnet"):
            write_images(folder, classes)
            header = ("exit", "temperature", "ece_before", "ece_after")
            rows = [(e, 1.5, 0.1 - 0.02 * i, 0.02) for i, e in enumerate(EXITS)]
            write_csv(folder / "exit_calibration.csv", header, rows)
    return folder


def write_points(folder: Path, method: str, seed: int, names: Sequence[str], is_old: bool) -> None:
    header = ["name", "test_acc", "macs", "params", "ms_per_image"]
    rows = []
    for i, name in enumerate(names):
        cost = 10**6 * (i + 1) * (2 + list(METHODS).index(method))
        row = [name, accuracy(method, i, seed), cost, cost // 100, cost / 1e7 + 0.001 * seed]
        rows.append(row if is_old else [*row, 0.99, 0.02 + 0.001 * i])
    header += [] if is_old else ["test_top5", "ece"]
    write_csv(folder / "operating_points.csv", header, rows)


def write_metrics(folder: Path, names: Sequence[str], epochs: int) -> None:
    accs = [f"val/acc_{name}" for name in names if name != "full"] if len(names) > 1 else []
    header = ["step", "train/loss", "epoch", "val/loss", "val/acc", *accs]
    header += ["gradients/first_conv", "train/loss_epoch", "train/acc", "test/acc"]
    empty = [""] * len(accs)
    rows: list[list[Any]] = []
    for epoch in range(epochs):
        fade = math.exp(-epoch / epochs * 3)
        step = 10 * epoch + 9
        rows.append([step, 2.3 * fade, float(epoch)])
        of_points = [0.9 - 0.5 * fade - 0.02 * i for i in range(len(accs))]
        rows.append([step, "", float(epoch), 2.4 * fade + 0.1, 0.95 - 0.6 * fade, *of_points])
        rows.append([step, "", float(epoch), "", "", *empty, 1e-3 * fade])
        rows.append([step, "", float(epoch), "", "", *empty, "", 2.2 * fade, 1 - 0.7 * fade])
    rows.append([10 * epochs, "", "", "", "", *empty, "", "", "", 0.9])
    width = len(header)
    write_csv(folder / "metrics.csv", header, [[*row, *[""] * (width - len(row))] for row in rows])


def write_exits(folder: Path, point: str) -> None:
    shares = (0.5, 0.3, 0.2)
    rows = [(point, e, 0.5, s, 0.99 - 0.1 * i) for i, (e, s) in enumerate(zip(EXITS, shares))]  # noqa: B905
    write_csv(folder / "exits.csv", ("point", "exit", "threshold", "share", "acc"), rows)
    edges = [math.log(10) * i / 20 for i in range(21)]
    rows = [
        (low, high, *(round(300 * math.exp(-i / (k + 1))) for k in range(3)))
        for i, (low, high) in enumerate(pairwise(edges))
    ]
    write_csv(folder / "exit_entropy.csv", ("from", "to", *EXITS), rows)
    header = ("threshold_exit1", "threshold_exit2", "test_acc", "macs")
    rows = [(i / 10, i / 10, 0.95 - 0.01 * i, 10**7 - 8 * 10**5 * i) for i in range(11)]
    write_csv(folder / "exit_curve.csv", header, rows)


def write_confusion(folder: Path, classes: Sequence[str]) -> None:
    rows = []
    for i, true in enumerate(classes):
        rows.append(("full", true, true, 30 - i % 7))
        if i % 7:
            rows.append(("full", true, classes[(i + 3) % len(classes)], i % 7))
    write_csv(folder / "confusion.csv", ("point", "true", "predicted", "num_images"), rows)


def write_images(folder: Path, classes: Sequence[str]) -> None:
    images = folder / "exit_images"
    images.mkdir()
    draw = random.Random(0)
    rows = []
    for exit_name in EXITS:
        for kind in ("easiest", "hardest"):
            for rank in range(1, 6):
                file = f"exit_images/{exit_name}_{kind}_{rank}.png"
                pixels = bytes(draw.randrange(256) for _ in range(64))
                Image.frombytes("L", (8, 8), pixels).save(folder / file)
                true = classes[rank % len(classes)]
                guess = classes[(rank + (kind == "hardest")) % len(classes)]
                rows.append((exit_name, kind, rank, file, true, guess, 1 / rank))
    header = ("exit", "kind", "rank", "file", "true", "predicted", "score")
    write_csv(folder / "exit_images.csv", header, rows)


def make_all(root: Path, seeds: Sequence[int] = (0, 1), **changes: Any) -> Path:
    """Writes a run of every method and seed below `root`, as `fit` arranges them."""
    for method in METHODS:
        for seed in seeds:
            make_run(root / method / "x" / f"seed{seed}", method, seed, **changes)
    return root

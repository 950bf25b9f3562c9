"""What early exits did: who left where, how sure, how right, and what it saved."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from callbacks.exit_images import write_exit_images
from callbacks.outlets import Column, Table, log_metrics, log_panels
from callbacks.sampled_images import SampledTestImages
from networks import (
    TIMED_BATCH_SIZE,
    CapturedInference,
    EarlyExit,
    early_exit,
    time_points,
)

NUM_BINS = 20  # of an entropy histogram
MAX_TIMED = 43  # points of the curve
SPEED = (
    Column("point", "name"),
    Column("branches", "branches"),
    Column("test_acc", "accuracy", ".2%"),
    Column("macs", "MACs", ",.0f"),
    Column("macs_gain", "gain in MACs", ".2f"),
    Column("ms_per_image", "ms", ".3f"),
    Column("ms_gain", "in time", ".2f"),
)
CALIBRATION = (
    *("exit", "temperature", "ece_before", "ece_after", "nll_before", "nll_after"),
    *("num_images", "held_out"),
)
HELD_OUT = (
    *("point", "num_images", "acc", "last_acc", "change", "change_low", "change_high", "macs"),
)


class ExitStatistics(SampledTestImages):
    """Logs what happens at every exit, and after a test compares the network with its trunk.

    After every validation, to every logger, for the thresholds that the module prefers:
    `exits/share_<exit>` (of the images that leave there), `exits/acc_<exit>` (their accuracy) and
    `exits/entropy_<exit>` (mean over all images). After the test that follows a fit, in the run
    folder and W&B (otherwise in files whose names end in `_again`, see `SampledTestImages`):

        exits.csv            share and accuracy of those who leave at each exit, by operating point
        exit_entropy.csv     histogram of the entropy (natural logarithm) at each exit
        exit_curve.csv       accuracy against mean MACs for the module's curve of thresholds
        exit_curve_speed.csv accuracy against measured milliseconds per image, in a batch of 64, for
                             at most 43 points of the curve
        exit_images.csv      the 8 images that each exit was surest of, and the 8 it was least sure
                             of, of those that leave there; in `exit_images` as PNG. With several
                             processes, of the images of the first
        exit_speed.csv       each operating point against the trunk alone; also printed
        exit_calibration.csv of modules that fit temperatures: what each does to calibration error
                             (ECE) and mean negative log-likelihood (NLL) of its exit, on validation
                             images, and whether these are others than it was fitted to
        exit_held_out.csv    of modules that halve their validation data: accuracy, MACs and shares
                             of each point on the half that its thresholds were not found on, and
                             the 95% interval of what leaving early changes in the accuracy

    The last, as the paper has it, is about one image at a time: accuracy, MACs and milliseconds per
    image, and how many times less that is than the trunk needs, which is this network's last exit
    without the others. Once as it is (branches "run"), and once as if branches cost nothing
    ("free"), which is what BranchyNet's authors measured.

    Where the module's `capture` says so, exits and trunk are recorded for it. Of a network of
    several widths `exits`, `exit_calibration` and `exit_held_out` have all points, and the rest is
    about the widest.

    Reads of the module: `capture`, `net`, `answering_net`, `exit_names`, `has_early_exits`,
    `exit_criterion`, `exit_thresholds`, `exit_curve`, `exit_outputs`, `exit_costs`, `exit_states`,
    `early_points()`, `test_answers`, `measure()`, `exits_taken()`; of the data module:
    `load_eval()`, `class_names`.

    Raises:
        ValueError: the module has no exits.
    """

    only_observes = True

    def __init__(self) -> None:
        super().__init__(TIMED_BATCH_SIZE)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "exit_names"):
            raise ValueError(
                f"ExitStatistics has nothing to log of {type(pl_module).__name__}: "
                "remove it from trainer.callbacks"
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or not pl_module.exit_thresholds:
            return
        thresholds = next(iter(pl_module.exit_thresholds.values()))
        entropies = pl_module.exit_outputs.entropies.mean(0).tolist()
        metrics: dict[str, float] = {}
        for name, mean, (share, accuracy) in zip(
            pl_module.exit_names, entropies, exit_shares(pl_module, thresholds), strict=True
        ):
            metrics |= {f"exits/share_{name}": share, f"exits/entropy_{name}": mean}
            if accuracy is not None:
                metrics[f"exits/acc_{name}"] = accuracy
        log_metrics(trainer, metrics)

    @torch.no_grad()
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or not pl_module.has_early_exits:
            return
        with trainer.precision_plugin.forward_context():
            images = self.take_images()
            speed, curve_speed = speed_rows(pl_module, images), curve_speed_rows(pl_module, images)
        histogram, curve = entropy_rows(pl_module), curve_rows(pl_module)
        names = pl_module.exit_names
        thresholds = (f"threshold_{name}" for name in names[:-1])
        tables = {
            "exits": Table(("point", "exit", "threshold", "share", "acc"), exit_rows(pl_module)),
            "exit_entropy": Table(("from", "to", *names), histogram),
            "exit_curve": Table((*thresholds, "test_acc", "macs"), curve),
            "exit_curve_speed": Table(("test_acc", "macs", "ms_per_image"), curve_speed),
            "exit_speed": Table(SPEED, speed),
            "exit_calibration": Table(CALIBRATION, calibration_rows(pl_module)),
            "exit_held_out": Table(
                (*HELD_OUT, *(f"share_{name}" for name in names)), held_out_rows(pl_module)
            ),
        }
        tables = {name: table for name, table in tables.items() if table.rows}
        for name, table in tables.items():
            table.write(self.path(trainer, name))
        write_exit_images(trainer, pl_module, self.num_tested, self.path(trainer, "exit_images"))
        tables["exit_speed"].show("early exit, one image at a time")
        log_panels(trainer, lambda wandb: panels(wandb, names, curve, curve_speed, histogram))


def exit_shares(
    module: LightningModule, thresholds: Sequence[float], group: str = ""
) -> list[tuple[float, float | None]]:
    """Returns for each exit the share of the images that leave there, and their accuracy."""
    outputs = module.exit_states[group].outputs
    taken = module.exits_taken(thresholds, group)
    shares = []
    for index in range(outputs.correct.shape[1]):
        here = taken == index
        right = outputs.correct[here, index].double().mean().item() if here.any() else None
        shares.append((here.double().mean().item(), right))
    return shares


def exit_rows(module: LightningModule) -> list[tuple]:
    return [
        (point, name, threshold, share, accuracy)
        for point, (group, thresholds) in module.early_points().items()
        for name, threshold, (share, accuracy) in zip(
            module.exit_names,
            [*thresholds, None],
            exit_shares(module, thresholds, group),
            strict=True,
        )
    ]


def calibration_rows(module: LightningModule) -> list[list]:
    known = (row for state in module.exit_states.values() for row in state.found.calibration)
    return [[row[column] for column in CALIBRATION] for row in known]


def held_out_rows(module: LightningModule) -> list[list]:
    """Returns a row for each point whose thresholds the latest validation has tried."""
    rows = []
    for point, (group, thresholds) in module.early_points().items():
        found = module.exit_states[group].found.held_out
        known = [row for row in found if row["thresholds"] == thresholds]
        for row in known[:1]:
            named = {"point": point, **row}
            rows.append([*(named[column] for column in HELD_OUT), *row["shares"]])
    return rows


def entropy_rows(module: LightningModule) -> list[list[float]]:
    """Returns one row per bin of [0, ln C]: its bounds, and the images of each exit in it."""
    limit = torch.tensor(module.net.num_classes).log().item()
    edges = torch.linspace(0, limit, NUM_BINS + 1).tolist()
    # Rounding may put a uniform distribution above ln C.
    entropies = module.exit_outputs.entropies.float().clamp(0, limit)
    counts = [torch.histc(column, NUM_BINS, 0, limit).tolist() for column in entropies.T]
    return [list(row) for row in zip(edges[:-1], edges[1:], *counts, strict=True)]


def curve_rows(module: LightningModule) -> list[tuple]:
    return [(*thresholds, *module.measure(thresholds)) for thresholds in module.exit_curve]


def curve_speed_rows(module: LightningModule, images: Tensor) -> list[tuple]:
    """Returns accuracy, mean MACs and measured milliseconds per image along the curve."""
    curve = module.exit_curve[:: max(1, math.ceil(len(module.exit_curve) / MAX_TIMED))]
    contenders = {
        str(index): partial(
            early_exit, module.answering_net, thresholds=thresholds, criterion=module.exit_criterion
        )
        for index, thresholds in enumerate(curve)
    }
    times = time_points(contenders, [images]).values()
    return [(*module.measure(point), ms) for point, ms in zip(curve, times, strict=True)]


def speed_rows(module: LightningModule, images: Tensor) -> list[tuple]:
    """Returns the trunk and every point of thresholds, in the columns of `SPEED`."""
    net, costs, criterion = module.answering_net, module.exit_costs, module.exit_criterion
    answers = {
        point: EarlyExit(net, thresholds, criterion, module.capture)
        for point, thresholds in module.exit_thresholds.items()
    }
    for answer in answers.values():
        answer(images[:1])
    paths = [path_to(net, index) for index in range(net.num_exits)]
    are_recorded = [answer.is_recorded for answer in answers.values()]
    if module.capture != "none" and are_recorded and all(are_recorded):
        paths = [CapturedInference(path, images[:1]) for path in paths]
    contenders: dict[str, Callable[[Tensor], object]] = {"trunk": one_by_one(paths[-1])}
    for point, answer in answers.items():
        contenders[point] = one_by_one(answer)
        contenders[f"{point}, free"] = trunk_only(paths, answer(images).exit_index)
    ms = time_points(contenders, [images])

    accuracy = module.exit_outputs.correct[:, -1].double().mean().item()
    rows: list[tuple] = [("trunk", None, accuracy, costs.trunk, 1.0, ms["trunk"], 1.0)]
    for point, thresholds in module.exit_thresholds.items():
        accuracy, macs = module.measure(thresholds)
        taken = module.exits_taken(thresholds)
        free = torch.tensor(costs.without_branches, dtype=torch.float64)[taken].mean().item()
        sides = ("run", macs, ms[point]), ("free", free, ms[f"{point}, free"])
        for branches, cost, time in sides:
            gains = (cost, costs.trunk / cost, time, ms["trunk"] / time)
            rows.append((point, branches, accuracy, *gains))
    return rows


def one_by_one(function: Callable[[Tensor], object]) -> Callable[[Tensor], None]:
    """Returns a function that gives `function` one image at a time."""

    def run(images: Tensor) -> None:
        for image in images.split(1):
            function(image)

    return run


def path_to(net: Any, index: int) -> Callable[[Tensor], object]:
    """Returns a function that takes images to an exit, and asks none but the last."""

    def run(images: Tensor) -> object:
        state = images
        for stage in net.stages[: index + 1]:
            state = stage(state)
        return net.exits[index](state) if index == net.num_exits - 1 else state

    return run


def trunk_only(
    paths: Sequence[Callable[[Tensor], object]], exit_index: Tensor
) -> Callable[[Tensor], None]:
    """Returns a function that sends each image along the path to the exit that it takes."""
    taken = exit_index.tolist()

    def run(images: Tensor) -> None:
        for image, index in zip(images.split(1), taken, strict=True):
            paths[index](image)

    return run


def panels(
    wandb: Any,
    names: Sequence[str],
    curve: list[tuple],
    curve_speed: list[tuple],
    histogram: list[list[float]],
) -> dict[str, Any]:
    """Returns plots of accuracy against MACs and milliseconds, and the entropies of each exit."""
    macs = Table(("macs", "test_acc"), ((macs, acc) for *_, acc, macs in curve)).to_wandb()
    ms = Table(("ms", "test_acc"), ((ms, acc) for acc, _, ms in curve_speed)).to_wandb()
    edges = [row[0] for row in histogram] + [histogram[-1][1]]
    plots = {
        "exits/acc_against_macs": wandb.plot.line(
            macs, "macs", "test_acc", title="accuracy against mean MACs"
        ),
        "exits/acc_against_ms": wandb.plot.line(
            ms, "ms", "test_acc", title="accuracy against milliseconds per image"
        ),
    }
    for name, counts in zip(names, list(zip(*histogram, strict=True))[2:], strict=True):
        plots[f"exits/entropy_histogram_{name}"] = wandb.Histogram(np_histogram=(counts, edges))
    return plots

"""What exits made of the images of an evaluation, and what is said of them besides accuracy."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.answers import PointAnswers
from lightning_modules.metrics import FULL
from networks import (
    MAX_GRID,
    Criterion,
    ExitCosts,
    Screening,
    entropy,
    exit_score,
    exits_taken,
    scale_logits,
    screen_thresholds,
)

MAX_EXITS = int(math.log(MAX_GRID, 3)) + 1  # with one threshold to try, and that of nobody
NORMAL_95 = 1.959964
"""Standard deviations of a normal distribution between which 95% of it lie."""

Parts = TypeVar("Parts", bound=tuple[Tensor, ...])


class ExitOutputs(NamedTuple):
    """What every exit (K of them) made of every image (N) of an evaluation; on the CPU."""

    scores: Tensor
    """(N, K), the criterion."""
    entropies: Tensor
    """(N, K), natural logarithm."""
    correct: Tensor
    """(N, K) bool."""

    @classmethod
    def of(cls, exits: Iterable[Tensor], labels: Tensor, criterion: Criterion) -> "ExitOutputs":
        """Returns what the logits (N, C) of each exit say, on their device."""
        parts = [
            (exit_score(logits, criterion), entropy(logits), logits.argmax(1) == labels)
            for logits in exits
        ]
        return cls(*(torch.stack(values, 1) for values in zip(*parts, strict=True)))


class ExitLogits(NamedTuple):
    """The logits of a validation, which temperatures are fitted to."""

    logits: Tensor
    """(N, K, C)."""
    labels: Tensor
    """(N,)."""


class HeldOut(NamedTuple):
    """How thresholds do on images that they were not found on."""

    thresholds: list[float]
    num_images: int
    acc: float
    last_acc: float
    """Of the last exit."""
    change: float
    """Of the accuracy by leaving early."""
    change_low: float
    change_high: float
    """Where it lies with 95% confidence."""
    macs: float
    shares: list[float]
    """Of the images that leave at each exit."""


class Calibration(NamedTuple):
    """What its temperature makes of an exit."""

    exit: str
    temperature: float
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    num_images: int
    held_out: bool
    """Whether these images are not those that the temperature was fitted to."""


class FoundThresholds(NamedTuple):
    """What a method makes of its validation data; empty before that."""

    points: dict[str, list[float]] = {}  # noqa: RUF012 (never changed)
    """Thresholds of the operating points, by name; the first is the method's own choice."""
    curve: list[list[float]] = []  # noqa: RUF012
    """Thresholds from cheap to expensive, for a curve of accuracy against MACs."""
    shares: list[list[float]] = []  # noqa: RUF012
    """Of the validation images that leave at each exit, for each point of the curve."""
    accuracies: list[float] = []  # noqa: RUF012
    macs: list[float] = []  # noqa: RUF012
    """Of each point of the curve, mean over the images that it was found on."""
    last_accuracy: float = 0.0
    """Of the last exit, on these images."""
    temperatures: list[float] = []  # noqa: RUF012
    """One per exit; empty without `calibrate_exits`."""
    calibration: list[dict[str, Any]] = []  # noqa: RUF012
    """A `Calibration` of each exit."""
    held_out: list[dict[str, Any]] = []  # noqa: RUF012
    """A `HeldOut` of each set of thresholds; empty without `halve_validation`."""

    @classmethod
    def of(
        cls, points: dict[str, list[float]], tried: Screening, rows: Tensor | slice = slice(None)
    ) -> "FoundThresholds":
        """Returns points, and as the curve some rows of what was tried."""
        parts = tried.thresholds, tried.shares, tried.accuracy, tried.cost
        return cls(points, *(values[rows].tolist() for values in parts))


@dataclass
class ExitState:
    """What evaluations tell of the exits of one network.

    Attributes:
        outputs: those of the latest evaluation, all ranks together.
        costs: MACs of stages and exits; known from the first evaluation on.
        found: by the latest validation.
        batches: outputs of the batches so far, where they were computed.
        logits: of a validation that fits temperatures; on the CPU.
    """

    outputs: ExitOutputs | None = None
    costs: ExitCosts | None = None
    found: FoundThresholds = FoundThresholds()  # noqa: RUF009 (never changed)
    batches: list[ExitOutputs] = field(default_factory=list)
    logits: list[ExitLogits] = field(default_factory=list)


class EarlyPoint(NamedTuple):
    """An operating point whose images leave early."""

    group: str
    """Of the network, see `MultiExitClassifier.exit_networks`."""
    thresholds: list[float]


def point_name(group: str, name: str) -> str:
    """Returns what a point of one of several networks is called: "w0.5_exit1", "w0.5_knee".

    Args:
        group: of the network; "" is the whole one, whose points have their names alone.
        name: of the point; `FULL` is called like the group.
    """
    if not group:
        return name
    return group if name == FULL else f"{group}_{name.removeprefix('adaptive_')}"


def check_num_exits(num_exits: int) -> None:
    """Raises ValueError if the grid of `screened_points` would be too large."""
    if num_exits > MAX_EXITS:
        raise ValueError(
            f"{num_exits} exits make a grid of thresholds that is too large: give the network "
            f"{MAX_EXITS} at most"
        )


def check_weights(weights: Sequence[float] | None, num_exits: int) -> list[float]:
    """Returns the weights of the losses of all exits; None: 1 each.

    Raises:
        ValueError: not one per exit.
    """
    weights = [1.0] * num_exits if weights is None else list(weights)
    if len(weights) != num_exits:
        raise ValueError(
            f"{len(weights)} exit_loss_weights for {num_exits} exits: give one per exit, shallow "
            "to deep"
        )
    return weights


def screened_points(
    outputs: ExitOutputs, costs: ExitCosts, criterion: Criterion
) -> FoundThresholds:
    """Returns BranchyNet's points: three of the front that its grid of thresholds has.

    "adaptive_lossless" is the cheapest that is at least as accurate as the last exit,
    "adaptive_knee" that farthest from the line between the ends, "adaptive_best" the most accurate.
    """
    screening = screen_thresholds(outputs.scores, outputs.correct, costs.leaving, criterion)
    of_last_exit = outputs.correct[:, -1].sum().item() / len(outputs.correct)
    points = {
        "adaptive_lossless": screening.cheapest(of_last_exit),
        "adaptive_knee": screening.knee,
        "adaptive_best": screening.front[-1],
    }
    return FoundThresholds.of(
        {name: screening.thresholds[point].tolist() for name, point in points.items()},
        screening,
        screening.front,
    )


def join_outputs(parts: Sequence[Parts]) -> Parts:
    """Returns the outputs of several batches or ranks as those of one, on the CPU."""
    return type(parts[0])(*(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)))


def gather_outputs(batches: Sequence[Parts], world_size: int) -> tuple[Parts, Tensor]:
    """Puts the outputs of all batches and ranks together, as if one process had made them.

    Returns:
        The outputs, rank after rank; and the places in them of images 0, 1, 2, ... of the data,
        which are dealt out to the ranks like cards.
    """
    ranks: list[Any] = [join_outputs(batches)]
    if world_size > 1:
        own, ranks = ranks[0], [None] * world_size
        torch.distributed.all_gather_object(ranks, own)
    numbers = [
        rank + world_size * torch.arange(len(outputs[0])) for rank, outputs in enumerate(ranks)
    ]
    return join_outputs(ranks), torch.cat(numbers).argsort()


def take(outputs: Parts, rows: Tensor | slice) -> Parts:
    """Returns the outputs of some images."""
    return type(outputs)(*(values[rows] for values in outputs))


def halves(num_images: int, in_half: bool) -> tuple[slice, slice]:
    """Returns the images to fit on and those to report on: every second one, or both times all.

    Raises:
        ValueError: they are too few.
    """
    if not in_half:
        return slice(None), slice(None)
    if num_images < 2:
        raise ValueError(
            f"halve_validation needs 2 validation images or more, and there are {num_images}: hold "
            "out more, or switch it off"
        )
    return slice(0, None, 2), slice(1, None, 2)


def calibrations(
    names: Sequence[str], temperatures: Sequence[float], outputs: ExitLogits, held_out: bool
) -> list[Calibration]:
    """Measures what temperatures do to every exit on some images; not on those without a score."""
    rows = []
    for index, (name, temperature) in enumerate(zip(names, temperatures, strict=True)):
        finite = outputs.logits[:, index].isfinite().all(1)
        before, labels = outputs.logits[finite, index].float(), outputs.labels[finite]
        both = before, scale_logits(before, temperature)
        errors = (PointAnswers.of(logits, labels).ece for logits in both)
        losses = (F.cross_entropy(logits.double(), labels).item() for logits in both)
        rows.append(Calibration(name, temperature, *errors, *losses, len(before), held_out))
    return rows


def held_out(
    outputs: ExitOutputs, thresholds: Sequence[float], costs: Sequence[float], criterion: Criterion
) -> HeldOut:
    """Measures thresholds on some images.

    Args:
        outputs: of the images.
        thresholds: one per exit but the last.
        costs: MACs of an image that leaves at each exit.
        criterion: of the scores.
    """
    taken = exits_taken(outputs.scores, thresholds, criterion)
    early, last = outputs.correct.gather(1, taken[:, None])[:, 0], outputs.correct[:, -1]
    shares = taken.bincount(minlength=len(costs)).double() / len(taken)
    macs = (shares * torch.tensor(costs, dtype=torch.float64)).sum().item()
    accuracy, last_accuracy = early.double().mean().item(), last.double().mean().item()
    return HeldOut(
        list(thresholds),
        len(taken),
        accuracy,
        last_accuracy,
        accuracy - last_accuracy,
        *paired_interval(int((early & ~last).sum()), int((last & ~early).sum()), len(taken)),
        macs,
        shares.tolist(),
    )


def paired_interval(num_gained: int, num_lost: int, num_images: int) -> tuple[float, float]:
    """Returns the 95% interval of a difference of accuracies on the same images.

    Wald's with half an image added to each of the four cells of the table (Agresti and Min,
    Statistics in Medicine 24, 2005): it has a width even where the accuracies are the same.

    Args:
        num_gained: images that only the first gets right.
        num_lost: images that only the second gets right.
        num_images: all of them.
    """
    gained, lost, total = num_gained + 0.5, num_lost + 0.5, num_images + 2
    difference = (gained - lost) / total
    width = NORMAL_95 * ((gained + lost) / total - difference**2) ** 0.5 / total**0.5
    return difference - width, difference + width

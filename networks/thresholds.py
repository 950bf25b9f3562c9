"""Finding the thresholds of a network with exits, on what its exits make of validation images.

Teerapittayanon et al., BranchyNet (ICPR 2016, arXiv 1709.01686): a grid of thresholds is screened
Huang et al., Multi-Scale Dense Networks (ICLR 2018, arXiv 1703.09844): shares of the exits, budgets

    share of exit k = q^k / sum_j q^j;    mean cost = sum_k share_k cost_k <= budget

Scores are entropies or confidences of N images at K exits, see `networks.early_exit`. The last exit
answers for all images that are left, so K exits take K - 1 thresholds.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from networks.early_exit import (
    Criterion,
    check_criterion,
    check_threshold,
    exits_taken,
    leaves,
)

ENTROPY_GRID = (
    *(1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.025, 0.05, 0.075),
    *(0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0),
)
"""Thresholds that BranchyNet's authors try at every exit."""
CONFIDENCE_GRID = (0.9999, 0.999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0)
"""Ours: the paper that leaves by confidence sets thresholds by fractions."""
MAX_GRID = 2_000_000
"""Points of a screening; some hundred bytes each."""


class Screening(NamedTuple):
    """Every point of a grid of thresholds, and those worth having."""

    thresholds: Tensor
    """(P, K - 1)."""
    accuracy: Tensor
    """(P,) share of the images that are right at the exit they take."""
    cost: Tensor
    """(P,) mean over the images, in the unit of the costs."""
    shares: Tensor
    """(P, K) share of the images that take each exit."""
    front: Tensor
    """Indices of the points that no cheaper or equally cheap point beats, by rising cost."""
    knee: int
    """Index of the point of the front that lies highest above the line between its two ends."""

    def cheapest(self, min_accuracy: float) -> int:
        """Returns the index of the cheapest point that has at least this accuracy.

        Raises:
            ValueError: none is.
        """
        good = self.front[self.accuracy[self.front] >= min_accuracy]
        if len(good) == 0:
            raise ValueError(
                f"no thresholds of the grid reach an accuracy of {min_accuracy}: the best is "
                f"{self.accuracy[self.front[-1]].item()}"
            )
        return int(good[0])


def screen_thresholds(
    scores: Tensor,
    correct: Tensor,
    costs: Sequence[float],
    criterion: Criterion = "entropy",
    candidates: Sequence[float] | None = None,
) -> Screening:
    """Tries all combinations of candidate thresholds over the exits, at once.

    An image's score falls between two neighbouring candidates at every exit, and what happens to
    it depends on nothing else. So the images are counted into cells, one for each combination of
    neighbours, and sums over cells give every point of the grid: its time does not grow with
    images times points.

    Args:
        scores: (N, K), criterion of each image at each exit; those of the last do not count.
        correct: (N, K) bool, whether each exit is right.
        costs: of an image that leaves at each exit, shallow to deep; any unit.
        criterion: what the scores are.
        candidates: thresholds to try at every exit; None: `ENTROPY_GRID` or `CONFIDENCE_GRID` (of
            many exits, only every second of them, or fourth, ...), and one at which none leaves.

    Raises:
        ValueError: shapes that do not fit, no images, a candidate outside the range of the
            criterion, or a grid of more than `MAX_GRID` points.
    """
    _check_screened(scores, correct, costs)
    num_images, num_axes = len(correct), len(costs) - 1
    candidates = _sort_candidates(candidates, num_axes, criterion)
    size = len(candidates)
    # rank: how many candidates are too strict for the image to leave.
    grid = torch.tensor(candidates, dtype=scores.dtype, device=scores.device)
    ranks = (~leaves(scores[:, :num_axes, None], grid, criterion)).sum(2)
    everyone = torch.ones_like(correct, dtype=torch.bool)
    counts = _count_leavers(ranks, everyone, size).double()
    accuracy = _count_leavers(ranks, correct.bool(), size).sum(1).double() / num_images
    # Divided last: sums of whole numbers are exact, so that equal costs are equal.
    cost = counts @ torch.tensor(costs, dtype=torch.float64, device=counts.device) / num_images
    points = torch.cartesian_prod(*[torch.tensor(candidates, dtype=torch.float64)] * num_axes)
    front = _front(cost, accuracy)
    return Screening(
        points.reshape(-1, num_axes),
        *(values.cpu() for values in (accuracy, cost, counts / num_images, front)),
        knee=int(front[_knee(cost[front], accuracy[front])]),
    )


def try_thresholds(
    scores: Tensor,
    correct: Tensor,
    costs: Sequence[float],
    thresholds: Sequence[Sequence[float]],
    criterion: Criterion = "confidence",
) -> Screening:
    """Tries some thresholds, one after the other; what `screen_thresholds` does with a whole grid.

    Args:
        scores, correct, costs, criterion: see `screen_thresholds`.
        thresholds: K - 1 numbers each.

    Raises:
        ValueError: shapes that do not fit, or no images.
    """
    _check_screened(scores, correct, costs)
    accuracy, counts = [], []
    for limits in thresholds:
        taken = exits_taken(scores, limits, criterion)
        accuracy.append(correct.gather(1, taken[:, None]).sum())
        counts.append(taken.bincount(minlength=len(costs)))
    accuracy = torch.stack(accuracy).double().cpu() / len(correct)
    counts = torch.stack(counts).double().cpu()
    cost = counts @ torch.tensor(costs, dtype=torch.float64) / len(correct)
    front = _front(cost, accuracy)
    return Screening(
        torch.tensor(thresholds, dtype=torch.float64),
        *(accuracy, cost, counts / len(correct), front),
        knee=int(front[_knee(cost[front], accuracy[front])]),
    )


def cheapest_within(accuracy: Sequence[float], cost: Sequence[float], min_accuracy: float) -> int:
    """Returns the index of the cheapest of several thresholds that are accurate enough.

    Of those that cost the same it is the most accurate.

    Args:
        accuracy, cost: of each; see `Screening`.
        min_accuracy: that it has at least, but for rounding.

    Raises:
        ValueError: none has.
    """
    good = [index for index, each in enumerate(accuracy) if each >= min_accuracy - 1e-9]
    if not good:
        raise ValueError(
            f"no thresholds reach an accuracy of {min_accuracy}: the best is {max(accuracy)}"
        )
    return min(good, key=lambda index: (cost[index], -accuracy[index]))


def _check_screened(scores: Tensor, correct: Tensor, costs: Sequence[float]) -> None:
    num_images, num_exits = correct.shape
    shapes = [(num_images, num_exits), (num_images, num_exits - 1)]
    if tuple(scores.shape) not in shapes or len(costs) != num_exits or num_exits < 2:
        raise ValueError(
            f"scores {tuple(scores.shape)}, correct {tuple(correct.shape)} and {len(costs)} costs "
            "do not fit: give (N, K), (N, K) and K, of two exits or more"
        )
    if num_images == 0:
        raise ValueError("no images to find thresholds with: hold out a validation split")


def _sort_candidates(
    candidates: Sequence[float] | None, num_axes: int, criterion: Criterion
) -> list[float]:
    """Returns the candidates from strict, at which few leave, to lax; None: see the screening."""
    check_criterion(criterion)
    if candidates is None:
        candidates = ENTROPY_GRID if criterion == "entropy" else CONFIDENCE_GRID
        while (len(candidates) + 2) ** num_axes > MAX_GRID and len(candidates) > 1:
            candidates = candidates[::2]
        candidates = (0.0 if criterion == "entropy" else math.inf, *candidates)
    for candidate in candidates:
        check_threshold("a candidate threshold", candidate, criterion)
    candidates = sorted(set(candidates), reverse=criterion == "confidence")
    if (len(candidates) + 1) ** num_axes > MAX_GRID:
        raise ValueError(
            f"{len(candidates)} candidates at {num_axes} exits make a grid that is too large: give "
            "fewer, or use thresholds_for_budget"
        )
    return candidates


def _count_leavers(ranks: Tensor, which: Tensor, size: int) -> Tensor:
    """Counts the images that leave at each exit, at every point of the grid.

    Args:
        ranks: (N, A), of each image at each exit but the last: 0..size.
        which: (N, A + 1) bool, the images that count at each exit.
        size: number of candidates.

    Returns:
        (size ** A, A + 1).
    """
    num_axes = ranks.shape[1]
    counts = []
    for index in range(num_axes + 1):
        cells = _count_cells(ranks[which[:, index], : index + 1], size)
        for axis in range(cells.dim()):
            below = cells.cumsum(axis)
            leave_here = axis == index
            # An image that leaves at this exit has left at none before.
            cells = below if leave_here else below.narrow(axis, size, 1) - below
            cells = cells.narrow(axis, 0, size)
        shape = [size] * cells.dim() + [1] * (num_axes - cells.dim())
        counts.append(cells.reshape(shape).expand([size] * num_axes).flatten())
    return torch.stack(counts, 1)


def _count_cells(ranks: Tensor, size: int) -> Tensor:
    """Counts the images (N, A) of each combination of ranks 0..size, in an array of A axes."""
    num_axes = ranks.shape[1]
    weights = torch.tensor([(size + 1) ** axis for axis in reversed(range(num_axes))])
    cells = (ranks * weights.to(ranks)).sum(1)
    counts = torch.bincount(cells, minlength=(size + 1) ** num_axes)
    return counts.reshape([size + 1] * num_axes)


def _front(cost: Tensor, accuracy: Tensor) -> Tensor:
    """Returns the indices of the points that raise the best accuracy so far, by rising cost."""
    order = accuracy.argsort(descending=True, stable=True)
    order = order[cost[order].argsort(stable=True)]
    rising = accuracy[order]
    best_before = torch.cat([rising.new_full((1,), -1), rising.cummax(0).values[:-1]])
    return order[rising > best_before]


def _knee(cost: Tensor, accuracy: Tensor) -> int:
    """Returns the position on a front of the point highest above the line between its ends."""
    if len(cost) == 1:
        return 0
    x = (cost - cost[0]) / (cost[-1] - cost[0])
    y = (accuracy - accuracy[0]) / (accuracy[-1] - accuracy[0])
    return int((y - x).argmax())


def thresholds_for_fractions(
    scores: Tensor, fractions: Sequence[float], criterion: Criterion = "confidence"
) -> list[float]:
    """Returns the thresholds at which given shares of the images take each exit (MSDNet's rule).

    At each exit the surest of the images that are left leave, ties included. Where a share is less
    than an image, or more than are left, none leaves. Use validation data, never test data.

    Args:
        scores: (N, K), or (N, K - 1).
        fractions: K numbers that sum to 1.
        criterion: what the scores are.

    Raises:
        ValueError: the fractions do not fit.
    """
    check_criterion(criterion)
    if scores.shape[1] not in (len(fractions), len(fractions) - 1):
        raise ValueError(
            f"{len(fractions)} fractions for scores {tuple(scores.shape)}: give one per exit"
        )
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-4):
        raise ValueError(f"fractions {list(fractions)} are no shares: they must sum to 1")
    is_entropy = criterion == "entropy"
    # In single precision, as in the released code.
    counts = (torch.tensor(fractions, dtype=torch.float32) * len(scores)).floor().long().tolist()
    inside = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    thresholds = []
    for index, count in enumerate(counts[:-1]):
        candidates = scores[inside, index]
        candidates = candidates[~candidates.isnan()].sort(descending=not is_entropy).values
        if count == 0 or count > inside.sum() or len(candidates) == 0:
            threshold = -math.inf if is_entropy else math.inf
        else:
            limit = candidates[min(count, len(candidates)) - 1]
            if is_entropy:  # an image at the limit leaves, and only those below a threshold do
                limit = limit.nextafter(limit.new_tensor(math.inf))
            threshold = limit.item()
        thresholds.append(threshold)
        inside &= ~leaves(scores[:, index], threshold, criterion)
    return thresholds


def geometric_fractions(ratio: float, num_exits: int) -> list[float]:
    """Returns MSDNet's shares of the exits: each exit has `ratio` times that of the one before."""
    # By logarithms in single precision, as in the released code: rounding can move an image.
    powers = (torch.tensor(ratio, dtype=torch.float32).log() * torch.arange(1, num_exits + 1)).exp()
    shares = powers / powers.sum()
    if not shares.isfinite().all():  # ratios that are too large or small for that
        shares = (math.log(ratio) * torch.arange(num_exits, dtype=torch.float64)).softmax(0)
    return shares.tolist()


def check_budget(budget: float, costs: Sequence[float]) -> None:
    """Raises ValueError if a mean cost per image is outside what the exits cost."""
    if not costs[0] <= budget <= costs[-1]:
        raise ValueError(
            f"a budget of {budget:,.10g} per image is outside what the exits cost: "
            f"{costs[0]:,.10g} to {costs[-1]:,.10g}"
        )


def thresholds_for_budget(
    scores: Tensor, costs: Sequence[float], budget: float, criterion: Criterion = "confidence"
) -> list[float]:
    """Returns the thresholds that spend at most `budget` per image on average, and almost that.

    The shares of the exits are geometric; their ratio is found by bisection.

    Args:
        scores: (N, K), of validation data.
        costs: of an image that leaves at each exit, shallow to deep.
        budget: mean cost per image, in the unit of the costs.
        criterion: what the scores are.

    Raises:
        ValueError: no images, or a budget outside what the exits span.
    """
    check_budget(budget, costs)
    if len(scores) == 0:
        raise ValueError("no images to find thresholds with: hold out a validation split")
    price = torch.tensor(costs, dtype=torch.float64)
    low, high = -50.0, 50.0  # of the logarithm of the ratio
    best, best_cost = None, -1.0
    for log_ratio in itertools.chain((low, high), itertools.repeat(None, 50)):
        middle = (low + high) / 2 if log_ratio is None else log_ratio
        fractions = geometric_fractions(math.exp(middle), len(costs))
        thresholds = thresholds_for_fractions(scores, fractions, criterion)
        cost = price[exits_taken(scores, thresholds, criterion).cpu()].mean().item()
        if best_cost < cost <= budget:
            best, best_cost = thresholds, cost
        if log_ratio is None:
            low, high = (middle, high) if cost <= budget else (low, middle)
    if best is None:
        raise ValueError(f"no thresholds keep to a budget of {budget:,.0f} per image: raise it")
    return best

"""Leaving a network early: when an image is sure of its class, and what is then never computed.

Teerapittayanon et al., BranchyNet (ICPR 2016, arXiv 1709.01686): entropy
Huang et al., Multi-Scale Dense Networks (ICLR 2018, arXiv 1703.09844): confidence, budgets

    state_k = stage_k(state_{k-1}),  logits_k = exit_k(state_k),  k = 1..K
    an image leaves at the first k where entropy(softmax(logits_k)) < T_k  (or confidence >= T_k)

A network with exits has `stages` and `exits`, separately callable, as many of one as of the other.
A state is a tensor, or any tree of tensors (tuples, lists, dicts), whose first dimension is the
batch. The last exit answers whoever is left, so K exits take K - 1 thresholds.

Differences from the released code:
    * BranchyNet's measures the trunk alone; here, too, branches are run only for the images that
      reach them, and they are part of what is counted and timed.
    * MSDNet's computes every exit for every image. Here an image that has left is never computed
      again.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from networks.cost import count_macs, wait_for
from networks.rows import take_rows

Criterion = Literal["entropy", "confidence"]
State = Any

ENTROPY_GRID = (
    *(1e-4, 5e-4, 1e-3, 5e-3, 0.01, 0.025, 0.05, 0.075),
    *(0.1, 0.25, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0),
)
"""Thresholds that BranchyNet's authors try at every exit."""
CONFIDENCE_GRID = (0.9999, 0.999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.0)
"""Ours: the paper that leaves by confidence sets thresholds by fractions."""
MAX_GRID = 2_000_000
"""Points of a screening; some hundred bytes each."""


class HasExits(Protocol):
    """What `early_exit` needs of a network."""

    @property
    def stages(self) -> Sequence[Callable[[State], State]]: ...

    @property
    def exits(self) -> Sequence[Callable[[State], Tensor]]: ...


class Staged(NamedTuple):
    """A network cut into stages, with an exit after each."""

    stages: Sequence[Callable[[State], State]]
    exits: Sequence[Callable[[State], Tensor]]


class MultiExitNetwork(nn.Module):
    """Base of networks with exits: a subclass sets `stages`, `exits` and `num_classes`.

    Attributes:
        stages: what runs between two exits, shallow to deep.
        exits: from the state after each stage to logits (N, num_classes). The last one, with all
            stages, is the trunk: the network without early exits.
        num_classes: number of logits.
    """

    num_classes: int
    stages: Sequence[Callable[[State], State]]
    exits: Sequence[Callable[[State], Tensor]]

    @property
    def num_exits(self) -> int:
        return len(self.exits)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns the logits (N, num_classes) of every exit, shallow to deep."""
        return run_all_exits(self, images)

    def in_early_exit(self, key: str) -> bool:
        """Tells whether a key of the state dict belongs to an exit other than the last."""
        return any(key.startswith(f"exits.{index}.") for index in range(self.num_exits - 1))

    def load_trunk(self, state_dict: dict[str, Tensor]) -> None:
        """Loads the weights of the trunk, the last exit included; early exits keep theirs.

        Args:
            state_dict: of a network of this class; what it holds of early exits is ignored.

        Raises:
            ValueError: it does not fit; names the first tensor that differs.
        """
        own, trunk = (
            {key: value for key, value in tensors.items() if not self.in_early_exit(key)}
            for tensors in (self.state_dict(), state_dict)
        )
        for key in [*own, *trunk]:
            here, there = (
                str(tuple(tensors[key].shape)) if key in tensors else "absent"
                for tensors in (own, trunk)
            )
            if here != there:
                raise ValueError(
                    f"the trunk's weights are of another network: {key} is {there} there and "
                    f"{here} here: give a checkpoint of the same network"
                )
        self.load_state_dict(trunk, strict=False)


def run_all_exits(network: HasExits, images: Tensor) -> list[Tensor]:
    """Returns the logits (N, num_classes) of every exit, shallow to deep."""
    state, logits = images, []
    for stage, exit_here in zip(network.stages, network.exits, strict=True):
        state = stage(state)
        logits.append(exit_here(state))
    return logits


def run_to_exit(network: HasExits, index: int, images: Tensor) -> Tensor:
    """Returns the logits (N, num_classes) of one exit; no other exit and no later stage runs.

    Args:
        network: has stages and exits.
        index: of the exit, from 0.
        images: (N, C, H, W).
    """
    state = images
    for stage in network.stages[: index + 1]:
        state = stage(state)
    return network.exits[index](state)


class ExitCosts(NamedTuple):
    """Costs per image of each stage and of each exit, shallow to deep: MACs or milliseconds."""

    stages: list[float]
    exits: list[float]

    @property
    def leaving(self) -> list[float]:
        """The cost of an image that leaves at each exit: all stages and all exits up to there."""
        both = (stage + exit_here for stage, exit_here in zip(*self, strict=True))
        return list(itertools.accumulate(both))

    @property
    def without_branches(self) -> list[float]:
        """The same if early exits were free: as BranchyNet's released code counts and times."""
        through = list(itertools.accumulate(self.stages))
        return [*through[:-1], through[-1] + self.exits[-1]]

    @property
    def trunk(self) -> float:
        """The cost of the network without early exits."""
        return self.without_branches[-1]


def count_exit_macs(network: HasExits, images: Tensor) -> ExitCosts:
    """Counts what every stage and every exit costs; see `count_macs`.

    Args:
        network: in evaluation mode.
        images: one image, (1, C, H, W).
    """
    state: State = images
    stages, exits = [], []
    for stage, exit_here in zip(network.stages, network.exits, strict=True):
        stages.append(count_macs(stage, state))
        with torch.no_grad():
            state = stage(state)
        exits.append(count_macs(exit_here, state))
    return ExitCosts(stages, exits)


def time_exits(network: HasExits, images: Tensor, num_rounds: int = 5) -> ExitCosts:
    """Measures the milliseconds per image of every stage and every exit, medians over rounds.

    Args:
        network: in evaluation mode.
        images: (N, C, H, W), computed together.
        num_rounds: how often each is run, after a first time that does not count.
    """
    steps = [part for pair in zip(network.stages, network.exits, strict=True) for part in pair]
    seconds: list[list[float]] = [[] for _ in steps]
    for _ in range(num_rounds + 1):
        state: State = images
        for index, step in enumerate(steps):
            wait_for(images.device)
            start = time.perf_counter()
            with torch.no_grad():
                result = step(state)
            wait_for(images.device)
            seconds[index].append(time.perf_counter() - start)
            if index % 2 == 0:
                state = result
    medians = [1000 * statistics.median(times[1:]) / len(images) for times in seconds]
    return ExitCosts(medians[::2], medians[1::2])


# --- criteria -------------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    """Returns the entropy (N,) of softmax(logits (N, C)), natural logarithm, in [0, ln C].

    0 ln 0 is 0. NaN where a logit is not finite, -inf included, so that such an image is never sure
    of anything. At least float32.
    """
    log_probs = _widen(logits).log_softmax(1)
    # Of a logit -inf this is 0 * -inf, which is NaN, and meant to be.
    return -torch.linalg.vecdot(log_probs.exp(), log_probs)


def confidence(logits: Tensor) -> Tensor:
    """Returns the largest probability (N,) of softmax(logits (N, C)); NaN as for `entropy`."""
    logits = _widen(logits)
    return logits.softmax(1).amax(1) + 0 * logits.amin(1)


def _widen(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def score(logits: Tensor, criterion: Criterion) -> Tensor:
    """Returns what a criterion compares with its thresholds: entropy or confidence, (N,)."""
    return entropy(logits) if criterion == "entropy" else confidence(logits)


def leaves(scores: Tensor, thresholds: float | Tensor, criterion: Criterion) -> Tensor:
    """Tells who leaves: entropy strictly below the threshold, or confidence at least as high.

    NaN never leaves.
    """
    return scores < thresholds if criterion == "entropy" else scores >= thresholds


def check_criterion(criterion: str) -> None:
    """Raises ValueError if the criterion is unknown."""
    if criterion not in get_args(Criterion):
        raise ValueError(
            f"exit criterion {criterion!r} is unknown: use {' or '.join(get_args(Criterion))}"
        )


def check_thresholds(thresholds: Sequence[float], num_exits: int) -> None:
    """Raises ValueError unless there is a number for every exit but the last."""
    if len(thresholds) != num_exits - 1:
        raise ValueError(
            f"{len(thresholds)} exit thresholds for {num_exits} exits: give {num_exits - 1}, "
            "shallow to deep; the last exit answers whoever is left"
        )
    for number, threshold in enumerate(thresholds, start=1):
        if math.isnan(threshold):
            raise ValueError(f"the threshold of exit {number} is NaN: give a number")


# --- inference ------------------------------------------------------------------------------------


class Answers(NamedTuple):
    """What `early_exit` returns."""

    logits: Tensor
    """(N, num_classes), of the exit that each image took."""
    exit_index: Tensor
    """(N,) int64, the index of that exit, from 0."""


@torch.no_grad()
def early_exit(
    network: HasExits,
    images: Tensor,
    thresholds: Sequence[float],
    criterion: Criterion = "entropy",
) -> Answers:
    """Classifies images; each leaves at the first exit where it is sure, and costs no more.

    After every exit the batch is compacted to the images that are still inside. When none leaves
    nothing is copied, and when all leave nothing more is run: that is all there is to a batch of
    one. There is one synchronisation with the device per exit.

    Args:
        network: in evaluation mode.
        images: (N, C, H, W).
        thresholds: one per exit but the last, shallow to deep.
        criterion: "entropy" leaves strictly below the threshold, "confidence" at or above it.

    Returns:
        The logits that a pass through the whole network has at the exit of each image, and the
        exit.

    Raises:
        ValueError: wrong thresholds, unknown criterion, or a network in training mode.
        FloatingPointError: an image has logits that are not finite at the last exit; at the others
            it is not sure and goes on.
    """
    stages, exits = network.stages, network.exits
    check_criterion(criterion)
    check_thresholds(thresholds, len(exits))
    if any(getattr(part, "training", False) for part in (network, *exits)):
        raise ValueError("early exit needs a network in evaluation mode: call network.eval()")

    state: State = images
    rows: Tensor | None = None  # of the images still inside; None: all
    for index, (stage, exit_here) in enumerate(zip(stages, exits, strict=True)):
        state = stage(state)
        logits = exit_here(state)
        if index == len(thresholds):
            _require_finite(logits)
            break
        leaving = leaves(score(logits, criterion), thresholds[index], criterion)
        num_leaving = int(leaving.sum() if len(leaving) != 1 else leaving)
        if num_leaving == len(leaving):
            break
        if num_leaving == 0:
            continue
        if rows is None:
            rows = torch.arange(len(images), device=logits.device)
            answers = Answers(logits.clone(), torch.zeros_like(rows))
        staying, going = (
            leaving.byte().argsort(stable=True).split([len(leaving) - num_leaving, num_leaving])
        )
        answers.logits[rows[going]] = logits[going].to(answers.logits.dtype)
        answers.exit_index[rows[going]] = index
        rows = rows[staying]
        state = pytree.tree_map_only(Tensor, partial(take_rows, rows=staying), state)

    if rows is None:
        return Answers(logits, torch.full((len(logits),), index, device=logits.device))
    answers.logits[rows] = logits.to(answers.logits.dtype)
    answers.exit_index[rows] = index
    return answers


def _require_finite(logits: Tensor) -> None:
    # The sum is sooner done, and may only be wrong in one way: it may overflow.
    if not math.isfinite(logits.sum()) and not logits.isfinite().all():
        num_bad = int((~logits.isfinite()).any(1).sum())
        raise FloatingPointError(
            f"{num_bad} of {len(logits)} images have logits that are not finite at the last exit: "
            "check these images and the weights"
        )


def exits_taken(scores: Tensor, thresholds: Sequence[float], criterion: Criterion) -> Tensor:
    """Returns the index (N,) of the exit that each image takes.

    Args:
        scores: (N, K), or without those of the last exit (N, K - 1), which do not count.
        thresholds: K - 1 numbers.
        criterion: what the scores are.

    Raises:
        ValueError: the thresholds do not fit the scores.
    """
    limits = torch.as_tensor(thresholds, dtype=scores.dtype, device=scores.device)
    if scores.shape[1] - len(limits) not in (0, 1):
        raise ValueError(f"{len(limits)} thresholds do not fit scores {tuple(scores.shape)}")
    leaving = leaves(scores[:, : len(limits)], limits, criterion)
    everyone = leaving.new_ones(len(scores), 1)
    return torch.cat([leaving, everyone], 1).byte().argmax(1)


# --- thresholds -----------------------------------------------------------------------------------


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
        """Returns the index of the cheapest point that is at least so accurate.

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
            many exits, only every second of them, or fourth, ...), and one at which nobody leaves.

    Raises:
        ValueError: shapes that do not fit, no images, a candidate that is NaN, or a grid of more
            than `MAX_GRID` points.
    """
    check_criterion(criterion)
    num_images, num_exits = correct.shape
    num_axes = num_exits - 1
    shapes = [(num_images, num_exits), (num_images, num_axes)]
    if tuple(scores.shape) not in shapes or len(costs) != num_exits or num_exits < 2:
        raise ValueError(
            f"scores {tuple(scores.shape)}, correct {tuple(correct.shape)} and {len(costs)} costs "
            "do not fit: give (N, K), (N, K) and K, of two exits or more"
        )
    if num_images == 0:
        raise ValueError("no images to find thresholds with: hold out a validation split")
    if candidates is None:
        candidates = ENTROPY_GRID if criterion == "entropy" else CONFIDENCE_GRID
        while (len(candidates) + 2) ** num_axes > MAX_GRID and len(candidates) > 1:
            candidates = candidates[::2]
        candidates = (0.0 if criterion == "entropy" else math.inf, *candidates)
    if any(math.isnan(candidate) for candidate in candidates):
        raise ValueError("a candidate threshold is NaN: give numbers")
    # From strict, at which few leave, to lax.
    candidates = sorted(set(candidates), reverse=criterion == "confidence")
    size = len(candidates)
    if (size + 1) ** num_axes > MAX_GRID:
        raise ValueError(
            f"{size} candidates at {num_axes} exits make a grid that is too large: give fewer, "
            "or use thresholds_for_budget"
        )

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


def _count_leavers(ranks: Tensor, which: Tensor, size: int) -> Tensor:
    """Counts who leaves where at every point of the grid.

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
            # Who leaves at this exit has left at none before.
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

    At each exit the surest of those who are left leave, ties included. Where a share is less than
    an image, or more than who is left, nobody leaves. Use validation data, never test data.

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
            if is_entropy:  # who is at the limit leaves, and to leave is to be strictly below
                limit = limit.nextafter(limit.new_tensor(math.inf))
            threshold = limit.item()
        thresholds.append(threshold)
        inside &= ~leaves(scores[:, index], threshold, criterion)
    return thresholds


def geometric_fractions(ratio: float, num_exits: int) -> list[float]:
    """Returns MSDNet's shares of the exits: each exit has `ratio` times that of the one before."""
    # From the larger end, so that no power overflows.
    powers = [min(ratio, 1 / ratio) ** index for index in range(num_exits)]
    if ratio > 1:
        powers.reverse()
    return [power / sum(powers) for power in powers]


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

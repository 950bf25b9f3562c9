"""Leaving a network early: when an image is sure of its class, and what is then never computed.

Teerapittayanon et al., BranchyNet (ICPR 2016, arXiv 1709.01686): entropy
Huang et al., Multi-Scale Dense Networks (ICLR 2018, arXiv 1703.09844): confidence

    state_k = stage_k(state_{k-1}),  logits_k = exit_k(state_k),  k = 1..K
    an image leaves at the first k where entropy(softmax(logits_k)) < T_k  (or confidence >= T_k)

A network with exits has `stages` and `exits`, separately callable, as many of one as of the other.
A state is a tensor, or any tree of tensors (tuples, lists, dicts), whose first dimension is the
batch. The last exit answers for all images that are left, so K exits take K - 1 thresholds;
`networks.thresholds` finds them.

Differences from the released code:
    * BranchyNet's measures the trunk alone; here, too, branches are run only for the images that
      reach them, and they are part of what is counted and timed.
    * MSDNet's computes every exit for every image. Here an image that has left is never computed
      again.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from networks.choices import check_choice
from networks.cost import NUM_TIMED_ROUNDS, count_macs, median_seconds
from networks.rows import take_rows

Criterion = Literal["entropy", "confidence"]
State = Any
EXPORT_REMEDY = (
    "early_exit cannot be traced or exported: later batches would leave where the example images "
    "left. Export each of network.stages and network.exits on its own, or a module whose forward "
    "is run_to_exit at one exit"
)


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
        trunk_prefix: what names in its state dict have before those of a trunk alone.
    """

    num_classes: int
    trunk_prefix: str = ""
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


@torch.no_grad()
def time_exits(network: HasExits, images: Tensor, num_rounds: int = NUM_TIMED_ROUNDS) -> ExitCosts:
    """Measures the milliseconds per image of every stage and every exit; see `median_seconds`.

    Args:
        network: in evaluation mode.
        images: (N, C, H, W), computed together.
        num_rounds: how often each is run, after a first time that does not count.
    """
    state: State = images
    steps: dict[str, Callable[[int], object]] = {}
    for index, (stage, exit_here) in enumerate(zip(network.stages, network.exits, strict=True)):
        steps[f"stage{index}"] = partial(_run, stage, state)
        state = stage(state)
        steps[f"exit{index}"] = partial(_run, exit_here, state)
    seconds = median_seconds(steps, num_rounds, images.device, num_warmup_rounds=1)
    milliseconds = [1000 * value / len(images) for value in seconds.values()]
    return ExitCosts(milliseconds[::2], milliseconds[1::2])


def _run(step: Callable[[State], object], state: State, _: int) -> object:
    return step(state)


# --- criteria -------------------------------------------------------------------------------------


def entropy(logits: Tensor) -> Tensor:
    """Returns the entropy (N,) of softmax(logits (N, C)), natural logarithm, in [0, ln C].

    0 ln 0 is 0. NaN where a logit is not finite, -inf included, so that such an image is never sure
    of anything. At least float32.
    """
    log_probs = widen(logits).log_softmax(1)
    # Of a logit -inf this is 0 * -inf, which is NaN, and meant to be.
    return -torch.linalg.vecdot(log_probs.exp(), log_probs)


def confidence(logits: Tensor) -> Tensor:
    """Returns the largest probability (N,) of softmax(logits (N, C)); NaN as for `entropy`."""
    logits = widen(logits)
    return logits.softmax(1).amax(1) + 0 * logits.amin(1)


def widen(logits: Tensor) -> Tensor:
    """Returns logits in float32 or more."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def exit_score(logits: Tensor, criterion: Criterion) -> Tensor:
    """Returns what a criterion compares with its thresholds: entropy or confidence, (N,)."""
    if criterion == "entropy":
        return entropy(logits)
    check_criterion(criterion)
    return confidence(logits)


def leaves(scores: Tensor, thresholds: float | Tensor, criterion: Criterion) -> Tensor:
    """Tells who leaves: entropy strictly below, or confidence at or above; NaN never does."""
    if criterion == "entropy":
        return scores < thresholds
    check_criterion(criterion)
    return scores >= thresholds


def check_criterion(criterion: str) -> None:
    """Raises ValueError if the criterion is unknown."""
    check_choice("exit criterion", criterion, Criterion)


def check_threshold(name: str, threshold: float, criterion: Criterion) -> None:
    """Raises ValueError unless a threshold is in the range of its criterion, or infinite.

    Entropies are 0 or more, confidences are from 0 to 1; at inf and -inf all images leave, or none.
    """
    is_entropy = criterion == "entropy"
    if math.isnan(threshold):
        raise ValueError(f"{name} is NaN: give a number")
    if not (math.isinf(threshold) or 0 <= threshold <= (math.inf if is_entropy else 1)):
        remedy = (
            "an entropy is 0 or more (at 0 or -inf none leaves, at inf all do)"
            if is_entropy
            else "a confidence is from 0 to 1 (at 0 all leave, at inf none does)"
        )
        raise ValueError(f"{name} is {threshold}: {remedy}")


def check_thresholds(thresholds: Sequence[float], num_exits: int, criterion: Criterion) -> None:
    """Raises ValueError unless there is one in range for every exit but the last.

    See `check_threshold`.
    """
    check_criterion(criterion)
    if len(thresholds) != num_exits - 1:
        raise ValueError(
            f"{len(thresholds)} exit thresholds for {num_exits} exits: give {num_exits - 1}, "
            "shallow to deep; the last exit answers for the rest"
        )
    for number, threshold in enumerate(thresholds, start=1):
        check_threshold(f"the threshold of exit {number}", threshold, criterion)


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
        ValueError: wrong thresholds, unknown criterion, a network in training mode, or a call while
            torch traces or exports.
        FloatingPointError: an image has logits that are not finite at the last exit; at the others
            it is not sure and goes on.
    """
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise ValueError(EXPORT_REMEDY)
    check_thresholds(thresholds, len(network.exits), criterion)
    check_evaluation_mode(network)
    return _leave_when_sure(network, images, thresholds, criterion)


def _leave_when_sure(
    network: HasExits, images: Tensor, thresholds: Sequence[float], criterion: Criterion
) -> Answers:
    state: State = images
    rows: Tensor | None = None  # of the images still inside; None: all
    for index, (stage, exit_here) in enumerate(zip(network.stages, network.exits, strict=True)):
        state = stage(state)
        logits = exit_here(state)
        if index == len(thresholds):
            _require_finite(logits)
            break
        leaving = leaves(exit_score(logits, criterion), thresholds[index], criterion)
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


def check_evaluation_mode(network: HasExits) -> None:
    """Raises ValueError if the network is in training mode."""
    if any(getattr(part, "training", False) for part in (network, *network.exits)):
        raise ValueError("early exit needs a network in evaluation mode: call network.eval()")


def _require_finite(logits: Tensor) -> None:
    # The sum is faster, and wrong in one way alone: it can overflow.
    if not math.isfinite(logits.sum()) and not logits.isfinite().all():
        raise not_finite(int((~logits.isfinite()).any(1).sum()), len(logits))


def not_finite(num_bad: int, num_images: int) -> FloatingPointError:
    return FloatingPointError(
        f"{num_bad} of {num_images} images have logits that are not finite at the last exit: "
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

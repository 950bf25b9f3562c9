"""Learning rate schedules that torch does not have, and what a schedule must be."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
)

from networks import check_counts

Interval = Literal["epoch", "step"]
LEAST = {
    **dict.fromkeys(("T_max", "T_0", "step_size", "total_iters", "total_steps"), 1),
    **dict.fromkeys(("eta_min", "power"), 0),
}
"""The least that arguments may be: below it torch divides by 0, or the rate is negative."""
MANY_STEPS = 10**9
"""More than any training has."""


class WarmupMultiStepLR(LambdaLR):
    """A tenth of the optimizer's rate at first, then all of it, divided by 10 at each milestone.

    Epochs or optimizer steps, according to the module's `lr_interval`, counted from 0. He et al.
    warm ResNet-110 up at a tenth of the rate for about 400 steps; Huang et al. the 1202 layers for
    10 epochs.

    Args:
        optimizer: holds the base rate.
        milestones: where the rate falls.
        warmup: length of the warm-up.

    Raises:
        ValueError: a length that is no whole number.
    """

    def __init__(self, optimizer: Optimizer, milestones: Sequence[int], warmup: int):
        def factor(time: int) -> float:
            if time < warmup:
                return 0.1
            return 0.1 ** sum(time >= milestone for milestone in milestones)

        _check_time(self, 0, warmup=warmup)
        self.milestones = list(milestones)
        self.warmup = warmup
        super().__init__(optimizer, factor)


class FittedLR(LambdaLR):
    """Base of schedules that are as long as the training, unless told otherwise.

    Args:
        optimizer: holds the base rate.
        length: epochs or optimizer steps, according to the module's `lr_interval`; None: as many as
            the training has, whatever that is.

    Raises:
        ValueError: a wrong length, or a run goes on with another one, which is another schedule.
    """

    def __init__(self, optimizer: Optimizer, length: int | None):
        if length is not None:
            _check_time(self, 1, length=length)
        self.length = length
        super().__init__(optimizer, lambda time: self.factor(time))

    def factor(self, time: int) -> float:
        """Returns what the base rate is multiplied by, 1 while the length is not known."""
        raise NotImplementedError("each schedule has its own curve")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        there, here = state_dict["length"], self.length
        if there != here:
            raise ValueError(
                f"the length of {type(self).__name__} was {there} in this run, and is {here} now: "
                f"pass another --run_dir, or set it to {there}"
            )
        super().load_state_dict(state_dict)


class LinearDecayLR(FittedLR):
    """Falls linearly from the optimizer's rate to 0, over the whole training unless told otherwise.

    Args:
        optimizer, length: see `FittedLR`.
    """

    def __init__(self, optimizer: Optimizer, length: int | None = None):
        super().__init__(optimizer, length)

    def factor(self, time: int) -> float:
        return 1.0 if self.length is None else max(0.0, 1 - time / self.length)


class WarmupCosineLR(FittedLR):
    """Rises linearly to the optimizer's rate, then falls to 0 along half a cosine.

    At time t, with a warm-up of w and a length of L: (t + 1) / (w + 1) of the rate for t < w, then
    (1 + cos(pi (t - w) / (L - w))) / 2. As torch's `LinearLR` followed by its `CosineAnnealingLR`
    (Loshchilov and Hutter, arXiv 1608.03983; Goyal et al., arXiv 1706.02677).

    Args:
        optimizer, length: see `FittedLR`.
        warmup: length of the warm-up, in the same unit.

    Raises:
        ValueError: a length that is no whole number.
    """

    def __init__(self, optimizer: Optimizer, warmup: int = 0, length: int | None = None):
        _check_time(self, 0, warmup=warmup)
        self.warmup = warmup
        super().__init__(optimizer, length)

    def factor(self, time: int) -> float:
        if time < self.warmup:
            return (time + 1) / (self.warmup + 1)
        if self.length is None:
            return 1.0
        share = (time - self.warmup) / (self.length - self.warmup)
        return (1 + math.cos(math.pi * min(share, 1.0))) / 2


def make(name: str, factory: Callable[[Any], Any], given: Any) -> Any:
    """Returns what a factory of the user's makes of parameters, or of an optimizer.

    Raises:
        ValueError: its arguments are wrong.
    """
    try:
        made = factory(given)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be made: {reason}: correct its arguments") from error
    for argument, value in getattr(made, "defaults", {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"{argument} of {type(made).__name__} is {value}: give a finite number"
            )
    return made


def check_schedule(scheduler: Any, training_length: float | None, interval: Interval) -> None:
    """Gives a schedule the length of the training, and warns of one that has another length.

    Args:
        scheduler: what the user's factory has made.
        training_length: how often it is stepped; None: not known.
        interval: what a step of it is.

    Raises:
        ValueError: it is no schedule of the step or the epoch, it makes the rate negative, or it
            has no length and the training none either.
    """
    name = type(scheduler).__name__
    _check_arguments(scheduler, name)
    if isinstance(scheduler, FittedLR) and scheduler.length is None:
        if training_length is None or math.isinf(training_length):
            raise ValueError(
                f"{name} is as long as the training, whose length is not known: set its length, or "
                "trainer.max_epochs"
            )
        scheduler.length = int(training_length)
    if isinstance(scheduler, WarmupCosineLR) and scheduler.warmup >= scheduler.length:
        raise ValueError(
            f"warmup of {name} is {scheduler.warmup}, and its length {scheduler.length} "
            f"{interval}s: give a shorter one"
            + (", or set lr_interval to step" if interval == "epoch" else "")
        )
    if isinstance(scheduler, OneCycleLR) and (training_length or 0) > scheduler.total_steps:
        raise ValueError(
            f"OneCycleLR is made for {scheduler.total_steps} {interval}s and the training has "
            f"{training_length}: set total_steps to that"
        )
    last_change, is_exact = _last_change(scheduler)
    if last_change is None or training_length is None or math.isinf(training_length):
        return
    has_milestones = bool(getattr(scheduler, "milestones", ()))
    is_late = last_change > training_length or (has_milestones and last_change == training_length)
    if is_late or (is_exact and last_change != training_length):
        rank_zero_warn(
            f"{name} changes the rate until {interval} {last_change}, and the training ends after "
            f"{training_length}: change one of the two numbers"
        )


def _check_time(scheduler: LRScheduler, least: int, **times: int) -> None:
    names = {f"{name} of {type(scheduler).__name__}": time for name, time in times.items()}
    check_counts(least, MANY_STEPS, **names)


def _check_arguments(scheduler: Any, name: str) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "ReduceLROnPlateau depends on metrics that a resumed run no longer has: "
            "use a schedule of the step or the epoch, such as MultiStepLR"
        )
    if not isinstance(scheduler, LRScheduler):
        raise ValueError(f"lr_scheduler is a {name}: give a class of torch.optim.lr_scheduler")
    gamma, milestones = getattr(scheduler, "gamma", 1.0), getattr(scheduler, "milestones", ())
    if not 0 < gamma < math.inf:
        raise ValueError(f"gamma of {name} is {gamma}: give a number above 0")
    if not all(0 <= milestone < math.inf for milestone in milestones):
        raise ValueError(f"milestones of {name} are {list(milestones)}: give none below 0")
    for argument, least in LEAST.items():
        value = getattr(scheduler, argument, least)
        if not least <= value < math.inf:
            raise ValueError(f"{argument} of {name} is {value}: give {least} or more")
    rates = [*scheduler.base_lrs, *getattr(scheduler, "max_lrs", ()), *scheduler.get_last_lr()]
    if not all(0 <= rate < math.inf for rate in rates):
        raise ValueError(f"{name} has a rate below 0, or none that is finite: give others")


def _last_change(scheduler: LRScheduler) -> tuple[int | None, bool]:
    """Returns when the rate changes for the last time, and whether training is to end just then."""
    if isinstance(scheduler, CosineAnnealingLR):
        return scheduler.T_max, True
    if isinstance(scheduler, OneCycleLR):
        return scheduler.total_steps, True
    if isinstance(scheduler, PolynomialLR):
        return scheduler.total_iters, True
    if isinstance(scheduler, FittedLR):
        return scheduler.length, True
    if isinstance(scheduler, LinearLR | ConstantLR):  # a warm-up, as a rule
        return scheduler.total_iters, False
    return max(getattr(scheduler, "milestones", ()), default=None), False

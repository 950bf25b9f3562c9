"""How sure exits may be: a temperature for each, fitted on held-out images.

Guo, Pleiss, Sun, Weinberger, On Calibration of Modern Neural Networks (ICML 2017, arXiv 1706.04599)

    T_k = argmin_T mean NLL(softmax(logits_k / T))

No answer of an exit changes, but how sure it is of it does, and so does who leaves there.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from networks.early_exit import MultiExitNetwork, State, run_all_exits, widen

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
MAX_STEPS = 200
PRECISION = 1e-12
"""Relative, at which the search ends."""


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Returns the temperature at which the mean negative log-likelihood is least.

    As a function of 1 / T that is convex, so it is found by Newton's method inside a bracket. It
    has no minimum where all images are right, or all logits of an image alike, for each of them:
    then the temperature is 1. Images whose logits are not finite do not count.

    Args:
        logits: (N, C).
        labels: (N,) int64.

    Returns:
        From `MIN_TEMPERATURE` to `MAX_TEMPERATURE`.
    """
    finite = logits.isfinite().all(1)
    gaps = logits[finite].double()
    gaps = gaps - gaps.amax(1, keepdim=True)
    truth = gaps.gather(1, labels[finite, None])[:, 0]
    if (truth == 0).all():
        return 1.0
    low, high, beta = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE, 1.0
    for _ in range(MAX_STEPS):
        probs = (beta * gaps).softmax(1)
        means = torch.linalg.vecdot(probs, gaps)
        slope = (means - truth).mean().item()
        curvature = (torch.linalg.vecdot(probs, gaps**2) - means**2).mean().item()
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = slope / curvature if curvature > 0 else math.inf
        following = beta - step if low <= beta - step <= high else math.sqrt(low * high)
        if abs(following - beta) <= PRECISION * beta:
            break
        beta = following
    return 1 / beta


def scale_logits(logits: Tensor, temperature: float) -> Tensor:
    """Returns logits of a temperature, in float32 or more."""
    return widen(logits) / temperature


class TemperatureScaled(nn.Module):
    """A network with exits as it answers: the logits of each exit are divided by its temperature.

    Whatever takes a network with stages and exits takes it instead. The network inside is the same
    object, and trains as ever.

    Args:
        network: with exits.
        temperatures: one per exit, shallow to deep.

    Raises:
        ValueError: temperatures that are not positive, or not one per exit.
    """

    def __init__(self, network: MultiExitNetwork, temperatures: Sequence[float]):
        super().__init__()
        if len(temperatures) != network.num_exits or not all(
            0 < each < math.inf for each in temperatures
        ):
            raise ValueError(
                f"temperatures {list(temperatures)} for {network.num_exits} exits: give a positive "
                "number for each"
            )
        self.network, self.temperatures = network, list(temperatures)
        self.training = network.training

    @property
    def num_exits(self) -> int:
        return self.network.num_exits

    @property
    def num_classes(self) -> int:
        return self.network.num_classes

    @property
    def stages(self) -> Sequence[Callable[[State], State]]:
        return self.network.stages

    # No list that is made once: a copy of this network has to call the exits of the copy.
    @property
    def exits(self) -> Sequence[Callable[[State], Tensor]]:
        pairs = zip(self.network.exits, self.temperatures, strict=True)
        return [partial(_run, exit_here, temperature) for exit_here, temperature in pairs]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Returns the logits (N, num_classes) of every exit, shallow to deep."""
        return run_all_exits(self, images)


def _run(exit_here: Callable[[State], Tensor], temperature: float, state: State) -> Tensor:
    return scale_logits(exit_here(state), temperature)

"""What an operating point costs: multiply-accumulates, parameters, and time on a device."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

TIMED_BATCH_SIZE = 64
"""Images in a batch whose time is measured, wherever a time per image is reported."""
NUM_TIMED_ROUNDS = 5
"""Timed runs of an operating point, whose median counts; one more before them warms up."""


def count_macs(function: Callable[[Tensor], Any], images: Tensor) -> int:
    """Runs `function` on `images`, and counts multiply-accumulates.

    Those of convolutions, linear layers and the two products of attention.
    BN, ReLU, pooling, biases and additions count 0, the convention of the papers (which say
    "FLOPs"). Only what is executed is counted: a closed gate, a narrow width or an early exit costs
    what it costs. Works on the meta device. Put the network in evaluation mode first:
    in training mode its BN statistics change.

    Args:
        function: a network, or one of its operating points.
        images: (N, C, H, W).

    Returns:
        MACs of the whole batch.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(images)
    return counter.get_total_flops() // 2


def count_params(network: nn.Module) -> int:
    """Counts the learnable numbers: BN scales and shifts included, running statistics not."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_params_run(network: nn.Module, function: Callable[[Tensor], Any], images: Tensor) -> int:
    """Counts the learnable numbers of the layers of `network` that `function` runs on `images`."""
    with torch.no_grad(), parameters_run(network) as used:
        function(images)
    return sum(parameter.numel() for parameter in used)


@contextlib.contextmanager
def parameters_run(network: nn.Module) -> Iterator[set[nn.Parameter]]:
    """Gathers the parameters of the layers that have run."""
    used: set[nn.Parameter] = set()
    hooks = [
        module.register_forward_hook(
            lambda module, *_: used.update(module.parameters(recurse=False))
        )
        for module in network.modules()
    ]
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()


# --- time -----------------------------------------------------------------------------------------


def wait_for(device: torch.device) -> None:
    """Waits until a GPU has done all its work; every measurement of time needs that."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(
    contenders: Mapping[str, Callable[[int], object]],
    num_rounds: int,
    device: torch.device,
    num_warmup_rounds: int,
) -> dict[str, float]:
    """Times contenders side by side, so that a busy machine slows all of them alike.

    Each runs once per round, in an order that depends on the number of the round: what ran before
    decides what is in the caches, and which memory is free.

    Args:
        contenders: functions of the number of the round; warm-up rounds have negative numbers.
        num_rounds: number of timed rounds.
        device: where the work happens; its queue is drained around every call.
        num_warmup_rounds: number of rounds before these, which are not timed.

    Returns:
        The median time of a call of each contender, in seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(-num_warmup_rounds, num_rounds):
        for name in random.Random(number).sample(list(contenders), len(contenders)):
            wait_for(device)
            start = time.perf_counter()
            contenders[name](number)
            wait_for(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


@torch.no_grad()
def time_points(
    points: Mapping[str, Callable[[Tensor], object]],
    batches: Sequence[Tensor],
    num_rounds: int = NUM_TIMED_ROUNDS,
) -> dict[str, float]:
    """Returns the median milliseconds per image of each operating point.

    Each round takes the next batch, for the sake of points whose cost depends on the images.

    Args:
        points: what to run, by name.
        batches: (N, C, H, W) each. Smaller ones than the first are left out: they would be slower
            per image.
        num_rounds: how often each is run, after a first time that does not count.
    """
    batches = [batch for batch in batches if len(batch) == len(batches[0])]

    def classify(point: Callable[[Tensor], object], number: int) -> object:
        return point(batches[(number + 1) % len(batches)])  # the warm-up has number -1

    contenders = {name: partial(classify, point) for name, point in points.items()}
    seconds = median_seconds(contenders, num_rounds, batches[0].device, num_warmup_rounds=1)
    return {name: 1000 * value / len(batches[0]) for name, value in seconds.items()}

"""What the benchmarks share: their options, a training step, and what they are measured on.

Their clock is `networks.median_seconds`; where a step is launched sooner than it is done, or a
contender may fail, `time_contenders`.
"""

import argparse
import gc
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from networks import wait_for


def best_device() -> torch.device:
    """Returns the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses the command line, which may say the number of threads, and sets it."""
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options


def add_memory_format(parser: argparse.ArgumentParser) -> None:
    """Adds ``--contiguous``, which decides `memory_format` among the options."""
    parser.add_argument(
        "--contiguous",
        dest="memory_format",
        action="store_const",
        const=torch.contiguous_format,
        default=torch.channels_last,
        help="torch's default memory format instead of channels_last, in which our modules train",
    )


def training_step(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[int], None]:
    """Returns a function that takes one step of SGD on a loss, whatever its argument."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )

    def step(_: int) -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def describe_machine(device: torch.device) -> str:
    """Returns one line on what the figures were measured on: hardware, threads, torch version."""
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{hardware}, torch {torch.__version__}"


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(line.split(":")[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        return platform.machine()


LONG_STEP = 0.2
"""Seconds; what takes longer is warm after two."""


class Times(NamedTuple):
    """What `time_contenders` returns."""

    seconds: dict[str, float]
    """The median time of a step, by contender."""
    failures: dict[str, str]
    """Why a contender has none."""


def time_contenders(
    builders: Mapping[str, Callable[[], Callable[[], object]]],
    device: torch.device,
    num_rounds: int,
    sample_seconds: float,
) -> Times:
    """Times contenders side by side; one that raises is left out, and the others go on.

    A sample is several steps, and then a wait: a device that is launched ahead stays so, as in a
    training. In every round each contender is sampled once, in an order of that round's own.

    Args:
        builders: make a contender, and return its step.
        device: where the work happens.
        num_rounds: samples of each contender.
        sample_seconds: about how long a sample lasts; a sample has one step at least.
    """
    steps: dict[str, tuple[Callable[[], object], int]] = {}
    samples: dict[str, list[float]] = {}
    failures: dict[str, str] = {}

    def attempt(action: Callable[[str], None], name: str) -> None:
        try:
            action(name)
        except Exception as error:  # whatever it is, it is told, and is no reason to lose the rest
            failures[name] = describe_failure(error)
            steps.pop(name, None)
        if name in failures:
            free_memory(device)

    def prepare(name: str) -> None:
        step = builders[name]()
        count = max(1, round(sample_seconds / warm_up(step, device)))
        steps[name], samples[name] = (step, count), []

    def take(name: str) -> None:
        samples[name].append(sample(*steps[name], device))

    for name in builders:
        attempt(prepare, name)
    for order in shuffled_rounds(list(steps), num_rounds):
        for name in order:
            if name in steps:
                attempt(take, name)
    return Times({name: median(samples[name]) for name in steps if samples[name]}, failures)


def warm_up(step: Callable[[], object], device: torch.device) -> float:
    """Runs a step until it is warm, and returns the seconds that one then takes."""
    # Kernels are chosen and compiled, some on the third call; long steps have enough of two.
    sample(step, 1, device)
    for count in (1, 2, 3):
        seconds = sample(step, count, device)
        if seconds > LONG_STEP:
            break
    return seconds


def shuffled_rounds(names: list[str], num_rounds: int) -> Iterator[list[str]]:
    """Yields the names in an order of its own for every round, the same in every run."""
    for number in range(num_rounds):
        yield random.Random(number).sample(names, len(names))


def sample(step: Callable[[], object], count: int, device: torch.device) -> float:
    """Returns the seconds of a step: the device is idle before the first and after the last."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait_for(device)
    return (time.perf_counter() - start) / count


def describe_failure(error: Exception) -> str:
    """Returns one line on what went wrong."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:160]


def free_memory(device: torch.device) -> None:
    """Returns what nothing refers to any more: graphs and cycles of closures keep much."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

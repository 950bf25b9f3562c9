"""Side-by-side timing: contenders take turns, so that a busy machine slows all of them alike.

Each round has an order of its own: who runs behind whom decides what is in the caches, and which
memory has been given back.
"""

import argparse
import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import Tensor, nn

from networks import wait_for


def best_device() -> torch.device:
    """Returns the GPU if there is one, else the CPU."""
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


def median_seconds(
    contenders: Mapping[str, Callable[[int], object]],
    num_rounds: int,
    device: torch.device,
    num_warmup_rounds: int,
) -> dict[str, float]:
    """Times every contender once per round, in an order that the number of the round decides.

    Args:
        contenders: functions of the number of the round; warm-up rounds have negative numbers.
        num_rounds: number of timed rounds.
        device: where the work happens; its queue is drained around every call.
        num_warmup_rounds: number of rounds before these, which are not timed.

    Returns:
        The median time of a call of each contender, in seconds.
    """
    seconds = {name: [] for name in contenders}
    for number in range(-num_warmup_rounds, num_rounds):
        for name in random.Random(number).sample(list(contenders), len(contenders)):
            wait_for(device)
            start = time.perf_counter()
            contenders[name](number)
            wait_for(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}

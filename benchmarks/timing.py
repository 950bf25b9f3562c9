"""Side-by-side timing: contenders take turns, so that a busy machine slows all of them alike."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

from networks import wait_for


def best_device() -> torch.device:
    """Returns the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


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
    """Times every contender once per round, in turn.

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
        for name, function in contenders.items():
            wait_for(device)
            start = time.perf_counter()
            function(number)
            wait_for(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}

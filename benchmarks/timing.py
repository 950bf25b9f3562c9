"""What the benchmarks share: their options, a training step, and what they are measured on.

Their clock is `networks.median_seconds`.
"""

import argparse
import os
import platform
from collections.abc import Callable

import torch
from torch import Tensor, nn


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

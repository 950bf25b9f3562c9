"""Claim: any width costs no more in training than networks of these widths.

    python -m benchmarks.sandwich_step

One step of Universally Slimmable MobileNet v2 at the widths 1.0, 0.35, 0.5 and 0.75 (forward,
inplace distillation, backward of each, one SGD step) over four forward and backward passes of
torchvision's MobileNet v2 at these widths, in the same memory format: on a CPU at most 1.00, and
0.95 in channels_last, in which our modules train; on a GPU at most 1.03. Random images; contenders
take turns, the table shows medians; a GPU is used if there is one.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import mobilenet_v2

from benchmarks.timing import best_device, describe_machine, parse_options
from networks import CapturedNetwork, SlimmableMobileNetV2, median_seconds

WIDTHS = (1.0, 0.35, 0.5, 0.75)
CLAIMS = {
    "cpu": "1.00 contiguous, 0.95 channels_last",
    "cuda": "1.03",
}


def sandwich(
    images: Tensor,
    labels: Tensor,
    memory_format: torch.memory_format,
    recorded: Sequence[float] = (),
) -> Callable[[int], None]:
    """Returns a training step of ours, in which some widths may be recorded."""
    network = SlimmableMobileNetV2(width_mult_range=(0.35, 1.0))
    network.to(images.device, memory_format=memory_format).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    runs = {width: partial(network, width_mult=width) for width in WIDTHS}
    for width in recorded:
        runs[width] = CapturedNetwork(network, run=runs[width])

    def step(_: int) -> None:
        optimizer.zero_grad()
        targets = labels
        for width in WIDTHS:
            logits = runs[width](images)
            F.cross_entropy(logits, targets).backward()
            if width == 1.0:
                targets = logits.detach().softmax(1)
        optimizer.step()

    return step


def separate(
    images: Tensor, labels: Tensor, memory_format: torch.memory_format
) -> Callable[[int], None]:
    """Returns forward and backward passes of torchvision's networks."""
    networks = [
        mobilenet_v2(width_mult=width, dropout=0.0).to(images.device, memory_format=memory_format)
        for width in WIDTHS
    ]

    def step(_: int) -> None:
        for network in networks:
            network.zero_grad()
            F.cross_entropy(network(images), labels).backward()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    options = parse_options(parser)
    device = best_device()

    torch.manual_seed(0)
    labels = torch.randint(1000, (options.batch_size,), device=device)
    steps = {}
    for name in ("contiguous_format", "channels_last"):
        memory_format = getattr(torch, name)
        images = torch.randn(options.batch_size, 3, 224, 224, device=device)
        images = images.to(memory_format=memory_format)
        steps[f"torchvision, {name}"] = separate(images, labels, memory_format)
        steps[f"ours, {name}"] = sandwich(images, labels, memory_format)
    seconds = median_seconds(steps, options.rounds, device, num_warmup_rounds=2)

    print(describe_machine(device))
    print(f"MobileNet v2, widths {WIDTHS}, batch {options.batch_size}, {options.rounds} rounds")
    print(f"{'':<32}{'s / step':>10}{'same format':>14}{'contiguous':>14}")
    base = seconds["torchvision, contiguous_format"]
    for name, value in seconds.items():
        same = seconds[f"torchvision, {name.split(', ')[1]}"]
        print(f"{name:<32}{value:>10.3f}{value / same:>14.3f}{value / base:>14.3f}")
    print(f"claim: ours at most {CLAIMS[device.type]} of torchvision in the same format")


if __name__ == "__main__":
    main()

"""Claim: recalibrating BN costs little more than the forward passes it consists of.

    python -m benchmarks.bn_recalibration

`recalibrate` for 16 widths of a Universally Slimmable CifarResNet-20 on a batch, over 16 forward
passes at these widths that normalise by the batch, which is what it has to run: at most 1.05, on a
GPU 1.15. The table also has forward passes in evaluation mode. Random weights and images;
contenders take turns, medians; a GPU is used if there is one.
"""

import argparse
import copy
from functools import partial

import torch

from benchmarks.timing import best_device, describe_machine, parse_options
from networks import SlimmableCifarResNet, median_seconds, recalibrate

WIDTHS = [0.25 + 0.05 * index for index in range(16)]
CLAIMS = {"cpu": 1.05, "cuda": 1.15}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    options = parse_options(parser)
    device = best_device()

    torch.manual_seed(0)
    network = SlimmableCifarResNet(20, width_mult_range=(0.25, 1.0))
    network.to(device, memory_format=torch.channels_last).eval()
    images = torch.randn(options.batch_size, 3, 32, 32, device=device)
    images = images.to(memory_format=torch.channels_last)
    runs = [partial(network, width_mult=width) for width in WIDTHS]
    recalibrate(network, [images], runs)
    training = copy.deepcopy(network).train()
    contenders = {
        "by the batch": lambda _: [training(images, width) for width in WIDTHS],
        "recalibration": lambda _: recalibrate(network, [images], runs),
        "in evaluation": lambda _: [run(images) for run in runs],
    }
    seconds = median_seconds(contenders, options.rounds, device, num_warmup_rounds=3)

    print(describe_machine(device))
    print(f"CifarResNet-20, batch {options.batch_size}, {options.rounds} rounds")
    base = seconds["by the batch"]
    for name, value in seconds.items():
        print(f"{name:<20}{value:>10.3f} s{value / base:>10.3f}")
    print(f"claim: at most {CLAIMS[device.type]}")


if __name__ == "__main__":
    main()

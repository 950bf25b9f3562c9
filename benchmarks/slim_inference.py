"""Claim: a width costs what a network built for it costs, and less when it is cut out.

    python -m benchmarks.slim_inference

Latency of Universally Slimmable MobileNet v2 at several widths over that of torchvision's MobileNet
v2 built for the width, contiguous as it comes: run in place at most 1.03, on a GPU 1.05; extracted
at most 1.02; extracted, BN folded and channels_last at most 0.60. Random weights and images,
evaluation mode; contenders take turns, the table shows medians; a GPU is used if there is one.
"""

import argparse
from functools import partial

import torch
from torchvision.models import mobilenet_v2

from benchmarks.timing import best_device, describe_machine, parse_options
from networks import SlimmableMobileNetV2, extract, median_seconds, recalibrate

WIDTHS = (1.0, 0.75, 0.5, 0.35)
CLAIMS = {"in place": 1.03, "extracted": 1.02, "folded, channels_last": 0.60}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    options = parse_options(parser)
    device = best_device()

    torch.manual_seed(0)
    network = SlimmableMobileNetV2(width_mult_range=(0.35, 1.0)).to(device)
    images = torch.randn(options.batch_size, 3, 224, 224, device=device)
    batch = torch.randn(8, 3, 224, 224, device=device)
    recalibrate(network, [batch], [partial(network, width_mult=width) for width in WIDTHS])
    network.eval()

    print(describe_machine(device))
    print(f"MobileNet v2, batch {options.batch_size}, {options.rounds} rounds")
    columns = "".join(f"{name:>24}" for name in CLAIMS)
    print(f"{'width':<8}{'built, ms':>12}{columns}")
    for width in WIDTHS:
        last = torch.channels_last
        folded = extract(network, width, fold_bn=True).to(memory_format=last)
        runs = {
            "built": partial(mobilenet_v2(width_mult=width).to(device).eval(), images),
            "in place": partial(network, images, width),
            "extracted": partial(extract(network, width), images),
            "folded, channels_last": partial(folded, images.to(memory_format=last)),
        }
        rounds = {name: lambda _, run=run: run() for name, run in runs.items()}
        seconds = median_seconds(rounds, options.rounds, device, num_warmup_rounds=5)
        ratios = "".join(f"{seconds[name] / seconds['built']:>24.3f}" for name in CLAIMS)
        print(f"{width:<8}{1000 * seconds['built']:>12.2f}{ratios}")
    print("claims: at most " + ", ".join(f"{name} {claim}" for name, claim in CLAIMS.items()))


if __name__ == "__main__":
    main()

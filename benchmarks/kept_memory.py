"""What it saves on a CPU to keep freed memory for the next step (`machine.keep_memory`).

    python -m benchmarks.kept_memory --threads 1

Full steps (forward, loss, backward, SGD) on random images of 32 pixels, 128 of them for a ResNet
and 64 otherwise. Memory that is kept once is kept, so every sample is a process of its own, some
with and some without, in turn; the table shows medians over processes of each one's median step.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.timing import describe_machine, parse_options, training_step
from networks import CifarDenseNet, CifarResNet, MSDNet
from running import keep_freed_memory

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "ResNet-20": (lambda: CifarResNet(20), 128),
    "ResNet-110": (lambda: CifarResNet(110), 128),
    "DenseNet-BC-100": (lambda: CifarDenseNet(100, bottleneck=True, compression=0.5), 64),
    "MSDNet": (
        lambda: MSDNet(num_blocks=5, base=4, step=2, num_channels=16, growth_rate=6),
        64,
    ),
}
NUM_STEPS = 7


def seconds_of_a_step(name: str) -> float:
    """Returns the median time of a step in this process; the first two warm up."""
    torch.manual_seed(0)
    build, batch_size = NETWORKS[name]
    network = build().to(memory_format=torch.channels_last).train()
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch_size,))

    def loss() -> torch.Tensor:
        outputs = network(images)
        exits = outputs if isinstance(outputs, list) else [outputs]
        return sum(F.cross_entropy(logits, labels) for logits in exits)

    step, seconds = training_step(network, loss), []
    for number in range(NUM_STEPS):
        start = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sample", nargs=2, help=argparse.SUPPRESS)  # a process of its own
    options = parse_options(parser)
    if options.sample is not None:
        name, keeps = options.sample
        if keeps == "kept" and not keep_freed_memory():
            sys.exit("this process cannot keep memory: it has no glibc, or MALLOC_ settings")
        print(seconds_of_a_step(name))
        return
    print(describe_machine(torch.device("cpu")))
    print(f"{'':<18}{'given back, s':>14}{'kept, s':>10}{'ratio':>8}")
    for name in NETWORKS:
        samples: dict[str, list[float]] = {"given back": [], "kept": []}
        for number in range(options.rounds):
            for keeps in sorted(samples, reverse=bool(number % 2)):
                command = [sys.executable, "-m", "benchmarks.kept_memory", "--sample", name, keeps]
                command += ["--threads", str(options.threads)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                samples[keeps].append(float(done.stdout))
        back, kept = map(statistics.median, samples.values())
        print(f"{name:<18}{back:>14.3f}{kept:>10.3f}{kept / back:>8.3f}", flush=True)


if __name__ == "__main__":
    main()

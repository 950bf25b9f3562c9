"""Claim: what early exit saves in MACs it saves in time, and its machinery costs next to nothing.

    python -m benchmarks.early_exit

BranchyNet's three networks at the exit rates of its table I, and an MSDNet of five exits, each of
which half as many images take as the one before, in batches of 1 and of 256:
    * measured speed-up over the same network without exits, divided by the speed-up in MACs: at
      least 0.9 at batch 256 and 0.8 at batch 1;
    * time of `early_exit` when no image leaves, divided by the time of all stages and exits: at
      most 1.03.
The columns "by times" tell what a miss is due to. They promise what would be reached if leaving at
an exit took just the time of the stages and exits up to there, each measured alone at the full
batch size. Where they promise less than the MACs, MACs are no measure of these layers' time; where
less is measured than they promise, it is the price of the machinery and of batches that shrink
(large ones may gain by that: they fit the cache again).

Weights and images are random. Thresholds between two images' entropies force the exit rates, up to
whole images; the promises are computed from the exits that were taken. A round of batch 1 is a pool
of images, one by one. Contenders take turns, with the same images in every round; the table shows
medians. On a CPU a convolution compiles for each number of rows that is new to it: that happens in
the warm-up rounds, and only there. A GPU is used if there is one.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.timing import add_memory_format, best_device, describe_machine, parse_options
from networks import (
    BranchyAlexNet,
    BranchyLeNet,
    BranchyResNet,
    MSDNet,
    MultiExitNetwork,
    Staged,
    count_exit_macs,
    early_exit,
    entropy,
    geometric_fractions,
    median_seconds,
    run_all_exits,
    run_to_exit,
    thresholds_for_fractions,
)

SPEED_CLAIMS = {1: 0.8, 256: 0.9}
OVERHEAD_CLAIM = 1.03


class Case(NamedTuple):
    """A network and the share of images that takes each of its exits."""

    build: Callable[[], MultiExitNetwork]
    image_shape: tuple[int, int, int]
    shares: tuple[float, ...]
    pool_size: int
    """Images in a round of batch 1: a number whose whole images come close to the shares."""
    num_rounds: int


def msdnet() -> MSDNet:
    return MSDNet(num_blocks=5, base=1, step=1, step_mode="lin_grow", lazy=True)


CASES = {
    "LeNet": Case(BranchyLeNet, (1, 28, 28), (0.943, 0.057), 70, 60),
    "AlexNet": Case(BranchyAlexNet, (3, 32, 32), (0.656, 0.252, 0.092), 61, 20),
    "ResNet-110": Case(BranchyResNet, (3, 32, 32), (0.415, 0.138, 0.447), 29, 4),
    "MSDNet": Case(msdnet, (3, 32, 32), tuple(geometric_fractions(0.5, 5)), 31, 6),
}


def find_thresholds(
    network: MultiExitNetwork, batches: Sequence[Tensor], shares: Sequence[float]
) -> list[float]:
    """Returns thresholds of the entropy at which these shares of the images take each exit.

    They are in the middle between two images, so that rounding decides about none.
    """
    logits = [torch.cat(answers) for answers in zip(*map(network, batches), strict=True)]
    scores = torch.stack([entropy(answers) for answers in logits], 1)
    thresholds = []
    for index, limit in enumerate(thresholds_for_fractions(scores, shares, "entropy")):
        above = scores[scores[:, index] >= limit]
        thresholds.append((limit + above[:, index].min().item()) / 2)
        scores = above
    return thresholds


def fit_statistics(network: MultiExitNetwork, images: Tensor) -> None:
    """Gives BN the statistics of these images: with others all entropies of ResNet-110 are 0."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    network.train()(images)
    network.eval()


def measure(name: str, case: Case, batch_size: int, options: argparse.Namespace) -> None:
    """Prints the line of a network and a batch size."""
    device = best_device()
    torch.manual_seed(0)
    place = {"device": device, "memory_format": options.memory_format}
    network = case.build().to(**place)
    num_images = case.pool_size if batch_size == 1 else batch_size
    images = torch.randn(num_images, *case.image_shape).to(**place)
    batches = images.split(batch_size)
    fit_statistics(network, images)
    last = network.num_exits - 1

    thresholds = find_thresholds(network, batches, case.shares)
    taken = torch.cat([early_exit(network, batch, thresholds).exit_index for batch in batches])
    counts = torch.bincount(taken, minlength=network.num_exits).tolist()
    wanted = [share * num_images for share in case.shares]
    if any(abs(got - want) > 1 for got, want in zip(counts[:-1], wanted, strict=False)):
        raise RuntimeError(f"{counts} images of {num_images} took the exits, not {wanted}")

    parts = [Staged(network.stages[: k + 1], network.exits[: k + 1]) for k in range(last + 1)]
    contenders = {
        "without exits": partial(run_to_exit, network, last),
        "early exit": partial(early_exit, network, thresholds=thresholds),
        "none leaves": partial(early_exit, network, thresholds=[-math.inf] * last),
        **{k: partial(run_all_exits, part) for k, part in enumerate(parts)},
    }

    def in_turn(run: Callable[[Tensor], object]) -> Callable[[int], object]:
        return lambda _: [run(batch) for batch in batches]

    rounds = {key: in_turn(run) for key, run in contenders.items()}
    seconds = median_seconds(rounds, options.rounds or case.num_rounds, device, num_warmup_rounds=2)

    def mean(per_exit: list[float]) -> float:
        return torch.tensor(per_exit)[taken.cpu()].double().mean().item()

    costs = count_exit_macs(network, batches[0][:1])
    leaving_times = [seconds[k] for k in range(last + 1)]
    shares = " / ".join(f"{count / num_images:.1%}" for count in counts)
    measured = seconds["without exits"] / seconds["early exit"]
    by_macs = costs.trunk / mean(costs.leaving)
    by_times = seconds["without exits"] / mean(leaving_times)
    overhead = seconds["none leaves"] / leaving_times[-1]
    milliseconds = 1000 * seconds["without exits"] / num_images
    print(
        f"{name:<11}{batch_size:>5}  {shares:<22}{milliseconds:>9.3f}{measured:>10.2f}"
        f"{by_macs:>9.2f}{measured / by_macs:>7.2f}{by_times:>10.2f}{measured / by_times:>7.2f}"
        f"{overhead:>10.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(SPEED_CLAIMS))
    parser.add_argument("--rounds", type=int, help="of every network; by default fewer of larger")
    add_memory_format(parser)
    options = parse_options(parser)

    print(describe_machine(best_device()))
    print(f"{'':<42}{'ms/image':>7}{'speed-up':>10}{'by MACs':>9}{'':>7}{'by times':>10}{'':>7}")
    print(
        f"{'':<11}{'batch':>5}  {'exits taken':<22}{'no exits':>9}{'measured':>10}"
        f"{'promised':>9}{'ratio':>7}{'promised':>10}{'ratio':>7}{'overhead':>10}"
    )
    with torch.no_grad():
        for name in options.networks:
            for batch_size in options.batch_sizes:
                measure(name, CASES[name], batch_size, options)
    speed = " and ".join(f"{claim} at batch {size}" for size, claim in SPEED_CLAIMS.items())
    print(f"claims: ratio to the MACs' promise at least {speed}; overhead {OVERHEAD_CLAIM} at most")


if __name__ == "__main__":
    main()

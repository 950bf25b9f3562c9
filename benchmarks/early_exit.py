"""Claim: what early exit saves it saves in time, and its machinery costs next to nothing.

    python -m benchmarks.early_exit

BranchyNet's three networks at the exit rates of its table I, and an MSDNet of five exits, each of
which half as many images take as the one before: one image at a time, and many images in batches of
256, on which stages run at a constant size (`ExitStream`). On a GPU all contenders are recorded.
    * measured speed-up over the same network without exits, divided by what the times of its stages
      promise: at least 0.9 for one image; for many 0.95 on a CPU, 0.92 on a GPU;
    * the same divided by the speed-up in MACs (many images, ResNet-110, MSDNet): at least 0.9 on a
      CPU, 0.85 on a GPU;
    * time when no image leaves, divided by the time of all stages and exits: at most 1.05.
Times promise what would be reached if leaving at an exit took just the time of the stages and exits
up to there, each measured alone at the full batch size. Where they promise less than the MACs, MACs
are no measure of these layers' time; where less is measured than they promise, it is the price of
the machinery. The column "shrinking" is the speed-up of `early_exit`, whose batches shrink.

Weights and images are random. Thresholds between two images' entropies force the exit rates, up to
whole images; the promises are computed from the exits that were taken. Contenders take turns, with
the same images in every round; the table shows medians. On a CPU a convolution compiles for each
number of rows that is new to it: that happens in the warm-up rounds, and only there.
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
    CapturedInference,
    EarlyExit,
    ExitStream,
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

CLAIMS = """claims: ratio to the times' promise at least 0.9 for one image, else 0.95 on a CPU and
0.92 on a GPU; to the MACs' 0.9 and 0.85 (ResNet-110, MSDNet, many images); overhead 1.05 at most"""


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


def force_exits(
    network: MultiExitNetwork, batches: Sequence[Tensor], shares: Sequence[float]
) -> tuple[list[float], Tensor]:
    """Returns such thresholds, and the exits that images take with them.

    Raises:
        RuntimeError: those are not the shares.
    """
    thresholds = find_thresholds(network, batches, shares)
    taken = torch.cat([early_exit(network, batch, thresholds).exit_index for batch in batches])
    counts = torch.bincount(taken, minlength=network.num_exits).tolist()
    wanted = [share * len(taken) for share in shares]
    if any(abs(got - want) > 1 for got, want in zip(counts[:-1], wanted, strict=False)):
        raise RuntimeError(f"{counts} images of {len(taken)} took the exits, not {wanted}")
    return thresholds, taken


def fit_statistics(network: MultiExitNetwork, images: Tensor) -> None:
    """Gives BN the statistics of these images: with others all entropies of ResNet-110 are 0."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    network.train()(images)
    network.eval()


def recorded(run: Callable[[Tensor], object], images: Tensor) -> Callable[[Tensor], object]:
    """Returns a function recorded for a batch, where that makes it faster."""
    return CapturedInference(run, images) if images.is_cuda else run


def leave_early(
    network: MultiExitNetwork, thresholds: Sequence[float], batches: Sequence[Tensor]
) -> Callable[[int], object]:
    """Returns a function that classifies all batches, whatever its argument."""
    capture = "graphs" if batches[0].is_cuda else "none"
    if len(batches[0]) == 1:
        answer = EarlyExit(network, thresholds, capture=capture)
        return lambda _: [answer(batch) for batch in batches]
    stream = ExitStream(network, thresholds, batch_size=len(batches[0]), capture=capture)
    return lambda _: ([stream.push(batch) for batch in batches], stream.finish())


def contenders(
    network: MultiExitNetwork, thresholds: Sequence[float], batches: Sequence[Tensor]
) -> dict[str | int, Callable[[int], object]]:
    """Returns the ways to classify all batches; a number: every exit up to this one."""

    def in_turn(run: Callable[[Tensor], object]) -> Callable[[int], object]:
        return lambda _: [run(batch) for batch in batches]

    last = network.num_exits - 1
    parts = [Staged(network.stages[: k + 1], network.exits[: k + 1]) for k in range(last + 1)]
    return {
        "without exits": in_turn(recorded(partial(run_to_exit, network, last), batches[0])),
        "early exit": leave_early(network, thresholds, batches),
        "shrinking": in_turn(partial(early_exit, network, thresholds=thresholds)),
        "none leaves": leave_early(network, [-math.inf] * last, batches),
        **{
            k: in_turn(recorded(partial(run_all_exits, part), batches[0]))
            for k, part in enumerate(parts)
        },
    }


def measure(name: str, case: Case, batch_size: int, options: argparse.Namespace) -> None:
    """Prints the line of a network and a batch size."""
    device = best_device()
    torch.manual_seed(0)
    place = {"device": device, "memory_format": options.memory_format}
    network = case.build().to(**place)
    num_batches = options.num_batches or (64 if device.type == "cuda" else 4)
    num_images = case.pool_size if batch_size == 1 else batch_size * num_batches
    images = torch.randn(num_images, *case.image_shape).to(**place)
    batches = images.split(batch_size)
    fit_statistics(network, images[:256])
    thresholds, taken = force_exits(network, batches, case.shares)
    counts = torch.bincount(taken, minlength=network.num_exits).tolist()
    rounds = contenders(network, thresholds, batches)
    seconds = median_seconds(rounds, options.rounds or case.num_rounds, device, num_warmup_rounds=2)
    costs = count_exit_macs(network, batches[0][:1])

    def mean(per_exit: list[float]) -> float:
        return torch.tensor(per_exit)[taken.cpu()].double().mean().item()

    leaving_times = [seconds[k] for k in range(network.num_exits)]
    by_macs = costs.trunk / mean(costs.leaving)
    by_times = seconds["without exits"] / mean(leaving_times)
    shares = " / ".join(f"{count / num_images:.1%}" for count in counts)
    measured = seconds["without exits"] / seconds["early exit"]
    print(
        f"{name:<11}{batch_size:>5}  {shares:<38}{num_images / seconds['without exits']:>9.0f}"
        f"{seconds['without exits'] / seconds['shrinking']:>10.2f}{measured:>10.2f}"
        f"{by_macs:>9.2f}{measured / by_macs:>7.2f}{by_times:>10.2f}{measured / by_times:>7.2f}"
        f"{seconds['none leaves'] / leaving_times[-1]:>10.3f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 256])
    parser.add_argument(
        "--num-batches", type=int, help="of more than one image; by default 4 or 64"
    )
    parser.add_argument("--rounds", type=int, help="of every network; by default fewer of larger")
    add_memory_format(parser)
    options = parse_options(parser)

    print(describe_machine(best_device()))
    print(f"{'':<56}{'images/s':>9}{'speed-up':>20}{'by MACs':>9}{'':>7}{'by times':>10}")
    print(
        f"{'':<11}{'batch':>5}  {'exits taken':<38}{'no exits':>9}{'shrinking':>10}{'measured':>10}"
        f"{'promised':>9}{'ratio':>7}{'promised':>10}{'ratio':>7}{'overhead':>10}"
    )
    with torch.no_grad():
        for name in options.networks:
            for batch_size in options.batch_sizes:
                measure(name, CASES[name], batch_size, options)
    print(CLAIMS)


if __name__ == "__main__":
    main()

"""Claim: drop path at a rate of 0.4 saves a step of a ViT or ConvNeXt the work of what it drops.

    python -m benchmarks.drop_path

Full steps (forward, loss, backward, SGD) of DeiT-Ti and a ConvNeXt as small (atto), beside timm's
networks of the same layers, which compute every branch and multiply it by a mask. Ours computes a
branch for the samples that keep it: a fixed number of them, its survival probability times the
batch (`mode: row`, `rescale: true`, `decay: drop_path`). At rates of 0.1 and 0.4 it keeps 0.95 and
0.80 of the branches. Goals, ours / timm's at the same rate: at most 1.00 and 0.90 of its time, and
at 0.4 at most 0.85 of the bytes that a step saves for backward (without parameters).

Contenders take turns, each network by itself; `--repeats` times, and the table shows the median of
the ratios and their range. Random images; a GPU is used if there is one.
"""

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import best_device, describe_machine, parse_options, training_step
from chance import generator
from lightning_modules import survival_probabilities
from networks import ConvNeXt, ResidualNetwork, VisionTransformer, median_seconds

RATES = (0.1, 0.4)
TIME_GOALS = {0.1: 1.00, 0.4: 0.90}
MEMORY_GOALS = {0.1: 1.00, 0.4: 0.85}
DEPTHS, CHANNELS = (2, 2, 6, 2), (40, 80, 160, 320)


class FixedCounts(nn.Module):
    """Our network as `LitStochasticDepth` trains it, with the gates of one step after the other.

    Args:
        network: called with images and gates.
        rate: the drop rate of the last layer.
    """

    def __init__(self, network: ResidualNetwork, rate: float):
        super().__init__()
        self.network = network
        probs = survival_probabilities(
            network.num_blocks, 1 - rate, "drop_path", network.blocks_per_layer
        )
        self.survival_probs = torch.tensor(probs, dtype=torch.float64).unsqueeze(1)
        self.num_steps = 0

    def forward(self, images: Tensor) -> Tensor:
        chance = generator("gates", 0, self.num_steps)
        self.num_steps += 1
        counts = (self.survival_probs * len(images)).round()
        ranks = torch.rand(len(counts), len(images), generator=chance).argsort(1)
        return self.network(images, gates=(len(images) / counts) * (ranks < counts))


def families(image_size: int) -> dict[str, tuple[Callable, Callable]]:
    """Returns, by name, what makes our network, and timm's of a drop rate."""
    return {
        "DeiT-Ti": (
            partial(VisionTransformer, image_size, num_heads=3, hidden_dim=192, mlp_dim=768),
            lambda rate: timm.models.VisionTransformer(
                image_size, embed_dim=192, num_heads=3, drop_path_rate=rate
            ),
        ),
        "ConvNeXt-atto": (
            partial(ConvNeXt, DEPTHS, CHANNELS),
            lambda rate: timm.models.ConvNeXt(depths=DEPTHS, dims=CHANNELS, drop_path_rate=rate),
        ),
    }


def bytes_for_backward(network: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Returns the bytes that a loss saves for its backward, parameters left out."""
    parameters = {each.untyped_storage().data_ptr() for each in network.parameters()}
    saved: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        kept = loss()  # while it lives, no address is used twice
    del kept
    return sum(saved.values())


def compare(name: str, options: argparse.Namespace, device: torch.device) -> None:
    """Measures one family, and prints its lines."""
    torch.manual_seed(0)
    make_ours, make_theirs = families(options.image_size)[name]
    size = (options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randn(size, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (options.batch_size,), device=device)
    networks = {"no drop path, ours": make_ours(), "no drop path, timm": make_theirs(0.0)}
    for rate in RATES:
        networks[f"{rate}, ours"] = FixedCounts(make_ours(), rate)
        networks[f"{rate}, timm"] = make_theirs(rate)
    steps, memory = {}, {}
    for key, network in networks.items():
        network.to(device, memory_format=torch.channels_last)
        loss = partial(lambda net: F.cross_entropy(net(images), labels), network)
        memory[key] = bytes_for_backward(network, loss)
        steps[key] = training_step(network, loss)
    seconds: dict[str, list[float]] = {key: [] for key in networks}
    for repeat in range(options.repeats):
        warm_up = 1 if repeat else 5
        for key, value in median_seconds(steps, options.rounds, device, warm_up).items():
            seconds[key].append(value)

    print(f"\n{name:<24}{'s / step':>10}{'MB saved':>10}")
    for key in networks:
        print(f"{key:<24}{median(seconds[key]):>10.4f}{memory[key] / 1e6:>10.1f}")
    print(f"{'ours / timm':<24}{'time':>6}{'range':>16}{'goal':>6}{'memory':>8}{'goal':>6}")
    for rate in ("no drop path", *RATES):
        pairs = zip(seconds[f"{rate}, ours"], seconds[f"{rate}, timm"], strict=True)
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        saved = memory[f"{rate}, ours"] / memory[f"{rate}, timm"]
        goals = [f"{goal[rate]:.2f}" if rate in goal else "" for goal in (TIME_GOALS, MEMORY_GOALS)]
        print(
            f"{rate!s:<24}{median(ratios):>6.3f}{ratios[0]:>9.3f}..{ratios[-1]:.3f}"
            f"{goals[0]:>6}{saved:>8.3f}{goals[1]:>6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3)
    options = parse_options(parser)
    device = best_device()
    print(describe_machine(device))
    print(f"batch {options.batch_size}, {options.image_size} pixels, {options.rounds} rounds")
    for name in families(options.image_size):
        compare(name, options, device)


if __name__ == "__main__":
    main()

"""Claim: a training step with stochastic depth takes at most 0.77 of the time of constant depth.

    python -m benchmarks.block_dropping

Full steps (forward, loss, backward, SGD) of CifarResNet-110 with linear decay to 0.5. It expects
0.745 of the blocks; early blocks are the most expensive and survive most often, so it saves less
than a quarter. With a gate per row at most 0.80: a fixed number of rows survives in each block, its
probability times the batch. `torchvision.ops.stochastic_depth` computes every branch and multiplies
it by 0: it saves nothing, be it per batch or per row.

Contenders take turns and the table shows medians over the rounds. To compare times after few
rounds, the gates per batch are drawn by systematic sampling: each block has its survival
probability, but the number of open blocks hardly varies (training draws them independently). Random
images; a GPU is used if there is one, kernel by kernel: `benchmarks.gpu` has it with recorded ones.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from benchmarks.timing import add_memory_format, best_device, describe_machine, parse_options
from chance import generator
from lightning_modules import survival_probabilities, zero_missing_gradients
from networks import CifarResNet, median_seconds

FINAL_SURVIVAL_PROB = 0.5
CLAIMS = {"batch": 0.77, "row": 0.80}


class DroppedBranches(nn.Module):
    """The same network with another library's function on its residual branches.

    Args:
        network: has the blocks.
        survival_probs: (num_blocks,).
        drop: from a branch and the probability to drop it to what is added to the shortcut.
    """

    def __init__(
        self,
        network: CifarResNet,
        survival_probs: Tensor,
        drop: Callable[[Tensor, float], Tensor],
    ):
        super().__init__()
        self.network = network
        self.drop_probs = (1 - survival_probs).tolist()
        self.drop = drop

    def forward(self, images: Tensor) -> Tensor:
        x = self.network.stem(images)
        for block, drop_prob in zip(self.network.blocks, self.drop_probs, strict=True):
            shortcut = x if block.downsample is None else block.downsample(x)
            branch = self.drop(block.residual(x), drop_prob)
            x = F.relu(shortcut + branch, inplace=True)
        return self.network.head(x)


class GatedDepth(nn.Module):
    """Our network with the gates of one step after the other; remembers the share that was open.

    Args:
        network: called with images and gates.
        survival_probs: (num_blocks,).
        mode: "batch" or "row".
    """

    def __init__(self, network: Callable[..., Tensor], survival_probs: Tensor, mode: str):
        super().__init__()
        self.network = network
        self.survival_probs = survival_probs
        self.mode = mode
        self.open_shares: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        probs = self.survival_probs
        chance = generator("gates", 0, len(self.open_shares))
        if self.mode == "batch":
            # A block is open if the running sum of probabilities passes an integer in it.
            sums = probs.cumsum(0) + torch.rand(1, generator=chance)
            gates = sums.floor().diff(prepend=torch.zeros(1))
        else:
            ranks = torch.rand(len(probs), len(images), generator=chance).argsort(1)
            gates = (ranks < (probs * len(images)).round().unsqueeze(1)).float()
        self.open_shares.append(gates.mean().item())
        return self.network(images, gates=gates)


def training_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[int], None]:
    """Returns a function that takes one step of SGD on the same batch, whatever its argument."""
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True
    )

    def step(_: int) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        zero_missing_gradients(network.parameters())  # as in the paper's code
        optimizer.step()

    return step


def contenders(base: CifarResNet, probs: Tensor) -> dict[str, nn.Module]:
    """Returns a copy of a network at constant depth, and for each way to drop blocks."""
    return {
        "constant depth": copy.deepcopy(base),
        "per batch, ours": GatedDepth(copy.deepcopy(base), probs, "batch"),
        "per batch, torchvision": DroppedBranches(
            copy.deepcopy(base), probs, partial(stochastic_depth, mode="batch")
        ),
        "per row, ours": GatedDepth(copy.deepcopy(base), probs, "row"),
        "per row, torchvision": DroppedBranches(
            copy.deepcopy(base), probs, partial(stochastic_depth, mode="row")
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=110)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    add_memory_format(parser)
    options = parse_options(parser)
    device = best_device()

    torch.manual_seed(0)
    base = CifarResNet(options.depth, shortcut="A-average")
    base.to(device, memory_format=options.memory_format)
    images = torch.randn(options.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (options.batch_size,), device=device)
    probs = torch.tensor(survival_probabilities(base.num_blocks, FINAL_SURVIVAL_PROB, "linear"))

    networks = contenders(base, probs)
    steps = {name: training_step(net, images, labels) for name, net in networks.items()}
    # On a CPU, each number of rows that is new to a convolution first costs a compilation.
    seconds = median_seconds(steps, options.rounds, device, num_warmup_rounds=10)

    print(describe_machine(device))
    print(
        f"CifarResNet-{options.depth}, batch {options.batch_size}, {options.rounds} rounds;"
        f" expected share of blocks: {probs.mean():.3f}"
    )
    print(f"{'':<24}{'s / step':>10}{'ratio':>10}{'blocks run':>12}")
    for name, network in networks.items():
        share = 1.0
        if isinstance(network, GatedDepth):
            timed = network.open_shares[-options.rounds :]
            share = sum(timed) / len(timed)
        ratio = seconds[name] / seconds["constant depth"]
        print(f"{name:<24}{seconds[name]:>10.4f}{ratio:>10.3f}{share:>12.3f}")
    claims = ", ".join(f"per {mode} at most {claim:.2f}" for mode, claim in CLAIMS.items())
    print(f"claim: ours {claims} of constant depth")


if __name__ == "__main__":
    main()

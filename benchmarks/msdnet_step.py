"""Claim: a training step of MSDNet takes no longer than in the plainest PyTorch that is correct.

    python -m benchmarks.msdnet_step

Forward, losses of all exits, backward and SGD of the CIFAR network with 5 exits at growing
distances (15 layers, 3 scales), ours with `lazy` and without, over a network written layer by layer
and scale by scale below, which has the same weights: at most 1. Both memory formats; in
channels_last our modules train. Before the clock starts, the logits of all are compared. What a
copy of the plain network differs from it is noise. Random images; contenders take turns, the table
shows medians; a GPU is used if there is one.
"""

import argparse
import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import best_device, describe_machine, parse_options, training_step
from networks import MSDNet, median_seconds

CLAIM = 1.0
FACTORS = (1, 2, 4)
NUM_LAYERS = 15
EXITS_BEHIND = (1, 3, 6, 10, 15)
TRANSITIONS_BEHIND = (6, 11)


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def branch(in_channels: int, out_channels: int, factor: int, stride: int) -> nn.Sequential:
    width = min(in_channels, factor * out_channels)
    return nn.Sequential(conv(in_channels, width, 1), conv(width, out_channels, 3, stride))


class PlainMSDNet(nn.Module):
    """MSDNet(5, 1, 1, "lin_grow") and no other, from lists of layers; for 32x32 images."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        stem = [conv(3, 16, 3), conv(16, 32, 3, stride=2), conv(32, 64, 3, stride=2)]
        self.stem = nn.ModuleList(stem)
        self.layers, self.exits = nn.ModuleList(), nn.ModuleList()
        channels, finest = 16, 0
        for number in range(1, NUM_LAYERS + 1):
            before, finest = finest, (number - 1) // 5
            kept = (channels + 6) // 2 if number in TRANSITIONS_BEHIND else channels + 6
            layer = nn.ModuleDict()
            for scale in range(finest, 3):
                factor = FACTORS[scale]
                new, cell = 6 * factor, nn.ModuleDict()
                if scale > before:
                    new //= 2
                    finer = FACTORS[scale - 1]
                    cell["down"] = branch(channels * finer, new, finer, stride=2)
                cell["normal"] = branch(channels * factor, new, factor, stride=1)
                if number in TRANSITIONS_BEHIND:
                    cell["transition"] = conv((channels + 6) * factor, kept * factor, 1)
                layer[str(scale)] = cell
            self.layers.append(layer)
            channels = kept
            if number in EXITS_BEHIND:
                self.exits.append(
                    nn.Sequential(
                        conv(channels * 4, 128, 3, stride=2),
                        conv(128, 128, 3, stride=2),
                        nn.AvgPool2d(2),
                        nn.Flatten(),
                        nn.Linear(128, num_classes),
                    )
                )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = {}
        for scale, layer in enumerate(self.stem):
            features[scale] = x = layer(x)
        logits = []
        for number, layer in enumerate(self.layers, start=1):
            new = {}
            for key, cell in layer.items():
                scale = int(key)
                parts = [features[scale]]
                if "down" in cell:
                    parts.append(cell["down"](features[scale - 1]))
                parts.append(cell["normal"](features[scale]))
                new[scale] = torch.cat(parts, 1)
                if "transition" in cell:
                    new[scale] = cell["transition"](new[scale])
            features = new
            if number in EXITS_BEHIND:
                logits.append(self.exits[len(logits)](features[2]))
        return logits


def total_loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return sum(F.cross_entropy(logits, labels) for logits in network(images))


def make_contenders(images: Tensor, memory_format: torch.memory_format) -> dict[str, nn.Module]:
    """Returns networks of the same weights whose logits were found to agree; the first is plain."""
    plain = PlainMSDNet()
    contenders = {"plain PyTorch": plain, "plain, a second time": copy.deepcopy(plain)}
    for name, lazy in (("ours", False), ("ours, lazy", True)):
        network = MSDNet(num_blocks=5, base=1, step=1, step_mode="lin_grow", lazy=lazy)
        # Layers were made in the same order, so their weights have it, too.
        weights = zip(network.state_dict(), plain.state_dict().values(), strict=True)
        network.load_state_dict(dict(weights))
        contenders[name] = network
    for network in contenders.values():
        network.to(images.device, memory_format=memory_format).eval()
    with torch.no_grad():
        expected = plain(images)
        for network in contenders.values():
            torch.testing.assert_close(network(images), expected, rtol=1e-3, atol=1e-4)
            network.train()
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=25)
    options = parse_options(parser)
    device = best_device()

    torch.manual_seed(0)
    labels = torch.randint(10, (options.batch_size,), device=device)
    print(describe_machine(device))
    print(f"batch {options.batch_size}, {options.rounds} rounds")
    print(f"{'':<42}{'s / step':>10}{'ratio':>8}")
    for name in ("contiguous_format", "channels_last"):
        memory_format = getattr(torch, name)
        images = torch.randn(options.batch_size, 3, 32, 32, device=device)
        images = images.to(memory_format=memory_format)
        steps = {
            contender: training_step(network, partial(total_loss, network, images, labels))
            for contender, network in make_contenders(images, memory_format).items()
        }
        seconds = median_seconds(steps, options.rounds, device, num_warmup_rounds=2)
        for contender, value in seconds.items():
            ratio = value / seconds["plain PyTorch"]
            print(f"{contender + ', ' + name:<42}{value:>10.4f}{ratio:>8.3f}")
    print(f"claim: ours at most {CLAIM:.2f} of plain PyTorch in the same format")


if __name__ == "__main__":
    main()

"""Claim: exits on a network of torchvision or timm leave it what it is, and save what MACs promise.

    python -m benchmarks.backbones

Each network gets three exits at about a quarter, a half and three quarters of its depth, cut by the
names of its modules (`with_exits`). The table shows
    * places: how many of its modules it can be cut after;
    * bits: whether the last exit's logits are the network's own, bit for bit (else the largest
      difference);
    * one pass: the largest difference between leaving early and a pass through all exits;
    * MACs: of each exit, with the stages before it, as a share of the network's;
    * images/s of the network as it came, and of leaving early, in batches, a quarter of the images
      at each exit (`ExitStream`, whose batches stay full);
    * the speed-up, and what the MACs promise. Goal: at least 0.9 of the promise.

Weights and images are random (weights that are 0 are drawn, too, so that no branch is closed), and
BN has the statistics of the images. Contenders take turns; the table shows medians.
"""

import argparse
import copy
from collections.abc import Callable

import timm
import torch
import torchvision
from torch import Tensor, nn

from benchmarks.early_exit import fit_statistics, force_exits, leave_early
from benchmarks.timing import best_device, describe_machine, parse_options
from networks import (
    MultiExitNetwork,
    count_exit_macs,
    early_exit,
    median_seconds,
    places_to_cut,
    run_to_exit,
    with_exits,
)

SHARES = (0.25, 0.25, 0.25, 0.25)

tv = torchvision.models
BACKBONES: dict[str, tuple[Callable[[int], nn.Module], list[str]]] = {
    "resnet50": (lambda size: tv.resnet50(), ["layer1", "layer2", "layer3"]),
    "mobilenet_v2": (
        lambda size: tv.mobilenet_v2(),
        ["features.4", "features.8", "features.13"],
    ),
    "efficientnet_b0": (
        lambda size: tv.efficientnet_b0(),
        ["features.2", "features.4", "features.5"],
    ),
    "densenet121": (
        lambda size: tv.densenet121(),
        ["features.transition1", "features.transition2", "features.transition3"],
    ),
    "convnext_tiny": (
        lambda size: tv.convnext_tiny(),
        ["features.3", "features.5.2", "features.5.5"],
    ),
    "vit_b_16": (
        lambda size: tv.vit_b_16(image_size=size),
        [f"encoder.layers.encoder_layer_{k}" for k in (2, 5, 8)],
    ),
    "swin_t": (lambda size: tv.swin_t(), ["features.3", "features.5.1", "features.5.3"]),
    "timm deit_tiny": (
        lambda size: timm.create_model("deit_tiny_patch16_224", img_size=size),
        ["blocks.2", "blocks.5", "blocks.8"],
    ),
    "timm mobilenetv4_conv_small": (
        lambda size: timm.create_model("mobilenetv4_conv_small"),
        ["blocks.0", "blocks.1", "blocks.2"],
    ),
    "timm regnety_004": (
        lambda size: timm.create_model("regnety_004"),
        ["s2", "s3.b3", "s4.b1"],
    ),
}


def open_branches(network: nn.Module) -> nn.Module:
    """Draws weights that are 0, or a layer scale: with them a branch would add nothing."""
    for parameter in network.parameters():
        if not parameter.any() or (parameter == 1e-6).all():
            nn.init.normal_(parameter, std=0.2)
    return network


def difference(ours: Tensor, theirs: Tensor) -> str:
    """Returns "equal", or the largest difference of two tensors."""
    return "equal" if torch.equal(ours, theirs) else f"{(ours - theirs).abs().max().item():.1e}"


def against_one_pass(network: MultiExitNetwork, images: Tensor, thresholds: list[float]) -> str:
    """Returns how far the logits of leaving early are from those of a pass through all exits."""
    answers = early_exit(network, images, thresholds)
    every_exit = torch.stack(network(images), 1)
    rows = torch.arange(len(images), device=images.device)
    return difference(answers.logits, every_exit[rows, answers.exit_index])


def measure(name: str, options: argparse.Namespace, device: torch.device) -> None:
    """Prints the line of a network."""
    torch.manual_seed(0)
    build, after = BACKBONES[name]
    original = open_branches(build(options.image_size))
    num_places = len(places_to_cut(original))
    network = with_exits(copy.deepcopy(original), after)
    place = {"device": device, "memory_format": torch.channels_last}
    network.to(**place)
    size = options.image_size
    images = torch.randn(options.batch_size * options.num_batches, 3, size, size).to(**place)
    fit_statistics(network, images)
    original.load_state_dict(network.network.state_dict())
    original.to(**place).eval()
    batches = images.split(options.batch_size)
    bits = difference(run_to_exit(network, network.num_exits - 1, batches[0]), original(batches[0]))
    thresholds, taken = force_exits(network, batches, SHARES)
    costs = count_exit_macs(network, images[:1])
    seconds = median_seconds(
        {
            "original": lambda _: [original(batch) for batch in batches],
            "early": leave_early(network, thresholds, batches),
        },
        options.rounds,
        device,
        num_warmup_rounds=2,
    )
    promised = costs.trunk / torch.tensor(costs.leaving)[taken.cpu()].double().mean().item()
    measured = seconds["original"] / seconds["early"]
    shares = " / ".join(f"{macs / costs.trunk:.0%}" for macs in costs.leaving[:-1])
    one_pass = against_one_pass(network, batches[0], thresholds)
    per_second = [len(images) / seconds[each] for each in ("original", "early")]
    print(
        f"{name:<28}{num_places:>7}{bits:>9}{one_pass:>10}"
        f"{shares:>19}{per_second[0]:>10.1f}{per_second[1]:>8.1f}{measured:>10.2f}{promised:>10.2f}"
        f"{measured / promised:>7.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-batches", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parse_options(parser)
    device = best_device()
    print(describe_machine(device))
    print(f"{options.num_batches} batches of {options.batch_size}, {options.image_size} pixels")
    print(
        f"{'':<28}{'places':>7}{'bits':>9}{'one pass':>10}{'MACs of exits':>19}"
        f"{'images/s':>10}{'early':>8}{'speed-up':>10}{'promised':>10}{'ratio':>7}"
    )
    with torch.no_grad():
        for name in options.networks:
            measure(name, options, device)


if __name__ == "__main__":
    main()

"""Claim: a memory-efficient DenseNet keeps a third of the memory, at 0.8 of the time on a CPU.

    python -m benchmarks.densenet_memory

Bytes kept for backward by one training step, and its time (forward, loss, backward, SGD), of
`memory_efficient=True` relative to False: DenseNet-BC-100 (k=12) at 32x32, and DenseNet-121 at
224x224 beside torchvision's. A GPU may take 1.15 of the time. Then the bytes per layer of networks
of 8, 16 and 32 layers per block, which are constant if memory grows with the depth, and not with
its square.

Bytes kept are those of all storages that some operation of the forward pass put out and that still
live behind it, each counted once. Weak references to the storages find them, whatever keeps one:
autograd, a checkpoint, a list. Parameters, buffers and images do not count.

Contenders take turns and the table shows medians. Random images; a GPU is used if there is one.
"""

import argparse
import copy
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.timing import (
    add_memory_format,
    best_device,
    describe_machine,
    parse_options,
    training_step,
)
from networks import CifarDenseNet, DenseNet, median_seconds

CLAIM_BYTES = 0.35
CLAIM_SECONDS = {"cpu": 0.80, "cuda": 1.15}


class StorageWatch(TorchDispatchMode):
    """Remembers the storage of every tensor that an operation puts out, and keeps none alive."""

    def __init__(self):
        super().__init__()
        self.num_bytes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.num_bytes[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def live_bytes(self, excluded: list[Tensor]) -> int:
        """Returns the size of all storages that live, less those of the `excluded` tensors."""
        known = {StorageWeakRef(tensor.untyped_storage()) for tensor in excluded}
        return sum(
            size
            for storage, size in self.num_bytes.items()
            if storage not in known and not storage.expired()
        )


def kept_bytes(network: nn.Module, images: Tensor) -> int:
    """Returns how many bytes a forward pass and its loss leave behind for backward."""
    excluded = [images, *network.parameters(), *network.buffers()]
    with StorageWatch() as watch:
        loss = loss_of(network, images)
    num_bytes = watch.live_bytes(excluded)
    del loss  # until here it kept the graph
    return num_bytes


def loss_of(network: nn.Module, images: Tensor) -> Tensor:
    labels = torch.arange(len(images), device=images.device) % 10
    return F.cross_entropy(network(images), labels)


def compare(
    pairs: dict[str, tuple[nn.Module, nn.Module]], images: Tensor, num_rounds: int
) -> dict[str, tuple[float, float]]:
    """Prints a table of plain and memory-efficient networks; returns the ratios of both columns."""
    networks = {}
    for name, (plain, efficient) in pairs.items():
        networks[f"{name}, plain"] = plain
        networks[f"{name}, memory-efficient"] = efficient
    for network in networks.values():
        network.to(images.device)
        if images.is_contiguous(memory_format=torch.channels_last):
            network.to(memory_format=torch.channels_last)
    num_bytes = {name: kept_bytes(network, images) for name, network in networks.items()}
    steps = {
        name: training_step(network, partial(loss_of, network, images))
        for name, network in networks.items()
    }
    seconds = median_seconds(steps, num_rounds, images.device, num_warmup_rounds=1)

    print(f"\nimages {tuple(images.shape)}, {num_rounds} rounds")
    print(f"{'':<34}{'MiB kept':>10}{'ratio':>8}{'s / step':>11}{'ratio':>8}")
    ratios = {}
    for name in pairs:
        for kind in ("plain", "memory-efficient"):
            contender, base = f"{name}, {kind}", f"{name}, plain"
            size, time = num_bytes[contender], seconds[contender]
            ratios[name] = (size / num_bytes[base], time / seconds[base])
            print(
                f"{contender:<34}{size / 2**20:>10.1f}{ratios[name][0]:>8.3f}"
                f"{time:>11.4f}{ratios[name][1]:>8.3f}"
            )
    return ratios


def with_efficient(network: CifarDenseNet | DenseNet) -> tuple[nn.Module, nn.Module]:
    efficient = copy.deepcopy(network)
    efficient.memory_efficient = True
    return network, efficient


def print_growth(images: Tensor) -> None:
    print(f"\nKiB kept per layer and image, DenseNet-BC (k=12), images {tuple(images.shape)}")
    print(f"{'layers':<12}{'plain':>10}{'memory-efficient':>20}")
    for layers_per_block in (8, 16, 32):
        network = CifarDenseNet(6 * layers_per_block + 4, bottleneck=True, compression=0.5)
        sizes = [
            kept_bytes(each.to(images.device), images) / 2**10 / len(images) / 3 / layers_per_block
            for each in with_efficient(network)
        ]
        print(f"3 x {layers_per_block:<8}{sizes[0]:>10.1f}{sizes[1]:>20.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64, help="of DenseNet-BC-100")
    parser.add_argument("--batch-size-121", type=int, default=8, help="of DenseNet-121")
    parser.add_argument("--rounds", type=int, default=5)
    add_memory_format(parser)
    options = parse_options(parser)
    device = best_device()

    def make_images(num_images: int, size: int) -> Tensor:
        images = torch.randn(num_images, 3, size, size, device=device)
        return images.contiguous(memory_format=options.memory_format)

    torch.manual_seed(0)
    print(describe_machine(device))
    bc_100 = CifarDenseNet(100, bottleneck=True, compression=0.5)
    pairs = {"DenseNet-BC-100": with_efficient(bc_100)}
    compare(pairs, make_images(options.batch_size, 32), options.rounds)
    seconds = CLAIM_SECONDS[device.type]
    print(f"claim: at most {CLAIM_BYTES:.2f} of the bytes and {seconds:.2f} of the time")

    densenet121 = torchvision.models.densenet121
    pairs = {
        "ours": with_efficient(DenseNet(121)),
        "torchvision": (densenet121(), densenet121(memory_efficient=True)),
    }
    ratios = compare(pairs, make_images(options.batch_size_121, 224), options.rounds)
    size, time = ratios["torchvision"]
    print(f"claim: our ratios below torchvision's {size:.3f} of the bytes, {time:.3f} of the time")

    print_growth(make_images(4, 32))


if __name__ == "__main__":
    main()

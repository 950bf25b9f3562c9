"""What the stages of a network cost, on any images: multiply-accumulates, parameters, memory, time.

A stage of a network with exits is what lies between two of them, and each exit is one, too. Of any
other network it is a top-level child with weights (the members of a list count as children)
together with what runs behind it, up to the next one. So the stages are all of the network, and
their costs add up to its own.

Memory, in bytes, of the tensors that operations of the pass put out: parameters, buffers and the
images do not count, nor does what a kernel needs for itself while it runs.

    kept    what a training pass has saved for backward when it ends, per image:
            (kept(2 n images) - kept(n images)) / n, so that what every batch has once is left out
    peak    what lives at once while one image is classified, at most: the largest sum, over all
            operations, of the outputs so far that are still referenced behind it
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from networks.cost import parameters_run, wait_for
from networks.early_exit import MultiExitNetwork
from networks.recalibration import BatchNorm, recalibrate

Mark = Callable[[str], None]
Walk = Callable[[Tensor, Mark], object]
"""Runs a network on images, and calls the mark with the name of each stage before it runs."""
NUM_KEPT_IMAGES = 2


# --- stages ---------------------------------------------------------------------------------------


def walk_stages(network: nn.Module, run: Callable[[Tensor], object]) -> Walk:
    """Returns a walk over the stages of a network.

    Args:
        network: of one with exits all stages and all exits run, whatever `run` does.
        run: from images to logits, by way of the children of the network.
    """
    if isinstance(network, MultiExitNetwork):
        return partial(_walk_exits, network)
    return partial(_walk_children, network, run)


def walk_whole(name: str, run: Callable[[Tensor], object]) -> Walk:
    """Returns a walk whose only stage is the whole function."""

    def walk(images: Tensor, mark: Mark) -> object:
        mark(name)
        return run(images)

    return walk


def _walk_exits(network: MultiExitNetwork, images: Tensor, mark: Mark) -> list[Tensor]:
    state: Any = images
    logits = []
    for number, (stage, exit_here) in enumerate(
        zip(network.stages, network.exits, strict=True), start=1
    ):
        mark(f"stage{number}")
        state = stage(state)
        mark(f"exit{number}")
        logits.append(exit_here(state))
    return logits


def _walk_children(
    network: nn.Module, run: Callable[[Tensor], object], images: Tensor, mark: Mark
) -> object:
    parts = _parts_of(network)
    # Networks with gates call the blocks of a layer, and never the layer.
    first = [(name, each[0]) for name, each in parts if isinstance(each, nn.Sequential)]
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: mark(name))
        for name, module in parts + first
    ]
    mark(parts[0][0] if parts else "network")
    try:
        return run(images)
    finally:
        for hook in hooks:
            hook.remove()


def _parts_of(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Returns the children that begin a stage, by name.

    A bare BN is none: with a hook on it, a DenseNet would save no memory.
    """
    parts = []
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            parts += [(f"{name}.{key}", part) for key, part in child.named_children()]
        elif isinstance(child, nn.ModuleDict):
            parts += child.named_children()
        else:
            parts.append((name, child))
    return [(n, part) for n, part in parts if any(p.dim() > 1 for p in part.parameters())]


def _growth(walk: Walk, images: Tensor, read: Callable[[], float]) -> dict[str, float]:
    """Returns by how much a reading grows in each stage."""
    readings: list[tuple[str, float]] = []
    walk(images, lambda name: readings.append((name, read())))
    readings.append(("", read()))
    growth: dict[str, float] = {}
    for (name, before), (_, behind) in pairwise(readings):
        growth[name] = growth.get(name, 0) + behind - before
    return growth


# --- what they cost -------------------------------------------------------------------------------


@torch.no_grad()
def count_stage_macs(walk: Walk, images: Tensor) -> dict[str, int]:
    """Returns the multiply-accumulates of each stage for a whole batch; see `count_macs`."""
    with FlopCounterMode(display=False) as counter:
        growth = _growth(walk, images, counter.get_total_flops)
    return {name: flops // 2 for name, flops in growth.items()}


@torch.no_grad()
def count_stage_params(network: nn.Module, walk: Walk, images: Tensor) -> dict[str, int]:
    """Returns the learnable numbers of the layers that each stage is the first to run."""
    with parameters_run(network) as used:
        return _growth(walk, images, lambda: sum(parameter.numel() for parameter in used))


def kept_bytes(network: nn.Module, walk: Walk, image: Tensor) -> dict[str, int]:
    """Returns the bytes per image that each stage keeps for backward, see the head of this file.

    Args:
        network: in training mode; its BN statistics change.
        walk: over this network.
        image: (1, C, H, W).
    """
    few, many = (
        _kept_bytes(network, walk, image.expand(count, -1, -1, -1).clone())
        for count in (NUM_KEPT_IMAGES, 2 * NUM_KEPT_IMAGES)
    )
    return {name: (many[name] - few[name]) // NUM_KEPT_IMAGES for name in many}


def _kept_bytes(network: nn.Module, walk: Walk, images: Tensor) -> dict[str, int]:
    """Returns what a stage is the first to save of all storages that live behind the pass."""
    saved: dict[StorageWeakRef, tuple[str, int]] = {}
    known = _storages(network, images)
    stages: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        ref = StorageWeakRef(storage)
        if ref not in known:
            saved.setdefault(ref, (stages[-1], storage.nbytes()))
        return tensor.detach()  # with its graph it would hold itself, for good

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        result = walk(images, stages.append)
    num_bytes = dict.fromkeys(stages, 0)
    for ref, (stage, size) in saved.items():
        num_bytes[stage] += 0 if ref.expired() else size
    del result  # until here it held the graph
    return num_bytes


@torch.no_grad()
def peak_bytes(network: nn.Module, walk: Walk, image: Tensor) -> dict[str, int]:
    """Returns the bytes that live at once in each stage, at most; see the head of this file.

    The largest one is that of the network.

    Args:
        network: in evaluation mode.
        walk: over this network.
        image: (1, C, H, W).
    """
    walk(image, lambda _: None)  # what is made once and kept, such as a narrow network
    with _LiveStorages(_storages(network, image)) as live:
        walk(image, live.begin)
    return live.peaks


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that operations have put out and that still live, behind each."""

    def __init__(self, known: set[StorageWeakRef]):
        super().__init__()
        self.known = known
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peaks: dict[str, int] = {}
        self.stage = ""

    def begin(self, stage: str) -> None:
        self.stage = stage
        self.note()

    def note(self) -> None:
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.peaks[self.stage] = max(self.peaks.get(self.stage, 0), sum(self.sizes.values()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref not in self.known:
                    self.sizes[ref] = storage.nbytes()
        self.note()
        return out


def _storages(network: nn.Module, images: Tensor) -> set[StorageWeakRef]:
    tensors = [images, *network.parameters(), *network.buffers()]
    return {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}


@torch.no_grad()
def time_stages(walk: Walk, images: Tensor, num_rounds: int) -> dict[str, float]:
    """Returns the median milliseconds per image of each stage; a first round does not count.

    The stages run one after the other, as they always do, and a GPU is waited for between two.
    """

    def clock() -> float:
        wait_for(images.device)
        return time.perf_counter()

    rounds = [_growth(walk, images, clock) for _ in range(1 + num_rounds)][1:]
    return {name: 1000 * median(each[name] for each in rounds) / len(images) for name in rounds[0]}


def settle_statistics(
    network: nn.Module, images: Tensor, runs: list[Callable[[Tensor], object]]
) -> None:
    """Gives every BN that runs the statistics of these images, if the network has any BN.

    No cost depends on their values. But a width without any refuses to run, and of random weights
    with statistics of 0 and 1 a thousand layers make numbers without end.
    """
    if any(isinstance(module, BatchNorm) for module in network.modules()):
        recalibrate(network, [images], runs)

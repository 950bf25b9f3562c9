"""Rows of `benchmarks.gpu`: stochastic depth."""

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from benchmarks.block_dropping import FINAL_SURVIVAL_PROB, DroppedBranches, GatedDepth
from benchmarks.gpu_report import Report, Setting, training_step
from benchmarks.gpu_training import Wrap, captured, contender
from benchmarks.timing import sample
from lightning_modules import survival_probabilities
from networks import CifarResNet

CONSTANT, GATED, ROWS = "ours, constant", "ours, a gate per block", "ours, a gate per sample"
EAGER = "eager loop, constant"


def with_tried_kernels(network: nn.Module) -> Callable[..., Tensor]:
    """Returns ours, whose kernels cuDNN has tried out, as with `trainer.benchmark`."""
    run = captured(network)

    def call(*args: object, **kwargs: object) -> Tensor:
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
        try:
            return run(*args, **kwargs)
        finally:
            torch.backends.cudnn.benchmark = before

    return call


def depth(report: Report, setting: Setting) -> None:
    """Stochastic against constant depth."""
    batch_size, size = setting.pick(128, 8), setting.pick(110, 8)
    images, labels = setting.images(batch_size, 32), setting.labels(batch_size)
    base = setting.place(CifarResNet(size, shortcut="A-average"))
    probs = torch.tensor(survival_probabilities(base.num_blocks, FINAL_SURVIVAL_PROB, "linear"))
    ways: dict[str, Wrap] = {
        "": captured,
        ", compiled": partial(captured, capture=setting.pick("compiled", "graphs")),
        ", kernels tried out": with_tried_kernels,
    }
    wraps = {ROWS: gated(captured, probs, "row"), **eager_loops(probs)}
    for how, run in ways.items():
        wraps |= {f"{CONSTANT}{how}": run, f"{GATED}{how}": gated(run, probs)}
    times = setting.time(
        {name: contender(base, wrap, images, labels, setting) for name, wrap in wraps.items()}
    )
    report.show(f"ResNet-{size}, batch {batch_size}, bf16, a training step", times, batch_size)
    report.ratio("a gate per sample / constant depth, both ours", times, ROWS, CONSTANT, 0.82)
    for how in ways:
        under, over = f"{CONSTANT}{how}", f"{GATED}{how}"
        report.ratio(f"stochastic / constant depth, both ours{how}", times, over, under, 0.77)
        promise = f"constant depth, images/s: ours{how} / eager loop"
        report.ratio(promise, times, EAGER, under, at_least=3.5)
        promise = f"images/s: ours, stochastic{how} / eager loop, constant"
        report.ratio(promise, times, EAGER, over, at_least=4.5)
    if CONSTANT in times.seconds:
        saved = seconds_saved(base, probs, images, labels, setting)
        promised = 1 - saved / times.seconds[CONSTANT]
        report.add("stochastic / constant depth, as the times of its blocks promise", promised)


def gated(run: Wrap, probs: Tensor, mode: str = "batch") -> Wrap:
    return lambda network: GatedDepth(run(network), probs, mode)


def eager_loops(probs: Tensor) -> dict[str, Wrap]:
    """Returns what a user would write otherwise."""

    def timm_rows(network: nn.Module) -> Callable[[Tensor], Tensor]:
        from timm.layers import drop_path

        return DroppedBranches(network, probs, partial(drop_path, training=True))

    by_batch = partial(stochastic_depth, mode="batch")
    return {
        EAGER: lambda network: network,
        "eager loop, a gate per block": gated(lambda network: network, probs),
        "eager loop, torchvision's stochastic_depth": (
            lambda network: DroppedBranches(network, probs, by_batch)
        ),
        "eager loop, timm's DropPath": timm_rows,
    }


def seconds_saved(
    base: nn.Module, probs: Tensor, images: Tensor, labels: Tensor, setting: Setting
) -> float:
    """Returns what closed blocks save of a step, by the times that the recorded blocks take.

    The first blocks, which survive most often, take more than their share of MACs where a device
    waits for memory.
    """
    network = copy.deepcopy(base)
    run = captured(network)
    gates = torch.ones(len(probs))

    def loss() -> Tensor:
        return F.cross_entropy(run(images, gates=gates), labels)

    training_step(network, loss, setting.autocast())()

    def seconds(part: Any) -> float:
        if part is None:
            return 0.0

        def replay() -> None:
            part.replay_forward()
            part.replay_backward()

        counts = [setting.pick(20, 1)] * 5
        return median(sample(replay, count, setting.device) for count in counts)

    blocks = run.chain.steps[1:-1]
    return sum(
        (1 - prob) * (seconds(opened) - seconds(closed))
        for prob, (closed, opened) in zip(probs.tolist(), blocks, strict=True)
    )

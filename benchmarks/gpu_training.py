"""Rows of `benchmarks.gpu`: training steps."""

import copy
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import networks
from benchmarks.densenet_memory import with_efficient
from benchmarks.gpu_report import Report, Setting, training_step
from benchmarks.sandwich_step import WIDTHS, sandwich, separate
from benchmarks.timing import Times
from networks import CifarDenseNet, CifarResNet, DenseNet

Wrap = Callable[[nn.Module], Callable[[Tensor], Tensor]]


def contender(
    base: nn.Module, wrap: Wrap, images: Tensor, labels: Tensor, setting: Setting
) -> Callable[[], Callable[[], None]]:
    """Returns what builds a training step in bf16 of a copy of `base`, run as `wrap` says."""

    def build() -> Callable[[], None]:
        network = copy.deepcopy(base)
        run = wrap(network)
        loss = lambda: F.cross_entropy(run(images), labels)  # noqa: E731
        return training_step(network, loss, setting.autocast())

    return build


def captured(network: nn.Module, capture: str = "graphs") -> Callable[..., Tensor]:
    """Returns our way to run a network at the speed of a device."""
    return networks.CapturedNetwork(network, capture=capture)


def compiled(report: Report, setting: Setting) -> None:
    """Beside torch.compile: ResNet-20, since ResNet-110 compiles for minutes."""
    batch_size, size = setting.pick(128, 8), setting.pick(20, 8)
    images, labels = setting.images(batch_size, 32), setting.labels(batch_size)
    base = setting.place(CifarResNet(size))
    overhead = "torch.compile, reduce-overhead"
    wraps: dict[str, Wrap] = {
        "ours, graphs": captured,
        "ours, compiled": partial(captured, capture=setting.pick("compiled", "graphs")),
        "eager loop": lambda network: network,
        "torch.compile, default": partial(setting.compile, mode="default"),
        overhead: partial(setting.compile, mode="reduce-overhead"),
    }
    times = setting.time(
        {name: contender(base, wrap, images, labels, setting) for name, wrap in wraps.items()}
    )
    report.show(f"ResNet-{size}, batch {batch_size}, bf16, a training step", times, batch_size)
    for name in ("ours, graphs", "ours, compiled"):
        promise = f"images/s: {name} / {overhead} (ResNet-{size})"
        report.ratio(promise, times, overhead, name, at_least=0.95)
        report.ratio(f"images/s: {name} / eager loop (ResNet-{size})", times, "eager loop", name)


def widths(report: Report, setting: Setting) -> None:
    """A sandwich step of MobileNet v2 beside torchvision's networks of its widths."""
    batch_size, side = setting.pick(64, 2), setting.pick(224, 64)
    labels = setting.labels(batch_size, 1000)
    # Those that every step runs, as in LitUniversallySlimmable; the others are drawn anew.
    ours, recorded = "ours, eager", "ours, steady widths recorded"
    makers = {
        ours: sandwich,
        recorded: partial(sandwich, recorded=(max(WIDTHS), min(WIDTHS))),
        "torchvision's networks": separate,
    }
    for name in ("contiguous_format", "channels_last"):
        memory_format = getattr(torch, name)
        images = setting.images(batch_size, side).contiguous(memory_format=memory_format)
        builders = {
            kind: lambda make=make, images=images, memory_format=memory_format: partial(
                make(images, labels, memory_format), 0
            )
            for kind, make in makers.items()
        }
        times = setting.time(builders)
        report.show(f"MobileNet v2, widths {WIDTHS}, batch {batch_size}, {name}", times, batch_size)
        best = min((ours, recorded), key=lambda kind: times.seconds.get(kind, math.inf))
        promise = f"sandwich step / four torchvision networks, {name}"
        report.ratio(promise, times, best, "torchvision's networks", at_most=1.03)
        promise = f"sandwich step, steady widths recorded / eager, {name}"
        report.ratio(promise, times, recorded, ours)


def dense(report: Report, setting: Setting) -> None:
    """Memory-efficient dense networks beside plain ones, and torchvision's."""
    size = setting.pick(100, 22)
    cifar = CifarDenseNet(size, bottleneck=True, compression=0.5)
    times = _memory_efficient(
        report, setting, {"": with_efficient(cifar)}, f"DenseNet-BC-{size}", setting.pick(64, 4), 32
    )
    promise = f"DenseNet-BC-{size}, memory-efficient / plain time"
    report.ratio(promise, times, "memory-efficient", "plain", at_most=1.15)

    densenet121 = torchvision.models.densenet121
    pairs = {
        "ours, ": with_efficient(DenseNet(121)),
        "torchvision, ": (densenet121(), densenet121(memory_efficient=True)),
    }
    batch_size, side = setting.pick(64, 2), setting.pick(224, 64)
    times = _memory_efficient(report, setting, pairs, "DenseNet-121", batch_size, side)
    ratios = []
    for name in pairs:
        over, under = f"{name}memory-efficient", f"{name}plain"
        report.ratio(f"DenseNet-121, {over} / plain time", times, over, under)
        ratios.append(report.lines[-1].value)
    both = None if None in ratios else ratios[0] / ratios[1]
    report.add("DenseNet-121, ours / torchvision's of these two", both, 1.0, reason="see above")
    over, under = (f"{name}memory-efficient" for name in pairs)
    report.ratio("DenseNet-121, memory-efficient: ours / torchvision's time", times, over, under)


def _memory_efficient(
    report: Report,
    setting: Setting,
    pairs: dict[str, tuple[nn.Module, nn.Module]],
    title: str,
    batch_size: int,
    side: int,
) -> Times:
    images, labels = setting.images(batch_size, side), setting.labels(batch_size)

    def build(network: nn.Module) -> Callable[[], None]:
        setting.place(network)
        return training_step(network, lambda: F.cross_entropy(network(images), labels))

    builders = {
        f"{name}{kind}": partial(build, network)
        for name, pair in pairs.items()
        for kind, network in zip(("plain", "memory-efficient"), pair, strict=True)
    }
    times = setting.time(builders, num_rounds=7)
    report.show(f"{title}, batch {batch_size}, TF32, a training step", times, batch_size)
    return times

"""Rows of `benchmarks.gpu`: images per second of each family, and share of the device's peak."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from benchmarks.gpu_report import Report, Setting, training_step
from benchmarks.gpu_training import captured
from benchmarks.timing import sample
from callbacks import peak_flops
from networks import (
    BranchyResNet,
    CifarDenseNet,
    CifarResNet,
    DenseNet,
    MSDNet,
    ResNet,
    ResNetWithExits,
    SlimmableCifarResNet,
    SlimmableMobileNetV2,
    SlimmableNetwork,
    count_macs,
    recalibrate,
)

PRECISIONS = {"bf16": "bf16-mixed", "TF32": "32-true"}


class Family(NamedTuple):
    """How a network is trained and run."""

    build: Callable[[], nn.Module]
    batch_size: int
    side: int
    num_classes: int = 10


FAMILIES = {
    "ResNet-110 (CIFAR)": Family(partial(CifarResNet, 110), 128, 32),
    "ResNet-50": Family(partial(ResNet, 50), 128, 224, 1000),
    "BranchyResNet-110": Family(BranchyResNet, 128, 32),
    "MSDNet, 5 exits": Family(
        partial(MSDNet, num_blocks=5, base=1, step=1, step_mode="lin_grow", lazy=True), 64, 32
    ),
    "US-MobileNet v2, width 1": Family(
        partial(SlimmableMobileNetV2, width_mult_range=(0.35, 1.0)), 128, 224, 1000
    ),
    "DenseNet-BC-100": Family(
        partial(CifarDenseNet, 100, bottleneck=True, compression=0.5), 64, 32
    ),
    "DenseNet-121": Family(partial(DenseNet, 121), 64, 224, 1000),
}
SMALL = {
    "ResNet-8": Family(partial(CifarResNet, 8), 8, 32),
    "ResNet-8 with exits": Family(lambda: ResNetWithExits(CifarResNet(8), [0, 1]), 8, 32),
    "US-ResNet-8": Family(partial(SlimmableCifarResNet, 8, width_mult_range=(0.25, 1.0)), 8, 32),
}


class deterministic:
    """Asks for kernels that give the same bits every time, as a machine file of a GPU does."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        self.benchmark = torch.backends.cudnn.benchmark
        self.fills = torch.utils.deterministic.fill_uninitialized_memory
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.utils.deterministic.fill_uninitialized_memory = False

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)
        torch.backends.cudnn.benchmark = self.benchmark
        torch.utils.deterministic.fill_uninitialized_memory = self.fills


def loss_of(output: Tensor | list[Tensor], labels: Tensor) -> Tensor:
    """Returns the sum of the losses of all exits; of one without a list."""
    exits = output if isinstance(output, list) else [output]
    return sum(F.cross_entropy(logits, labels) for logits in exits)


def families(report: Report, setting: Setting) -> None:
    """Images per second of training and inference of each family, and share of peak."""
    peaks = {name: measured_peak(name, report, setting) for name in PRECISIONS}
    for name, family in setting.pick(FAMILIES, SMALL).items():
        network = setting.place(family.build())
        images = setting.images(family.batch_size, family.side)
        labels = setting.labels(family.batch_size, family.num_classes)
        copied = copy.deepcopy(network).train()
        macs = count_macs(copied, images[:2]) / 2
        for title, builders, passes in (
            ("training step", dict(trainings(network, images, labels, setting)), 3),
            ("inference", dict(inferences(network, images, setting)), 1),
        ):
            times = setting.time(builders, num_rounds=5)
            report.show(f"{name}, batch {family.batch_size}, {title}", times, family.batch_size)
            shares = {}
            for key, seconds in times.seconds.items():
                flops = 2 * passes * macs * family.batch_size / seconds
                shares[key] = flops / peaks["bf16" if "bf16" in key else "TF32"]
                report.say(f"  {key:<44}{flops / 1e12:>10.1f} TFLOP/s{shares[key]:>12.1%} of peak")
            best = min(times.seconds, key=times.seconds.get, default=None)
            if best is not None:
                rate = family.batch_size / times.seconds[best] / 1000
                promise = f"{name}, {title}, {best} ({shares[best]:.1%} of peak): 1000 images/s"
                report.add(promise, rate)
            if passes == 3:
                report.ratio(f"{name}, {title}: bf16 / TF32 time", times, "bf16", "TF32")
                promise = f"{name}, {title}, bf16: deterministic / other kernels"
                report.ratio(promise, times, "bf16, deterministic", "bf16")


def trainings(
    base: nn.Module, images: Tensor, labels: Tensor, setting: Setting
) -> Iterator[tuple[str, Callable[[], Callable[[], None]]]]:
    """Yields the training steps of a family: precisions, and the price of deterministic kernels."""

    def build(precision: str, is_deterministic: bool) -> Callable[[], None]:
        network = copy.deepcopy(base).train()
        run = captured(network)
        amp = setting.autocast() if precision == "bf16" else None
        step = training_step(network, lambda: loss_of(run(images), labels), amp)
        if not is_deterministic:
            return step

        def careful_step() -> None:
            with deterministic():
                step()

        return careful_step

    for precision in PRECISIONS:
        yield precision, partial(build, precision, False)
        yield f"{precision}, deterministic", partial(build, precision, True)


def inferences(
    base: nn.Module, images: Tensor, setting: Setting
) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """Yields ways to classify: recorded in both precisions, and the eager loop."""
    network = copy.deepcopy(base)
    if isinstance(network, SlimmableNetwork):
        recalibrate(network, [images[:8]], [network])
    network.eval()

    def in_bf16(images: Tensor) -> object:
        with setting.autocast():
            return network(images)

    @torch.no_grad()
    def eager_loop() -> object:
        return in_bf16(images)

    def record(run: Callable[[Tensor], object]) -> Callable[[], object]:
        return partial(networks.CapturedInference(run, images), images)

    yield "bf16, a graph", partial(record, in_bf16)
    yield "TF32, a graph", partial(record, network)
    yield "bf16, eager loop", lambda: eager_loop


def measured_peak(precision: str, report: Report, setting: Setting) -> float:
    """Returns the device's peak FLOP/s: of the table, or of a large matrix product."""
    if setting.device.type == "cuda":
        name = torch.cuda.get_device_name(setting.device)
        peak = peak_flops(name, PRECISIONS[precision])
        if peak is not None:
            report.say(f"peak {precision}: {peak / 1e12:.1f} TFLOP/s, by the data sheet")
            return peak
    size = setting.pick(8192, 64)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.randn(size, size, device=setting.device, dtype=dtype)
    sample(lambda: matrix @ matrix, 3, setting.device)
    seconds = min(sample(lambda: matrix @ matrix, 10, setting.device) for _ in range(5))
    peak = 2 * size**3 / seconds
    report.say(
        f"peak {precision}: {peak / 1e12:.1f} TFLOP/s, measured: a product of matrices of {size}"
    )
    return peak

"""Claim: a training step through our modules and Lightning costs at most 1.03 of a bare loop on a
CPU, 1.05 on a GPU.

    python -m benchmarks.trainer_overhead

CifarResNet-20, batch 128, one batch of random images; network, memory format, loss and SGD are the
same on both sides. The bare loop has no Trainer, no module, no data module: what it lacks is what
is measured. The two take ten steps in turn, and only then wait for the device, so that a host that
runs ahead is not held up; one of the Trainer's ten is logged. The table shows medians. On a CPU
both keep freed memory, as runs do. A GPU is used if there is one.

Below it, in microseconds, the steps of a network that takes next to nothing, two images of one
pixel: what is left is the host's time, which a fast device waits for. Claims nothing.
"""

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from torch import Tensor, nn

from benchmarks.timing import best_device, describe_machine, parse_options
from callbacks import ThroughputMonitor
from lightning_modules import LitResNet, sgd
from networks import CifarResNet, wait_for
from running import (
    CSVHistory,
    NoProfiler,
    OperatingPoints,
    RunCheckpoint,
    keep_freed_memory,
    progress_bar,
)

CLAIM = {"cpu": 1.03, "cuda": 1.05}
STEPS_IN_TURN = 10


class Nothing(nn.Module):
    """A network that takes next to no time."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


class SameBatch(LightningDataModule):
    """Serves one batch again and again; between two turns of its steps the bare loop has one.

    Attributes:
        seconds: of a step, in each turn.
    """

    num_classes = 10

    def __init__(
        self, images: Tensor, labels: Tensor, num_steps: int, bare_step: Callable[[], None]
    ):
        super().__init__()
        self.batch = images, labels
        self.image_shape = (*images.shape[1:],)
        self.num_steps = num_steps
        self.bare_step = bare_step
        self.seconds: dict[str, list[float]] = {"bare loop": [], "Trainer": []}

    def train_dataloader(self) -> "SameBatch":
        return self

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.batch[0].device
        for _ in range(self.num_steps // STEPS_IN_TURN):
            wait_for(device)
            start = time.perf_counter()
            for _ in range(STEPS_IN_TURN):
                self.bare_step()
            wait_for(device)
            middle = time.perf_counter()
            # From one request to the next lies one whole step of the Trainer, hooks included.
            yield from repeat(self.batch, STEPS_IN_TURN)
            wait_for(device)
            self.seconds["bare loop"].append((middle - start) / STEPS_IN_TURN)
            self.seconds["Trainer"].append((time.perf_counter() - middle) / STEPS_IN_TURN)


def callbacks_of_a_run() -> list[Callback]:
    """Returns the callbacks that every run has, and the most common one of the YAMLs."""
    return [ThroughputMonitor(), OperatingPoints(), LearningRateMonitor(), RunCheckpoint()]


def measure(
    net: nn.Module, images: Tensor, num_steps: int, others: list[Callback], device: torch.device
) -> dict[str, float]:
    """Returns the median seconds of a step of the bare loop and of a Trainer.

    Args:
        net: is trained by both, each its own copy.
        images: the batch.
        num_steps: of each.
        others: callbacks beside the progress bar; with any, logger and checkpoints are on, too.
        device: of the images.
    """
    labels = torch.randint(10, (len(images),), device=device)
    bare = copy.deepcopy(net).to(device, memory_format=torch.channels_last)
    optimizer = sgd(bare.parameters())

    def bare_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(bare(images), labels).backward()
        optimizer.step()

    data = SameBatch(images, labels, max(2, num_steps // STEPS_IN_TURN) * STEPS_IN_TURN, bare_step)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            log_every_n_steps=STEPS_IN_TURN,
            default_root_dir=folder,
            logger=CSVHistory(Path(folder, "metrics.csv")) if others else False,
            enable_checkpointing=bool(others),
            enable_model_summary=False,
            profiler=NoProfiler(),
            callbacks=[progress_bar(), *others],
        )
        trainer.fit(LitResNet(net), datamodule=data)
    # The first turn warms up.
    return {name: statistics.median(turns[1:]) for name, turns in data.seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    options = parse_options(parser)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    device = best_device()
    if device.type == "cpu":
        keep_freed_memory()

    images = torch.randn(128, 3, 32, 32, device=device)
    medians = measure(CifarResNet(20), images, options.steps, [], device)
    pixels, steps = torch.randn(2, 3, 1, 1, device=device), 10 * options.steps
    module = measure(Nothing(), pixels, steps, [], device)
    run = measure(Nothing(), pixels, steps, callbacks_of_a_run(), device)

    print(describe_machine(device))
    print(f"{'':<12}{'ms / step':>10}{'ratio':>8}")
    for name, median in medians.items():
        print(f"{name:<12}{1000 * median:>10.2f}{median / medians['bare loop']:>8.3f}")
    print(f"claim: Trainer at most {CLAIM[device.type]:.2f} of the bare loop")
    print("\na network of nothing, microseconds / step")
    for name, seconds in {
        "bare loop": module["bare loop"],
        "Trainer and module": module["Trainer"],
        "the same with the logger and the callbacks of a run": run["Trainer"],
    }.items():
        print(f"{name:<52}{1e6 * seconds:>6.0f}")


if __name__ == "__main__":
    main()

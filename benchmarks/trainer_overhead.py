"""Claim: a training step through our modules and Lightning costs at most 1.03 of a bare loop on a
CPU, 1.05 on a GPU.

    python -m benchmarks.trainer_overhead

CifarResNet-20, batch 128, one batch of random images; network, memory format, loss and SGD are the
same on both sides. The bare loop has no Trainer, no module, no data module: what it lacks is what
is measured. The two take ten steps in turn, and only then wait for the device, so that a host that
runs ahead is not held up; one of the Trainer's ten is logged. The table shows medians. A GPU is
used if there is one.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Iterator
from itertools import repeat

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor

from benchmarks.timing import best_device, describe_machine, parse_options
from lightning_modules import LitResNet, sgd
from networks import CifarResNet, wait_for

CLAIM = {"cpu": 1.03, "cuda": 1.05}
STEPS_IN_TURN = 10


class SameBatch(LightningDataModule):
    """Serves one batch again and again; between two turns of its steps the bare loop has one."""

    num_classes = 10
    image_shape = (3, 32, 32)

    def __init__(self, images: Tensor, labels: Tensor, num_steps: int, bare_step, seconds: dict):
        super().__init__()
        self.batch = images, labels
        self.num_steps = num_steps
        self.bare_step = bare_step
        self.seconds = seconds

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    options = parse_options(parser)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    device = best_device()

    images = torch.randn(128, 3, 32, 32, device=device)
    labels = torch.randint(10, (128,), device=device)
    net = CifarResNet(20).to(device, memory_format=torch.channels_last)
    optimizer = sgd(net.parameters())

    def bare_step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()

    seconds: dict[str, list[float]] = {"bare loop": [], "Trainer": []}
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        log_every_n_steps=STEPS_IN_TURN,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=True,
    )
    num_steps = max(2, options.steps // STEPS_IN_TURN) * STEPS_IN_TURN
    data = SameBatch(images, labels, num_steps, bare_step, seconds)
    trainer.fit(LitResNet(CifarResNet(20)), datamodule=data)

    print(describe_machine(device))
    # The first turn warms up.
    medians = {name: statistics.median(turns[1:]) for name, turns in seconds.items()}
    print(f"{'':<12}{'ms / step':>10}{'ratio':>8}")
    for name, median in medians.items():
        print(f"{name:<12}{1000 * median:>10.2f}{median / medians['bare loop']:>8.3f}")
    print(f"claim: Trainer at most {CLAIM[device.type]:.2f} of the bare loop")


if __name__ == "__main__":
    main()

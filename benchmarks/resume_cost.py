"""Claim: exact resume costs at most 1% of a step, 1 MB of a checkpoint and 1.2 of a start.

    python -m benchmarks.resume_cost

1. CifarResNet-20, batch 128, one batch of random images, on the CPU. Three Trainers, each in its
   own thread, take a step in turn; the table shows medians. One keeps the books: RunCheckpoint,
   AtomicCheckpointIO, CSVHistory (a row every 50 steps, the default), keyed seeding, EpochLoader.
   The others have none of it: as far as they differ, the machine is too noisy. What a write of
   `last.ckpt` takes is added by its share of a step, counting the writes of a CIFAR-10 epoch: one
   every `every_n_steps`, and one each of `last.ckpt` and `best.ckpt` at its end.
2. Bytes of `last.ckpt` against the states of weights, optimizer and scheduler alone.
3. From the command to the first finished step, on the digits: started anew against gone on from a
   checkpoint within an epoch, in turn.
"""

import argparse
import io
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from pytorch_lightning import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR

from benchmarks.timing import describe_machine, parse_options
from datamodules import EpochLoader
from lightning_modules import LitResNet
from networks import CifarResNet, median_seconds
from running import LAST, AtomicCheckpointIO, CSVHistory, RunCheckpoint

ROOT = Path(__file__).parent.parent
STEPS_PER_EPOCH = 352  # 45,000 training images of CIFAR-10
CLAIMED_STEP, CLAIMED_BYTES, CLAIMED_START = 1.01, 1_000_000, 1.2

# Its fourth step comes after a checkpoint and before the end of the epoch.
EXPERIMENT = """
model:
  class_path: lightning_modules.LitResNet
  init_args:
    net:
      class_path: networks.CifarResNet
      init_args: {{depth: 20, in_channels: 1}}
data:
  class_path: datamodules.DigitsDataModule
  init_args: {{batch_size: 128}}
checkpoint: {{every_n_steps: 3}}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  enable_progress_bar: false
  callbacks:
    - class_path: benchmarks.resume_cost.EndProcess
      init_args: {{num_steps: {num_steps}}}
"""


class EndProcess(Callback):
    """Ends the process, as a kill would, after this many training steps of it."""

    def __init__(self, num_steps: int):
        self.num_steps = num_steps

    def on_train_batch_end(self, *args: object) -> None:
        self.num_steps -= 1
        if self.num_steps == 0:
            os._exit(0)


class Turns(LightningDataModule):
    """Serves one batch again and again; between two steps every other Trainer takes one."""

    num_classes = 10
    image_shape = (3, 32, 32)

    def __init__(self, batch: tuple[Tensor, Tensor], num_steps: int):
        super().__init__()
        self.batch = batch
        self.num_steps = num_steps
        self.seconds: list[float] = []
        self.mine = threading.Semaphore(0)
        self.next: Turns

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.num_steps):
            self.mine.acquire()
            start = time.perf_counter()
            # From here to the next request lies one whole step of the Trainer, hooks included.
            yield self.batch
            self.seconds.append(time.perf_counter() - start)
            self.next.mine.release()

    def train_dataloader(self) -> "Turns":
        return self

    def fit(self, trainer: Trainer, module: LitResNet) -> None:
        try:
            trainer.fit(module, datamodule=self)
        finally:
            # This one may have failed: those that wait for its turn go on.
            self.next.mine.release(self.num_steps)


class TurnsOfEpochLoader(Turns):
    def train_dataloader(self) -> EpochLoader:
        return EpochLoader(self.num_steps, partial(iter, self))


class UnkeyedResNet(LitResNet):
    def on_train_batch_start(self, *args: object) -> None:
        """Leaves the global generator alone."""


def compare_steps(num_steps: int, folder: Path) -> None:
    """Prints what the books cost per step, and leaves a `last.ckpt` in the folder."""
    options = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    checkpoint = RunCheckpoint()
    keeping = Trainer(
        default_root_dir=folder,
        logger=CSVHistory(folder / "metrics.csv"),
        callbacks=[checkpoint],
        plugins=[AtomicCheckpointIO()],
        **options,
    )
    bare = [Trainer(logger=False, enable_checkpointing=False, **options) for _ in range(2)]
    trainers = [bare[0], keeping, bare[1]]
    modules = [
        make(CifarResNet(20), lr_scheduler=partial(MultiStepLR, milestones=[1]))
        for make in (UnkeyedResNet, LitResNet, UnkeyedResNet)
    ]
    batch = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))
    turns = [make(batch, num_steps) for make in (Turns, TurnsOfEpochLoader, Turns)]
    for one, other in zip(turns, [*turns[1:], turns[0]], strict=True):
        one.next = other
    turns[0].mine.release()
    # The number of threads belongs to the thread that sets it.
    with ThreadPoolExecutor(3, "fit", torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        list(pool.map(Turns.fit, turns, trainers, modules))

    save = {"save": lambda _: checkpoint.save(keeping, LAST)}
    write = median_seconds(save, 20, torch.device("cpu"), num_warmup_rounds=2)["save"]
    share = write * (1 / checkpoint.every_n_steps + 2 / STEPS_PER_EPOCH)
    # The first tenth warms up.
    medians = [statistics.median(taking.seconds[num_steps // 10 :]) for taking in turns]
    print(f"{'':<28}{'ms / step':>10}{'ratio':>8}")
    for name, step in {
        "without books": medians[0],
        "without, a second time": medians[2],
        "with books": medians[1],
        "with its share of writes": medians[1] + share,
    }.items():
        print(f"{name:<28}{1000 * step:>10.2f}{step / medians[0]:>8.4f}")
    print(f"one write: {1000 * write:.2f} ms; claim: a ratio of at most {CLAIMED_STEP}\n")


def compare_bytes(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    states = io.BytesIO()
    parts = ("state_dict", "optimizer_states", "lr_schedulers")
    torch.save({key: checkpoint[key] for key in parts}, states)
    size, least = path.stat().st_size, states.tell()
    print(f"{LAST}: {size:,} bytes, weights and optimizer alone: {least:,}, more: {size - least:,}")
    print(f"claim: at most {CLAIMED_BYTES:,} more\n", flush=True)


def run_until(step: int, folder: Path, run: str) -> None:
    """Runs the experiment in a process of its own, until `step` steps are done."""
    (folder / "experiment.yaml").write_text(EXPERIMENT.format(num_steps=step))
    command = [sys.executable, ROOT / "main.py", "fit", "-c", "experiment.yaml", "--run_dir", run]
    environment = os.environ | {"WANDB_MODE": "disabled"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)


def compare_starts(num_rounds: int, folder: Path) -> None:
    run_until(4, folder, "broken")
    checkpoint = torch.load(folder / "broken" / LAST, weights_only=True)
    assert checkpoint["global_step"] == 3  # within an epoch
    seconds = median_seconds(
        {
            "started anew": lambda number: run_until(1, folder, f"new{number}"),
            "gone on": lambda _: run_until(1, folder, "broken"),
        },
        num_rounds,
        torch.device("cpu"),
        num_warmup_rounds=1,
    )
    print(f"{'':<28}{'s to first step':>16}{'ratio':>8}")
    for name, median in seconds.items():
        print(f"{name:<28}{median:>16.2f}{median / seconds['started anew']:>8.3f}")
    print(f"claim: a ratio of at most {CLAIMED_START}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parse_options(parser)
    print(describe_machine(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        compare_steps(options.steps, Path(folder))
        compare_bytes(Path(folder, LAST))
        compare_starts(options.rounds, Path(folder))


if __name__ == "__main__":
    main()

"""Rows of `benchmarks.gpu`: what a Trainer and a data module cost."""

import contextlib
import copy
import io
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import torch.nn.functional as F
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor

from benchmarks.gpu_report import Report, Setting
from benchmarks.gpu_training import captured
from benchmarks.input_pipeline import RandomCIFAR10
from benchmarks.timing import Times, describe_failure, shuffled_rounds
from datamodules import LabelledImages
from lightning_modules import LitResNet, sgd
from networks import Capture, CifarResNet, wait_for
from running import NoProfiler, progress_bar

Batch = tuple[Tensor, Tensor]


class Turns:
    """Batches for a Trainer, in blocks of one source; between them others take their own steps.

    A block lasts from the first request to the last step's end on the device.

    Args:
        sources: what gives the Trainer its batches, by name; the first one begins.
        others: steps that the Trainer has no part in.
        setting: where.
    """

    def __init__(
        self,
        sources: Mapping[str, Iterator[Batch]],
        others: Mapping[str, Callable[[], None]],
        setting: Setting,
    ):
        self.sources, self.others, self.device = sources, others, setting.device
        many = 50 if setting.device.type == "cuda" else 10
        self.num_steps, self.num_rounds = setting.pick(many, 2), setting.pick(9, 1)
        self.seconds: dict[str, list[float]] = {name: [] for name in [*sources, *others]}
        self.name = ""

    def __len__(self) -> int:
        # One more: the end of a block is when the next batch is asked for.
        return len(self.sources) * self.num_steps * (self.num_rounds + 1) + 1

    def __iter__(self) -> Iterator[Batch]:
        warm_up = [list(self.seconds)]
        rounds = shuffled_rounds(list(self.seconds), self.num_rounds)
        for number, order in enumerate(itertools.chain(warm_up, rounds)):
            for self.name in order:
                wait_for(self.device)
                start = time.perf_counter()
                for _ in range(self.num_steps):
                    if self.name in self.others:
                        self.others[self.name]()
                    else:
                        yield next(self.sources[self.name])
                wait_for(self.device)
                if number > 0:
                    seconds = (time.perf_counter() - start) / self.num_steps
                    self.seconds[self.name].append(seconds)
        self.name = next(iter(self.sources))
        yield next(self.sources[self.name])

    def times(self) -> Times:
        return Times({name: median(values) for name, values in self.seconds.items()}, {})


class Given(LightningDataModule):
    """Serves what it is given."""

    num_classes = 10
    image_shape = (3, 32, 32)

    def __init__(self, turns: Turns):
        super().__init__()
        self.turns = turns

    def train_dataloader(self) -> Turns:
        return self.turns


def fit(net: CifarResNet, capture: str, data: LightningDataModule, setting: Setting) -> None:
    """Trains for one epoch, profiler and progress bar as every run has them; prints nothing."""
    module = LitResNet(net)
    module.capture = capture
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            accelerator="gpu" if setting.device.type == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            profiler=NoProfiler(),
            callbacks=[progress_bar()],
        )
        trainer.fit(module, datamodule=data)


def trainer(report: Report, setting: Setting) -> None:
    """A Trainer's step beside a bare loop's, ResNet-20, one batch that lies on the device."""
    batch_size, size = setting.pick(128, 8), setting.pick(20, 8)
    batch = setting.images(batch_size, 32), setting.labels(batch_size)
    for capture in ("none", "graphs"):
        net = setting.place(CifarResNet(size))
        bare = copy.deepcopy(net).train()
        run = bare if capture == "none" else captured(bare)
        optimizer = sgd(bare.parameters())

        def bare_step(run: Callable = run, optimizer=optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(run(batch[0]), batch[1]).backward()
            optimizer.step()

        turns = Turns({"Trainer": itertools.repeat(batch)}, {"bare loop": bare_step}, setting)
        how = {"none": "eager", "graphs": "captured"}[capture]
        title = f"Trainer / bare loop of the same {how} ResNet-{size}"
        try:
            fit(net, capture, Given(turns), setting)
        except Exception as error:  # any: a line that says why, and the rest goes on
            report.add(title, None, at_most=1.05, reason=describe_failure(error))
            continue
        report.show(f"ResNet-{size}, batch {batch_size}, TF32, {how}", turns.times(), batch_size)
        report.ratio(title, turns.times(), "Trainer", "bare loop", at_most=1.05)


class CIFARInTurn(RandomCIFAR10):
    """`RandomCIFAR10`, and in turn a batch of it again and again, as it lies on the device."""

    def __init__(self, num_images: int, setting: Setting):
        super().__init__(num_images)
        self.setting = setting
        self.same: Batch | None = None

    def makes_chunks(self, train: LabelledImages) -> bool:
        return train.images.is_cuda  # as without the method below, which changes no batch

    def train_dataloader(self) -> Turns:
        loader = super().train_dataloader()

        def epochs() -> Iterator[Batch]:
            while True:
                yield from loader

        def repeated() -> Iterator[Batch]:
            while True:
                yield self.same

        sources = {"the data set": epochs(), "one batch": repeated()}
        self.turns = Turns(sources, {}, self.setting)
        return self.turns

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.turns.name == "one batch":
            return batch
        self.same = super().on_after_batch_transfer(batch, dataloader_idx)
        return self.same


def data(
    report: Report, setting: Setting, captures: Sequence[Capture] = ("none", "graphs")
) -> None:
    """A Trainer on a data set beside one on a batch, ResNet-20: bytes as many as CIFAR-10's."""
    num_images, size = setting.pick(50_000, 512), setting.pick(20, 8)
    for capture in captures:
        how = {"none": "eager", "graphs": "captured"}[capture]
        title = f"images/s: a data set like CIFAR-10 / one batch, {how} ResNet-{size}"
        module = CIFARInTurn(num_images, setting)
        try:
            fit(setting.place(CifarResNet(size)), capture, module, setting)
        except Exception as error:  # any: a line that says why, and the rest goes on
            report.add(title, None, at_least=0.97, reason=describe_failure(error))
            continue
        times, count = module.turns.times(), module.batch_size
        precision = "TF32" if setting.device.type == "cuda" else "float32"
        report.show(f"ResNet-{size}, batch {count}, {precision}, {how}", times, count)
        report.ratio(title, times, "one batch", "the data set", at_least=0.97)

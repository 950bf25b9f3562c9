"""Classifies images with the network of a run: a folder of them, or one.

Nothing is needed but the run folder. Images are brought to the size and the colours that the
network was trained with. Folders are searched down to the bottom, without what is hidden. There is
a row for each image, sorted by path:

  file         relative to the folder of --images
  label        the folder that holds it, if that has the name of a class
  class        and its probability, and those of the next four (class2, probability2, ...)
  exit         that it took, from 1, where the operating point lets images leave early
  point        name of the operating point
  error        why there is no answer

With a name that ends in .jsonl, the rows are JSON lines. In CSV files, a name that a spreadsheet
would take for a formula gets an apostrophe in front.
"""

import argparse
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules import ImagesToClassify, tell_unlike
from running.loading import load_run
from running.point import CLASSIFY_BATCH_SIZE, Point
from running.predictions import FILE, Prediction, PredictionFile, top_classes

NUM_WORKERS = 2
MAX_BATCH_SIZE = 2**20
MAX_NUM_WORKERS = 2**10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, or an image")
    parser.add_argument("--point", default="full", help="operating point (default: full)")
    parser.add_argument("--checkpoint", choices=("best", "last"), help="default: as in the test")
    parser.add_argument("--out", type=Path, help=f"a .csv or .jsonl (default: {FILE} in the run)")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    parser.add_argument("--batch_size", type=int, default=CLASSIFY_BATCH_SIZE)
    parser.add_argument("--device", help="default: the GPU, if there is one")
    parser.add_argument(
        "--num_workers", type=int, default=NUM_WORKERS, help="processes that decode images"
    )


def run(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.batch_size <= MAX_BATCH_SIZE:
        raise ValueError(f"--batch_size is {arguments.batch_size}: give 1 to {MAX_BATCH_SIZE}")
    if not 0 <= arguments.num_workers <= MAX_NUM_WORKERS:
        raise ValueError(
            f"--num_workers is {arguments.num_workers}: give 0 or more, up to {MAX_NUM_WORKERS}"
        )
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_run(arguments.run, arguments.checkpoint, device)
    point = loaded.point(arguments.point)
    files = ImagesToClassify(arguments.images, loaded.image_format)
    path = arguments.out or loaded.folder / FILE
    with PredictionFile(path, len(point.class_names), arguments.overwrite) as file:
        task = Classification(point, files, file)
        task.run(arguments.batch_size, arguments.num_workers)
    print(f"{len(files):,} rows in {path}, {task.rate}")
    task.tell()


class Classification:
    """Answers for files, written in their order.

    Args:
        point: answers.
        files: are asked for.
        file: takes the rows.
    """

    def __init__(self, point: Point, files: ImagesToClassify, file: PredictionFile):
        self.point, self.files, self.file = point, files, file
        self.class_names = point.class_names
        self.classes = frozenset(self.class_names)
        self.waiting: deque[str | None] = deque()
        """Errors of the files that were read and have no row yet."""
        self.num_written = self.num_errors = self.num_unlike = 0
        self.num_labelled = self.num_right = 0
        self.start = time.perf_counter()

    @property
    def rate(self) -> str:
        return f"{self.num_written / (time.perf_counter() - self.start):,.0f} images/s"

    def run(self, batch_size: int, num_workers: int) -> None:
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        quiet = not console.is_terminal  # a log has no use for a bar
        with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
            bar = progress.add_task("", total=len(self.files), rate="")
            batches = self.batches(batch_size, num_workers)
            for answers in self.point.classify_stream(batches, batch_size):
                taken = [None] * len(answers.labels)
                exits = taken if answers.exits is None else answers.exits.tolist()
                tops = top_classes(answers.probabilities, self.class_names)
                for top, exit_number in zip(tops, exits, strict=True):
                    self.write_errors()
                    self.write(top, exit_number)
                progress.update(bar, completed=self.num_written, rate=self.rate)
            self.write_errors()

    def batches(self, batch_size: int, num_workers: int) -> Iterator[torch.Tensor]:
        pins = self.point.module.device.type == "cuda"
        for batch in self.files.batches(batch_size, num_workers, pins):
            self.waiting.extend(batch.errors)
            self.num_unlike += batch.num_unlike
            if len(batch.images):
                yield batch.images

    def write_errors(self) -> None:
        """Writes the rows of the files that come next and have no answer."""
        while self.waiting and self.waiting[0] is not None:
            self.num_errors += 1
            self.write([], None)

    def write(self, top: list[tuple[str, float]], exit_number: int | None) -> None:
        """Writes the row of the next file."""
        error, index = self.waiting.popleft(), self.num_written
        holder = self.files.holder(index)
        label = holder if holder in self.classes else None
        if label is not None and error is None:
            self.num_labelled += 1
            self.num_right += top[0][0] == label
        name = self.files.name(index)
        self.file.write(Prediction(name, label, top, exit_number, self.point.name, error))
        self.num_written += 1

    def tell(self) -> None:
        """Prints what is worth a line."""
        name = self.point.name
        if self.num_labelled:
            accuracy = self.num_right / self.num_labelled
            print(f"accuracy of {name}: {accuracy:.2%} of {self.num_labelled:,} with a label")
        if self.num_unlike:
            print(tell_unlike(self.num_unlike, len(self.files), self.point.image_format))
        if self.num_errors:
            print(f"{self.num_errors:,} images could not be decoded: see the column error")

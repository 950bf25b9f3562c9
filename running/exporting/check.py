"""Whether what was exported answers as the checkpoint does, on real images; and how fast it is."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules import ImageDataModule, ImageFormat, ImagesToClassify
from networks import exit_score, median_seconds, run_to_exit
from running.loading import LoadedRun, build, read_config

NUM_IMAGES = 1000
"""That are compared, if there are as many."""
BATCH_SIZE = 64
NUM_ROUNDS = 20
MAX_DIFFERENCE = 1e-3
"""Of probabilities: of what differs more, nothing is written."""
TIE = 1e-5
"""Two classes whose probabilities differ by less, and a score that is so close to its threshold,
may be decided otherwise by rounding."""


class Answers(NamedTuple):
    """What a network makes of images; on the CPU."""

    probabilities: Tensor
    """(N, num_classes)."""
    exits: Tensor | None = None
    """(N,), from 1; None: it has no early exit."""


Classify = Callable[[Tensor], Answers]
"""From images in bytes, uint8 (N, C, H, W)."""


# --- images ---------------------------------------------------------------------------------------


def find_images(run: LoadedRun, folder: Path | None) -> tuple[Tensor, str]:
    """Returns real images, uint8 (N, C, H, W), of a folder or of the run's test data.

    Returns:
        The images, and what they are.

    Raises:
        FileNotFoundError: there are none.
        ValueError: they do not fit the network.
    """
    if folder is not None:
        return images_in(folder, run.image_format), str(folder)
    try:
        data = build("data", ImageDataModule, read_config(run.folder), run.folder)
        data.setup("test")
        rows = spread(data.num_samples("test"))
        batches = list(data.load_eval(rows.split(BATCH_SIZE), "test"))
    except Exception as error:  # whatever it lacks
        raise FileNotFoundError(
            "an export is checked on real images, and the test data of this run is not here: give "
            f"some by --images DIR ({error})"
        ) from error
    return torch.cat([images for images, *_ in batches]).contiguous(), (
        f"test images of {run.image_format.data}"
    )


def images_in(folder: Path, image_format: ImageFormat) -> Tensor:
    """Returns images of a folder, prepared as those of `predict` are."""
    files = ImagesToClassify(folder, image_format)
    found = [
        image for index in spread(len(files)).tolist() if (image := files[index][0]) is not None
    ]
    if not found:
        raise ValueError(f"no image of {folder} can be decoded: give others by --images DIR")
    return torch.stack(found)


def spread(num_images: int) -> Tensor:
    """Returns the indices of `NUM_IMAGES` images at most, from all over: folders are sorted."""
    return torch.arange(0, num_images, max(1, num_images // NUM_IMAGES))[:NUM_IMAGES]


# --- answers --------------------------------------------------------------------------------------


def checkpoint(run: LoadedRun, name: str) -> Classify:
    """Returns the operating point as the checkpoint has it, and as `predict` runs it."""
    point = run.point(name)

    def classify(images: Tensor) -> Answers:
        answers = point.classify(images, len(images))
        return Answers(answers.probabilities, answers.exits)

    return classify


def in_batches(classify: Classify, images: Tensor, batch_size: int) -> Answers:
    parts = [classify(batch) for batch in images.split(batch_size)]
    probabilities, exits = zip(*parts, strict=True)
    return Answers(torch.cat(probabilities), None if exits[0] is None else torch.cat(exits))


class Agreement(NamedTuple):
    """How the answers of an export compare with those of the checkpoint."""

    num_images: int
    difference: float
    """The largest of probabilities, over the images that take the same exit."""
    num_same_classes: int
    num_same_exits: int | None

    def __str__(self) -> str:
        exits = "" if self.num_same_exits is None else f", {self.num_same_exits} same exits"
        return (
            f"{self.num_images} images: probabilities differ by {self.difference:.1e} at most, "
            f"{self.num_same_classes} same classes{exits}"
        )


def compare(run: LoadedRun, name: str, images: Tensor, ours: Answers, theirs: Answers) -> Agreement:
    """Compares what the checkpoint (`ours`) and an export answer at an operating point.

    Raises:
        ValueError: a probability differs by more than `MAX_DIFFERENCE` or is not finite, or a class
            or an exit differs that is no `TIE`.
    """
    same_exit = torch.ones(len(images), dtype=torch.bool)
    if ours.exits is not None:
        same_exit = ours.exits == theirs.exits
        check_exits(run, name, images[~same_exit], ours, theirs, ~same_exit)
    differences = (ours.probabilities - theirs.probabilities).abs().amax(1)[same_exit]
    difference = differences.max().item() if len(differences) else 0.0
    labels, other_labels = ours.probabilities.argmax(1), theirs.probabilities.argmax(1)
    rows = torch.arange(len(images))
    gaps = ours.probabilities[rows, labels] - ours.probabilities[rows, other_labels]
    same_class = labels == other_labels
    found = Agreement(
        len(images),
        difference,
        int(same_class.sum()),
        None if ours.exits is None else int(same_exit.sum()),
    )
    num_wrong = int((same_exit & ~same_class & ~(gaps < TIE)).sum())
    if num_wrong or not difference <= MAX_DIFFERENCE:
        raise ValueError(
            f"not written, as it differs from the checkpoint: {found} ({MAX_DIFFERENCE} is allowed)"
        )
    return found


def check_exits(
    run: LoadedRun, name: str, images: Tensor, ours: Answers, theirs: Answers, rows: Tensor
) -> None:
    """Raises ValueError if images that take another exit were not on the edge of doing so."""
    if not len(images):
        return
    # With the width, gates and temperatures of the point: its thresholds are for their scores.
    network, thresholds = run.module.network_of(name), run.module.early_points()[name].thresholds
    first = torch.minimum(ours.exits[rows], theirs.exits[rows]) - 1
    for index in first.unique().tolist():
        with torch.no_grad():
            chosen = run.image_format.normalize(images[first == index])
            logits = run_to_exit(network, index, chosen)
        scores = exit_score(logits, run.module.exit_criterion)
        if not ((scores - thresholds[index]).abs() < TIE).all():
            raise ValueError(
                f"not written, as it differs from the checkpoint: {len(images)} of "
                f"{len(rows)} images take another exit"
            )


# --- time -----------------------------------------------------------------------------------------


def time_both(ours: Classify, exported: Classify, images: Tensor, size: int) -> str:
    """Returns a line about so many real images that are classified together.

    Each call takes the next batch; as images differ, what is timed are several batches of few.
    """
    batches = images.split(size)[: max(1, len(images) // size)]  # full ones
    num_calls = min(max(1, BATCH_SIZE // size), len(batches))

    def run(classify: Classify, number: int) -> None:
        for turn in range(num_calls):
            classify(batches[(number * num_calls + turn) % len(batches)])

    functions = {"exported": partial(run, exported), "PyTorch": partial(run, ours)}
    seconds = median_seconds(functions, NUM_ROUNDS, torch.device("cpu"), num_warmup_rounds=2)
    num_images = num_calls * len(batches[0])
    times = (f"{name} {1000 * value / num_images:.3f}" for name, value in seconds.items())
    return f"{len(batches[0])} at a time, ms per image: {', '.join(times)}"


def time_alone(exported: Classify, images: dict[str, Tensor]) -> dict[str, float]:
    """Returns the seconds of single images, (1, C, H, W) each."""
    num_calls = 10

    def run(image: Tensor, _: int) -> None:
        for _ in range(num_calls):
            exported(image)

    functions = {name: partial(run, image) for name, image in images.items()}
    seconds = median_seconds(functions, NUM_ROUNDS, torch.device("cpu"), num_warmup_rounds=2)
    return {name: value / num_calls for name, value in seconds.items()}


def time_exits_taken(exported: Classify, images: Tensor, exits: Tensor, last: int) -> Iterator[str]:
    """Yields how many images leave early, and what one that leaves first costs, and one that stays.

    Args:
        exported: classifies one image.
        images: real ones.
        exits: those that they take, (N,), from 1.
        last: number of exits.
    """
    shares = ", ".join(f"{100 * (exits == k).double().mean():.1f}" for k in range(1, last + 1))
    yield f"{shares} % of the images leave at exits 1 to {last}"
    chosen = {f"exit {k}": images[exits == k][:1] for k in (1, last) if (exits == k).any()}
    for name, seconds in time_alone(exported, chosen).items():
        yield f"an image that goes to {name}: {1000 * seconds:.3f} ms"

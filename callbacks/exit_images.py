"""The images that were easiest and hardest for each exit, to be looked at."""

import shutil
from pathlib import Path

import torch
from PIL import Image
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from callbacks.outlets import Table, class_names
from networks import Criterion

NUM_SHOWN = 8
"""Images of each kind and exit, at most."""
COLUMNS = ("exit", "kind", "rank", "file", "true", "predicted", "score")


def write_exit_images(
    trainer: Trainer, module: LightningModule, num_images: int, path: Path
) -> None:
    """Writes the images of a test that each exit was surest and least sure of, as PNG.

    Of those that leave at the exit by the thresholds that the module prefers; the least sure ones
    of the last exit are what the network found hardest.

    Args:
        trainer: has the data module, whose `load_eval` gives images as bytes.
        module: what `callbacks.ExitStatistics` reads of it.
        num_images: how many rank 0 has tested; those of other ranks are not looked at.
        path: of the table; the images are in a folder of the same name.
    """
    folder = path.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)
    path.unlink(missing_ok=True)
    data = trainer.datamodule
    if not hasattr(data, "load_eval") or data.image_shape[0] not in (1, 3):
        rank_zero_info(
            f"{path.name} is left out: {type(data).__name__} has no load_eval, which gives images "
            "by number, or they are neither grey nor RGB"
        )
        return
    rows, numbers = choose(module, num_images, folder.name)
    names = class_names(trainer, module.net.num_classes)
    if rows:
        folder.mkdir()
        ((images, *_),) = data.load_eval([numbers * trainer.world_size], "test")
        for row, image in zip(rows, images.cpu(), strict=True):
            pixels = image[0] if len(image) == 1 else image.movedim(0, 2)
            Image.fromarray(pixels.numpy()).save(path.parent / row[3])
    rows = [(*row[:4], names[row[4]], names[row[5]], row[6]) for row in rows]
    Table(COLUMNS, rows).write(path)


def choose(module: LightningModule, num_images: int, folder: str) -> tuple[list[tuple], Tensor]:
    """Returns rows of the table, with numbers of classes, and the number of each row's image."""
    rows, chosen = [], [torch.empty(0, dtype=torch.int64)]
    for thresholds in list(module.exit_thresholds.values())[:1]:
        taken = module.exits_taken(thresholds)[:num_images]
        for index, name in enumerate(module.exit_names):
            scores, answers = module.exit_outputs.scores[:, index], module.test_answers[name]
            easiest, hardest = extremes(scores, taken == index, module.exit_criterion)
            for kind, numbers in (("easiest", easiest), ("hardest", hardest)):
                chosen.append(numbers)
                for rank, number in enumerate(numbers.tolist(), start=1):
                    file = f"{folder}/{name}_{kind}_{rank}.png"
                    classes = answers.labels[number].item(), answers.classes[number].item()
                    rows.append((name, kind, rank, file, *classes, scores[number].item()))
    return rows, torch.cat(chosen)


def extremes(scores: Tensor, is_here: Tensor, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """Returns the numbers of the surest images, and of the least sure ones, those first.

    No image is both.

    Args:
        scores: of the exit, (N,).
        is_here: whether an image leaves there, of the first of them.
        criterion: what the scores are.
    """
    here = is_here.nonzero().flatten()
    ranked = here[scores[here].argsort(descending=criterion == "confidence", stable=True)]
    half = len(ranked) // 2
    return ranked[: len(ranked) - half][:NUM_SHOWN], ranked[len(ranked) - half :].flip(0)[
        :NUM_SHOWN
    ]

"""The 1,797 handwritten digits that scikit-learn carries: trains in seconds, needs no network."""

from dataclasses import dataclass

import torch
from torch import Tensor

from chance import generator
from datamodules.in_memory import InMemoryDataModule, LabelledImages


def hold_out(labels: Tensor, num_held_out: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Splits at random, with every class in proportion (to within one image).

    Returns:
        The indices that stay and the `num_held_out` indices that are held out.
    """
    shuffled = torch.randperm(len(labels), generator=chance)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Walk through the classes and take an image whenever the running share passes a whole number.
    share = torch.arange(len(labels) + 1) * num_held_out // len(labels)
    held_out = share.diff() > 0
    return by_class[~held_out], by_class[held_out]


@dataclass(eq=False, kw_only=True)
class DigitsDataModule(InMemoryDataModule):
    """UCI optical digits as in `sklearn.datasets.load_digits`: 8x8, 1 channel, enlarged to 32x32.

    Every pixel becomes a square of 4x4, its value 0..16 one of 0..255. By default 1,257 images
    train, 180 validate and 360 test, in a stratified split. The test images are always the same;
    `split_seed` keys those that validate.

    Args:
        crop_padding: in pixels of the enlarged image.
        batch_size, eval_batch_size, val_size, split_seed, seed, normalization, drop_last,
            random_erasing: see `InMemoryDataModule`.
    """

    num_classes = 10
    class_names = [str(digit) for digit in range(10)]  # noqa: RUF012
    image_shape = (1, 32, 32)
    num_test = 360
    enlargement = 4

    val_size: int = 180

    def read(self, download: bool) -> tuple[LabelledImages, LabelledImages]:
        from sklearn.datasets import load_digits  # slow to import, and only needed here

        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8)
        images = images.repeat_interleave(self.enlargement, 1)
        images = images.repeat_interleave(self.enlargement, 2)[:, None]
        rest, test = hold_out(labels, self.num_test, generator("split", 0, "test"))
        train, test = (LabelledImages(images[part], labels[part]) for part in (rest, test))
        return train, test

    def split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        return hold_out(labels, self.val_size, generator("split", self.split_seed))

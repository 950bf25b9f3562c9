"""Folders of images of any size, decoded when they are needed, by worker processes."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import preemption
from chance import generator
from datamodules.base import Batch, ImageDataModule, Split, require
from datamodules.erasing import draw_boxes
from datamodules.image_augmentation import (
    Augmentation,
    Draw,
    Policy,
    evaluation_transform,
    keyed,
    training_draw,
    training_policy,
)
from datamodules.image_colour import ColourTransform
from datamodules.image_files import (
    as_tensor,
    list_all,
    list_classes,
    list_labelled,
    opened,
    readable,
    resized,
    to_rgb,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY_MEAN, GREY_STD = (0.459,), (0.226,)
"""Of these, in the shares that red, green and blue have in grey."""
UNKNOWN = -1  # label of an image to predict


class ImageFiles(Dataset):
    """Decodes the image at an index. Holds no state: what comes out is a function of the key alone.

    Args:
        samples: path and label of every image.
        image_size: height and width of what comes out.
        draw: chooses the part of an image to show and its colours; None: the centre as it is.
        seed: the draws are keyed by (seed, epoch, index).
        policy: changes what was cut out; draws, too.
        erasing: how likely a box is erased.
        grey: whether one channel comes out, as Pillow converts to it.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        image_size: int,
        draw: Draw | None = None,
        seed: int = 0,
        policy: Policy | None = None,
        erasing: float = 0.0,
        grey: bool = False,
    ):
        # Two arrays instead of a million Python objects, whose reference counts would make every
        # worker copy them.
        self.paths = np.array([os.fsencode(path) for path, _ in samples])
        self.labels = torch.tensor([label for _, label in samples])
        self.image_size = image_size
        self.centre = evaluation_transform(image_size)
        self.draw = draw
        self.seed = seed
        self.policy = policy
        self.erasing = erasing
        self.grey = grey

    def __len__(self) -> int:
        return len(self.paths)

    def names(self) -> list[str]:
        """Returns the paths; bytes that are no UTF-8 are escaped, so that they can be written."""
        return [readable(path) for path in self.paths]

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, ...]:
        """Returns, for a key (epoch, index), an image, its label, its numbers and its box, if any.

        The image is uint8 (H, W, C), as Pillow stores it: the device puts the channels first.
        """
        epoch, index = key
        with opened(os.fsdecode(self.paths[index])) as image:
            numbers: list[Tensor] = []
            if self.draw is not None:
                with keyed("augmentation", self.seed, epoch, index):
                    box, *numbers = self.draw(image)
                    shown = resized(image, box, self.image_size)
                    if self.policy is not None:
                        shown = self.policy(shown)
            else:
                shown = to_rgb(image)
            if self.grey:
                shown = shown.convert("L")
            if self.draw is None:
                shown = self.centre(shown)
            pixels = as_tensor(shown).view(self.image_size, self.image_size, -1)
        if self.erasing and self.draw is not None:
            chance, size = generator("erasing", self.seed, epoch, index), (self.image_size,) * 2
            numbers.append(draw_boxes(1, size, self.erasing, chance)[0])
        return pixels, self.labels[index], *numbers


def start_worker(worker: int) -> None:
    """Prepares a loader process: they run side by side, so that each may use one core."""
    torch.set_num_threads(1)
    preemption.outlive_warnings()


@dataclass(eq=False, kw_only=True)
class ImageFolderDataModule(ImageDataModule):
    """A folder ``data_dir/{train,val[,test]}/<class>/<image>``; without ``test``, ``val`` tests.

    With `val_size`, ``train`` alone will do for a fit without test (``test_after_fit: false``).

    Workers decode, crop and resize; flips, colours and ImageNet's mean and std are left to the
    device, see `datamodules.image_colour`. Lightning does not see the torch DataLoader inside, so
    it needs no ``use_distributed_sampler=False``.

    Args:
        data_dir: the folder.
        image_size: height and width of what the steps receive, in pixels.
        augmentation: see `datamodules.image_augmentation`.
        val_size: images of ``train`` held out for validation; 0 validates on ``val``.
        split_seed: keys the images that are held out.
        num_workers: processes that decode; 0 decodes in the main process.
        grey: convert the images to one channel, for networks that take one.
        predict_dir: images to predict, here and in folders below, with the label -1; None: those of
            the test.
        batch_size, eval_batch_size, seed, drop_last, random_erasing: see `ImageDataModule`.
    """

    crops_images = True

    data_dir: str = field(default="data", kw_only=False)
    image_size: int = 224
    augmentation: Augmentation = "inception"
    val_size: int = 0
    split_seed: int = 0
    num_workers: int = 4
    grey: bool = False
    predict_dir: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.augmentation != "none" or not self.random_erasing,
            f"random_erasing is {self.random_erasing} and augmentation none: give one or drop both",
        )
        self.image_shape = (1 if self.grey else 3, self.image_size, self.image_size)
        self._draw = training_draw(self.augmentation, self.image_size)
        self._splits: dict[Split, tuple[ImageFiles, Tensor]] = {}

    @cached_property
    def _classes(self) -> list[str]:
        return list_classes(Path(self.data_dir) / "train")

    @property
    def class_names(self) -> list[str]:
        """The names of the folders, which need not be UTF-8, for people."""
        return [readable(name) for name in self._classes]

    @property
    def num_classes(self) -> int:
        return len(self._classes)

    def setup(self, stage: str) -> None:
        if not self._splits:
            self._splits = self._find_splits()
            of_channels = (GREY_MEAN, GREY_STD) if self.grey else (IMAGENET_MEAN, IMAGENET_STD)
            self.transform = ColourTransform(*([255 * x for x in each] for each in of_channels))
        if "predict" in self._splits:
            files, _ = self._splits["predict"]
            self.predict_names = files.names()[self.rank :: self.world_size]
        self.check_batch_size()

    def _find_splits(self) -> dict[Split, tuple[ImageFiles, Tensor]]:
        """Returns for every split the files and the indices of those that belong to it."""
        root, size, grey = Path(self.data_dir), self.image_size, self.grey
        train = list_labelled(root / "train", self._classes)
        require(
            self.val_size < len(train),
            f"val_size is {self.val_size} of {len(train)} training images: lower it",
        )
        others: dict[Split, list[tuple[str, int]]] = {}
        if (root / "val").is_dir():
            others["val"] = others["test"] = list_labelled(root / "val", self._classes)
        elif not self.val_size:
            raise FileNotFoundError(
                f"looked for {root}/val/<class>/*: put one folder per class there, or hold out "
                "images of train by val_size"
            )
        if (root / "test").is_dir():
            others["test"] = list_labelled(root / "test", self._classes)
        if self.predict_dir is not None:
            others["predict"] = [(path, UNKNOWN) for path in list_all(Path(self.predict_dir))]
        elif "test" in others:
            others["predict"] = others["test"]
        splits: dict[Split, tuple[ImageFiles, Tensor]] = {
            split: (ImageFiles(files, size, grey=grey), torch.arange(len(files)))
            for split, files in others.items()
        }
        order = torch.randperm(len(train), generator=generator("split", self.split_seed))
        if self.val_size:
            splits["val"] = ImageFiles(train, size, grey=grey), order[: self.val_size]
        drawn = training_policy(self.augmentation), self.random_erasing
        files = ImageFiles(train, size, self._draw, self.seed, *drawn, grey)
        return {"train": (files, order[self.val_size :]), **splits}

    def num_samples(self, split: Split) -> int:
        if split not in self._splits:
            remedy = "set predict_dir" if split == "predict" else "pass --test_after_fit=false"
            raise FileNotFoundError(
                f"there are no images to {split}: put some in {self.data_dir}/test/<class>, or "
                f"{remedy}"
            )
        return len(self._splits[split][1])

    def load_train(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        return self._load("train", batches, epoch)

    def load_eval(self, batches: Sequence[Tensor], split: Split) -> Iterator[Batch]:
        return self._load(split, batches, epoch=0)

    def _load(self, split: Split, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        files, indices = self._splits[split]
        loader = DataLoader(
            files,
            # A generator: the keys of an epoch of ImageNet would be a million Python objects.
            batch_sampler=([(epoch, row) for row in indices[batch].tolist()] for batch in batches),
            num_workers=self.num_workers,
            worker_init_fn=start_worker,
            pin_memory=self.root_device.type == "cuda",
            # Otherwise it would draw a seed for its workers, which use none, from the global one.
            generator=generator("workers", self.seed, epoch),
        )
        try:
            with preemption.held_back():  # until the workers can outlive them
                loaded = iter(loader)
            for images, *others in loaded:
                yield images.permute(0, 3, 1, 2), *others
        except ValueError as error:  # a corrupt image; from a worker it comes with a traceback
            problem = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
            # Without the traceback, whose frames would keep the workers alive.
            raise ValueError(problem) from error.with_traceback(None)

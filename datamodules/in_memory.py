"""Data sets that fit into memory as bytes: a batch is an `index_select`.

They lie on the GPU, if there is one and it has room. Then the order of an epoch travels once, and
training images are made a chunk at a time: the images of many batches are chosen, cropped, flipped,
normalised and erased at once, and a batch is a slice of them. Launches and Python, for which a
small network has no time, are thereby paid per chunk.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from chance import generator
from datamodules.augmentation import BatchTransform, draw_views
from datamodules.base import Batch, Finished, ImageDataModule, Split, require
from datamodules.erasing import draw_boxes
from datamodules.normalization import Normalization, statistics


class LabelledImages(NamedTuple):
    images: Tensor
    """uint8 (N, C, H, W)."""
    labels: Tensor
    """int64 (N,)."""


Pools = tuple[LabelledImages, LabelledImages]

CHUNK = 2**24
"""Values of images that are made at once, or one batch: 64 MiB of float32, 5,461 CIFAR images."""
BYTES_TO_MAKE = 10
"""Of memory for each of these values while they are made: chosen and cropped bytes (1 + 1), scale
and result in float32 (4 + 4)."""

ON_THE_WAY = (
    "load_train",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "finish",
)
"""Methods by which a training batch goes from the data set to the steps."""


def has_room(pools: Pools, device: torch.device) -> bool:
    """Returns whether pools may lie on a device: a GPU with enough free memory.

    That is four times as much as they and a chunk in the making take. The rest is for the network,
    whose needs are not known yet.
    """
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    chunk = BYTES_TO_MAKE * min(CHUNK, pools[0].images.numel())
    return 4 * (sum(values.nbytes for pool in pools for values in pool) + chunk) <= free


def send(values: Tensor, device: torch.device) -> Tensor:
    """Moves values to a device, for which the host does not wait."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


@dataclass(eq=False, kw_only=True)
class InMemoryDataModule(ImageDataModule):
    """Holds all images as uint8. Subclasses define `read` and may replace `split` and `statistics`.

    Args:
        val_size: images held out from the training set; 0: train on all of it, validate on nothing.
        split_seed: keys the split, which is thereby the same for every run and every `seed`.
        normalization: see `datamodules.normalization`; computed from the training split alone.
        crop_padding: zeros on each side before a random crop to the original size, in pixels.
        batch_size, eval_batch_size, seed, drop_last, random_erasing: see `ImageDataModule`.

    Attributes:
        horizontal_flip: whether half of the training images are flipped; an argument only where
            mirrored images keep their labels.
        resident: whether all images may lie on the GPU, where training batches are made in
            chunks. It changes no number, so it is the machine's matter and no argument.
    """

    horizontal_flip = False
    resident = True

    val_size: int = 0
    split_seed: int = 0
    normalization: Normalization = "channel"
    crop_padding: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._loaded = False
        self._placed: dict[torch.device, Pools] = {}

    def __getstate__(self) -> dict:
        """Another process gets no memory of a device."""
        return self.__dict__ | {"_placed": {}}

    def read(self, download: bool) -> Pools:
        """Returns the training images, those to be held out included, and the test images.

        Args:
            download: whether a missing data set may be fetched.

        Raises:
            FileNotFoundError: it is not there; says what was looked for, where, how to get it.
            ValueError: a file is corrupt.
        """
        raise NotImplementedError("each data set has its own files")

    def split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the indices that train and those that validate, for all labels (N,)."""
        order = torch.randperm(len(labels), generator=generator("split", self.split_seed))
        return order[self.val_size :], order[: self.val_size]

    def statistics(self, images: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean (C, H, W) and std (C, 1, 1), in bytes, of ``images[indices]``."""
        return statistics(self.normalization, images, indices)

    def prepare_data(self) -> None:
        self._load(download=True)

    def setup(self, stage: str) -> None:
        self._load(download=False)
        num_test = len(self._test.labels)
        self.predict_names = [f"test/{i}" for i in range(self.rank, num_test, self.world_size)]
        self.check_batch_size()

    def _load(self, download: bool) -> None:
        if self._loaded:
            return
        self._train, self._test = self.read(download)
        self._check("training", self._train)
        self._check("test", self._test)
        num_images = len(self._train.labels)
        require(
            self.val_size < num_images,
            f"val_size is {self.val_size} of {num_images} training images: lower it",
        )
        widest = min(self.image_shape[1:]) - 1  # beyond it a crop may show padding alone
        require(
            self.crop_padding <= widest,
            f"crop_padding is {self.crop_padding}: give 0 to {widest} pixels",
        )
        self._train_indices, self._val_indices = self.split(self._train.labels)
        mean, std = self.statistics(self._train.images, self._train_indices)
        require(
            bool((std > 0).all()),
            f"all training images of {type(self).__name__} are of one colour: get the files again",
        )
        self.transform = BatchTransform(mean, std, self.crop_padding)
        self._loaded = True

    def _check(self, part: str, data: LabelledImages) -> None:
        """Compares what was read with what is declared, whatever the files were.

        Raises:
            ValueError: images and labels differ in number, or images in shape from `image_shape`,
                or a label is none of the `num_classes`.
        """
        name = f"the {part} data of {type(self).__name__}"
        images, labels = data
        require(
            len(images) == len(labels) > 0,
            f"{name} have {len(images)} images and {len(labels)} labels: get the files again",
        )
        require(
            images.dtype == torch.uint8 and labels.dtype == torch.int64,
            f"{name} are images of {images.dtype} with labels of {labels.dtype}, not of uint8 and "
            "int64: convert them",
        )
        require(
            images.shape[1:] == self.image_shape and labels.ndim == 1,
            f"{name} are images of {(*images.shape[1:],)} with labels of {(*labels.shape[1:],)}, "
            f"not of {self.image_shape} and (): get the files again, or use ImageFolderDataModule",
        )
        low, high = (int(label) for label in labels.aminmax())
        require(
            low >= 0 and high < self.num_classes,
            f"{name} have labels from {low} to {high}, but {self.num_classes} classes count from 0 "
            f"to {self.num_classes - 1}: get the files again",
        )

    def num_samples(self, split: Split) -> int:
        if split == "train":
            return len(self._train_indices)
        return len(self._val_indices) if split == "val" else len(self._test.labels)

    def load_train(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        train, _ = self._pools()
        numbers = self._draw(epoch)
        if self.makes_chunks(train):
            return self._take_finished(train, batches, *numbers)
        return self._take(train, self._train_indices, batches, *numbers)

    def makes_chunks(self, train: LabelledImages) -> bool:
        """Returns whether training batches are slices of chunks: of images that lie on a GPU.

        They are not where a subclass has a method of its own that may change batches: it expects
        bytes, and one batch at a time.
        """
        return train.images.is_cuda and all(
            getattr(type(self), name) is getattr(InMemoryDataModule, name) for name in ON_THE_WAY
        )

    def _draw(self, epoch: int) -> list[Tensor]:
        """Returns what chance gives to the training samples: a view (num_samples,), and a box."""
        if not (self.crop_padding or self.horizontal_flip or self.random_erasing):
            return []
        count = self.num_samples("train")
        views = draw_views(count, self.crop_padding, self.horizontal_flip, self.seed, epoch)
        if not self.random_erasing:
            return [views]
        chance = generator("erasing", self.seed, epoch)
        return [views, draw_boxes(count, self.image_shape[1:], self.random_erasing, chance)]

    def load_eval(self, batches: Sequence[Tensor], split: Split) -> Iterator[Batch]:
        train, test = self._pools()
        if split == "val":
            return self._take(train, self._val_indices, batches)
        return self._take(test, torch.arange(len(self._test.labels)), batches)

    def _pools(self) -> Pools:
        """Returns the training and the test images, from where batches are taken."""
        pools, device = (self._train, self._test), self.root_device
        if not self.resident:
            return pools
        if device not in self._placed:
            if has_room(pools, device):
                pools = tuple(
                    LabelledImages(*(values.to(device) for values in pool)) for pool in pools
                )
            self._placed = {device: pools}
        return self._placed[device]

    def _take(
        self, pool: LabelledImages, indices: Tensor, batches: Sequence[Tensor], *numbers: Tensor
    ) -> Iterator[Batch]:
        """Yields batches from the device of the pool.

        Args:
            pool: all images, those of other splits included.
            indices: the rows of the samples in it, (num_samples,).
            batches: the samples of each batch.
            numbers: what else belongs to each sample, (num_samples, ...).
        """
        if not batches:
            return
        order = torch.cat(tuple(batches))
        device = pool.images.device
        rows, *numbers = (
            send(values.index_select(0, order), device) for values in (indices, *numbers)
        )
        labels = pool.labels.index_select(0, rows)
        sizes = [len(batch) for batch in batches]
        pins = device != self.root_device and self.root_device.type == "cuda"
        for part, *others in zip(
            *(values.split(sizes) for values in (rows, labels, *numbers)), strict=True
        ):
            # Without a name for the images: it would keep them until the next ones are here.
            yield tuple(
                values.pin_memory() if pins else values
                for values in (pool.images.index_select(0, part), *others)
            )

    def _take_finished(
        self, pool: LabelledImages, batches: Sequence[Tensor], *numbers: Tensor
    ) -> Iterator[Batch]:
        """Yields finished training batches, see `ImageDataModule`; for its arguments see `_take`.

        A chunk is given up before the next one is made, unless somebody still has a batch of it.
        """
        step = max(1, CHUNK // (self.batch_size * math.prod(self.image_shape)))
        groups = [batches[first : first + step] for first in range(0, len(batches), step)]
        rows = [torch.cat(tuple(group)) for group in groups]
        chunks = self._take(pool, self._train_indices, rows, *numbers)
        for group in groups:
            yield from self._finish_and_split(next(chunks), [len(batch) for batch in group])

    def _finish_and_split(self, chunk: Batch, sizes: list[int]) -> Iterator[Batch]:
        parts = (values.split(sizes) for values in self.finish(chunk))
        # For autograd, slices are parts of one tensor, and a step that multiplies its images by a
        # weight in place would have to do with all of them; detached ones are tensors of their own.
        return map(Finished, *(map(Tensor.detach, part) for part in parts))

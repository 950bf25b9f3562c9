"""What all data modules share: arguments, order, ranks, and where a resumed run goes on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Literal, NamedTuple, get_args, get_origin

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from datamodules.erasing import erase
from datamodules.image_format import ImageFormat
from datamodules.order import evaluation_batches, num_training_batches, training_batches

Split = Literal["train", "val", "test", "predict"]
Batch = Sequence[Tensor]


class Finished(NamedTuple):
    """A batch as the steps receive it."""

    images: Tensor
    """float32 (N, C, H, W)."""
    labels: Tensor
    """int64 (N,)."""


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message`, which names the mistake and its remedy."""
    if not condition:
        raise ValueError(message)


LEAST = {"batch_size": 1, "eval_batch_size": 1, "image_size": 1}
"""Of whole numbers; others may be 0."""
MOST = {"seed": 2**64, "split_seed": 2**64, "image_size": 2**13, "num_workers": 2**10}


def check_value(name: str, value: object, kind: object) -> None:
    """Raises ValueError unless an argument has a value of its type, and a number is in its range.

    Args:
        name: of the argument.
        value: what was given.
        kind: int, bool, float (a share) or a `Literal`; others are only asked not to be empty.
    """
    # As a folder, an unset variable of a shell would be the one in which the command runs.
    require(value != "", f"{name} is empty: give a value, or leave it out")
    if get_origin(kind) is Literal:
        *others, last = get_args(kind)
        fits, remedy = value in (*others, last), f"give {', '.join(others)} or {last}"
    elif kind is int:
        least, most = LEAST.get(name, 0), MOST.get(name, 2**20)
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        fits = is_whole and least <= value <= most
        remedy = f"give a whole number from {least} to {most}"
    elif kind is bool:
        fits, remedy = isinstance(value, bool), "give true or false"
    elif kind is float:
        fits = isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= 1
        remedy = "give a number from 0 to 1"
    else:
        return
    require(fits, f"{name} is {value!r}: {remedy}")


class EpochLoader:
    """A sized iterable of batches; every `iter` asks `batches` anew.

    It is not a torch DataLoader on purpose: Lightning rebuilds those with samplers of its own, and
    ours already know ranks, epochs and where to resume.
    """

    def __init__(self, num_batches: int, batches: Callable[[], Iterator[Batch]]):
        self._num_batches = num_batches
        self._batches = batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        # A generator on purpose: `batches` looks up the trainer's progress when the first batch is
        # asked for. Lightning calls iter() up to twice before that, when a resumed trainer still
        # holds the counters of the checkpoint, which may be those of an epoch that was complete.
        yield from self._batches()

    def state_dict(self) -> dict:
        """Nothing: the trainer's progress is the position. Tells Lightning that we can resume."""
        return {}

    def load_state_dict(self, state_dict: dict) -> None:
        """Nothing to do, see `state_dict`."""


@dataclass(eq=False, kw_only=True)
class ImageDataModule(LightningDataModule):
    """Labelled images. Steps receive ``(images, labels)``: float32 (N, C, H, W) and int64 (N,).

    The order is a function of (seed, epoch), see `datamodules.order`, and so is the augmentation. A
    loader has the length of the full epoch, and its iterator starts at the batch that the trainer
    has reached.

    A batch, ``(images, labels[, numbers[, boxes]])``, comes to the device as bytes, with what
    chance gave to each of its training images: numbers, and a box to erase. It is finished there,
    that is, augmented, normalised and erased, and nothing in that makes the host wait for a GPU.
    Training batches may also come `Finished`.

    The fields are the arguments. A subclass names, as a dataclass, only those that it adds or whose
    default it changes, checks them in `__post_init__`, and defines the attributes and
    `num_samples`, `load_train`, `load_eval`.

    Args:
        batch_size: training images per process.
        eval_batch_size: images per process in validation, test and prediction.
        seed: keys order and augmentation; the seed of the run.
        drop_last: leave out the last training batch of an epoch when it is not full.
        random_erasing: how likely a box of a training image is erased, see `datamodules.erasing`.

    Attributes:
        num_classes: number of classes.
        class_names: their names, in the order of the labels.
        image_shape: (C, H, W) of what the steps receive.
        predict_names: a name for each image that `predict` gives to this rank, in their order; set
            by `setup`.
        transform: what happens on the device to a batch's images and numbers, a `BatchTransform` or
            `ColourTransform`; set by `setup`.
        crops_images: whether images have any size, and evaluation cuts their centre out.
        enlargement: sides of the square that a pixel of the files becomes.

    Raises:
        ValueError: an argument is out of range.
    """

    crops_images = False
    enlargement = 1

    batch_size: int = 128
    eval_batch_size: int = 500
    seed: int = 0
    drop_last: bool = False
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        super().__init__()
        for field in fields(self):
            check_value(field.name, getattr(self, field.name), field.type)

    def num_samples(self, split: Split) -> int:
        """Returns the number of images of a split, over all ranks."""
        raise NotImplementedError("in memory or from files: the subclass knows")

    def load_train(self, batches: Sequence[Tensor], epoch: int) -> Iterator[Batch]:
        """Yields one loaded batch for each tensor of sample indices."""
        raise NotImplementedError("in memory or from files: the subclass knows")

    def load_eval(self, batches: Sequence[Tensor], split: Split) -> Iterator[Batch]:
        """Yields one loaded batch, not augmented, for each tensor of sample indices."""
        raise NotImplementedError("in memory or from files: the subclass knows")

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def root_device(self) -> torch.device:
        """Where the steps of this rank run."""
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    @property
    def num_train_batches(self) -> int:
        """Batches of a full training epoch on this rank."""
        return num_training_batches(
            self.num_samples("train"), self.batch_size, self.world_size, self.drop_last
        )

    def check_batch_size(self) -> None:
        """Is called at the end of `setup`.

        Raises:
            ValueError: the training split does not fill one batch on every process.
        """
        per_step = self.batch_size * self.world_size
        require(
            per_step <= self.num_samples("train"),
            f"there are {self.num_samples('train')} training images; batch_size times processes "
            f"asks for {per_step} of them in every step: lower batch_size",
        )

    @property
    def image_format(self) -> ImageFormat:
        """How an image becomes what the steps receive, without this data module; after `setup`."""
        return ImageFormat(
            data=type(self).__name__,
            image_shape=self.image_shape,
            scale=self.transform.scale.cpu(),
            shift=self.transform.shift.cpu(),
            class_names=getattr(self, "class_names", None),
            is_cropped=self.crops_images,
            enlargement=self.enlargement,
        )

    def train_position(self) -> tuple[int, int]:
        """Returns the epoch and the batch in it that training comes to next.

        Both are the trainer's own progress, which its checkpoints hold, so nothing is saved here.
        """
        if self.trainer is None:
            return 0, 0
        num_done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return self.trainer.current_epoch, num_done % self.num_train_batches

    def train_epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """Yields this rank's batches of an epoch, which need not be on the device yet.

        Under ``trainer.overfit_batches`` the order is that of epoch 0 in every epoch, so that the
        batches that are left hold the same images; how they are augmented goes on changing.
        """
        overfits = self.trainer is not None and self.trainer.overfit_batches > 0
        batches = training_batches(
            self.num_samples("train"),
            self.batch_size,
            self.seed,
            0 if overfits else epoch,
            self.rank,
            self.world_size,
            self.drop_last,
        )
        return self.load_train(batches[first_batch:], epoch)

    def train_dataloader(self) -> EpochLoader:
        return EpochLoader(self.num_train_batches, lambda: self.train_epoch(*self.train_position()))

    def val_dataloader(self) -> EpochLoader | list:
        return self._eval_loader("val") if self.num_samples("val") else []

    def test_dataloader(self) -> EpochLoader:
        return self._eval_loader("test")

    def predict_dataloader(self) -> EpochLoader:
        return self._eval_loader("predict")

    def _eval_loader(self, split: Split) -> EpochLoader:
        batches = evaluation_batches(
            self.num_samples(split), self.eval_batch_size, self.rank, self.world_size
        )
        return EpochLoader(len(batches), lambda: self.load_eval(batches, split))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if isinstance(batch, Finished):
            return batch
        require(
            not batch[0].is_floating_point(),
            f"the images of a batch are {batch[0].dtype} and not `Finished`: give bytes, which "
            "are normalised here, or keep the type of the batch",
        )
        return self.finish(batch)

    def finish(self, batch: Batch) -> Finished:
        """Returns what the steps receive of a batch of bytes, on the device of its images."""
        images, labels, *numbers = batch
        if self.transform.shift.device != images.device:
            self.transform.to(images.device)
        if not (self.random_erasing and numbers):
            return Finished(self.transform(images, *numbers), labels)
        *numbers, boxes = numbers
        return Finished(erase(self.transform(images, *numbers), boxes), labels)

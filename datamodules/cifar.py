"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 training and 10,000 test images of 32x32."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from datamodules.base import require
from datamodules.decoded_folder import read_folder
from datamodules.in_memory import InMemoryDataModule, LabelledImages
from datamodules.normalization import per_channel


@dataclass(eq=False, kw_only=True)
class CIFAR10DataModule(InMemoryDataModule):
    """CIFAR-10, by default 45,000 / 5,000 / 10,000 images.

    Looks for ``data_dir/cifar-10-batches-py`` (torchvision), then for an image folder
    ``data_dir/cifar10`` with ``{train,test}/<class>/<image>`` (decoded once and cached beside it),
    and then downloads the former.

    Args:
        data_dir: where to look, and to download to.
        normalization: "channel" uses the constants of the DenseNet and MSDNet code.
        horizontal_flip: flip half of the training images.
        batch_size, eval_batch_size, val_size, split_seed, seed, crop_padding, drop_last,
            random_erasing: see `InMemoryDataModule`.
    """

    num_classes = 10
    image_shape = (3, 32, 32)
    folder = "cifar10"
    source = datasets.CIFAR10
    channel_means = (125.3, 123.0, 113.9)
    channel_stds = (63.0, 62.1, 66.7)

    data_dir: str = field(default="data", kw_only=False)
    val_size: int = 5000
    crop_padding: int = 4
    horizontal_flip: bool = True

    def read(self, download: bool) -> tuple[LabelledImages, LabelledImages]:
        batches = Path(self.data_dir) / self.source.base_folder
        folder = Path(self.data_dir) / self.folder
        if folder.is_dir() and not batches.is_dir():
            content = read_folder(folder, ("train", "test"))
            self.class_names = content["class_names"]
            train, test = LabelledImages(*content["train"]), LabelledImages(*content["test"])
        else:
            train, test = self._read_batches(batches, folder, download)
        require(
            len(self.class_names) == self.num_classes,
            f"{folder} has {len(self.class_names)} classes, not {self.num_classes}: use "
            f"ImageFolderDataModule",
        )
        return train, test

    def _read_batches(
        self, batches: Path, folder: Path, download: bool
    ) -> tuple[LabelledImages, LabelledImages]:
        found = batches.is_dir()
        try:
            parts = [
                self.source(self.data_dir, train, download=download and not found)
                for train in (True, False)
            ]
        # Without a network, or where torchvision's checksums do not hold.
        except (OSError, RuntimeError) as error:
            if found:
                raise ValueError(
                    f"{batches} is incomplete or corrupt: remove it and download again"
                ) from error
            how = f" (downloading it failed: {error})" if download else ", or call prepare_data()"
            raise FileNotFoundError(
                f"{self.source.__name__} not found: looked for {batches} and {folder}/"
                f"{{train,test}}/<class>/*; unpack {self.source.url} in {self.data_dir}{how}"
            ) from error
        self.class_names = parts[0].classes
        train, test = (
            LabelledImages(
                torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
                torch.tensor(part.targets),
            )
            for part in parts
        )
        return train, test

    def statistics(self, images: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        if self.normalization == "channel":
            return per_channel(self.channel_means, self.channel_stds, *images.shape[2:])
        return super().statistics(images, indices)


class CIFAR100DataModule(CIFAR10DataModule):
    """As `CIFAR10DataModule`, from ``cifar-100-python`` or the image folder ``cifar100``."""

    num_classes = 100
    folder = "cifar100"
    source = datasets.CIFAR100
    channel_means = (129.3, 124.1, 112.4)
    channel_stds = (68.2, 65.4, 70.4)

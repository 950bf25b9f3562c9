"""MNIST (LeCun et al. 1998) and Fashion-MNIST (Xiao et al. 2017).

Each has 60,000 training and 10,000 test images of 28x28.
"""

import gzip
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from datamodules.in_memory import InMemoryDataModule, LabelledImages
from datamodules.normalization import Normalization

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_idx(path: Path) -> Tensor:
    """Reads an array of bytes in the format of the MNIST files, compressed if the name ends in .gz.

    The header is two zero bytes, the type (8: bytes), the number of dimensions, and each of them in
    4 bytes.

    Raises:
        ValueError: the file is corrupt.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:3] != b"\0\0\x08" or content[3] == 0:
            raise ValueError("it does not start like an idx file of bytes")
        num_dims = content[3]
        shape = np.frombuffer(content, ">i4", num_dims, offset=4)
        values = np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape)
        return torch.from_numpy(values.copy())
    except (OSError, EOFError, IndexError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"cannot read {path} ({error}): remove it and get it again") from error


@dataclass(eq=False, kw_only=True)
class MNISTDataModule(InMemoryDataModule):
    """MNIST, by default 55,000 / 5,000 / 10,000 images, 1 channel.

    Looks for the four idx files, compressed or not, in `data_dir` and in ``data_dir/MNIST/raw``,
    then downloads them.

    Args:
        data_dir: where to look, and to download to.
        batch_size, eval_batch_size, val_size, split_seed, seed, normalization, crop_padding,
            drop_last, random_erasing: see `InMemoryDataModule`.
    """

    num_classes = 10
    class_names = [str(digit) for digit in range(10)]  # noqa: RUF012
    image_shape = (1, 28, 28)
    source = datasets.MNIST
    folders = (".", "MNIST/raw")

    data_dir: str = field(default="data", kw_only=False)
    val_size: int = 5000
    normalization: Normalization = "scale"

    def read(self, download: bool) -> tuple[LabelledImages, LabelledImages]:
        paths = self._find()
        if paths is None and download:
            try:
                self.source(self.data_dir, download=True)
            except (OSError, RuntimeError) as error:
                raise FileNotFoundError(
                    f"{self._not_found()} (downloading them failed: {error})"
                ) from error
            paths = self._find()
        if paths is None:
            raise FileNotFoundError(f"{self._not_found()}, or call prepare_data()")
        images, labels, test_images, test_labels = (read_idx(path) for path in paths)
        return (
            LabelledImages(images[:, None], labels.long()),
            LabelledImages(test_images[:, None], test_labels.long()),
        )

    def _find(self) -> list[Path] | None:
        """Returns the paths of the four files in the first folder that has them all."""
        for folder in (Path(self.data_dir) / name for name in self.folders):
            paths = [
                next(
                    (path for path in (folder / name, folder / f"{name}.gz") if path.is_file()),
                    None,
                )
                for name in FILES
            ]
            if all(paths):
                return paths
        return None

    def _not_found(self) -> str:
        places = " and ".join(str(Path(self.data_dir) / name) for name in self.folders)
        return (
            f"{self.source.__name__} not found: looked for {FILES[0]}[.gz] and its companions in "
            f"{places}; get them from {self.source.mirrors[0]}"
        )


class FashionMNISTDataModule(MNISTDataModule):
    """Fashion-MNIST; as `MNISTDataModule`, from ``FashionMNIST/raw`` or ``fashion-mnist``.

    Debian's package dataset-fashion-mnist is found with ``data_dir="/usr/share/datasets"``.
    """

    class_names = datasets.FashionMNIST.classes
    source = datasets.FashionMNIST
    folders = (".", "FashionMNIST/raw", "fashion-mnist")

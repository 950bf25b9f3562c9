"""Street View House Numbers (Netzer et al. 2011), with the extra training images."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

from chance import generator
from datamodules.base import require
from datamodules.in_memory import InMemoryDataModule, LabelledImages
from datamodules.normalization import Normalization


def split_per_class(
    labels: Tensor, num_train: int, from_train: int, from_extra: int, chance: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Holds out the same number of images of every class.

    Args:
        labels: (N,): first the labels of the `num_train` training images, then those of the extra
            images.
        from_train, from_extra: images to hold out per class from each of the two.

    Returns:
        The indices that stay and those that are held out.
    """
    order = torch.randperm(len(labels), generator=chance)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    extra = order >= num_train
    for label in labels.unique():
        same = labels[order] == label
        for members, count in (
            (order[same & ~extra], from_train),
            (order[same & extra], from_extra),
        ):
            require(
                len(members) >= count,
                f"class {label} has {len(members)} images, of which val_size asks for {count}: "
                f"lower val_size",
            )
            held_out[members[:count]] = True
    return (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)


@dataclass(eq=False, kw_only=True)
class SVHNDataModule(InMemoryDataModule):
    """SVHN, by default 598,388 / 6,000 / 26,032 images.

    The training set is ``train`` and ``extra`` together, about 1.9 GB in memory. Validation holds
    out, per class, two thirds from ``train`` and one third from ``extra``: 400 and 200, as
    Stochastic Depth and DenseNet do.

    Looks for ``{train,extra,test}_32x32.mat`` in `data_dir`, then downloads them.

    Args:
        data_dir: where to look, and to download to.
        val_size: images held out, a multiple of 30.
        batch_size, eval_batch_size, split_seed, seed, normalization, crop_padding, drop_last,
            random_erasing: see `InMemoryDataModule`.
    """

    num_classes = 10
    class_names = [str(digit) for digit in range(10)]  # noqa: RUF012
    image_shape = (3, 32, 32)

    data_dir: str = field(default="data", kw_only=False)
    val_size: int = 6000
    normalization: Normalization = "scale"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.val_size % 30 == 0,
            f"val_size is {self.val_size}: give a multiple of 30 (3 per class)",
        )

    def read(self, download: bool) -> tuple[LabelledImages, LabelledImages]:
        train, extra, test = (
            self._read_part(part, download) for part in ("train", "extra", "test")
        )
        self._num_train = len(train.labels)
        both = LabelledImages(*(torch.cat(pair) for pair in zip(train, extra, strict=True)))
        return both, test

    def _read_part(self, part: str, download: bool) -> LabelledImages:
        url, name, _ = datasets.SVHN.split_list[part]
        path = Path(self.data_dir) / name
        found = path.is_file()
        try:
            # Where the file is there, its checksum is computed once: torchvision's `download` would
            # do so again.
            source = datasets.SVHN(self.data_dir, part, download=download and not found)
        except (OSError, RuntimeError, ValueError) as error:
            if found:
                raise ValueError(f"{path} is corrupt: remove it and download it again") from error
            how = f" (downloading it failed: {error})" if download else ", or call prepare_data()"
            raise FileNotFoundError(
                f"SVHN not found: looked for {path}; get it from {url}{how}"
            ) from error
        return LabelledImages(
            torch.from_numpy(source.data).contiguous(), torch.from_numpy(source.labels)
        )

    def split(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        per_class = self.val_size // self.num_classes
        return split_per_class(
            labels,
            self._num_train,
            from_train=per_class * 2 // 3,
            from_extra=per_class // 3,
            chance=generator("split", self.split_seed),
        )

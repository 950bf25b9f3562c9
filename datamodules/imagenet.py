"""ImageNet (Russakovsky et al. 2015), as folders."""

from dataclasses import dataclass, field

from datamodules.image_folder import ImageFolderDataModule


@dataclass(eq=False, kw_only=True)
class ImageNetDataModule(ImageFolderDataModule):
    """`ImageFolderDataModule` as the papers set it: 224x224, batch 256, tested on ``val``.

    Two papers differ in their images: see the head of `datamodules.image_augmentation` for the mean
    per pixel of ResNet-50, and for the crop and flip alone of MSDNet's PyTorch code.

    Args:
        data_dir: holds ``train/<class>`` and ``val/<class>``.
        val_size: MSDNet holds out 50,000 training images to find its thresholds.
        image_size, augmentation, batch_size, eval_batch_size, split_seed, seed, num_workers,
            grey, predict_dir, drop_last, random_erasing: see `ImageFolderDataModule`.
    """

    data_dir: str = field(default="data/imagenet", kw_only=False)
    batch_size: int = 256
    eval_batch_size: int = 256
    num_workers: int = 8

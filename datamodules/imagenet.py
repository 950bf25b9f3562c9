"""ImageNet (Russakovsky et al. 2015), as folders."""

from datamodules.image_augmentation import Augmentation
from datamodules.image_folder import ImageFolderDataModule


class ImageNetDataModule(ImageFolderDataModule):
    """`ImageFolderDataModule` as the papers set it: 224x224, batch 256, reported on ``val``.

    Args:
        data_dir: holds ``train/<class>`` and ``val/<class>``.
        val_size: MSDNet holds out 50,000 training images to find its thresholds.
        image_size, augmentation, batch_size, eval_batch_size, split_seed, seed, num_workers,
            predict_dir, drop_last: see `ImageFolderDataModule`.
    """

    def __init__(
        self,
        data_dir: str = "data/imagenet",
        image_size: int = 224,
        augmentation: Augmentation = "inception",
        batch_size: int = 256,
        eval_batch_size: int = 256,
        val_size: int = 0,
        split_seed: int = 0,
        seed: int = 0,
        num_workers: int = 8,
        predict_dir: str | None = None,
        drop_last: bool = False,
    ):
        super().__init__(
            data_dir=data_dir,
            image_size=image_size,
            augmentation=augmentation,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            val_size=val_size,
            split_seed=split_seed,
            seed=seed,
            num_workers=num_workers,
            predict_dir=predict_dir,
            drop_last=drop_last,
        )

"""Claims: augmented CIFAR training images, 30 times faster than the usual torchvision way.

And images of a folder, as far as a worker is busy with them, 1.3 times faster.

    python -m benchmarks.input_pipeline [--folder FOLDER [--image-size PIXELS]]

CIFAR: pad by 4, random 32x32 crop, random flip, normalise; batches of 128. Needs no data set:
random bytes. With ``--folder`` instead ``FOLDER/<class>/<image>``: random crop of 8-100%, colour
jitter, random flip, normalise, beside torchvision's `ImageFolder`; ours adds the PCA colour. What a
worker does is one row, and that and the arithmetic, which is meant for a GPU, on the CPU another.

On the CPU, one thread, no workers. The pipelines take turns, and the table shows medians over the
rounds of images per second of CPU time, so that a busy machine slows all of them alike.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms
from torchvision.transforms import v2

from chance import generator
from datamodules import CIFAR10DataModule, ImageFolderDataModule, LabelledImages

BATCH_SIZE = 128
FOLDER_BATCH_SIZE = 16
NUM_ROUNDS = 9
OURS = "this project"


class RandomCIFAR10(CIFAR10DataModule):
    """`CIFAR10DataModule` on random bytes."""

    def __init__(self, num_images: int):
        super().__init__(batch_size=BATCH_SIZE, val_size=0)
        self.num_images = num_images

    def read(self, download: bool) -> tuple[LabelledImages, LabelledImages]:
        shape = (self.num_images, *self.image_shape)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator("benchmark"))
        pool = LabelledImages(images, torch.arange(self.num_images) % self.num_classes)
        return pool, pool

    def device_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields what the training steps of an epoch receive."""
        for batch in self.train_dataloader():
            yield self.on_after_batch_transfer(batch, 0)


class OneByOne(Dataset):
    """An image at a time, through `transform`, as `torchvision.datasets.CIFAR10` does it."""

    def __init__(self, images: Sequence, labels: list[int], transform: Callable):
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def pipelines(num_images: int) -> dict[str, Callable[[], Iterable]]:
    """Returns, by the name in the table, functions that start an epoch over the same images."""
    ours = RandomCIFAR10(num_images)
    ours.setup("fit")
    (images, labels), _ = ours.read(download=False)
    mean = [value / 255 for value in ours.channel_means]
    std = [value / 255 for value in ours.channel_stds]

    pil_images = OneByOne(
        images.permute(0, 2, 3, 1).contiguous().numpy(),
        labels.tolist(),
        transforms.Compose(
            [
                Image.fromarray,
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        ),
    )
    tensors = OneByOne(
        images,
        labels.tolist(),
        v2.Compose(
            [
                v2.RandomCrop(32, padding=4),
                v2.RandomHorizontalFlip(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        ),
    )
    return {
        OURS: ours.device_batches,
        "torchvision, PIL images": lambda: DataLoader(pil_images, BATCH_SIZE, shuffle=True),
        "torchvision v2, tensors": lambda: DataLoader(tensors, BATCH_SIZE, shuffle=True),
    }


def folder_pipelines(root: Path, image_size: int) -> dict[str, Callable[[], Iterable]]:
    """As `pipelines`, over ``root/train``; ours without and with what the device does."""
    ours = ImageFolderDataModule(
        str(root), image_size=image_size, batch_size=FOLDER_BATCH_SIZE, num_workers=0
    )
    ours.setup("fit")
    usual = datasets.ImageFolder(
        str(root / "train"),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(image_size),
                transforms.ColorJitter(0.4, 0.4, 0.4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        ),
    )
    return {
        OURS: ours.train_dataloader,
        "and the device's part": lambda: (
            ours.on_after_batch_transfer(batch, 0) for batch in ours.train_dataloader()
        ),
        "torchvision": lambda: DataLoader(usual, FOLDER_BATCH_SIZE, shuffle=True),
    }


def images_per_second(epoch: Iterable, num_batches: int) -> float:
    """Times `num_batches` batches, after a first one that warms up."""
    batches = iter(epoch)
    next(batches)
    start = time.process_time()
    num_images = sum(len(batch[1]) for batch in islice(batches, num_batches))
    return num_images / (time.process_time() - start)


def compare(starts: dict[str, Callable[[], Iterable]], num_batches: int, num_ours: int) -> None:
    """Prints the table; `num_ours` are the batches of ours, which may be faster, in a round."""
    rates = {name: [] for name in starts}
    for _ in range(NUM_ROUNDS):
        for name, start in starts.items():
            rates[name].append(
                images_per_second(start(), num_ours if name == OURS else num_batches)
            )
    ours = median(rates[OURS])
    print(f"{'pipeline':<26}{'images/s':>10}{'speed-up of ours':>20}")
    for name, values in rates.items():
        print(f"{name:<26}{median(values):>10,.0f}{ours / median(values):>18.2f} x")


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast training images come, per core.")
    parser.add_argument("--folder", type=Path, help="holds <class>/<image>; otherwise CIFAR")
    parser.add_argument("--image-size", type=int, default=224)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.folder is not None and not options.folder.is_dir():
        parser.error(f"no folder {options.folder}: give one that holds <class>/<image>")
    if options.folder is None:
        compare(pipelines(num_images=50_000), num_batches=12, num_ours=300)
        return
    with tempfile.TemporaryDirectory() as root:
        for split in ("train", "val"):
            Path(root, split).symlink_to(options.folder.resolve())
        starts = folder_pipelines(Path(root), options.image_size)
        compare(starts, num_batches=30, num_ours=30)


if __name__ == "__main__":
    main()

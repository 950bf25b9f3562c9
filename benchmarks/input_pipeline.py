"""Claim: augmented CIFAR training images come 30 times faster than from the usual torchvision pipeline, on one core.

    python -m benchmarks.input_pipeline

Pad by 4, random 32x32 crop, random flip, normalise; batches of 128 on the CPU, one thread, no workers. The pipelines
take turns and the table shows medians over the rounds, so that a busy machine slows all of them alike. Needs no data
set: the images are random bytes.
"""

import time
from collections.abc import Callable, Iterable
from statistics import median

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from chance import generator
from datamodules import CIFAR10DataModule
from datamodules.in_memory import LabelledImages

BATCH_SIZE = 128
CLAIM = 30.0


class RandomCIFAR10(CIFAR10DataModule):
    """`CIFAR10DataModule` on random bytes."""

    def __init__(self, num_images: int):
        super().__init__(batch_size=BATCH_SIZE, val_size=0)
        self.num_images = num_images

    def read(self, download: bool) -> tuple[LabelledImages, LabelledImages]:
        chance = generator("benchmark")
        shape = (self.num_images, *self.image_shape)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=chance)
        pool = LabelledImages(images, torch.arange(self.num_images) % self.num_classes)
        return pool, pool


class TorchvisionCIFAR10(Dataset):
    """What `torchvision.datasets.CIFAR10` does with an item: an image at a time, through `transform`."""

    def __init__(self, images: list, labels: list[int], transform: Callable):
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


class FromArray:
    """Makes a PIL image of (H, W, C) bytes, as torchvision's data set does for every item."""

    def __call__(self, pixels: Tensor) -> Image.Image:
        return Image.fromarray(pixels)


def pipelines(num_images: int) -> dict[str, Iterable]:
    """Returns the three ways of loading the same images, under the names of the table."""
    ours = RandomCIFAR10(num_images)
    ours.setup("fit")
    pool, _ = ours.read(download=False)
    labels = pool.labels.tolist()
    mean = [value / 255 for value in ours.channel_means]
    std = [value / 255 for value in ours.channel_stds]
    crop_and_flip = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    from torchvision import transforms as v1

    pil = v1.Compose(
        [
            FromArray(),
            v1.RandomCrop(32, padding=4),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            v1.Normalize(mean, std),
        ]
    )
    tensor = v2.Compose([*crop_and_flip, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    arrays = list(pool.images.permute(0, 2, 3, 1).contiguous().numpy())
    return {
        "ours": _OnDevice(ours),
        "torchvision, PIL images": DataLoader(
            TorchvisionCIFAR10(arrays, labels, pil), BATCH_SIZE, shuffle=True
        ),
        "torchvision v2, tensors": DataLoader(
            TorchvisionCIFAR10(list(pool.images), labels, tensor), BATCH_SIZE, shuffle=True
        ),
    }


class _OnDevice:
    """Our loader with the hook that Lightning calls after a batch has reached the device."""

    def __init__(self, data: RandomCIFAR10):
        self.data = data

    def __iter__(self):
        for batch in self.data.train_dataloader():
            yield self.data.on_after_batch_transfer(batch, 0)


def images_per_second(pipeline: Iterable, num_batches: int) -> float:
    """Times the first `num_batches` batches, after one that warms up."""
    batches = iter(pipeline)
    next(batches)
    start = time.process_time()
    num_images = sum(len(labels) for _, (_, labels) in zip(range(num_batches), batches, strict=False))
    return num_images / (time.process_time() - start)


def main(num_images: int = 50_000, num_rounds: int = 7) -> None:
    torch.set_num_threads(1)
    loaders = pipelines(num_images)
    rates = {name: [] for name in loaders}
    for _ in range(num_rounds):
        for name, loader in loaders.items():
            rates[name].append(images_per_second(loader, 300 if name == "ours" else 15))
    ours = median(rates["ours"])
    print(f"{'pipeline':<26}{'images/s':>12}{'ours is':>12}")
    for name, values in rates.items():
        print(f"{name:<26}{median(values):>12,.0f}{ours / median(values):>10.1f} x")


if __name__ == "__main__":
    main()

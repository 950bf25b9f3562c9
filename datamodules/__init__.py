"""Data sets as Lightning data modules; the same arguments everywhere, the order a function of (seed, epoch)."""

from datamodules.base import ImageDataModule
from datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from datamodules.digits import DigitsDataModule
from datamodules.in_memory import InMemoryDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "InMemoryDataModule",
]

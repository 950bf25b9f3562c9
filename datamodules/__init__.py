"""Data sets as Lightning data modules; the same arguments everywhere, order and views keyed."""

from datamodules.base import EpochLoader, ImageDataModule
from datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from datamodules.digits import DigitsDataModule
from datamodules.image_folder import ImageFolderDataModule
from datamodules.image_format import ImageFormat
from datamodules.imagenet import ImageNetDataModule
from datamodules.in_memory import InMemoryDataModule, LabelledImages
from datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
from datamodules.svhn import SVHNDataModule

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "EpochLoader",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "ImageFormat",
    "ImageNetDataModule",
    "InMemoryDataModule",
    "LabelledImages",
    "MNISTDataModule",
    "SVHNDataModule",
]

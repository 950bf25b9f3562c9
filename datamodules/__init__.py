"""Data sets as Lightning data modules; the same arguments everywhere, order and views keyed."""

from datamodules.base import EpochLoader, ImageDataModule
from datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from datamodules.digits import DigitsDataModule
from datamodules.image_folder import ImageFolderDataModule
from datamodules.image_format import ImageFormat
from datamodules.imagenet import ImageNetDataModule
from datamodules.in_memory import InMemoryDataModule, LabelledImages
from datamodules.mnist import FashionMNISTDataModule, MNISTDataModule
from datamodules.prepared_files import ImagesToClassify, prepare_images, tell_unlike
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
    "ImagesToClassify",
    "InMemoryDataModule",
    "LabelledImages",
    "MNISTDataModule",
    "SVHNDataModule",
    "prepare_images",
    "tell_unlike",
]

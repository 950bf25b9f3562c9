"""A data module is its arguments: the command line shows them and refuses all others."""

import pickle

import pytest
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from pytorch_lightning import LightningDataModule

import datamodules
from datamodules import MNISTDataModule

OF_ALL = {"batch_size": 128, "eval_batch_size": 500, "seed": 0, "drop_last": False}
OF_ALL["random_erasing"] = 0.0
IN_MEMORY = {"split_seed": 0, "crop_padding": 0}
FOLDER = {"image_size": 224, "augmentation": "inception", "val_size": 0, "split_seed": 0}
FILES = {"num_workers": 4, "grey": False, "predict_dir": None}
CIFAR = {"val_size": 5000, "crop_padding": 4, "horizontal_flip": True, "normalization": "channel"}
MNIST = {"data_dir": "data", "val_size": 5000, "normalization": "scale"}
ARGUMENTS = {
    "DigitsDataModule": {"val_size": 180, "normalization": "channel", **IN_MEMORY},
    "CIFAR10DataModule": {"data_dir": "data", **IN_MEMORY, **CIFAR},
    "CIFAR100DataModule": {"data_dir": "data", **IN_MEMORY, **CIFAR},
    "MNISTDataModule": {**IN_MEMORY, **MNIST},
    "FashionMNISTDataModule": {**IN_MEMORY, **MNIST},
    "SVHNDataModule": {**IN_MEMORY, **MNIST, "val_size": 6000},
    "ImageFolderDataModule": {"data_dir": "data", **FOLDER, **FILES},
    "ImageNetDataModule": {
        **{"data_dir": "data/imagenet", "batch_size": 256, "eval_batch_size": 256},
        **{**FOLDER, **FILES, "num_workers": 8},
    },
}


def parse(*args: str) -> Namespace:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.parse_args(args).data


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_command_line_knows_the_arguments_of_each_data_set(name):
    shown = parse(f"--data=datamodules.{name}").init_args
    assert shown.as_dict() == OF_ALL | ARGUMENTS[name]
    for argument in ("--data.batch_size=many", "--data.nonsense=1", "--data.trainer=1"):
        with pytest.raises(ArgumentError):
            parse(f"--data=datamodules.{name}", argument)
    if "horizontal_flip" not in shown:
        with pytest.raises(ArgumentError, match="horizontal_flip"):
            parse(f"--data=datamodules.{name}", "--data.horizontal_flip=true")


def test_a_data_module_is_shown_by_its_arguments_and_told_apart_by_identity():
    data = MNISTDataModule("there", batch_size=3)
    assert repr(data).startswith("MNISTDataModule(batch_size=3, eval_batch_size=500, ")
    assert repr(pickle.loads(pickle.dumps(data))) == repr(data)
    assert len({data, MNISTDataModule("there", batch_size=3)}) == 2


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_empty_argument_is_refused(name):
    for argument, value in ARGUMENTS[name].items():
        if isinstance(value, str):
            with pytest.raises(ValueError, match=f"^{argument} is empty: give a value"):
                getattr(datamodules, name)(**{argument: ""})

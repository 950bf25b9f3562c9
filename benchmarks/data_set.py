"""Claim: on a CPU a data set like CIFAR-10 costs at most 3% of the images per second.

    python -m benchmarks.data_set --threads 1

A Trainer and ResNet-20, batch 128: on random bytes as many as CIFAR-10's, cropped, flipped and
normalised, and on one such batch again and again. They take ten steps in turn; medians count. On a
GPU it is a row of `benchmarks.gpu`.
"""

import argparse
import warnings

import torch

from benchmarks.gpu_report import Report, Setting
from benchmarks.gpu_trainer import data
from benchmarks.timing import describe_machine, parse_options


def main() -> None:
    parse_options(argparse.ArgumentParser(description=__doc__.splitlines()[0]))
    warnings.filterwarnings("ignore", module="torch|pytorch_lightning")
    setting = Setting(torch.device("cpu"))
    print(describe_machine(setting.device))
    data(Report(), setting, captures=["none"])


if __name__ == "__main__":
    main()

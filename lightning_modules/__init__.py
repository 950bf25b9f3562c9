"""One method per file: the training step, and how the trained network is evaluated."""

from lightning_modules.answers import PointAnswers
from lightning_modules.base import Cost, ImageClassifier, sgd
from lightning_modules.branchynet import LitBranchyNet
from lightning_modules.densenet import LitDenseNet
from lightning_modules.fitting import check_data
from lightning_modules.losses import LossNotFinite
from lightning_modules.metrics import FULL, accuracy_name
from lightning_modules.msdnet import LitMSDNet
from lightning_modules.multi_exit import MultiExitClassifier
from lightning_modules.recipe import Recipe
from lightning_modules.resnet import LitResNet
from lightning_modules.schedules import LinearDecayLR, WarmupCosineLR, WarmupMultiStepLR
from lightning_modules.slimmable import LitSlimmable, LitUniversallySlimmable
from lightning_modules.slimmable_exits import LitSlimmableExits
from lightning_modules.stochastic_depth import (
    LitStochasticDepth,
    survival_probabilities,
    zero_missing_gradients,
)
from lightning_modules.tuning import Tuning
from lightning_modules.weight_files import read_weight_file

__all__ = [
    "FULL",
    "Cost",
    "ImageClassifier",
    "LinearDecayLR",
    "LitBranchyNet",
    "LitDenseNet",
    "LitMSDNet",
    "LitResNet",
    "LitSlimmable",
    "LitSlimmableExits",
    "LitStochasticDepth",
    "LitUniversallySlimmable",
    "LossNotFinite",
    "MultiExitClassifier",
    "PointAnswers",
    "Recipe",
    "Tuning",
    "WarmupCosineLR",
    "WarmupMultiStepLR",
    "accuracy_name",
    "check_data",
    "read_weight_file",
    "sgd",
    "survival_probabilities",
    "zero_missing_gradients",
]

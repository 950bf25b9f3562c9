"""Plain torch networks; what is dynamic is an argument or a return value of `forward`."""

from networks.cost import count_macs, count_params
from networks.resnet import CifarResNet, ResidualNetwork, ResNet, fold_survival_probs

__all__ = [
    "CifarResNet",
    "ResNet",
    "ResidualNetwork",
    "count_macs",
    "count_params",
    "fold_survival_probs",
]

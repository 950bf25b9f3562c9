"""Plain torch networks; what is dynamic is an argument or a return value of `forward`."""

from networks.branchynet import BranchyAlexNet, BranchyLeNet, BranchyResNet, ResNetWithExits
from networks.cost import count_macs, count_params, count_params_run, wait_for
from networks.densenet import CifarDenseNet, DenseNet
from networks.early_exit import (
    MultiExitNetwork,
    Staged,
    count_exit_macs,
    early_exit,
    exits_taken,
    run_all_exits,
    run_to_exit,
    screen_thresholds,
    thresholds_for_budget,
    thresholds_for_fractions,
    time_exits,
)
from networks.mobilenet import SlimmableMobileNetV1, SlimmableMobileNetV2
from networks.msdnet import MSDNet
from networks.recalibration import recalibrate
from networks.resnet import CifarResNet, ResidualNetwork, ResNet, fold_survival_probs
from networks.slimmable import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    SlimmableNetwork,
    SwitchableBatchNorm2d,
    extract,
)
from networks.slimmable_resnet import SlimmableCifarResNet, SlimmableResNet

__all__ = [
    "BranchyAlexNet",
    "BranchyLeNet",
    "BranchyResNet",
    "CifarDenseNet",
    "CifarResNet",
    "DenseNet",
    "MSDNet",
    "MultiExitNetwork",
    "ResNet",
    "ResNetWithExits",
    "ResidualNetwork",
    "SlimmableBatchNorm2d",
    "SlimmableCifarResNet",
    "SlimmableConv2d",
    "SlimmableLinear",
    "SlimmableMobileNetV1",
    "SlimmableMobileNetV2",
    "SlimmableNetwork",
    "SlimmableResNet",
    "Staged",
    "SwitchableBatchNorm2d",
    "count_exit_macs",
    "count_macs",
    "count_params",
    "count_params_run",
    "early_exit",
    "exits_taken",
    "extract",
    "fold_survival_probs",
    "recalibrate",
    "run_all_exits",
    "run_to_exit",
    "screen_thresholds",
    "thresholds_for_budget",
    "thresholds_for_fractions",
    "time_exits",
    "wait_for",
]

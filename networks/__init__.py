"""Plain torch networks; what is dynamic is an argument or a return value of `forward`."""

from networks.branchynet import BranchyAlexNet, BranchyLeNet, BranchyResNet, ResNetWithExits
from networks.cost import count_macs, count_params, count_params_run
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
)
from networks.resnet import CifarResNet, ResidualNetwork, ResNet, fold_survival_probs

__all__ = [
    "BranchyAlexNet",
    "BranchyLeNet",
    "BranchyResNet",
    "CifarResNet",
    "MultiExitNetwork",
    "ResNet",
    "ResNetWithExits",
    "ResidualNetwork",
    "Staged",
    "count_exit_macs",
    "count_macs",
    "count_params",
    "count_params_run",
    "early_exit",
    "exits_taken",
    "fold_survival_probs",
    "run_all_exits",
    "run_to_exit",
    "screen_thresholds",
    "thresholds_for_budget",
    "thresholds_for_fractions",
]

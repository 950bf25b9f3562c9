"""Plain torch networks; what is dynamic is an argument or a return value of `forward`."""

from networks.branchynet import BranchyAlexNet, BranchyLeNet, BranchyResNet, ResNetWithExits
from networks.captured import Capture, CapturedInference, Recorder, check_capture
from networks.captured_network import CapturedNetwork
from networks.choices import check_choice, check_counts, check_numbers
from networks.convnext import ConvNeXt
from networks.cost import (
    NUM_TIMED_ROUNDS,
    TIMED_BATCH_SIZE,
    count_macs,
    count_params,
    count_params_run,
    median_seconds,
    time_points,
    wait_for,
)
from networks.cutting import on_meta, places_to_cut
from networks.densenet import CifarDenseNet, DenseNet
from networks.early_exit import (
    Answers,
    Criterion,
    ExitCosts,
    MultiExitNetwork,
    Staged,
    check_criterion,
    check_thresholds,
    confidence,
    count_exit_macs,
    early_exit,
    entropy,
    exit_score,
    exits_taken,
    run_all_exits,
    run_to_exit,
    time_exits,
)
from networks.exit_stream import STREAM_BATCH_SIZE, ExitStream, early_exit_stream, join_answers
from networks.mobilenet import SlimmableMobileNetV1, SlimmableMobileNetV2
from networks.msdnet import MSDNet
from networks.only_used import OnlyUsed
from networks.profiling import (
    count_stage_macs,
    count_stage_params,
    kept_bytes,
    peak_bytes,
    settle_statistics,
    time_stages,
    walk_stages,
    walk_whole,
)
from networks.recalibration import recalibrate
from networks.recorded_exits import EarlyExit
from networks.resnet import CifarResNet, ResidualNetwork, ResNet, fold_survival_probs
from networks.slimmable import SlimmableNetwork, extract
from networks.slimmable_base import Slimmable
from networks.slimmable_exits import AtWidth, NarrowWithExits, SlimmableWithExits
from networks.slimmable_layers import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableLinear,
    SwitchableBatchNorm2d,
    WidthMult,
)
from networks.slimmable_resnet import SlimmableCifarResNet, SlimmableResNet
from networks.temperatures import TemperatureScaled, fit_temperature, scale_logits
from networks.thresholds import (
    MAX_GRID,
    Screening,
    cheapest_within,
    check_budget,
    geometric_fractions,
    screen_thresholds,
    thresholds_for_budget,
    thresholds_for_fractions,
    try_thresholds,
)
from networks.vision_transformer import VisionTransformer
from networks.weights import LoadedWeights, load_weights
from networks.with_exits import WithExits, with_exits

__all__ = [
    "MAX_GRID",
    "NUM_TIMED_ROUNDS",
    "STREAM_BATCH_SIZE",
    "TIMED_BATCH_SIZE",
    "Answers",
    "AtWidth",
    "BranchyAlexNet",
    "BranchyLeNet",
    "BranchyResNet",
    "Capture",
    "CapturedInference",
    "CapturedNetwork",
    "CifarDenseNet",
    "CifarResNet",
    "ConvNeXt",
    "Criterion",
    "DenseNet",
    "EarlyExit",
    "ExitCosts",
    "ExitStream",
    "LoadedWeights",
    "MSDNet",
    "MultiExitNetwork",
    "NarrowWithExits",
    "OnlyUsed",
    "Recorder",
    "ResNet",
    "ResNetWithExits",
    "ResidualNetwork",
    "Screening",
    "Slimmable",
    "SlimmableBatchNorm2d",
    "SlimmableCifarResNet",
    "SlimmableConv2d",
    "SlimmableLinear",
    "SlimmableMobileNetV1",
    "SlimmableMobileNetV2",
    "SlimmableNetwork",
    "SlimmableResNet",
    "SlimmableWithExits",
    "Staged",
    "SwitchableBatchNorm2d",
    "TemperatureScaled",
    "VisionTransformer",
    "WidthMult",
    "WithExits",
    "cheapest_within",
    "check_budget",
    "check_capture",
    "check_choice",
    "check_counts",
    "check_criterion",
    "check_numbers",
    "check_thresholds",
    "confidence",
    "count_exit_macs",
    "count_macs",
    "count_params",
    "count_params_run",
    "count_stage_macs",
    "count_stage_params",
    "early_exit",
    "early_exit_stream",
    "entropy",
    "exit_score",
    "exits_taken",
    "extract",
    "fit_temperature",
    "fold_survival_probs",
    "geometric_fractions",
    "join_answers",
    "kept_bytes",
    "load_weights",
    "median_seconds",
    "on_meta",
    "peak_bytes",
    "places_to_cut",
    "recalibrate",
    "run_all_exits",
    "run_to_exit",
    "scale_logits",
    "screen_thresholds",
    "settle_statistics",
    "thresholds_for_budget",
    "thresholds_for_fractions",
    "time_exits",
    "time_points",
    "time_stages",
    "try_thresholds",
    "wait_for",
    "walk_stages",
    "walk_whole",
    "with_exits",
]

"""What a YAML may add or remove: callbacks observe or post-process; the loss is right without."""

from callbacks.bn_recalibration import BNRecalibration
from callbacks.exit_statistics import ExitStatistics
from callbacks.gradient_magnitude import GradientMagnitudeLogger
from callbacks.outlets import Column, Table, class_names, log_metrics, log_panels
from callbacks.recalibration_sweep import RecalibrationSweep
from callbacks.sampled_images import SampledTestImages, result_file
from callbacks.survival_probability import SurvivalProbabilityLogger
from callbacks.throughput import ThroughputMonitor, peak_flops

__all__ = [
    "BNRecalibration",
    "Column",
    "ExitStatistics",
    "GradientMagnitudeLogger",
    "RecalibrationSweep",
    "SampledTestImages",
    "SurvivalProbabilityLogger",
    "Table",
    "ThroughputMonitor",
    "class_names",
    "log_metrics",
    "log_panels",
    "peak_flops",
    "result_file",
]

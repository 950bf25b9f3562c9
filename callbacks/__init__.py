"""Callbacks observe or post-process; the loss is right without any of them."""

from callbacks.bn_recalibration import BNRecalibration
from callbacks.checkpointing import AtomicCheckpointIO, RunCheckpoint
from callbacks.csv_history import CSVHistory
from callbacks.exit_statistics import ExitStatistics
from callbacks.gradient_magnitude import GradientMagnitudeLogger
from callbacks.operating_points import OperatingPoints
from callbacks.predictions import PredictionWriter
from callbacks.recalibration_sweep import RecalibrationSweep
from callbacks.survival_probability import SurvivalProbabilityLogger
from callbacks.throughput import ThroughputMonitor
from callbacks.wandb_logger import FaultTolerantWandbLogger

__all__ = [
    "AtomicCheckpointIO",
    "BNRecalibration",
    "CSVHistory",
    "ExitStatistics",
    "FaultTolerantWandbLogger",
    "GradientMagnitudeLogger",
    "OperatingPoints",
    "PredictionWriter",
    "RecalibrationSweep",
    "RunCheckpoint",
    "SurvivalProbabilityLogger",
    "ThroughputMonitor",
]

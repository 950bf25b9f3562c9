"""What makes a command a run, and a repeated command a resumed one."""

from running.checkpoint import LAST, RunCheckpoint
from running.checkpoint_io import AtomicCheckpointIO
from running.cli import ExperimentCLI
from running.command_line import main
from running.folder import RunFolder
from running.history import CSVHistory
from running.light_trainer import NoProfiler, progress_bar
from running.loading import LoadedRun, load_run
from running.memory import keep_freed_memory
from running.paper import Paper
from running.point import Classified, Point
from running.predictions import PredictionWriter
from running.result import OperatingPoints
from running.tracking import Tracking
from running.wandb_logger import FaultTolerantWandbLogger
from running.weights import read_weights

__all__ = [
    "LAST",
    "AtomicCheckpointIO",
    "CSVHistory",
    "Classified",
    "ExperimentCLI",
    "FaultTolerantWandbLogger",
    "LoadedRun",
    "NoProfiler",
    "OperatingPoints",
    "Paper",
    "Point",
    "PredictionWriter",
    "RunCheckpoint",
    "RunFolder",
    "Tracking",
    "keep_freed_memory",
    "load_run",
    "main",
    "progress_bar",
    "read_weights",
]

"""A Trainer for tests: on the CPU, and nothing printed or saved but what the test asks for."""

from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from running import AtomicCheckpointIO


def quiet_trainer(folder: Path, **arguments: Any) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(**(defaults | arguments))

"""Where a run is tracked: Weights & Biases, and the sweeps that it starts."""

import netrc
import os
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from running.environment import environment
from running.wandb_logger import FaultTolerantWandbLogger


@dataclass
class Tracking:
    """Weights & Biases.

    Args:
        project: project of the run.
        entity: user or team; None is the default of the account.
        mode: "auto" is online for a user who is logged in and offline for others; it never asks.
        tags: tags of the run.
    """

    project: str = "dynamic-networks"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    tags: list[str] | None = None

    def resolve_mode(self) -> str:
        """Returns "online", "offline" or "disabled"; WANDB_MODE wins over the others."""
        if self.mode == "disabled":
            return self.mode
        mode = os.environ.get("WANDB_MODE") or self.mode
        if mode == "auto":
            return "online" if is_logged_in() else "offline"
        if mode == "online" and not is_logged_in():
            print("W&B: nobody is logged in (wandb login), so it tracks offline", file=sys.stderr)
            return "offline"
        return mode


def is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Sweep(NamedTuple):
    """What `wandb agent` tells a run that it starts."""

    id: str
    run_id: str


def current_sweep() -> Sweep | None:
    ids = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return Sweep(*ids) if all(ids) else None


def open_wandb(
    tracking: Tracking, folder: Path, name: str, seed: int, config: dict[str, Any]
) -> list[Logger]:
    """Opens the W&B run of a folder, the same in every attempt; none if tracking is disabled.

    Args:
        tracking: what the user asked for.
        folder: of the run; keeps the id of the W&B run, and its files.
        name: of the experiment, for people.
        seed: of the run.
        config: what is trained.
    """
    mode = tracking.resolve_mode()
    if mode == "disabled":
        return []
    return [FaultTolerantWandbLogger(experiment=_init(tracking, mode, folder, name, seed, config))]


@rank_zero_only
def _init(
    tracking: Tracking, mode: str, folder: Path, name: str, seed: int, config: dict[str, Any]
) -> Any:
    import wandb  # slow, and not every command tracks

    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds, a third of its default
    id_file = folder / "wandb_id"
    sweep = current_sweep()
    if sweep or not id_file.exists():
        id_file.write_text(sweep.run_id if sweep else uuid.uuid4().hex[:12])
    options = {
        "id": id_file.read_text(),
        "resume": "allow",
        "dir": folder,
        # In a sweep all would be called the same; W&B numbers them.
        "name": None if sweep else f"{name}/seed{seed}",
        "group": name,
        "project": tracking.project,
        "entity": tracking.entity,
        "tags": tracking.tags,
        "config": {**config, "environment": environment()},
        "settings": wandb.Settings(silent=True),
    }
    try:
        run = wandb.init(mode=mode, **options)
    except wandb.errors.Error as error:
        print(f"W&B refused or was not reached, so it tracks offline ({error})", file=sys.stderr)
        wandb.teardown()  # the failed attempt still holds the id
        run = wandb.init(mode="offline", **options)
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


def describe_wandb(loggers: list[Logger], folder: Path) -> list[str]:
    """Returns a line that says how to look at the run in W&B; none if it is not tracked."""
    runs = (logger.experiment for logger in loggers if isinstance(logger, WandbLogger))
    urls = (None if run.offline else run.url for run in runs)
    return [f"W&B: {url or f'wandb sync {folder}/wandb/offline-run-*'}" for url in urls]

"""Where a run is tracked: Weights & Biases, and the sweeps that it starts."""

import netrc
import os
import sys
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from running import wandb_logger
from running.arguments import one_line
from running.environment import environment
from running.masking import masked_command
from running.wandb_file import can_be_uploaded, cut_half_record
from running.wandb_logger import FaultTolerantWandbLogger

MODES = {"online", "offline", "disabled", "shared", "dryrun", "run"}
"""What W&B takes for WANDB_MODE."""
FLUSH_INTERVAL = 0.05
"""Seconds after which W&B writes what was logged; every checkpoint waits for it."""


@dataclass
class Tracking:
    """Weights & Biases.

    Args:
        project: project of the run.
        entity: user or team; None is the default of the account.
        mode: "auto" is online for a user who is logged in and offline for others; it never asks.
        tags: tags of the run.
        log_checkpoints: keep the checkpoint that is tested as an artifact, at the end.

    Raises:
        ValueError: W&B would refuse the project or WANDB_MODE.
    """

    project: str = "dynamic-networks"
    entity: str | None = None
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    tags: list[str] | None = None
    log_checkpoints: bool = False

    def __post_init__(self) -> None:
        forbidden = " ".join(character for character in "/\\#?%:" if character in self.project)
        if forbidden:
            raise ValueError(
                f"wandb.project is {self.project!r}: W&B allows no {forbidden} in it (a team is "
                "given as wandb.entity)"
            )
        if len(self.project) > 128:
            raise ValueError(
                f"wandb.project has {len(self.project)} characters: W&B allows 128 at most"
            )
        mode = os.environ.get("WANDB_MODE")
        if self.mode != "disabled" and mode is not None and mode not in MODES:
            raise ValueError(
                f"WANDB_MODE is {mode!r}: unset it, or set it to online, offline or disabled"
            )

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

    repair_attempts(folder)
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds, a third of its default
    id_file = folder / "wandb_id"
    sweep = current_sweep()
    if sweep or not id_file.exists():
        id_file.write_text(sweep.run_id if sweep else uuid.uuid4().hex[:12])
    options = {
        "id": id_file.read_text(),
        "resume": "allow",
        # Otherwise W&B goes on with the run of an earlier command of this process.
        "reinit": "finish_previous",
        "dir": folder,
        # In a sweep all would be called the same; W&B numbers them.
        "name": None if sweep else f"{name}/seed{seed}",
        "group": name,
        "project": tracking.project,
        "entity": tracking.entity,
        "tags": tracking.tags,
        "config": {**config, "environment": environment()},
        "settings": _settings(),
    }
    with masked_command():
        try:
            run = wandb.init(mode=mode, **options)
        except wandb.errors.Error as error:
            line = f"W&B refused or was not reached, so it tracks offline ({error})"
            print(line, file=sys.stderr)
            wandb.teardown()  # the failed attempt still holds the id
            run = wandb.init(mode="offline", **options)
    run.define_metric("trainer/global_step")
    run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
    return run


def _settings() -> Any:
    import wandb

    settings = wandb.Settings(silent=True)
    # W&B's own interval is 15 seconds, too long for a checkpoint to wait.
    if hasattr(settings, wandb_logger.FLUSH_SETTING):
        setattr(settings, wandb_logger.FLUSH_SETTING, FLUSH_INTERVAL)
    return settings


def repair_attempts(folder: Path, but: Collection[str] = ()) -> None:
    """Makes `wandb sync` upload all that attempts have left that were killed while W&B wrote.

    One that does not even say which run it is of is renamed: with it, `wandb sync` uploads none of
    those that it is given. Of half a record at the end of a file, see `cut_half_record`.

    Args:
        folder: of the run.
        but: names of those to leave alone, since an attempt still writes there.
    """
    for path in sorted((folder / "wandb").glob("offline-run-*")):
        if path.name in but:
            continue
        if not can_be_uploaded(path):
            aside = path.with_name(path.name.replace("offline", "unreadable", 1))
            path.rename(aside)
            print(
                f"W&B: {path} holds nothing to upload, as its attempt was killed too early: "
                f"renamed to {aside.name}",
                file=sys.stderr,
            )
        elif any([cut_half_record(file) for file in path.glob("*.wandb")]):
            print(
                f"W&B: {path} ended within a record, as its attempt was killed: that is left out, "
                "so that all others can be uploaded",
                file=sys.stderr,
            )


def trackers_of(loggers: list[Logger]) -> list[FaultTolerantWandbLogger]:
    return [logger for logger in loggers if isinstance(logger, FaultTolerantWandbLogger)]


@rank_zero_only
def show_finished(trainer: Trainer, select: Callable[[Trainer], Path] | Literal[False]) -> None:
    """Gives W&B the figures of a finished run.

    What goes wrong is said: the run is finished, and stays so.

    Args:
        trainer: has the loggers, and the folder of the run.
        select: which checkpoint W&B shall keep, too; False if none.
    """
    folder = Path(trainer.default_root_dir)
    for tracker in trackers_of(trainer.loggers):
        try:
            tracker.log_metrics(figures(folder))
        except Exception as error:  # of a library that draws; whatever it is, the run is whole
            rank_zero_warn(
                f"W&B gets no figures of {folder}, as drawing them failed ({one_line(error)}): the "
                f"run is whole; python main.py report {folder} tries again"
            )
        try:
            if select:
                tracker.log_checkpoint(select(trainer))
        except Exception as error:  # of the network or the server: the run folder has it
            rank_zero_warn(f"W&B keeps no checkpoint of {folder}, which has it ({one_line(error)})")
        tracker.flush()


def figures(folder: Path) -> dict[str, Any]:
    """Returns the figures that a report has of a run, as W&B shows them."""
    import wandb
    from PIL import Image

    from reports import run_figures  # slow, like the others

    pictures = run_figures(folder).items()
    return {f"report/{name}": wandb.Image(Image.open(BytesIO(png))) for name, png in pictures}


def describe_wandb(loggers: list[Logger], folder: Path) -> list[str]:
    """Returns lines that say how to look at the run in W&B; none if it is not tracked."""
    trackers = trackers_of(loggers)
    writing = [Path(one.experiment.settings.sync_dir).name for one in trackers if not one.is_lost]
    repair_attempts(folder, but=writing)
    lines = []
    for tracker in trackers:
        if tracker.experiment.offline:
            lines.append(f"W&B: wandb sync {folder}/wandb/offline-run-*")
            if find_spec("wandb.cli.leet"):  # not in every version
                lines.append(f"W&B in this terminal: wandb leet {folder}/wandb")
        else:
            lines.append(f"W&B: {tracker.experiment.url}")
    return lines

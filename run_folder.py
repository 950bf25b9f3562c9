"""The folder of a run: what makes a repeated command a resumed run.

config.yaml            what is trained; a changed YAML is refused
attempts.yaml          when, with which command, commit and versions it was started, one entry per
start last.ckpt best.ckpt    see `callbacks.RunCheckpoint`
metrics.csv            see `callbacks.CSVHistory`
wandb_id wandb/        the W&B run that every attempt continues
operating_points.csv   the result
finished.yaml          where training stopped, written after the test
"""

import datetime
import netrc
import os
import platform
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import Namespace
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from callbacks import CSVHistory
from callbacks.checkpointing import LAST

# What may change between two attempts of one run, beside everything that says how long, where and
# how verbosely it trains: a YAML's trainer section decides the result only through these.
TRAINER_SCIENCE = ("accumulate_grad_batches", "gradient_clip_algorithm", "gradient_clip_val")
TRAINER_SCIENCE += ("limit_train_batches", "overfit_batches")
DATA_LOGISTICS = ("data_dir", "eval_batch_size", "num_workers")


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
        """Returns "online", "offline" or "disabled"; WANDB_MODE has the last word."""
        if os.environ.get("WANDB_MODE"):
            return os.environ["WANDB_MODE"]
        if self.mode == "auto":
            return "online" if _logged_in() else "offline"
        return self.mode


def _logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class RunFolder:
    """One run.

    Args:
        path: the folder; need not exist yet.
        name: name of the experiment, for people.
        seed: the run's seed.
    """

    def __init__(self, path: Path, name: str, seed: int):
        self.path = path
        self.name = name
        self.seed = seed

    @classmethod
    def of(cls, config: Namespace, method: str) -> "RunFolder":
        """Returns the folder that a parsed command line means."""
        files = config["config"] or []
        stem = Path(str(files[0])).stem if files else "command_line"
        seed = config["seed_everything"]
        path = config["run_dir"] or Path("runs", method, stem, f"seed{seed}")
        return cls(Path(path), f"{method}/{stem}", seed)

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint to go on from; one of Lightning's SLURM requeue counts too."""
        paths = [self.path / LAST, *self.path.glob("hpc_ckpt_*.ckpt")]
        found = [path for path in paths if path.exists()]
        return max(found, key=lambda path: path.stat().st_mtime, default=None)

    @rank_zero_only
    def create(self) -> None:
        """Makes the folder.

        Raises:
            OSError: it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / f".probe{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"cannot write the run folder {self.path} ({error.strerror}): "
                "pass --run_dir with a folder that you may write"
            ) from error

    # --- what is trained --------------------------------------------------------------------------

    def check_config(self, config: dict[str, Any]) -> None:
        """Refuses to continue a run whose YAML has changed in what decides its result.

        Raises:
            ValueError: names the first key that differs.
        """
        path = self.path / "config.yaml"
        if self.last_checkpoint is None or not path.exists():
            return
        there, here = (_science(c) for c in (yaml.safe_load(path.read_text()), config))
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                raise ValueError(
                    f"{self.path} holds another experiment: {key} is {there.get(key)} there and "
                    f"{here.get(key)} here: pass another --run_dir, or delete that folder"
                )

    @rank_zero_only
    def record_attempt(self, config: dict[str, Any]) -> None:
        """Writes the config, and a line in the diary."""
        _write(self.path / "config.yaml", config)
        (self.path / "finished.yaml").unlink(missing_ok=True)
        with (self.path / "attempts.yaml").open("a") as file:
            yaml.safe_dump([environment()], file, sort_keys=False)

    # --- finished or not --------------------------------------------------------------------------

    def is_finished(self, trainer: pl.Trainer) -> bool:
        """Tells whether the run ended where this trainer would stop."""
        path = self.path / "finished.yaml"
        return path.exists() and yaml.safe_load(path.read_text()) == _stop(trainer)

    @rank_zero_only
    def mark_finished(self, trainer: pl.Trainer) -> None:
        _write(self.path / "finished.yaml", _stop(trainer))

    # --- tracking ---------------------------------------------------------------------------------

    def loggers(self, tracking: Tracking, config: dict[str, Any]) -> list[Logger]:
        """Opens the CSV history and the W&B run of this folder."""
        history = CSVHistory(self.path / "metrics.csv")
        if self.last_checkpoint is None:
            history.truncate(0)
        mode = tracking.resolve_mode()
        if mode == "disabled":
            return [history]
        return [history, WandbLogger(experiment=self._open_wandb(tracking, mode, config))]

    @rank_zero_only
    def _open_wandb(self, tracking: Tracking, mode: str, config: dict[str, Any]) -> Any:
        import wandb  # slow, and not every command tracks

        id_file = self.path / "wandb_id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12])
        options = {
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": self.path,
            "name": f"{self.name}/seed{self.seed}",
            "group": self.name,
            "project": tracking.project,
            "entity": tracking.entity,
            "tags": tracking.tags,
            "config": {**config, "environment": environment()},
            "settings": wandb.Settings(init_timeout=60, silent=True),
        }
        try:
            run = wandb.init(mode=mode, **options)
        except wandb.errors.Error as error:
            print(f"W&B cannot be reached ({error}): tracking offline", file=sys.stderr)
            run = wandb.init(mode="offline", **options)
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    def describe(self, loggers: list[Logger]) -> str:
        """Says where the run is, and how to look at it in W&B."""
        lines = [f"run folder: {self.path}"]
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                url = None if logger.experiment.offline else logger.experiment.url
                lines.append(f"W&B: {url or f'wandb sync {self.path}/wandb/offline-run-*'}")
        return "\n".join(lines)


def environment() -> dict[str, Any]:
    """Returns what a number must be read with: time, command, commit, versions, hardware."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pytorch_lightning": pl.__version__,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpus": devices,
        "host": platform.node(),
    }


def _git(*args: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", *args], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def _science(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the dotted keys of a config that decide what is trained."""
    trainer = {key: config["trainer"].get(key) for key in TRAINER_SCIENCE}
    data = dict(config["data"])
    data["init_args"] = {k: v for k, v in data["init_args"].items() if k not in DATA_LOGISTICS}
    return _flatten({"model": config["model"], "data": data, "trainer": trainer})


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _stop(trainer: pl.Trainer) -> dict[str, Any]:
    return {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}


def _write(path: Path, content: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(yaml.safe_dump(content, sort_keys=False))
    os.replace(part, path)

"""The folder of a run: what makes a repeated command a resumed run.

What it holds:

    config.yaml            what is trained; a changed YAML is refused
    attempts.yaml          one entry per start: time, command, commit, versions, hardware
    {last,best}.ckpt       see `callbacks.RunCheckpoint`, as is previous.ckpt
    damaged.ckpt           a last.ckpt that could not be read; the run went on from the one before
    metrics.csv            see `callbacks.CSVHistory`
    wandb_id wandb/        the W&B run that every attempt continues
    operating_points.csv   the result; `test` writes operating_points_again.csv
    survival.csv exit*.csv recalibration.csv predictions.csv   see `callbacks`
    finished.yaml          where training stopped, and whether it was tested
    lock                   held while a process trains here
"""

import datetime
import fcntl
import netrc
import os
import platform
import shlex
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import is_zipfile

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import Namespace
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks import CSVHistory, FaultTolerantWandbLogger
from callbacks.checkpointing import LAST, PREVIOUS

# Of a YAML's trainer and data sections, this part is the experiment; the rest says how long, where,
# how precisely and how verbosely a run trains, and may change between two attempts of it.
TRAINER_SCIENCE = (
    "accumulate_grad_batches",
    "check_val_every_n_epoch",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "val_check_interval",
)
CHECKPOINT_SCIENCE = ("select", "monitor", "mode")
# The images of a step, `batch_size` of every process, must stay as many: see `RunCheckpoint`.
DATA_LOGISTICS = ("data_dir", "batch_size", "eval_batch_size", "num_workers")


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
            return "online" if _logged_in() else "offline"
        if mode == "online" and not _logged_in():
            print("W&B: nobody is logged in (wandb login), so it tracks offline", file=sys.stderr)
            return "offline"
        return mode


def _logged_in() -> bool:
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


def _sweep() -> Sweep | None:
    ids = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    return Sweep(*ids) if all(ids) else None


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
        files = [Path(str(file)) for file in config["config"] or []]
        # The science file, also when a machine file stands before it.
        science = [file for file in files if "model" in _read(file)]
        stem = science[0].stem if science else "command_line"
        seed = config["seed_everything"]
        sweep = _sweep()  # all its runs share one YAML
        leaf = f"sweep-{sweep.id}/{sweep.run_id}" if sweep else f"seed{seed}"
        path = config["run_dir"] or Path("runs", method, stem, leaf)
        return cls(Path(path), f"{method}/{stem}", seed)

    @property
    def last_checkpoint(self) -> Path | None:
        """The checkpoint to go on from."""
        path = self.path / LAST
        return path if path.exists() else None

    @rank_zero_only
    def repair(self) -> None:
        """Puts the checkpoint before the last in the place of a last one that is cut short.

        Writing a checkpoint cannot do that, but a file system that loses its latest blocks can. The
        bad file is kept as damaged.ckpt. One that is whole, whatever it holds, is left alone.
        """
        last, previous = self.path / LAST, self.path / PREVIOUS
        if last.exists() and not is_zipfile(last) and is_zipfile(previous):
            rank_zero_warn(f"{last} is damaged: goes on from the checkpoint before it")
            damaged = self.path / "damaged.ckpt"
            shutil.copyfile(last, damaged)
            os.replace(previous, last)

    @rank_zero_only
    def create(self) -> None:
        """Makes the folder.

        Raises:
            OSError: it cannot be made or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
        except OSError as error:
            raise OSError(
                f"cannot write the run folder {self.path} ({error.strerror}): "
                "pass --run_dir with a folder that you may write"
            ) from error

    @rank_zero_only
    def lock(self) -> None:
        """Keeps other processes from training here, until this one ends, however it ends.

        A job that SLURM has started again waits for its lock: if its node has lost the scheduler
        and nothing else, the processes from before are still at work.

        Raises:
            ValueError: another process has it.
        """
        self._lock = (self.path / "lock").open("w")
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if os.environ.get("SLURM_RESTART_COUNT"):
                rank_zero_info(f"waits for another process that trains in {self.path}")
                fcntl.lockf(self._lock, fcntl.LOCK_EX)
                return
            raise ValueError(
                f"another process trains in {self.path}: wait for it, or pass another --run_dir"
            ) from error
        except OSError:
            pass  # a file system without locks: nothing to hold

    # --- what is trained --------------------------------------------------------------------------

    def check_config(self, config: dict[str, Any]) -> None:
        """Refuses to continue a run whose YAML has changed in what decides its result.

        Raises:
            ValueError: names the first key that differs.
        """
        path = self.path / "config.yaml"
        if self.last_checkpoint is None or not path.exists():
            return
        there, here = _science(_read(path)), _science(config)
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                raise ValueError(
                    f"{self.path} holds another experiment: {key} is {there.get(key)} there and "
                    f"{here.get(key)} here: pass another --run_dir, or delete that folder"
                )

    @rank_zero_only
    def record_attempt(self, config: dict[str, Any]) -> None:
        """Writes the config, and an entry in the diary."""
        _write(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        (self.path / "finished.yaml").unlink(missing_ok=True)
        with (self.path / "attempts.yaml").open("a") as file:
            yaml.safe_dump([environment()], file, sort_keys=False)

    # --- finished or not --------------------------------------------------------------------------

    def is_finished(self, trainer: pl.Trainer, test: bool) -> bool:
        """Tells whether the run has been where this trainer would stop, and was tested if asked."""
        try:
            there = _read(self.path / "finished.yaml")
        except FileNotFoundError:  # at any moment: rank 0 removes it when a run goes on
            return False
        enough = [
            there.get(name) == limit or 0 < limit <= (there.get(name) or 0)
            for name, limit in _limits(trainer).items()
        ]
        return all(enough) and (there.get("tested") or not test)

    @rank_zero_only
    def mark_finished(self, trainer: pl.Trainer, tested: bool) -> None:
        content = _limits(trainer) | {"tested": tested}
        _write(self.path / "finished.yaml", yaml.safe_dump(content))

    # --- tracking ---------------------------------------------------------------------------------

    def loggers(self, tracking: Tracking, config: dict[str, Any]) -> list[Logger]:
        """Opens the CSV history and the W&B run of this folder."""
        history = CSVHistory(self.path / "metrics.csv")
        if self.last_checkpoint is None:
            history.truncate(0)
        mode = tracking.resolve_mode()
        if mode == "disabled":
            return [history]
        run = self._open_wandb(tracking, mode, config)
        return [history, FaultTolerantWandbLogger(experiment=run)]

    @rank_zero_only
    def _open_wandb(self, tracking: Tracking, mode: str, config: dict[str, Any]) -> Any:
        import wandb  # slow, and not every command tracks

        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")  # seconds, a third of its default
        id_file = self.path / "wandb_id"
        sweep = _sweep()
        if sweep or not id_file.exists():
            _write(id_file, sweep.run_id if sweep else uuid.uuid4().hex[:12])
        options = {
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": self.path,
            # In a sweep all would be called the same; W&B numbers them.
            "name": None if sweep else f"{self.name}/seed{self.seed}",
            "group": self.name,
            "project": tracking.project,
            "entity": tracking.entity,
            "tags": tracking.tags,
            "config": {**config, "environment": environment()},
            "settings": wandb.Settings(silent=True),
        }
        try:
            run = wandb.init(mode=mode, **options)
        except wandb.errors.Error as error:
            print(
                f"W&B refused or was not reached, so it tracks offline ({error})", file=sys.stderr
            )
            wandb.teardown()  # the failed attempt still holds the id
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
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
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
    parts = {
        name: dict(config.get(name) or {}) for name in ("model", "data", "trainer", "checkpoint")
    }
    init_args = parts["data"].get("init_args") or {}
    parts["data"]["init_args"] = {k: v for k, v in init_args.items() if k not in DATA_LOGISTICS}
    parts["trainer"] = {key: parts["trainer"].get(key) for key in TRAINER_SCIENCE}
    parts["checkpoint"] = {key: parts["checkpoint"].get(key) for key in CHECKPOINT_SCIENCE}
    return _flatten(parts)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _limits(trainer: pl.Trainer) -> dict[str, int]:
    return {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: correct it, or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys and values: correct it, or delete it")
    return content


def _write(path: Path, content: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(content)
    os.replace(part, path)

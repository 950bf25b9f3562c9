"""The folder of a run: what makes a repeated command a resumed run.

What it holds:

    config.yaml            what is trained; a changed YAML is refused
    attempts.yaml          one entry per start: time, command, commit, versions, hardware
    {last,best}.ckpt       see `running.RunCheckpoint`, as is previous.ckpt
    damaged.ckpt           a last.ckpt that could not be read; the run went on from the one before
    metrics.csv            see `running.CSVHistory`
    wandb_id wandb/        the W&B run that every attempt continues
    operating_points.csv   the result; `test` writes operating_points_again.csv
    class_accuracy.csv confusion.csv   see `running.OperatingPoints`
    survival.csv exit*.csv exit_images/ recalibration.csv predictions.csv   see `callbacks`
    finished.yaml          where training stopped, and whether it was tested
    lock                   held while a process trains here
"""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_warn

from endless import is_endless, is_special
from running.checkpoint import LAST, PREVIOUS, check_images_per_step, images_per_step
from running.checkpoint_io import is_damaged
from running.environment import environment
from running.experiment import evaluated, first_difference, renamed, trained
from running.history import CSVHistory
from running.masking import masked
from running.tracking import Tracking, current_sweep, describe_wandb, open_wandb

FINISHED = "finished.yaml"
Config = dict[str, Any]
Complete = Callable[[Config], Config]


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
        science = [file for file in files if "model" in read_yaml(file)]
        stem = science[0].stem if science else "command_line"
        seed = config["seed_everything"]
        sweep = current_sweep()  # all its runs share one YAML
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
        """Puts the checkpoint before the last in the place of a last one that is damaged.

        Writing a checkpoint cannot damage it, but a disk can, and so can a file system that loses
        its latest blocks. The bad file is kept as damaged.ckpt. One that is whole, whatever it
        holds, is left alone.
        """
        last, previous = self.path / LAST, self.path / PREVIOUS
        if last.exists() and is_damaged(last) and not is_damaged(previous):
            rank_zero_warn(f"{last} is damaged: goes on from the checkpoint before it")
            shutil.copyfile(last, self.path / "damaged.ckpt")
            os.replace(previous, last)

    @rank_zero_only
    def create(self) -> None:
        """Makes the folder.

        Raises:
            OSError: it cannot be made or written.
            ValueError: something in it is neither a file nor a folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for each in self.path.iterdir():
                if is_special(each):  # to open a pipe is to wait, maybe forever
                    raise ValueError(f"{each} is a pipe or a device: remove it")
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

    def check_trained(self, config: Config, complete: Complete) -> None:
        """Refuses to continue this run with a YAML that would train something else.

        Raises:
            ValueError: names the first key that differs.
        """
        if self.last_checkpoint is not None or (self.path / FINISHED).exists():
            check_trained(self.path, config, complete)

    @rank_zero_only
    def record_attempt(self, config: dict[str, Any]) -> None:
        """Writes the config, and an entry in the diary."""
        _write(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        (self.path / FINISHED).unlink(missing_ok=True)
        with (self.path / "attempts.yaml").open("a") as file:
            yaml.safe_dump([environment()], file, sort_keys=False)

    # --- finished or not --------------------------------------------------------------------------

    def is_finished(self, trainer: pl.Trainer, data: pl.LightningDataModule, test: bool) -> bool:
        """Tells whether the run has reached this trainer's limits and, if asked, was tested.

        Raises:
            ValueError: the run was trained with more epochs or steps, or with another number of
                images in a step.
        """
        try:
            there = read_yaml(self.path / FINISHED)
        except FileNotFoundError:  # at any moment: rank 0 removes it when a run goes on
            return False
        check_images_per_step(there.get("images_per_step"), data, trainer)
        limits = _limits(trainer)
        for name, limit in limits.items():
            if 0 < limit < there.get(name, -1):
                raise ValueError(
                    f"{self.path} was trained for trainer.{name}={there[name]}, and this command "
                    f"asks for {limit}: pass another --run_dir"
                )
        has_reached = all(there.get(name) == limit for name, limit in limits.items())
        return has_reached and bool(there.get("tested") or not test)

    @rank_zero_only
    def mark_finished(self, trainer: pl.Trainer, tested: bool) -> None:
        """Notes where training stopped, and whether the whole test set was used."""
        content = {
            "tested": tested,
            "images_per_step": images_per_step(trainer.datamodule, trainer),
        }
        _write(self.path / FINISHED, yaml.safe_dump(_limits(trainer) | content))

    def history(self) -> CSVHistory:
        """Opens the CSV history of this folder."""
        history = CSVHistory(self.path / "metrics.csv")
        if self.last_checkpoint is None:
            history.truncate(0)
        return history

    def trackers(self, tracking: Tracking, config: dict[str, Any]) -> list[Logger]:
        """Opens the W&B run of this folder, if it is tracked."""
        return open_wandb(tracking, self.path, self.name, self.seed, config)

    def describe(self, loggers: list[Logger]) -> str:
        """Says where the run is, and how to look at it in W&B."""
        return "\n".join([f"run folder: {self.path}", *describe_wandb(loggers, self.path)])


def check_trained(folder: Path, config: Config, complete: Complete) -> None:
    """Refuses to go on from the run in a folder with a YAML that would train something else.

    Args:
        folder: of the run; without a config.yaml there is nothing to compare.
        config: of this command.
        complete: adds the defaults that were not yet there when the run began.

    Raises:
        ValueError: names the first key that differs.
    """
    difference = _difference(folder, config, complete, trained)
    if difference:
        raise ValueError(
            f"{folder} holds another experiment: {difference}: pass another --run_dir, or delete "
            "that folder"
        )


def check_evaluated(checkpoint: Path, config: Config, complete: Complete) -> None:
    """Refuses to evaluate a run's checkpoint with a YAML that would change its answers.

    What only chooses what is evaluated may differ. A checkpoint outside a run folder has no
    configuration to be compared with.

    Raises:
        ValueError: names the first key that differs.
    """
    difference = _difference(checkpoint.parent, config, complete, evaluated)
    if difference:
        raise ValueError(
            f"{checkpoint} is of another experiment: {difference}: use the YAML it was trained "
            f"with, or {checkpoint.parent / 'config.yaml'}"
        )


def _difference(
    folder: Path, config: Config, complete: Complete, part: Callable[[Config], Config]
) -> str | None:
    path = folder / "config.yaml"
    if not path.exists():
        return None
    # An older one names secrets, which no message may; a default of today may be one.
    there = masked(complete(masked(renamed(read_yaml(path)))))
    return first_difference(part(there), part(masked(config)))


def _limits(trainer: pl.Trainer) -> dict[str, int]:
    """Returns where training stops; before a fit, Lightning has not put its defaults in yet."""
    max_epochs = trainer.max_epochs
    if max_epochs is None:
        max_epochs = 1000 if trainer.max_steps == -1 else -1
    return {"max_epochs": max_epochs, "max_steps": trainer.max_steps}


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns what a YAML file holds.

    Raises:
        ValueError: no keys and values.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: correct it, or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys and values: correct it, or delete it")
    if is_endless(content):
        raise ValueError(f"{path} refers to itself, or says too much: correct it, or delete it")
    return content


def _write(path: Path, content: str) -> None:
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)  # of a killed attempt, or a link that leads elsewhere
    part.write_text(content)
    os.replace(part, path)

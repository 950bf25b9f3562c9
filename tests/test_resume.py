"""A run killed anywhere and started again by the same command ends as if nothing had happened."""

import csv
import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import launch
import methods
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Timer
from torch import nn

from archive import is_intact
from running import RunCheckpoint
from running.checkpoint_io import is_damaged

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run"]


def write(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    """Returns what a CSV file holds, without the columns that measure time."""
    with path.open(newline="") as file:
        return [
            {
                key: value
                for key, value in row.items()
                if not key.startswith("time/") and key not in ("ms_per_image", "train/mfu")
            }
            for row in csv.DictReader(file)
        ]


def assert_same(one, other, path="") -> None:
    """Compares two trees of tensors and plain data, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert one == other, path


def assert_same_run(one: Path, other: Path) -> None:
    names = sorted(path.name for path in (one / "run").glob("*.ckpt"))
    assert names == sorted(path.name for path in (other / "run").glob("*.ckpt"))
    for name in names:
        a, b = (torch.load(folder / "run" / name, weights_only=True) for folder in (one, other))
        for checkpoint in (a, b):
            checkpoint["callbacks"].pop("ThroughputMonitor", None)
            # Lightning's counters of attempts; what they decide is compared.
            del checkpoint["loops"]
        assert_same(a, b, name)
    for name in ("metrics.csv", "operating_points.csv"):
        assert rows(one / "run" / name) == rows(other / "run" / name), name
    for name in ("survival.csv", "exits.csv", "exit_curve.csv", "config.yaml"):
        files = [folder / "run" / name for folder in (one, other)]
        assert files[0].exists() == files[1].exists()
        assert not files[0].exists() or files[0].read_text() == files[1].read_text()


def kill_after_every_save(folder: Path) -> int:
    """Starts the run again and again, killed after its first save, until it ends by itself."""
    num_kills = 0
    while launch.kill_after_save(COMMAND, folder):
        num_kills += 1
        assert num_kills < 60, "makes no progress"
    assert (folder / "run/finished.yaml").exists(), (folder / "output.txt").read_text()
    return num_kills


@pytest.mark.parametrize("method", methods.EXPENSIVE)
def test_killed_after_every_checkpoint(method: str, tmp_path: Path) -> None:
    config = methods.config(method)
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    assert kill_after_every_save(broken) >= 5
    assert_same_run(whole, broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"val_check_interval": 3},
        {"limit_val_batches": 0, "val_check_interval": 1.0},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": None, "val_check_interval": 5},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 2, "val_check_interval": 3},
        {"max_steps": 10, "max_epochs": -1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_killed_under_other_trainer_settings(changes: dict[str, Any], tmp_path: Path) -> None:
    config = methods.config("stochastic_depth")
    config["trainer"] |= changes
    config["checkpoint"] = {"select": "last", "every_n_steps": 2}
    config["model"]["init_args"]["lr_interval"] = "step"
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    assert kill_after_every_save(broken) >= 4
    assert_same_run(whole, broken)


def image_folder_config(folder: Path, num_workers: int) -> dict[str, Any]:
    """Writes 32 images, and returns an experiment of 6 batches that decodes them as it goes."""
    chance = np.random.default_rng(0)
    for number in range(32):
        split = "train" if number % 4 else "val"
        name = "cat" if number < 16 else "dog"
        path = folder / split / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = chance.integers(0, 256, (30 + number, 60 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    config = methods.config("stochastic_depth")
    config["model"]["init_args"]["net"]["init_args"] |= {"num_classes": 2, "in_channels": 3}
    config["data"] = {
        "class_path": "datamodules.ImageFolderDataModule",
        "init_args": {
            "data_dir": str(folder),
            "image_size": 16,
            "batch_size": 4,
            "num_workers": num_workers,
        },
    }
    config["checkpoint"]["every_n_steps"] = 4
    config["trainer"] |= {"max_epochs": 2, "limit_train_batches": 1.0}
    return config


@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_while_workers_decode(num_workers: int, tmp_path: Path) -> None:
    config = image_folder_config(tmp_path / "images", num_workers)
    if num_workers:
        changes = {"augmentation": "randaugment", "random_erasing": 0.5}
        config["data"]["init_args"] |= changes
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    assert kill_after_every_save(broken) >= 3
    assert_same_run(whole, broken)


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"pytorch_lightning.callbacks.{name}", "init_args": arguments}


# No validation is better than the one before by as much: it stops after the third.
NEVER_BETTER = {"patience": 2, "min_delta": 10.0}
WITH_CALLBACKS = {
    "stops early": ([callback("EarlyStopping", monitor="val/loss", **NEVER_BETTER)], {}),
    "stops within an epoch": (
        [callback("EarlyStopping", monitor="val/loss", **NEVER_BETTER)],
        {"val_check_interval": 3},
    ),
    "stops after the least steps": (
        [callback("EarlyStopping", monitor="val/loss", **NEVER_BETTER)],
        {"val_check_interval": 2, "min_steps": 13},
    ),
    "stops without validation": (
        [callback("EarlyStopping", monitor="train/loss", **NEVER_BETTER)],
        {"limit_val_batches": 0, "val_check_interval": 1.0},
    ),
    "averages": ([callback("EMAWeightAveraging", decay=0.8)], {}),
    "averages epochs": (
        [callback("EMAWeightAveraging", decay=0.8, update_starting_at_epoch=0)],
        {"limit_val_batches": 0, "val_check_interval": 1.0},
    ),
    "accumulates": ([callback("GradientAccumulationScheduler", scheduling={0: 1, 1: 2, 2: 4})], {}),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name != "averages" else name
        for name in WITH_CALLBACKS
    ],
)
def test_killed_with_callbacks_that_keep_state(name: str, tmp_path: Path) -> None:
    callbacks, changes = WITH_CALLBACKS[name]
    config = methods.config("resnet")
    config["trainer"] |= {"max_epochs": 6 if "stops" in name else 3, **changes}
    config["trainer"]["callbacks"] += callbacks
    config["checkpoint"] = {"select": "last", "every_n_steps": 2}
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    assert kill_after_every_save(broken) >= 4
    assert_same_run(whole, broken)
    steps = torch.load(whole / "run/last.ckpt", weights_only=True)["global_step"]
    expected = {"stops within an epoch": 10, "stops after the least steps": 13, "accumulates": 13}
    assert steps == expected.get(name, 21)


def test_run_that_stopped_early_does_not_go_on(tmp_path: Path) -> None:
    """Neither after a kill in its test, nor when it is given more epochs."""
    config = methods.config("resnet")
    config["trainer"]["max_epochs"] = 5
    config["trainer"]["callbacks"] += WITH_CALLBACKS["stops early"][0]
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    output = broken / "output.txt"

    def testing() -> bool:
        return output.exists() and "Restoring states from" in output.read_text()

    assert launch.kill_when(testing, COMMAND, broken)
    for _ in range(2):
        status, printed = launch.run([*COMMAND, "--trainer.max_epochs=9"], broken)
        assert status == 0, printed
    assert "finished already" in printed
    assert launch.run([*COMMAND, "--trainer.max_epochs=9"], whole)[0] == 0
    assert torch.load(broken / "run/last.ckpt", weights_only=True)["global_step"] == 21
    assert_same_run(whole, broken)


class WarnAll(Callback):
    """Sends a warning to this process and its loader workers, as SLURM does, in the first batch.

    One of the workers may just be starting.
    """

    def __init__(self, number: int, while_validating: bool):
        self.number = number
        self.while_validating = while_validating

    def warn(self) -> None:
        own = os.getpid()
        workers = Path(f"/proc/{own}/task/{own}/children").read_text().split()
        assert len(workers) >= 2
        # By a process of its own: a worker obeys a SIGTERM of its trainer.
        kill = " ".join(["kill", f"-{self.number}", *workers, str(own)])
        subprocess.run(kill, shell=True, check=True)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.while_validating and batch_idx == 0:
            self.warn()

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.while_validating and batch_idx == 0:
            self.warn()


@pytest.mark.parametrize("while_validating", [False, True], ids=["training", "validating"])
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)], ids=["USR1", "TERM"]
)
def test_warning_that_reaches_the_loader_workers(
    number: int, status: int, while_validating: bool, tmp_path: Path
) -> None:
    config = image_folder_config(tmp_path / "images", num_workers=2)
    config["data"]["init_args"]["eval_batch_size"] = 1
    arguments = {"number": int(number), "while_validating": while_validating}
    warn_all = {"class_path": "test_resume.WarnAll", "init_args": arguments}
    config["trainer"]["callbacks"] = [warn_all]
    folder = write(tmp_path / "folder", config)
    found, output = launch.run(COMMAND, folder)
    assert found == status, output
    assert "saved after a signal" in output
    assert "Traceback" not in output
    num_steps = torch.load(folder / "run/last.ckpt", weights_only=True)["global_step"]
    assert num_steps == (6 if while_validating else 1)


class DropoutNet(nn.Module):
    """Draws from the global generator in every step, as ordinary dropout does."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(1024, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.dropout(images.flatten(1)))


@pytest.mark.slow
def test_dropout_draws_the_same_after_a_kill(tmp_path: Path) -> None:
    config = methods.config("resnet")
    config["model"]["init_args"]["net"] = {"class_path": "test_resume.DropoutNet"}
    config["trainer"]["callbacks"] = None
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    assert kill_after_every_save(broken) >= 4
    assert_same_run(whole, broken)


def test_killed_while_testing(tmp_path: Path) -> None:
    config = methods.config("resnet")
    config["trainer"]["max_epochs"] = 1
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    output = broken / "output.txt"

    def testing() -> bool:
        return output.exists() and "Restoring states from" in output.read_text()

    assert launch.kill_when(testing, COMMAND, broken)
    assert launch.run(COMMAND, broken)[0] == 0, (broken / "output.txt").read_text()
    assert_same_run(whole, broken)


def test_damaged_checkpoint_goes_on_from_the_one_before(tmp_path: Path) -> None:
    config = methods.config("stochastic_depth")
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    previous, last = broken / "run/previous.ckpt", broken / "run/last.ckpt"
    # When a write begins, both names mean the same file.
    two_files = lambda: previous.exists() and not previous.samefile(last)  # noqa: E731
    assert launch.kill_when(two_files, COMMAND, broken)
    content = last.read_bytes()
    last.unlink()  # in the middle of a write it is the same file as previous.ckpt
    last.write_bytes(content[:-100])
    status, output = launch.run(COMMAND, broken)
    assert status == 0, output
    assert "last.ckpt is damaged: goes on from the checkpoint before it" in output
    (broken / "run/damaged.ckpt").unlink()
    assert_same_run(whole, broken)


def test_bits_that_torch_alone_stumbles_over(tmp_path: Path) -> None:
    """In the directory of the archive, which has no checksum of its own."""
    path, other = tmp_path / "good.ckpt", tmp_path / "bad.ckpt"
    content = {"tensor": torch.full((9,), 3)}
    torch.save(content, path)
    good = path.read_bytes()
    assert not is_damaged(path)
    start, silent = good.index(b"PK\1\2"), []
    for place, bit in itertools.product(range(start, len(good)), range(8)):
        bad = bytearray(good)
        bad[place] ^= 1 << bit
        other.write_bytes(bad)
        if is_damaged(other):
            continue
        loaded = torch.load(other, weights_only=True)
        if any(not torch.equal(value, content[key]) for key, value in loaded.items()):
            silent.append((place - start, bit))
    assert not silent


@pytest.mark.parametrize(
    "damage", [pytest.param("a block of zeros", marks=pytest.mark.slow), "a flipped bit"]
)
def test_checkpoint_that_has_rotted_is_not_gone_on_from(damage: str, tmp_path: Path) -> None:
    config = methods.config("resnet")
    config["trainer"]["max_epochs"] = 2
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    for _ in range(2):
        assert launch.kill_after_save(COMMAND, broken)
    last, previous = broken / "run/last.ckpt", broken / "run/previous.ckpt"
    content = bytearray(last.read_bytes())
    weights = torch.load(last, weights_only=True)["state_dict"]["net.conv1.weight"]
    place = content.index(
        weights.contiguous(memory_format=torch.channels_last)
        .permute(0, 2, 3, 1)
        .contiguous()
        .numpy()
        .tobytes()
    )
    if damage == "a flipped bit":
        content[place + 3] ^= 1
    else:
        content[place : place + 64] = bytes(64)
    last.unlink()  # it may be the same file as previous.ckpt
    last.write_bytes(content)
    assert not is_intact(last)
    assert is_intact(previous)
    status, output = launch.run(COMMAND, broken)
    assert status == 0, output
    assert "last.ckpt is damaged: goes on from the checkpoint before it" in output
    (broken / "run/damaged.ckpt").unlink()
    assert_same_run(whole, broken)


class TimePasses(Callback):
    """Lets `trainer.max_time` be over in the third batch of the second epoch."""

    only_observes = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 2):
            (checkpoint,) = (c for c in trainer.callbacks if isinstance(c, RunCheckpoint))
            checkpoint.timer = Timer(timedelta(0))
            checkpoint.timer.on_train_start(trainer, pl_module)


@pytest.mark.parametrize(
    ("changes", "num_steps"),
    [
        pytest.param({"limit_val_batches": 0, "val_check_interval": 1.0}, 10, id="unvalidated"),
        pytest.param({}, 10, id="validated", marks=pytest.mark.slow),
        # In the middle of a group.
        pytest.param({"accumulate_grad_batches": 2}, 6, id="accumulated", marks=pytest.mark.slow),
        pytest.param({"val_check_interval": 3}, 10, id="often", marks=pytest.mark.slow),
    ],
)
def test_no_step_is_lost_when_time_is_over(
    changes: dict[str, Any], num_steps: int, tmp_path: Path
) -> None:
    config = methods.config("resnet")
    config["trainer"] |= changes
    config["checkpoint"]["select"] = "last"
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    config["trainer"]["callbacks"].append({"class_path": "test_resume.TimePasses"})
    (broken / "brief.yaml").write_text(yaml.safe_dump(config))
    brief = ["fit", "-c", "brief.yaml", *COMMAND[3:], "--trainer.max_time=00:01:00:00"]
    status, output = launch.run(brief, broken)
    assert status == 0, output
    assert "trainer.max_time is over: repeat the command to go on" in output
    last = torch.load(broken / "run/last.ckpt", weights_only=True)
    assert last["global_step"] == num_steps
    assert launch.run(COMMAND, broken)[0] == 0, (broken / "output.txt").read_text()
    (broken / "run/previous.ckpt").unlink()
    (whole / "run/previous.ckpt").unlink()
    assert_same_run(whole, broken)


class FullDisk(Callback):
    """From the second epoch on no file grows beyond a few kilobytes, by a limit of the process."""

    only_observes = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))


def test_full_disk_is_told_in_a_line_and_loses_nothing(tmp_path: Path) -> None:
    config = methods.config("stochastic_depth")
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    config["trainer"]["callbacks"].append({"class_path": "test_resume.FullDisk"})
    (broken / "full.yaml").write_text(yaml.safe_dump(config))
    status, output = launch.run(["fit", "-c", "full.yaml", *COMMAND[3:]], broken)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 2
    assert len(errors) == 1
    assert "last.ckpt, the one before it is kept" in errors[0]
    assert torch.load(broken / "run/last.ckpt", weights_only=True)["global_step"] == 7
    assert not list(broken.rglob("*.part"))
    assert launch.run(COMMAND, broken)[0] == 0, (broken / "output.txt").read_text()
    assert_same_run(whole, broken)


def test_more_epochs_go_on(tmp_path: Path) -> None:
    config = methods.config("stochastic_depth")
    whole, grown = write(tmp_path / "whole", config), write(tmp_path / "grown", config)
    assert launch.run(COMMAND, whole)[0] == 0
    for num_epochs in (1, 3):
        args = [*COMMAND, f"--trainer.max_epochs={num_epochs}", "--test_after_fit=false"]
        assert launch.run(args, grown)[0] == 0, (grown / "output.txt").read_text()
    assert launch.run(COMMAND, grown)[0] == 0
    assert_same_run(whole, grown)


SLURM = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "job", "SLURM_NTASKS_PER_NODE": "1"}


@pytest.mark.parametrize(
    ("number", "status", "changes"),
    [
        pytest.param(signal.SIGUSR1, 75, {}, id="USR1", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, 75, {"accumulate_grad_batches": 2}, id="USR2"),
        pytest.param(
            *(signal.SIGTERM, 143, {"limit_val_batches": 0, "val_check_interval": 1.0}),
            id="TERM",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_warned_run_saves_and_leaves(
    number: int, status: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    """A warning at any moment: a checkpoint of that step, the status that the scheduler needs."""
    config = methods.config("stochastic_depth")
    config["trainer"] |= changes
    config["checkpoint"] = {"select": "last", "every_n_steps": 1000}
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()
    history = broken / "run/metrics.csv"
    steps = [0]
    for _ in range(3):
        process = launch.start(COMMAND, broken, launch.QUIET | SLURM)
        seen = history.stat().st_size if history.exists() else 0
        time.sleep(0.5)  # the history is cut to the checkpoint first
        while process.is_alive() and (not history.exists() or history.stat().st_size <= seen):
            time.sleep(0.001)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == status, (broken / "output.txt").read_text()
        steps.append(torch.load(broken / "run/last.ckpt", weights_only=True)["global_step"])
        assert steps[-1] > steps[-2]
    assert len(steps) > 1
    assert launch.run(COMMAND, broken)[0] == 0, (broken / "output.txt").read_text()
    assert not list(broken.rglob("hpc_ckpt*"))  # Lightning's own
    for folder in (whole, broken):  # who was warned has saved more often
        (folder / "run/previous.ckpt").unlink(missing_ok=True)
    assert_same_run(whole, broken)


@pytest.mark.slow
def test_warning_before_training_is_remembered(tmp_path: Path) -> None:
    """While torch is imported, and while the data is prepared, nothing can be saved yet."""
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(methods.config("resnet")))
    environment = os.environ | launch.QUIET
    process = subprocess.Popen(
        [sys.executable, str(launch.ROOT / "main.py"), *COMMAND], cwd=tmp_path, env=environment
    )
    status_file = Path(f"/proc/{process.pid}/status")
    while True:
        (caught,) = (line for line in status_file.read_text().splitlines() if "SigCgt" in line)
        if int(caught.split()[1], 16) >> signal.SIGUSR1 - 1 & 1:
            break
        time.sleep(0.001)
    assert not (tmp_path / "run").exists()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=300) == 75
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["global_step"] == 1


def test_wrong_number_of_slurm_tasks_is_refused(tmp_path: Path) -> None:
    """Each of two tasks that believe to be alone would write the same files."""
    folder = write(tmp_path / "folder", methods.config("resnet"))
    two = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    status, output = launch.run(COMMAND, folder, launch.QUIET | SLURM | two)
    assert status == 2
    assert "SLURM started 2 tasks for 1 processes" in output


def test_torchrun_with_more_processes_than_asked_for_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", methods.config("resnet"))
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE")
    launcher = dict.fromkeys(names, "0") | {"WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    status, output = launch.run(COMMAND, folder, launch.QUIET | launcher)
    assert status == 2
    assert "torchrun started 2 processes, and this command asks for 1" in output


def test_wrong_number_of_processes_under_slurm_is_refused(tmp_path: Path) -> None:
    """One task that asks for two devices would train with half the images per step."""
    folder = write(tmp_path / "folder", methods.config("resnet"))
    command = [*COMMAND, "--trainer.devices=2"]
    rank = dict.fromkeys(("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID"), "0")
    status, output = launch.run(command, folder, launch.QUIET | SLURM | rank)
    assert status == 2
    assert "SLURM started 1 tasks for 2 processes" in output
    assert "--ntasks-per-node as many as trainer.devices" in output

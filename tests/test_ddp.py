"""Two processes (gloo) decide alike, end with the same weights, and count every image once."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import launch
import methods
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import Trainer
from test_resume import assert_same_run
from torch import nn

from datamodules import DigitsDataModule
from lightning_modules import LitStochasticDepth
from networks import CifarResNet

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run"]
# A fork of the test's own server instead of a new interpreter per rank: the same DDP, much sooner.
FORKED = {"devices": 2, "strategy": "ddp_fork_find_unused_parameters_true"}


def experiment(folder: Path, method: str, trainer: dict[str, Any]) -> None:
    config = methods.config(method)
    config["trainer"]["callbacks"].append({"class_path": "ddp_probe.RanksAgree"})
    config["trainer"] |= trainer
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))


def test_ranks_share_the_images_of_a_users_own_loader(tmp_path: Path) -> None:
    experiment(tmp_path, "stochastic_depth", FORKED | {"max_epochs": 1})
    config = yaml.safe_load((tmp_path / "experiment.yaml").read_text())
    config["data"] = {"class_path": "ddp_probe.OwnData"}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 0, output
    report = agreement(tmp_path)
    assert report["num_steps"] == 3
    assert not any(report["same_images"])
    status, output = launch.run(["predict", *COMMAND[1:], "--trainer.devices=1"], tmp_path)
    assert status == 0, output
    with (tmp_path / "run/predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    assert [row["file"] for row in predictions] == [str(number) for number in range(60)]


def agreement(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/agreement.json").read_text())


@pytest.mark.parametrize("method", methods.EXPENSIVE)
def test_ranks_agree(method: str, tmp_path: Path) -> None:
    experiment(tmp_path, method, FORKED)
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 0, output
    report = agreement(tmp_path)
    assert report["world_size"] == 2
    assert report["num_steps"] == 21
    assert report["same_weights"]
    assert not any(report["same_images"])  # the ranks share the work
    assert report["num_syncs"] == report["num_steps"]
    if "slimmable" in method:
        assert len(report["same_widths"]) == 21
        assert all(report["same_widths"])
    if method in ("stochastic_depth", "convnext", "slimmable_exits"):
        assert len(report["same_gates"]) == 21
        assert all(report["same_gates"])
    if method in ("stochastic_depth_row", "vision_transformer"):
        assert not all(report["same_gates"])  # every sample has gates of its own

    # The same checkpoint, evaluated by one process: what is measured is equal to the last digit.
    def points(name: str) -> list[tuple[str, ...]]:
        with (tmp_path / "run" / name).open(newline="") as file:
            return [
                (*(row[key] for key in ("name", "test_acc", "macs", "test_top5")), error)
                for row in csv.DictReader(file)
                for error in [round(float(row["ece"]), 6)]  # of batches of other sizes
            ]

    of_two = points("operating_points.csv")
    alone = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.callbacks=null"]
    assert launch.run(["test", *COMMAND[1:], *alone], tmp_path)[0] == 0
    assert points("operating_points_again.csv") == of_two
    for name in ("class_accuracy", "confusion"):
        files = (tmp_path / f"run/{name}{end}.csv" for end in ("", "_again"))
        assert len({file.read_text() for file in files}) == 1
    if method in methods.WITH_EXITS:
        assert_images_are_of_their_class(tmp_path / "run")


def assert_images_are_of_their_class(folder: Path) -> None:
    """The first of two ranks has every second image."""
    data = DigitsDataModule()
    data.setup("test")
    images, labels = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    with (folder / "exit_images.csv").open(newline="") as file:
        shown = list(csv.DictReader(file))
    assert shown
    for row in shown:
        pixels = torch.from_numpy(np.array(Image.open(folder / row["file"])))
        same = (images[:, 0] == pixels).flatten(1).all(1).nonzero().flatten()
        assert (same % 2 == 0).any()
        assert str(labels[same[0]].item()) == row["true"]


LONG_EPOCH = FORKED | {"max_epochs": 1, "limit_train_batches": 25, "log_every_n_steps": 1000}


def long_epoch(folder: Path, callback: str) -> None:
    """Writes an experiment of 25 steps, in which nothing is logged and nothing is saved."""
    experiment(folder, "resnet", LONG_EPOCH | {"callbacks": {"class_path": callback}})
    config = yaml.safe_load((folder / "experiment.yaml").read_text())
    config["data"]["init_args"]["batch_size"] = 16
    config["checkpoint"]["every_n_steps"] = 1000
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))


def test_ranks_ask_each_other_every_ten_steps(tmp_path: Path) -> None:
    long_epoch(tmp_path, "ddp_probe.CountsCollectives")
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 0, output
    counts = json.loads((tmp_path / "run/collectives.json").read_text())
    assert counts == [int(step % 10 == 0) for step in range(1, 25)]


def test_bad_loss_of_one_rank_stops_both(tmp_path: Path) -> None:
    """When they ask each other, after step 20; the message names the step where it began."""
    long_epoch(tmp_path, "ddp_probe.RuinsSecondRank")
    status, output = launch.run(COMMAND, tmp_path)
    assert status != 0
    assert "at step 13 (epoch 0): stopped" in output
    assert "at step 14" not in output
    assert not (tmp_path / "run/last.ckpt").exists()


def test_two_ranks_predict_what_one_predicts(tmp_path: Path) -> None:
    experiment(tmp_path, "resnet", {"max_epochs": 1, "limit_train_batches": 1, "callbacks": None})
    assert launch.run(COMMAND, tmp_path)[0] == 0
    answers = []
    for arguments in ([], ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]):
        status, output = launch.run(["predict", *COMMAND[1:], *arguments], tmp_path)
        assert status == 0, output
        with (tmp_path / "run/predictions.csv").open(newline="") as file:
            answers.append([(row["file"], row["class"]) for row in csv.DictReader(file)])
    assert len(answers[0]) == 360
    assert answers[0] == answers[1]


class LinearNet(nn.Module):
    """Without BN, whose statistics are those of a rank, the number of ranks decides nothing."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1024, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.flatten(1))


def test_other_number_of_ranks_goes_on_within_an_epoch(tmp_path: Path) -> None:
    """One process, killed, then two, killed, then one: the weights are those of one process."""
    two = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]
    half = "--data.init_args.batch_size=32"
    checkpoints = []
    for name in ("whole", "broken"):
        folder = tmp_path / name
        folder.mkdir()
        net = {"class_path": "test_ddp.LinearNet"}
        config = methods.config("resnet")
        config["model"]["init_args"]["net"] = net
        config["trainer"] |= {"callbacks": None, "limit_train_batches": 10}
        (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
        last = folder / "run/last.ckpt"
        if name == "broken":
            assert launch.kill_after_save(COMMAND, folder)
            steps = torch.load(last, weights_only=True)["global_step"]
            assert steps % 10, "saved within an epoch"
            status, output = launch.run([*COMMAND, *two], folder)
            assert status != 0
            assert (
                "64 images per step (batch_size times processes), and this command has 128"
                in output
            )
            assert "set batch_size to 32" in output
            seen = last.stat().st_mtime_ns
            command = [*COMMAND, *two, half]
            assert launch.kill_when(lambda: last.stat().st_mtime_ns != seen, command, folder)  # noqa: B023
        assert launch.run(COMMAND, folder)[0] == 0, (folder / "output.txt").read_text()
        checkpoints.append(torch.load(last, weights_only=True))
    whole, broken = checkpoints
    assert whole["global_step"] == broken["global_step"] == 30
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(broken["state_dict"][key], value, rtol=1e-4, atol=1e-6)


def test_two_ranks_resume(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        experiment(folder, "stochastic_depth", FORKED)
        last = folder / "run/last.ckpt"
        if folder == broken:
            assert launch.kill_when(last.exists, COMMAND, folder)
        assert launch.run(COMMAND, folder)[0] == 0, (folder / "output.txt").read_text()
    assert_same_run(whole, broken)


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "number"),
    [("second", signal.SIGUSR1), ("second", signal.SIGKILL), ("first", signal.SIGKILL)],
    ids=["warned", "second killed", "first killed"],
)
def test_what_happens_to_one_rank_happens_to_both(victim: str, number: int, tmp_path: Path) -> None:
    """A warned rank saves with the other; the other of a killed one says so, and ends soon."""
    experiment(tmp_path, "stochastic_depth", {"max_epochs": 1000, "callbacks": None})
    machine = str(launch.ROOT / "experiments/machines/ddp.yaml")
    command = [sys.executable, str(launch.ROOT / "main.py"), *COMMAND, "-c", machine]
    environment = os.environ | launch.QUIET | {"CUDA_VISIBLE_DEVICES": ""}
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=file)
    history = tmp_path / "run/metrics.csv"
    while not history.exists() or history.read_text().count("\n") < 20:
        assert first.poll() is None, output.read_text()
        time.sleep(0.01)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    (second,) = (
        int(pid) for pid in children if b"main.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    start = time.monotonic()
    os.kill(first.pid if victim == "first" else second, number)
    status = first.wait(timeout=120)
    while not has_ended(second):
        assert time.monotonic() - start < 120
        time.sleep(0.01)
    checkpoint = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] > 0
    errors = [line for line in output.read_text().splitlines() if line.startswith("error: ")]
    if number == signal.SIGUSR1:
        assert status == 75
        assert not errors
        assert "saved after a signal" in output.read_text()
    else:
        assert status in (1, -signal.SIGKILL)
        # Lightning looks for dead children every five seconds, says so, and ends what is left.
        by_lightning = f"Child process with PID {second} terminated" in output.read_text()
        assert len(errors) == 1 or (by_lightning and not errors)
        if errors:
            assert errors[0].startswith("error: another process of this run has ended")


def test_plain_ddp_is_refused_with_the_remedy() -> None:
    method = LitStochasticDepth(CifarResNet(8))
    method.trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False)
    with pytest.raises(ValueError, match=r"set trainer\.strategy to ddp_find_unused"):
        method.on_fit_start()


@pytest.mark.slow
def test_shipped_machine_file_in_two_interpreters(tmp_path: Path) -> None:
    experiment(tmp_path, "stochastic_depth", {"max_epochs": 1})
    machine = launch.ROOT / "experiments/machines/ddp.yaml"
    command = [sys.executable, str(launch.ROOT / "main.py"), *COMMAND, "-c", str(machine)]
    paths = os.pathsep.join([str(launch.ROOT), str(Path(__file__).parent)])
    environment = {**os.environ, "WANDB_MODE": "disabled", "PYTHONPATH": paths}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    report = agreement(tmp_path)
    assert report["same_weights"]
    assert all(report["same_gates"])

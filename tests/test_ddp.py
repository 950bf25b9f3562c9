"""Two processes (gloo) decide alike, end with the same weights, and count every image once."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import launch
import methods
import pytest
import torch
import yaml
from pytorch_lightning import Trainer

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


def agreement(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run/agreement.json").read_text())


@pytest.mark.parametrize("method", methods.METHODS)
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
    if method == "stochastic_depth":
        assert len(report["same_gates"]) == 21
        assert all(report["same_gates"])
    if method == "stochastic_depth_row":
        assert not all(report["same_gates"])  # every sample has gates of its own

    # The same checkpoint, evaluated by one process: accuracy equal to the last digit.
    def points(name: str) -> list[tuple[str, ...]]:
        with (tmp_path / "run" / name).open(newline="") as file:
            return [(row["name"], row["test_acc"], row["macs"]) for row in csv.DictReader(file)]

    of_two = points("operating_points.csv")
    alone = ["--trainer.devices=1", "--trainer.strategy=auto", "--trainer.callbacks=null"]
    assert launch.run(["test", *COMMAND[1:], *alone], tmp_path)[0] == 0
    assert points("operating_points_again.csv") == of_two


def test_two_ranks_predict_what_one_predicts(tmp_path: Path) -> None:
    experiment(tmp_path, "resnet", {"max_epochs": 1, "limit_train_batches": 1, "callbacks": None})
    assert launch.run(COMMAND, tmp_path)[0] == 0
    answers = []
    for arguments in ([], ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]):
        status, output = launch.run(["predict", *COMMAND[1:], *arguments], tmp_path)
        assert status == 0, output
        with (tmp_path / "run/predictions.csv").open(newline="") as file:
            answers.append([(row["image"], row["class"]) for row in csv.DictReader(file)])
    assert len(answers[0]) == 360
    assert answers[0] == answers[1]


def test_other_number_of_ranks_within_an_epoch_is_refused(tmp_path: Path) -> None:
    experiment(tmp_path, "stochastic_depth", {"callbacks": None})
    last = tmp_path / "run/last.ckpt"
    assert launch.kill_when(last.exists, COMMAND, tmp_path)
    assert torch.load(last, weights_only=True)["global_step"] == 3
    more = ["--trainer.devices=2", "--trainer.strategy=ddp_fork_find_unused_parameters_true"]
    status, output = launch.run([*COMMAND, *more], tmp_path)
    assert status != 0
    assert "was saved within an epoch by 1 processes" in output


def test_two_ranks_resume(tmp_path: Path) -> None:
    weights = []
    for name in ("whole", "broken"):
        folder = tmp_path / name
        folder.mkdir()
        experiment(folder, "stochastic_depth", FORKED)
        last = folder / "run/last.ckpt"
        if name == "broken":
            assert launch.kill_when(last.exists, COMMAND, folder)
        assert launch.run(COMMAND, folder)[0] == 0, (folder / "output.txt").read_text()
        weights.append(torch.load(last, weights_only=True)["state_dict"])
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


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

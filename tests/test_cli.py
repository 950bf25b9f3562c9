"""The front door: what it refuses, in one line, and what it does with a run folder."""

import ast
import csv
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import launch
import methods
import pytest
import torch
import yaml
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.distributed import DistError

from networks import CifarResNet
from running import command_line
from running.error_file import ErrorFile

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run"]


def change(config: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        config = config.setdefault(key, {})
    config[last] = value


def experiment(folder: Path, method: str = "stochastic_depth", **changes: Any) -> Path:
    """Writes a small experiment; keyword `a__b=1` changes the key a.b."""
    config = methods.config(method)
    config["trainer"]["max_epochs"] = 1
    for path, value in changes.items():
        change(config, path.replace("__", "."), value)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    return folder


def corrupt_image_folder(folder: Path) -> dict[str, Any]:
    for name in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / "broken.png").write_bytes(b"no image")
    return {
        "class_path": "datamodules.ImageFolderDataModule",
        "init_args": {"data_dir": "images", "batch_size": 1, "image_size": 32, "num_workers": 0},
    }


NET = "model__init_args__net__init_args__"
BAD = {
    "unknown key": ({"trainer__max_epoch": 3}, "does not accept option 'trainer.max_epoch'"),
    "unknown argument": ({NET + "dept": 3}, "Option 'dept' is not accepted"),
    "unknown class": ({"model__class_path": "lightning_modules.LitX"}, "no attribute 'LitX'"),
    "wrong type": (
        {"trainer__max_epochs": "ten"},
        "\"trainer.max_epochs\": Expected a <class 'int'>",
    ),
    "wrong choice": (
        {"model__init_args__decay": "cubic"},
        "'linear', 'uniform', 'drop_path']. Got value: cubic",
    ),
    "survival probability": (
        {"model__init_args__final_survival_prob": 0.0},
        "give a number in (0, 1]",
    ),
    "survival above 1": ({"model__init_args__final_survival_prob": 1.5}, "give a number in (0, 1]"),
    "depth": ({NET + "depth": 21}, "depth is 21: give 6n+2, such as"),
    "batch of 0": ({"data__init_args__batch_size": 0}, "batch_size is 0"),
    "batch too large": (
        {"data__init_args__batch_size": 5000},
        "there are 1257 training images; ",
    ),
    "other classes": ({NET + "num_classes": 7}, "set the network's num_classes to 10"),
    "NaN loss": (
        {"model__init_args__optimizer__init_args__lr": 1e30, "checkpoint__every_n_steps": 1},
        "at step 1 (epoch 0)",
    ),
    "no data": (
        {
            "data": {
                "class_path": "datamodules.ImageFolderDataModule",
                "init_args": {"data_dir": "nowhere"},
            }
        },
        "nowhere",
    ),
    "corrupt image": (
        {"data": corrupt_image_folder, NET + "num_classes": 2, NET + "in_channels": 3},
        "broken.png",
    ),
    "plateau schedule": (
        {
            "model__init_args__lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.ReduceLROnPlateau"
            }
        },
        "use a schedule of the step or the epoch",
    ),
    "other channels": ({NET + "in_channels": 3}, "set the network's in_channels to 1"),
    "nothing to select by": (
        {"data__init_args__val_size": 0},
        "checkpoint.select is best, but nothing is validated",
    ),
    "validated too late": (
        {"trainer__check_val_every_n_epoch": 5},
        "the first validation comes after 35 batches and the training ends after 7",
    ),
    "too few steps to validate": (
        {"trainer__max_steps": 2, "trainer__accumulate_grad_batches": 3},
        "the first validation comes after 7 batches and the training ends after 6: validate",
    ),
    "worker processes": (
        {
            "data": {
                "class_path": "datamodules.ImageFolderDataModule",
                "init_args": {"num_workers": 10**12},
            }
        },
        "num_workers is 1000000000000",
    ),
    "logger": ({"trainer__logger": False}, "use --wandb.mode and --run_dir"),
    "seed": ({"seed_everything": -1}, "seed_everything is -1: use 0 to"),
    "checkpoint period": ({"checkpoint__every_n_steps": 0}, "use 1 or more"),
    "negative accumulation": (
        {"trainer__accumulate_grad_batches": -1},
        "trainer.accumulate_grad_batches is -1: use 1 or more",
    ),
    "validation by time": (
        {"trainer__val_check_interval": "00:00:10:00"},
        "after a time, a run that goes on would validate elsewhere",
    ),
    "no validation interval": (
        {"trainer__val_check_interval": 0.0},
        "trainer.val_check_interval is 0.0: give a number of batches, or a share",
    ),
    "gradient clipping": ({"trainer__gradient_clip_val": -1.0}, "gradient_clip_val is -1.0: use 0"),
    "no log": ({"trainer__log_every_n_steps": 0}, "trainer.log_every_n_steps is 0: use 1 or more"),
    "double precision": (
        {"trainer__precision": "64-true"},
        "precision is 64-true, and images and metrics are of 32 bits: use 32-true",
    ),
    "timer": (
        {
            "trainer__callbacks": {
                "class_path": "pytorch_lightning.callbacks.Timer",
                "init_args": {"duration": "00:00:10:00"},
            }
        },
        "use trainer.max_time, after which the same command goes on",
    ),
    "stop when it gets better": (
        {
            "trainer__callbacks": {
                "class_path": "pytorch_lightning.callbacks.EarlyStopping",
                "init_args": {"monitor": "val/acc"},
            }
        },
        "EarlyStopping would stop when val/acc gets better (mode min): set its mode to max",
    ),
    "misspelt monitor of a callback": (
        {
            "trainer__callbacks": {
                "class_path": "pytorch_lightning.callbacks.EarlyStopping",
                "init_args": {"monitor": "val/accuracy", "mode": "max"},
            }
        },
        "Early stopping conditioned on metric `val/accuracy` which is not available",
    ),
    "callback given twice": (
        {"trainer__callbacks": [{"class_path": "callbacks.ThroughputMonitor"}] * 2},
        "Found more than one stateful callback of type",
    ),
    "finder of a rate": (
        {"trainer__callbacks": {"class_path": "LearningRateFinder"}},
        "try values in folders of their own",
    ),
    "finder of a batch": (
        {"trainer__callbacks": {"class_path": "BatchSizeFinder"}},
        "try values in folders of their own",
    ),
    "device of a CPU": (
        {"trainer__devices": [0]},
        "the Trainer cannot be built (TypeError: `devices` selected with `CPUAccelerator`",
    ),
    "schedule of schedules": (
        {
            "model__init_args__lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.SequentialLR",
                "init_args": {
                    "milestones": [1],
                    "schedulers": [{"class_path": "torch.optim.lr_scheduler.ConstantLR"}],
                },
            }
        },
        "made of other schedules, which no YAML can nest: use lightning_modules.WarmupMultiStepLR",
    ),
    "negative gamma": (
        {
            "model__init_args__lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.ExponentialLR",
                "init_args": {"gamma": -1.0},
            }
        },
        "gamma of ExponentialLR is -1.0: give a number above 0",
    ),
    "unknown monitor": (
        {"checkpoint__monitor": "val/f1", "checkpoint__mode": "max"},
        "'val/f1' is not logged; there are: ",
    ),
    "monitor of unknown direction": (
        {"checkpoint__monitor": "val/f1"},
        "checkpoint.monitor 'val/f1' is no loss and no accuracy: set checkpoint.mode to min or max",
    ),
}


def assert_one_line(status: int, output: str, message: str) -> None:
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 2, output
    assert len(errors) == 1, output
    assert message in errors[0]
    assert len(errors[0]) < 500
    assert "Traceback" not in output


def foreign_trunk(folder: Path) -> dict[str, str]:
    network = CifarResNet(14, in_channels=1)
    weights = {f"net.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": weights}, folder / "trunk.ckpt")
    return {"weights": "trunk.ckpt"}


INIT = "model__init_args__"
BAD_EXITS = {
    "too many thresholds": (
        {INIT + "exit_thresholds": [0.1, 0.2, 0.3]},
        "3 exit thresholds for 3 exits: give 2, shallow to deep",
    ),
    "NaN threshold": (
        {INIT + "exit_thresholds": [0.1, float("nan")]},
        "the threshold of exit 2 is NaN",
    ),
    "unknown criterion": ({INIT + "exit_criterion": "margin"}, "'entropy', 'confidence'"),
    "too few weights": (
        {INIT + "exit_loss_weights": [1.0]},
        "1 exit_loss_weights for 3 exits: give one per exit, shallow to deep",
    ),
    "weight of 0": (
        {INIT + "exit_loss_weights": [1.0, 0.0, 1.0]},
        "give positive numbers, or zeros for all but the last",
    ),
    "thresholds of untrained exits": (
        {INIT + "exit_loss_weights": [0, 0, 1], INIT + "exit_thresholds": [0.1, 0.1]},
        "exit_thresholds need exits that are trained",
    ),
    "order of the exits": ({NET + "exits_after": [2, 0]}, "give rising numbers from 0 to 2"),
    "trunk of another depth": (
        {INIT + "tuning": foreign_trunk},
        "trunk.layer1.1.conv1.weight is (16, 16, 3, 3) there and absent here",
    ),
    "image size": (
        {INIT + "net": {"class_path": "networks.BranchyLeNet"}},
        "takes images of 28 x 28 pixels and the data has 32 x 32: set the network's image_size",
    ),
}


@pytest.mark.parametrize("name", BAD_EXITS)
def test_mistake_with_exits_is_one_line(name: str, tmp_path: Path) -> None:
    changes, message = BAD_EXITS[name]
    changes = {k: v(tmp_path) if isinstance(v, Callable) else v for k, v in changes.items()}
    experiment(tmp_path, "branchynet", **changes)
    assert_one_line(*launch.run(COMMAND, tmp_path), message)
    assert not (tmp_path / "run/last.ckpt").exists()


BAD_WIDTHS = {
    "evaluated width": ({INIT + "eval_widths": [0.1, 1.0]}, "width 0.1 is outside the range 0.25"),
    "no evaluated width": ({INIT + "eval_widths": []}, "eval_widths is empty: give one width"),
    "empty range": (
        {NET + "width_mult_range": [1.0, 0.5]},
        "width_mult_range is [1.0, 0.5]: give the narrowest width, then the widest",
    ),
    "range beyond 1": ({NET + "width_mult_range": [0.5, 1.5]}, "give numbers in (0, 1]"),
    "one width per step": ({INIT + "num_widths": 1}, "num_widths is 1: give a whole number from 2"),
    "switches instead of a range": (
        {NET + "width_mult_range": None, NET + "width_mults": [0.5, 1.0]},
        "LitUniversallySlimmable needs the network's width_mult_range: set it, or use LitSlimmable",
    ),
    "recalibrated width": (
        {
            "trainer__callbacks": [
                {"class_path": "callbacks.BNRecalibration", "init_args": {"widths": [2.0]}}
            ]
        },
        "widths is [2.0]: give numbers in (0, 1]",
    ),
    "no recalibration": ({"trainer__callbacks": []}, "add callbacks.BNRecalibration to trainer"),
    "no images to recalibrate with": (
        {
            "trainer__callbacks": [
                {"class_path": "callbacks.BNRecalibration", "init_args": {"num_images": 0}}
            ]
        },
        "num_images is 0: give a whole number from 1",
    ),
}


@pytest.mark.parametrize("name", BAD_WIDTHS)
def test_mistake_with_widths_is_one_line(name: str, tmp_path: Path) -> None:
    changes, message = BAD_WIDTHS[name]
    experiment(tmp_path, "universally_slimmable", **changes)
    assert_one_line(*launch.run(COMMAND, tmp_path), message)
    assert not (tmp_path / "run/last.ckpt").exists()


BAD_DENSE = {
    "depth": ("densenet", {NET + "depth": 41}, "depth is 41: give 3n+4, such as 40, 100"),
    "depth with bottlenecks": (
        "densenet",
        {NET + "depth": 43, NET + "bottleneck": True},
        "depth is 43: give 6n+4, such as 100, 190, 250",
    ),
    "compression": (
        "densenet",
        {NET + "compression": 0.0},
        "compression is 0.0: give a number",
    ),
    "growth rate": (
        "densenet",
        {NET + "growth_rate": -6},
        "growth_rate is -6: give a whole",
    ),
    "reduction": ("msdnet", {NET + "reduction": 1.5}, "reduction is 1.5: give a number in (0, 1]"),
    "odd growth at a coarse scale": (
        "msdnet",
        {NET + "growth_rate": 5, NET + "growth_factors": [1, 1]},
        "a growth rate of 5 times a growth factor of 1 is odd: make it even",
    ),
    "too few layers": (
        "msdnet",
        {NET + "num_blocks": 1},
        "1 layers do not drop 2 scales one by one (prune='max'): choose base, step and num_blocks "
        "such that there are 2",
    ),
    "base": ("msdnet", {NET + "base": 0}, "base is 0: give a whole number from 1"),
    "step": ("msdnet", {NET + "step": 0}, "step is 0: give a whole number from 1"),
    "two budgets": (
        "msdnet",
        {INIT + "budget_macs": 1e6, INIT + "budget_ms": 1.0},
        "give one of budget_macs, budget_ms and exit_thresholds",
    ),
    "budget below the first exit": (
        "msdnet",
        {INIT + "budget_macs": 1.0},
        "a budget of 1 per image is outside what the exits cost: ",
    ),
    "budget above the last exit": (
        "msdnet",
        {INIT + "budget_macs": 1e12},
        "a budget of 1e+12 per image is outside what the exits cost: ",
    ),
    "budget in ms": (
        "msdnet",
        {INIT + "budget_ms": 1e6},
        "a budget of 1,000,000 per image is outside what the exits cost: ",
    ),
    "budget without validation images": (
        "msdnet",
        {
            INIT + "budget_macs": 1e6,
            "data__init_args__val_size": 0,
            "checkpoint__select": "last",
        },
        "a budget needs thresholds, which a validation finds: hold out validation images",
    ),
}


@pytest.mark.parametrize("name", BAD_DENSE)
def test_mistake_with_a_dense_network_is_one_line(name: str, tmp_path: Path) -> None:
    method, changes, message = BAD_DENSE[name]
    experiment(tmp_path, method, **changes)
    assert_one_line(*launch.run(COMMAND, tmp_path), message)
    assert not (tmp_path / "run/last.ckpt").exists()


def test_budget_on_the_command_line(tmp_path: Path) -> None:
    experiment(tmp_path, "msdnet", trainer__callbacks=None)
    assert launch.run(COMMAND, tmp_path)[0] == 0
    command = ["test", *COMMAND[1:], "--model.init_args.budget_macs=6e6"]
    status, output = launch.run(command, tmp_path)
    assert status == 0, output
    with (tmp_path / "run/operating_points_again.csv").open(newline="") as file:
        macs = {row["name"]: int(row["macs"]) for row in csv.DictReader(file)}
    assert macs["exit1"] < macs["adaptive"] < macs["full"]
    assert macs["adaptive"] == pytest.approx(6e6, rel=0.15)
    command[0] = "predict"
    assert launch.run(command, tmp_path)[0] == 0
    with (tmp_path / "run/predictions.csv").open(newline="") as file:
        assert len({row["exit"] for row in csv.DictReader(file)}) > 1


@pytest.mark.parametrize("callback", ["ExitStatistics", "SurvivalProbabilityLogger"])
def test_callback_of_another_method_is_one_line(callback: str, tmp_path: Path) -> None:
    experiment(tmp_path, "resnet", trainer__callbacks=[{"class_path": f"callbacks.{callback}"}])
    assert_one_line(*launch.run(COMMAND, tmp_path), f"{callback} has nothing to log of LitResNet")


@pytest.mark.parametrize("name", BAD)
def test_mistake_is_one_line(name: str, tmp_path: Path) -> None:
    changes, message = BAD[name]
    changes = {k: v(tmp_path) if isinstance(v, Callable) else v for k, v in changes.items()}
    experiment(tmp_path, **changes)
    assert_one_line(*launch.run(COMMAND, tmp_path), message)


def test_loss_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The fourth step is the bad one. What was saved after it would be lost for good."""
    scheduler = {
        "class_path": "torch.optim.lr_scheduler.MultiStepLR",
        "init_args": {"milestones": [3], "gamma": 1e30},
    }
    init = "model__init_args__"
    changes = {init + "lr_scheduler": scheduler, init + "lr_interval": "step"}
    experiment(tmp_path, **changes, checkpoint__every_n_steps=1)
    status, output = launch.run(COMMAND, tmp_path)
    assert_one_line(status, output, "at step 4 (epoch 0)")
    checkpoint = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3
    weights = [value for value in checkpoint["state_dict"].values() if value.is_floating_point()]
    assert all(value.abs().max() < 100 for value in weights)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["fit", "-c", "missing.yaml"], "missing.yaml"),
        (["fit", "-c", "experiment.yaml", "--trainer.max_epoch=3"], "trainer.max_epoch"),
        (
            ["fit", "-c", "experiment.yaml", "--run_dir", "experiment.yaml/x"],
            "cannot write the run",
        ),
        (["test", "-c", "experiment.yaml", "--run_dir", "run"], "train first (fit)"),
        (["test", "-c", "experiment.yaml", "--ckpt_path", "no.ckpt"], "no checkpoint no.ckpt"),
        (
            ["test", "-c", "experiment.yaml", "--ckpt_path", "experiment.yaml"],
            "is not a checkpoint",
        ),
        (["fit", "-c", "experiment.yaml", "--ckpt_path", "best"], "no checkpoint runs/"),
        (["fit", "-c", "notes.txt"], "Unexpected config: no keys here"),
        (["test", "-c", "experiment.yaml", "--verbose=false"], "verbose"),
        (["fit"], "the command line names no experiment: give one by -c"),
        (["train"], "did you mean fit?"),
        ([], "the command line names no command: begin with one of these"),
    ],
)
def test_mistake_on_the_command_line(args: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no keys here")
    assert_one_line(*launch.run(args, experiment(tmp_path)), message)
    assert not (tmp_path / "run").exists()


def test_life_of_a_run_folder(tmp_path: Path) -> None:
    experiment(tmp_path)
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 0, output
    assert "operating points" in output
    assert "run folder: run" in output
    run = tmp_path / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.yaml", "attempts.yaml", "last.ckpt", "best.ckpt", "metrics.csv"}
    assert not [name for name in names if name.endswith(".part")]
    with (run / "operating_points.csv").open(newline="") as file:
        (point,) = csv.DictReader(file)
    assert (point["name"], int(point["macs"]), int(point["params"])) == ("full", 11944576, 75002)
    accuracy = float(point["test_acc"])
    with (run / "metrics.csv").open(newline="") as file:
        logged = [row["test/acc"] for row in csv.DictReader(file) if row["test/acc"]]
    assert [float(value) for value in logged] == [accuracy]  # tested exactly once

    before = (run / "last.ckpt").stat().st_mtime_ns
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 0
    assert "finished already" in output
    assert f"{accuracy:.2%}" in output
    assert (run / "last.ckpt").stat().st_mtime_ns == before

    for command in ("validate", "test", "predict"):
        status, output = launch.run([command, *COMMAND[1:]], tmp_path)
        assert status == 0, output
    with (run / "operating_points_again.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["test_acc"]) == accuracy
    with (run / "predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    assert len(predictions) == 360
    assert all(0.1 <= float(row["probability"]) <= 1 for row in predictions)

    # More epochs go on; another network is refused, by fit and by test.
    status, output = launch.run([*COMMAND, "--trainer.max_epochs=2"], tmp_path)
    assert status == 0, output
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 1
    deeper = "--model.init_args.net.init_args.depth=14"
    assert_one_line(*launch.run([*COMMAND, deeper], tmp_path), "depth is 8 there and 14 here")
    output = launch.run(["test", *COMMAND[1:], deeper], tmp_path)
    assert_one_line(*output, "is of another experiment: model.init_args.net.init_args.depth is 8")


def test_edited_value_wins_over_the_checkpoint(tmp_path: Path) -> None:
    """Lightning alone would lay hyper-parameters stored in a checkpoint file over the YAML."""
    experiment(tmp_path)
    assert launch.run(COMMAND, tmp_path)[0] == 0
    args = ["test", *COMMAND[1:], "--ckpt_path", "run/last.ckpt", "--print_config"]
    status, output = launch.run([*args, "--model.init_args.final_survival_prob=0.25"], tmp_path)
    assert status == 0
    output = output[output.index("# pytorch_lightning") :]
    assert yaml.safe_load(output)["model"]["init_args"]["final_survival_prob"] == 0.25


def test_run_folder_is_named_by_method_yaml_and_seed(tmp_path: Path) -> None:
    experiment(tmp_path, trainer__limit_train_batches=1)
    assert launch.run(["fit", "-c", "experiment.yaml", "--seed_everything=3"], tmp_path)[0] == 0
    assert (tmp_path / "runs/stochastic_depth/experiment/seed3/finished.yaml").exists()


def test_science_file_names_the_run_wherever_it_stands(tmp_path: Path) -> None:
    experiment(tmp_path, trainer__limit_train_batches=1)
    (tmp_path / "cpu.yaml").write_text("trainer: {accelerator: cpu}")
    args = ["fit", "-c", "cpu.yaml", "-c", "experiment.yaml"]
    assert launch.run(args, tmp_path)[0] == 0
    assert (tmp_path / "runs/stochastic_depth/experiment/seed7/finished.yaml").exists()


def test_run_that_was_not_tested_can_be_tested_later(tmp_path: Path) -> None:
    experiment(tmp_path)
    result = tmp_path / "run/operating_points.csv"
    for args in ([*COMMAND, "--test_after_fit=false"], [*COMMAND, "--test_after_fit=false"]):
        assert launch.run(args, tmp_path)[0] == 0
        assert not result.exists()
    assert launch.run(COMMAND, tmp_path)[0] == 0
    assert result.exists()


def test_evaluating_again_leaves_the_result_alone(tmp_path: Path) -> None:
    experiment(tmp_path)
    assert launch.run(COMMAND, tmp_path)[0] == 0
    result = tmp_path / "run/operating_points.csv"
    before = result.read_bytes()
    args = ["test", *COMMAND[1:], "--ckpt_path", "last", "--trainer.limit_test_batches=1"]
    args.append("--data.init_args.eval_batch_size=9")
    assert launch.run(args, tmp_path)[0] == 0
    assert result.read_bytes() == before


def test_best_is_kept_also_where_the_last_is_selected(tmp_path: Path) -> None:
    experiment(tmp_path, checkpoint__select="last")
    assert launch.run(COMMAND, tmp_path)[0] == 0
    assert (tmp_path / "run/best.ckpt").exists()
    assert "run/last.ckpt" in (tmp_path / "output.txt").read_text()


def test_single_callback_needs_no_list(tmp_path: Path) -> None:
    callback = {"class_path": "callbacks.SurvivalProbabilityLogger"}
    experiment(tmp_path, trainer__callbacks=callback, trainer__limit_train_batches=1)
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 0, output
    assert (tmp_path / "run/survival.csv").exists()


DEAD_RANK = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DEAD_RANK, 1, "error: another process of this run has ended, so this one does"),
        (DistError("timeout"), 1, "error: another process of this run has ended"),
        (SIGTERMException(), 143, ""),
    ],
)
def test_exit_status_of_what_others_did(
    error: Exception,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command_line, "ExperimentCLI", Mock(side_effect=error))
    assert command_line.main(["fit", "-c", "experiment.yaml"]) == status
    assert capsys.readouterr().err.startswith(line)


def test_unknown_error_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "ExperimentCLI", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        command_line.main(["fit", "-c", "experiment.yaml"])


@pytest.mark.parametrize("error", [ValueError("a mistake"), RuntimeError("a bug")])
def test_a_traceback_is_kept_in_the_run_folder(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whether the fault is the user's or ours: what is told in a line may be a bug."""

    def fail(args: Any, errors: ErrorFile) -> None:
        errors.folder = tmp_path
        raise error

    monkeypatch.setattr(command_line, "ExperimentCLI", fail)
    words = ["fit", "-c", "a.yaml", "--model.init_args.api_key=1234"]
    for _ in range(2):
        if isinstance(error, ValueError):
            assert command_line.main(words) == 2
        else:
            with pytest.raises(RuntimeError):
                command_line.main(words)
    text = (tmp_path / "error.txt").read_text()
    assert text.count("Traceback") == text.count(f"{error}\n") == 2
    assert (
        text.count("main.py fit -c a.yaml '--model.init_args.api_key=*** (sha256 03ac6742)'") == 2
    )
    assert f"{tmp_path}/error.txt shows where" in capsys.readouterr().err


def test_what_fails_when_it_is_built_is_told_with_its_arguments(tmp_path: Path) -> None:
    schedule = {
        "class_path": "torch.optim.lr_scheduler.CyclicLR",
        "init_args": {"base_lr": 0.1, "max_lr": 0.2, "step_size_up": 0},
    }
    experiment(tmp_path, model__init_args__lr_scheduler=schedule)
    status, output = launch.run(COMMAND, tmp_path)
    assert_one_line(status, output, "lr_scheduler cannot be made: float division by zero")
    assert "run/error.txt shows where" in output
    assert "ZeroDivisionError" in (tmp_path / "run/error.txt").read_text()


def test_fast_dev_run_leaves_no_trace(tmp_path: Path) -> None:
    experiment(tmp_path)
    (tmp_path / "temporary").mkdir()
    environment = launch.QUIET | {"TMPDIR": str(tmp_path / "temporary")}
    status, output = launch.run([*COMMAND, "--trainer.fast_dev_run=true"], tmp_path, environment)
    assert status == 0, output
    assert not (tmp_path / "run").exists()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_time_limit_is_not_the_end(tmp_path: Path) -> None:
    experiment(tmp_path, trainer__max_epochs=1000)
    steps = [0]
    for _ in range(2):
        status, output = launch.run([*COMMAND, "--trainer.max_time=00:00:00:02"], tmp_path)
        assert status == 0, output
        assert "repeat the command to go on" in output
        assert not (tmp_path / "run/finished.yaml").exists()
        checkpoint = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
        steps.append(checkpoint["global_step"])
    assert steps[0] < steps[1] < steps[2]


def test_evaluating_a_bad_checkpoint_leaves_the_run_alone(tmp_path: Path) -> None:
    experiment(tmp_path)
    assert launch.run(COMMAND, tmp_path)[0] == 0
    last = tmp_path / "run/last.ckpt"
    good = last.read_bytes()
    checkpoint = torch.load(last, weights_only=True)
    checkpoint["state_dict"]["net.fc.bias"].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / "bad.ckpt")
    for command in ("validate", "test"):
        status, output = launch.run([command, *COMMAND[1:], "--ckpt_path", "bad.ckpt"], tmp_path)
        assert_one_line(status, output, "the loss is nan")
    assert last.read_bytes() == good


def start_training(folder: Path) -> multiprocessing.Process:
    """Starts a run that does not end by itself, and returns when it has saved."""
    experiment(folder, trainer__max_epochs=1000)
    process = launch.start(COMMAND, folder)
    while not (folder / "run/last.ckpt").exists():
        assert process.is_alive(), (folder / "output.txt").read_text()
        time.sleep(0.01)
    return process


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    first = start_training(tmp_path)
    status, output = launch.run(COMMAND, tmp_path)
    first.kill()
    first.join()
    assert status == 2
    assert "another process trains in run" in output


def test_requeued_job_waits_for_what_is_left_of_it(tmp_path: Path) -> None:
    """Of a node that SLURM took for dead."""
    first = start_training(tmp_path)
    requeued = launch.start(COMMAND, tmp_path, {**launch.QUIET, "SLURM_RESTART_COUNT": "1"})
    output = tmp_path / "output.txt"
    while "waits for another process that trains in run" not in output.read_text():
        assert requeued.is_alive()
        time.sleep(0.01)
    assert "Restoring states" not in output.read_text()
    first.kill()
    while "Restoring states" not in output.read_text():
        assert requeued.is_alive()
        time.sleep(0.01)
    requeued.kill()
    for process in (first, requeued):
        process.join()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_is_no_success(number: int, status: int, tmp_path: Path) -> None:
    process = start_training(tmp_path)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == status
    if number == signal.SIGINT:
        assert "the same command goes on" in (tmp_path / "output.txt").read_text()
    assert not (tmp_path / "run/finished.yaml").exists()
    assert not (tmp_path / "run/operating_points.csv").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "{", "config.yaml is no YAML"),
        ("config.yaml", "", "config.yaml holds no keys"),
        ("finished.yaml", "- 1", "finished.yaml holds no keys"),
    ],
)
def test_damaged_file_in_the_run_folder(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    experiment(tmp_path)
    assert launch.run(COMMAND, tmp_path)[0] == 0
    (tmp_path / "run" / name).write_text(content)
    more = [] if name == "finished.yaml" else ["--trainer.max_epochs=2"]
    assert_one_line(*launch.run([*COMMAND, *more], tmp_path), message)


def test_damaged_checkpoint_is_told_in_a_line(tmp_path: Path) -> None:
    experiment(tmp_path)
    assert launch.run(COMMAND, tmp_path)[0] == 0
    for name in ("last.ckpt", "previous.ckpt"):
        (tmp_path / "run" / name).write_text("PK")
    more = [*COMMAND, "--trainer.max_epochs=2"]
    assert_one_line(*launch.run(more, tmp_path), "last.ckpt is not a checkpoint")


class Harmful:
    """Unpickled, it would make a file."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def test_foreign_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    experiment(tmp_path)
    assert launch.run(COMMAND, tmp_path)[0] == 0
    last = tmp_path / "run/last.ckpt"
    content = torch.load(last, weights_only=True)
    torch.save({**content, "extra": Harmful()}, last)
    for command in (
        [*COMMAND, "--trainer.max_epochs=2"],
        ["test", *COMMAND[1:], "--ckpt_path", "last"],
    ):
        assert_one_line(*launch.run(command, tmp_path), "last.ckpt is not a checkpoint of tensors")
    assert not (tmp_path / "executed").exists()
    assert (tmp_path / "run/best.ckpt").exists()


@pytest.mark.slow
def test_import_stays_lean() -> None:
    """Nobody waits for what he does not use: `--help` loads nothing heavy beside Lightning."""
    program = (
        "import sys, torch, pytorch_lightning\n"
        "before = set(sys.modules)\n"
        "import main\n"
        "from running import cli\n"
        "try: cli.ExperimentCLI(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=launch.ROOT, capture_output=True, text=True, check=True
    ).stdout
    loaded = set(ast.literal_eval(output.splitlines()[-1]))
    assert "callbacks" in loaded
    assert not loaded & {"wandb", "sklearn", "scipy", "datamodules", "timm", "pandas", "matplotlib"}

"""A run that is killed anywhere and started again by the same command ends as if nothing had happened."""

import csv
import random
import shutil
from pathlib import Path

import launch
import methods
import pytest
import torch
import yaml

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run"]


def write(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    return folder


def metrics(folder: Path) -> list[dict[str, str]]:
    """Returns what was logged, without the columns that measure time."""
    with (folder / "run/metrics.csv").open(newline="") as file:
        rows = [
            {key: value for key, value in row.items() if not key.startswith("time/")}
            for row in csv.DictReader(file)
        ]
    return rows


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
    for name in ("last.ckpt", "best.ckpt"):
        a, b = (torch.load(folder / "run" / name, weights_only=True) for folder in (one, other))
        for checkpoint in (a, b):
            checkpoint["callbacks"].pop("ThroughputMonitor", None)
            del checkpoint["loops"]  # counters of the attempts; what they decide is compared below
        assert_same(a, b, name)
    assert metrics(one) == metrics(other)
    assert (one / "run/survival.csv").exists() == (other / "run/survival.csv").exists()


@pytest.mark.parametrize("method", methods.METHODS)
def test_killed_after_every_checkpoint(method: str, tmp_path: Path) -> None:
    config = methods.config(method)
    if method.startswith("stochastic_depth"):
        config["trainer"]["callbacks"] = [
            {"class_path": "callbacks.SurvivalProbabilityLogger"},
            {"class_path": "callbacks.GradientMagnitudeLogger"},
            {"class_path": "callbacks.ThroughputMonitor"},
        ]
    whole = write(tmp_path / "whole", config)
    assert launch.run(COMMAND, whole)[0] == 0, (whole / "output.txt").read_text()

    broken = write(tmp_path / "broken", config)
    last = broken / "run/last.ckpt"
    seen = None

    def new_checkpoint() -> bool:
        return last.exists() and last.stat().st_mtime_ns != seen

    num_kills = 0
    while launch.kill_when(new_checkpoint, COMMAND, broken):
        seen = last.stat().st_mtime_ns
        num_kills += 1
        assert num_kills < 40, "makes no progress"
    assert num_kills >= 5
    assert_same_run(whole, broken)

"""How a network runs is the machine's matter: it changes nothing that is computed."""

import copy
from pathlib import Path

import launch
import methods
import pytest
import torch
from test_resume import COMMAND, assert_same, kill_after_every_save, rows, write


@pytest.mark.slow
@pytest.mark.parametrize("method", methods.METHODS)
def test_recorded_and_killed_is_eager_and_whole(method: str, tmp_path: Path) -> None:
    """On a CPU, where a recording is a call: the weights of every checkpoint to the bit."""
    config = methods.config(method)
    config["trainer"] |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    if method == "slimmable_exits":  # whose blocks, where they close, are not recorded
        config["model"]["init_args"]["final_survival_prob"] = 1.0
    recorded = copy.deepcopy(config) | {"machine": {"capture": "graphs"}}
    whole, broken = write(tmp_path / "whole", config), write(tmp_path / "broken", recorded)
    status, output = launch.run(COMMAND, whole)
    assert status == 0, output
    assert kill_after_every_save(broken) >= 4
    output = (broken / "output.txt").read_text()
    assert "is recorded for batches of 64" in output
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (torch.load(folder / "run" / name) for folder in (whole, broken))
        for part in ("state_dict", "optimizer_states", "train_metrics"):
            assert_same(one[part], other[part], f"{name}/{part}")
    assert rows(whole / "run/metrics.csv") == rows(broken / "run/metrics.csv")


def test_capture_without_a_gpu_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", methods.config("resnet"))
    status, output = launch.run([*COMMAND, "--machine.capture=graphs"], folder)
    assert status == 0
    assert "machine.capture is graphs, and there is no GPU to record for" in output


def test_unknown_capture_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", methods.config("resnet"))
    status, output = launch.run([*COMMAND, "--machine.capture=always"], folder)
    assert status == 2
    assert "machine.capture" in output
    assert "'none', 'graphs', 'compiled'" in output


@pytest.mark.slow
def test_random_rows_are_told_to_be_eager(tmp_path: Path) -> None:
    config = methods.config("stochastic_depth_row")
    config["model"]["init_args"]["row_counts"] = "random"
    folder = write(tmp_path / "run", config)
    status, output = launch.run([*COMMAND, "--machine.capture=graphs"], folder)
    assert status == 0, output
    assert "the network runs eagerly; set row_counts to fixed" in output
    assert "is recorded" not in output

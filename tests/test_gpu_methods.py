"""Every method, trained on CUDA: recorded as eagerly, killed as undisturbed, and with NCCL."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import launch
import methods
import pytest
import torch
import yaml
from pytorch_lightning import Callback, LightningModule, Trainer, seed_everything
from quiet import quiet_trainer
from test_resume import assert_same_run
from torch import Tensor

from datamodules import DigitsDataModule

pytestmark = pytest.mark.gpu
GPU = launch.ROOT / "experiments/machines/gpu.yaml"
COMMAND = [sys.executable, str(launch.ROOT / "main.py"), "fit", "-c", "experiment.yaml"]
ON_GPU = [*COMMAND, "-c", str(GPU), "--run_dir", "run"]


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    """A Trainer's deterministic kernels stay switched on."""
    yield
    torch.use_deterministic_algorithms(False)


class Watch(Callback):
    """Remembers the losses, on the device."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"].detach())


def tensors(module: LightningModule) -> dict[str, Tensor]:
    state = module.net.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def train(method: str, capture: str, folder: Path, arguments: Mapping[str, Any]) -> tuple:
    """Takes five optimizer steps; returns losses, the state before and after, and the module."""
    seed_everything(7, verbose=False)
    module = methods.build(methods.METHODS[method])
    module.capture = capture
    before = {name: value.clone() for name, value in tensors(module).items()}
    watch = Watch()
    trainer = quiet_trainer(
        folder,
        **{
            "accelerator": "gpu",
            "max_steps": 5,
            "max_epochs": -1,
            "limit_val_batches": 0,
            "deterministic": True,
            "callbacks": [watch],
            **arguments,
        },
    )
    trainer.fit(module, datamodule=DigitsDataModule(batch_size=32, seed=7))
    after = {name: value.cpu() for name, value in tensors(module).items()}
    return torch.stack(watch.losses).cpu(), before, after, module


VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped": {"gradient_clip_val": 0.1},
    "bfloat16": {"precision": "bf16-mixed"},
    "float16, scaled": {"precision": "16-mixed"},
}
CASES = [
    *((method, "float32") for method in methods.TRAINED),
    *itertools.product(("resnet", "stochastic_depth", "stochastic_depth_row"), list(VARIANTS)[1:]),
]


@pytest.mark.parametrize(("method", "variant"), CASES)
def test_recorded_steps_are_the_eager_ones(method: str, variant: str, tmp_path: Path) -> None:
    """Losses, weights and BN statistics after five steps: a share of what training changed."""
    arguments = VARIANTS[variant]
    losses, before, eager, _ = train(method, "none", tmp_path, arguments)
    recorded_losses, _, recorded, module = train(method, "graphs", tmp_path, arguments)
    # Of slimmable networks one for each width that all steps run; none if their blocks close.
    num_widths = 0 if method == "slimmable_exits" else 2
    assert len(module._recorded) == (num_widths if "slimmable" in method else 1)
    for network in module._recorded.values():
        assert network.chain is not None, network.said
        assert network.num_recordings == 1
    half = "16" in arguments.get("precision", "")
    torch.testing.assert_close(
        recorded_losses, losses, rtol=0.02 if half else 1e-4, atol=0.01 if half else 1e-5
    )
    for name, value in before.items():
        if not value.is_floating_point():
            assert torch.equal(recorded[name], eager[name]), name  # batches that BN has counted
            continue
        difference = (recorded[name] - eager[name]).norm()
        change = (eager[name] - value).norm()
        assert difference <= (0.05 if half else 1e-3) * change + 1e-6, name


def write(folder: Path, method: str) -> Path:
    """Writes an experiment into a folder; its machine is to be that of the command line."""
    folder.mkdir()
    config = methods.config(method)
    trainer = config["trainer"]
    del trainer["accelerator"], trainer["devices"]
    # It measures time, which is never the same.
    trainer["callbacks"] = [
        each for each in trainer["callbacks"] if "Throughput" not in each["class_path"]
    ]
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    return folder


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    """Starts a run in an interpreter of its own: a fork cannot use a device."""
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [*ON_GPU, *arguments],
            cwd=folder,
            env=os.environ | {"WANDB_MODE": "disabled"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def kill_within(process: subprocess.Popen, folder: Path, num_saves: int) -> bool:
    """Kills a run (SIGKILL) when it has saved so often; False if it ended before."""
    last, seen = folder / "run/last.ckpt", set()
    while process.poll() is None:
        if last.exists():
            seen.add(last.stat().st_mtime_ns)
        if len(seen) >= num_saves:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.001)
    return False


def finish(process: subprocess.Popen, folder: Path) -> None:
    assert process.wait(launch.PATIENCE) == 0, (folder / "output.txt").read_text()
    assert (folder / "run/finished.yaml").exists()


def test_killed_run_ends_with_the_bits_of_one_left_alone(tmp_path: Path) -> None:
    """With `machines/gpu.yaml` as it is, through the command line, without and with NCCL."""
    names = ("stochastic_depth", "universally_slimmable")
    wholes = {name: write(tmp_path / f"{name}_whole", name) for name in names}
    brokens = {name: write(tmp_path / f"{name}_broken", name) for name in names}
    alone = write(tmp_path / "nccl", "stochastic_depth")
    running = {folder: start(folder) for folder in [*wholes.values(), *brokens.values()]}
    running[alone] = start(alone, "--trainer.strategy=ddp_find_unused_parameters_true")
    try:
        for name in names:
            folder = brokens[name]
            assert kill_within(running[folder], folder, 2), (folder / "output.txt").read_text()
            running[folder] = start(folder)
        for folder, process in running.items():
            finish(process, folder)
    finally:
        for process in running.values():
            process.kill()
    for name in names:
        assert_same_run(wholes[name], brokens[name])
    first, second = (
        torch.load(folder / "run/last.ckpt", weights_only=True)["state_dict"]
        for folder in (wholes["stochastic_depth"], alone)
    )
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-4)

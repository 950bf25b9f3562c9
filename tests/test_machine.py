"""How a network runs is the machine's matter: it changes nothing that is computed."""

import copy
import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import launch
import methods
import pytest
import torch
from test_resume import COMMAND, assert_same, kill_after_every_save, rows, write

from running.machine import Machine
from running.memory import keep_freed_memory

ROOT = Path(__file__).parent.parent


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


def faults_of_steps() -> int:
    """Allocates and frees, as a step does, and returns how often the system gave a page."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        blocks = [torch.ones(16_000_000 // (1 + number)) for number in range(3)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_memory_of_a_step_is_kept_for_the_next() -> None:
    """In a process of its own, whose memory is not yet kept."""
    code = (
        "from test_machine import faults_of_steps; from running.memory import keep_freed_memory\n"
        "given_back = faults_of_steps()\n"
        "assert keep_freed_memory()\n"
        "faults_of_steps()\n"
        "print(given_back, faults_of_steps())"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 100
    assert kept < 20


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_user_are_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not keep_freed_memory()


@pytest.mark.parametrize("keep", [True, False])
def test_a_machine_keeps_memory_of_a_cpu(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("running.machine.keep_freed_memory", lambda: calls.append(1))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for device in ("cpu", "cuda"):
        trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)))
        Machine(keep_memory=keep).apply(trainer, SimpleNamespace(), SimpleNamespace())
    assert len(calls) == keep

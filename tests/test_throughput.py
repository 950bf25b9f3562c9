"""Model FLOP/s utilisation: from the network's MACs, the pace, and a table of devices."""

from types import SimpleNamespace

import pytest
import torch

import callbacks.throughput
from callbacks import ThroughputMonitor, peak_flops
from callbacks.throughput import PEAKS, training_flops
from networks import CifarResNet, SlimmableCifarResNet, count_macs


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", 989e12),
        ("NVIDIA H100 80GB HBM3", "32-true", 494.5e12),
        ("NVIDIA H100 PCIe", "16-mixed", 756e12),
        ("NVIDIA H200", "bf16-true", 989e12),
        ("NVIDIA A100-SXM4-80GB", "16-true", 312e12),
        ("Tesla V100-SXM2-16GB", "16-mixed", 125e12),
        ("NVIDIA GeForce RTX 4090", "32-true", 82.6e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "32-true", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "32-true", None),
        ("NVIDIA A1000", "32-true", None),
        ("AMD Instinct MI300X", "bf16-mixed", None),
        ("NVIDIA H100 80GB HBM3", "64-true", None),
        ("NVIDIA H100 80GB HBM3", "transformer-engine", None),
    ],
)
def test_peak_of_a_device(name: str, precision: str, expected: float | None) -> None:
    assert peak_flops(name, precision) == expected


def test_half_precision_is_at_least_twice_as_fast_everywhere() -> None:
    assert all(1.9 * full < half for half, full in PEAKS.values())


def test_training_costs_three_forward_passes() -> None:
    """And leaves the network, whose BN it runs, as it was."""
    net = CifarResNet(8).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    one = count_macs(CifarResNet(8).eval(), torch.zeros(1, 3, 32, 32))
    assert training_flops(net, (3, 32, 32)) == 6 * one
    assert net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_width_without_statistics_is_counted_too() -> None:
    net = SlimmableCifarResNet(8, width_mult_range=(0.25, 1.0)).eval()
    assert training_flops(net, (3, 32, 32)) > 0


def run_epoch(monitor: ThroughputMonitor, module: SimpleNamespace, data: object) -> dict:
    """An epoch of two steps of 8 images on 2 ranks; returns what was logged."""
    logged: list[dict] = []
    trainer = SimpleNamespace(
        loggers=[SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics))],
        world_size=2,
        current_epoch=0,
        global_step=2,
        precision="bf16-mixed",
        datamodule=data,
    )
    batch = (torch.zeros(8, 1),)
    monitor.on_train_start(trainer, module)
    for number in range(2):
        monitor.on_train_batch_start(trainer, module, batch, number)
        monitor.on_train_batch_end(trainer, module, None, batch, number)
    monitor.on_train_epoch_end(trainer, module)
    return logged[0]


def on_a_device(monkeypatch: pytest.MonkeyPatch, name: str) -> tuple[SimpleNamespace, list[str]]:
    """Makes this process believe in a GPU; returns a module on it, and when it was waited for."""
    waits: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(callbacks.throughput, "wait_for", lambda device: waits.append(str(device)))
    clock = iter(range(100))
    monkeypatch.setattr(callbacks.throughput.time, "perf_counter", lambda: float(next(clock)))
    return SimpleNamespace(net=CifarResNet(8), device=torch.device("cuda", 0)), waits


def test_utilisation_is_of_all_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    module, waits = on_a_device(monkeypatch, "NVIDIA H100 80GB HBM3")
    logged = run_epoch(ThroughputMonitor(), module, SimpleNamespace(image_shape=(3, 32, 32)))
    # The clock is read at the start, after each step and when the device is done: 3 seconds.
    assert logged["time/epoch_seconds"] == 3
    assert logged["time/images_per_second"] == 2 * 8 * 2 / 3
    flops = training_flops(module.net, (3, 32, 32)) * 2 * 8 * 2 / 3
    assert logged["train/mfu"] == pytest.approx(flops / (2 * 989e12))
    assert waits == ["cuda:0"]  # once, when it logs


@pytest.mark.parametrize(
    ("name", "shape"), [("NVIDIA T1000", (3, 32, 32)), ("NVIDIA H100 80GB HBM3", None)]
)
def test_unknown_peak_or_images_are_no_number(
    name: str, shape: tuple | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _ = on_a_device(monkeypatch, name)
    data = None if shape is None else SimpleNamespace(image_shape=shape)
    logged = run_epoch(ThroughputMonitor(), module, data)
    assert "train/mfu" not in logged
    assert logged["time/images_per_second"] > 0


def test_on_a_cpu_nothing_is_logged_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module, waits = on_a_device(monkeypatch, "NVIDIA H100 80GB HBM3")
    module.device = torch.device("cpu")
    logged = run_epoch(ThroughputMonitor(), module, SimpleNamespace(image_shape=(3, 32, 32)))
    assert logged["time/epoch_seconds"] == 2
    assert "train/mfu" not in logged
    assert waits == []


def test_validation_is_waited_for_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    module, waits = on_a_device(monkeypatch, "NVIDIA H100 80GB HBM3")
    monitor = ThroughputMonitor()
    monitor.device = module.device
    monitor.on_validation_start(None, module)  # before the first step, as a sanity check
    assert waits == []
    monitor.on_train_batch_start(None, module, None, 0)
    monitor.on_validation_start(None, module)
    assert waits == ["cuda:0"]
    assert monitor.seconds == 1
    assert monitor.since is None

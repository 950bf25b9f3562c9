"""The code of the benchmarks of a GPU, run small on a CPU; what times they would show is theirs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import networks
from benchmarks import gpu, gpu_families, sandwich_step
from benchmarks.gpu_report import Report, Setting
from benchmarks.timing import Times, shuffled_rounds, time_contenders
from networks import CapturedNetwork, SlimmableMobileNetV2

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", gpu.ROWS)
def test_every_row_runs_on_a_cpu(name: str, capsys: pytest.CaptureFixture) -> None:
    report = gpu.run([name], 1e9, Setting(CPU, small=True))
    assert report.lines
    output = capsys.readouterr().out
    for line in report.lines:
        assert line.value is not None, line
        assert output.count(f"\n{line.promise}  ") == 2  # at once, and in the table
    assert "failed:" not in output


@pytest.mark.parametrize("name", gpu_families.SMALL)
def test_step_of_every_family_is_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = watch_captures(monkeypatch)
    setting = Setting(CPU, small=True)
    network = gpu_families.SMALL[name].build()
    trainings = dict(
        gpu_families.trainings(network, setting.images(4, 32), setting.labels(4), setting)
    )
    for build in trainings.values():
        step = build()
        step()
        step()
    assert len(made) == 4
    assert all(each.chain is not None and each.num_recordings == 1 for each in made)


def test_recorded_widths_of_a_sandwich_have_the_bits_of_eager_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, networks_made = watch_captures(monkeypatch), []
    build = sandwich_step.SlimmableMobileNetV2

    def build_and_keep(**arguments: object) -> SlimmableMobileNetV2:
        torch.manual_seed(0)
        networks_made.append(build(**arguments))
        return networks_made[-1]

    monkeypatch.setattr(sandwich_step, "SlimmableMobileNetV2", build_and_keep)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 5])
    for recorded in [(), (1.0, 0.35)]:
        step = sandwich_step.sandwich(images, labels, torch.channels_last, recorded)
        step(0)
        step(1)
    assert [each.num_recordings for each in made] == [1, 1]
    eager, replayed = (network.state_dict() for network in networks_made)
    for key, value in eager.items():
        assert not isinstance(value, Tensor) or torch.equal(value, replayed[key]), key


def watch_captures(monkeypatch: pytest.MonkeyPatch) -> list[CapturedNetwork]:
    """Returns a list that gets what the benchmarks record."""
    made = []

    class Watched(CapturedNetwork):
        def __init__(self, *args: object, **arguments: object):
            super().__init__(*args, **arguments)
            made.append(self)

    monkeypatch.setattr(networks, "CapturedNetwork", Watched)
    monkeypatch.setattr(sandwich_step, "CapturedNetwork", Watched)
    return made


def test_deterministic_kernels_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a training: `Machine.apply` asks for none; and all is put back."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with gpu_families.deterministic():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.backends.cudnn.benchmark
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cudnn.benchmark


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == "benchmarks.gpu needs a CUDA device, and torch finds none\n"


def test_unknown_row_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--rows", "speed"])
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_no_row_begins_when_time_is_over(capsys: pytest.CaptureFixture) -> None:
    report = gpu.run(["depth", "dense"], -1, Setting(CPU, small=True))
    assert [line.promise for line in report.lines] == ["row depth", "row dense"]
    assert "not measured: -1 seconds are over" in capsys.readouterr().out


def test_row_that_raises_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(report: Report, setting: Setting) -> None:
        raise RuntimeError("no such kernel")

    def good(report: Report, setting: Setting) -> None:
        report.add("a promise", 0.5, at_most=1.0)

    monkeypatch.setattr(gpu, "ROWS", {"broken": broken, "good": good})
    report = gpu.run(["broken", "good"], 1e9, Setting(CPU, small=True))
    assert [line.verdict for line in report.lines] == [
        "not measured: RuntimeError: no such kernel",
        "holds",
    ]
    del capsys


def test_interrupted_benchmark_still_prints_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def good(report: Report, setting: Setting) -> None:
        report.add("a promise", 0.5, at_most=1.0)

    def interrupted(report: Report, setting: Setting) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "ROWS", {"good": good, "interrupted": interrupted})
    with pytest.raises(KeyboardInterrupt):
        gpu.run(["good", "interrupted"], 1e9, Setting(CPU, small=True))
    assert capsys.readouterr().out.count("a promise") == 2


def test_contender_that_fails_is_left_out_and_the_others_go_on() -> None:
    calls = {"good": 0, "late": 0}

    def good() -> None:
        calls["good"] += 1

    def late() -> None:
        calls["late"] += 1
        if calls["late"] == 9:  # seven warm-up calls, and one sample
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")

    def impossible() -> None:
        raise ValueError("no\nway")

    times = time_contenders(
        {"good": lambda: good, "late": lambda: late, "never": impossible},
        CPU,
        num_rounds=5,
        sample_seconds=0.0,
    )
    assert times.seconds.keys() == {"good"}
    assert times.failures == {"late": "out of memory", "never": "ValueError: no way"}
    assert calls == {"good": 12, "late": 9}


def test_time_of_a_step_is_that_of_a_sample_over_its_steps() -> None:
    times = time_contenders(
        {"slow": lambda: lambda: time.sleep(0.004), "slower": lambda: lambda: time.sleep(0.04)},
        CPU,
        num_rounds=3,
        sample_seconds=0.02,
    )
    assert times.seconds["slow"] >= 0.004
    assert times.seconds["slower"] >= 0.04


def test_every_round_has_an_order_of_its_own() -> None:
    orders = list(shuffled_rounds(["a", "b", "c", "d"], 20))
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert len({tuple(order) for order in orders}) > 5
    assert {order[0] for order in orders} == {"a", "b", "c", "d"}


@pytest.mark.parametrize(
    ("goal", "verdict"),
    [
        ({"at_most": 0.5}, "holds"),
        ({"at_most": 0.49}, "MISSED"),
        ({"at_least": 0.5}, "holds"),
        ({"at_least": 0.51}, "MISSED"),
        ({}, "for comparison"),
    ],
)
def test_verdict(goal: dict, verdict: str) -> None:
    report = Report()
    report.ratio("half", Times({"ours": 1.0, "theirs": 2.0}, {}), "ours", "theirs", **goal)
    assert report.lines[0].value == 0.5
    assert report.lines[0].verdict == verdict


def test_promise_without_a_contender_says_why() -> None:
    report = Report()
    times = Times({"ours": 1.0}, {"theirs": "out of memory"})
    report.ratio("half", times, "ours", "theirs", at_most=1.0)
    assert report.lines[0].verdict == "not measured: theirs: out of memory"


@pytest.mark.slow
def test_ended_benchmark_prints_its_table() -> None:
    """SIGTERM, as `timeout` sends it."""
    code = (
        "import torch, sys; from benchmarks import gpu; import benchmarks.gpu_report as r\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.get_device_name = lambda device: 'a device'\n"
        "def wait(report, setting):\n"
        "    report.add('a promise', 1.0); import time; time.sleep(60)\n"
        "gpu.ROWS['depth'] = wait\n"
        "sys.exit(gpu.main(['--rows', 'depth']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    lines = iter(process.stdout)
    assert any("a promise" in line for line in lines)
    os.kill(process.pid, signal.SIGTERM)
    assert any("a promise" in line for line in lines)
    assert process.wait() == 128 + signal.SIGTERM

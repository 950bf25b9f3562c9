"""What the callbacks write: every number against one that is computed another way."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import launch
import methods
import pytest
import torch
import yaml
from torch import nn

from callbacks import GradientMagnitudeLogger, SampledTestImages, Table, ThroughputMonitor
from lightning_modules import LitStochasticDepth, WarmupMultiStepLR, survival_probabilities
from networks import CifarResNet
from running import AtomicCheckpointIO, CSVHistory, RunCheckpoint
from running.checkpoint_io import WHOLE

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_history_appends_widens_and_truncates(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    history = CSVHistory(path)
    history.log_metrics({"a": 0.1}, step=0)
    history.log_metrics({"a": 0.2}, step=1)
    assert history.num_rows == 2
    history.log_metrics({"b": 1.0}, step=1)
    history.log_metrics({"a": 0.3}, step=2)
    assert path.read_text().splitlines() == ["step,a,b", "0,0.1,", "1,0.2,", "1,,1.0", "2,0.3,"]
    with path.open("a") as file:
        file.write("3,0.")  # killed in the middle of a line
    resumed = CSVHistory(path)
    resumed.truncate(2)
    assert path.read_text().splitlines() == ["step,a", "0,0.1", "1,0.2"]


def test_logged_floats_are_exact(tmp_path: Path) -> None:
    history = CSVHistory(tmp_path / "metrics.csv")
    value = 1 / 3
    history.log_metrics({"a": value}, step=0)
    assert float(rows(history.path)[0]["a"]) == value


def test_survival_file_counts_the_gates(tmp_path: Path) -> None:
    config = methods.config("stochastic_depth")
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    assert launch.run(COMMAND, tmp_path)[0] == 0

    # The gates are a function of (seed, step): draw them again.
    method = LitStochasticDepth(CifarResNet(8), seed=config["seed_everything"])
    drawn = []
    for step in range(21):
        type(method).global_step = step
        drawn.append(method.draw_gates(1, 0))
    del type(method).global_step
    drawn = torch.stack(drawn)
    written = rows(tmp_path / "run/survival.csv")
    probs = survival_probabilities(3, 0.5, "linear")
    assert [float(row["survival_prob"]) for row in written] == probs
    rates = torch.tensor([float(row["survival_rate"]) for row in written])
    torch.testing.assert_close(rates, drawn.mean(0))

    logged = rows(tmp_path / "run/metrics.csv")
    active = [float(v) for row in logged if (v := row["stochastic_depth/active_blocks"])]
    expected = drawn.sum(1).reshape(3, 7).mean(1)
    torch.testing.assert_close(torch.tensor(active), expected)
    planned = {row["stochastic_depth/expected_active_blocks"] for row in logged} - {""}
    assert {float(value) for value in planned} == {sum(probs)}


def test_gradient_magnitude_is_the_mean_over_steps() -> None:
    net = nn.Sequential(nn.ReLU(), nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
    callback = GradientMagnitudeLogger()
    logged = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((metrics, step)))
    trainer = SimpleNamespace(loggers=[logger], current_epoch=4, global_step=7)
    module = SimpleNamespace(net=net)
    callback.on_fit_start(trainer, module)
    for value in (1.0, -3.0):
        net[1].weight.grad = torch.full_like(net[1].weight, value)
        callback.on_before_optimizer_step(trainer, module, None)
    callback.on_train_epoch_end(trainer, module)
    assert logged == [({"gradients/first_conv": 2.0, "epoch": 4}, 6)]


def test_gradient_magnitude_of_no_convolution_is_refused() -> None:
    """A StopIteration in a hook would end the training in silence."""
    module = SimpleNamespace(net=nn.Linear(1, 1))
    with pytest.raises(ValueError, match="nothing to log of Linear, which has no convolution"):
        GradientMagnitudeLogger().on_fit_start(None, module)


def test_throughput_counts_training_and_not_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 8 images on 2 ranks; the clock is read at the start and end of the steps."""
    clock = iter([10.0, 11.0, 13.0, 100.0, 104.0])
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: next(clock))
    logged = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append(metrics))
    trainer = SimpleNamespace(loggers=[logger], world_size=2, current_epoch=0, global_step=3)
    batch = (torch.zeros(8, 1),)
    monitor = ThroughputMonitor()
    for is_validated_after in (False, True):
        monitor.on_train_batch_start(trainer, None, batch, 0)
        monitor.on_train_batch_end(trainer, None, None, batch, 0)
        if is_validated_after:
            monitor.on_validation_start(trainer, None)
    resumed = ThroughputMonitor()
    resumed.load_state_dict(monitor.state_dict())
    resumed.on_train_batch_start(trainer, None, batch, 0)
    resumed.on_train_batch_end(trainer, None, None, batch, 0)
    resumed.on_train_epoch_end(trainer, None)
    assert logged[0]["time/epoch_seconds"] == 1 + 2 + 4
    assert logged[0]["time/images_per_second"] == pytest.approx(3 * 8 * 2 / 7)


def test_checkpoint_write_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    files = AtomicCheckpointIO()
    content = dict.fromkeys(WHOLE, 1)
    files.save_checkpoint(content, path)
    with pytest.raises(Exception, match="pickle"):
        files.save_checkpoint({"step": 2, "function": lambda: None}, path)
    assert files.load_checkpoint(path) == content
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_full_disk_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    files = AtomicCheckpointIO()
    content = dict.fromkeys(WHOLE, 1)
    files.save_checkpoint(content, path)

    def full(*args: object) -> None:
        raise RuntimeError("unexpected pos")  # what torch makes of a full disk

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="the one before it is kept"):
        files.save_checkpoint(content, path)
    assert files.load_checkpoint(path) == content


@pytest.mark.parametrize(("mode", "better", "worse"), [("min", 1.0, 2.0), ("max", 2.0, 1.0)])
def test_best_is_the_best(mode: str, better: float, worse: float) -> None:
    checkpoint = RunCheckpoint(select="best", monitor="score", mode=mode)
    seen = []
    for score in (math.nan, 1.5, worse, better, better):
        trainer = SimpleNamespace(callback_metrics={"score": torch.tensor(score)})
        seen.append(checkpoint.improved(trainer))
    assert seen == [True, True, False, True, False]


def test_best_by_the_metric() -> None:
    """The least loss, the highest accuracy; another metric is not guessed at."""
    for monitor, mode in (
        ("val/loss", "min"),
        ("train/loss_epoch", "min"),
        ("val/acc", "max"),
        ("val/acc_w0.25", "max"),
    ):
        assert RunCheckpoint(monitor=monitor).mode == mode
    assert RunCheckpoint(monitor="val/loss", mode="max").mode == "max"
    for monitor in ("val/macs_adaptive", "score"):
        with pytest.raises(ValueError, match=r"no loss and no accuracy: set checkpoint.mode"):
            RunCheckpoint(monitor=monitor)


@pytest.mark.parametrize(("own", "other"), [(0, 5), (5, 0), (5, 5)])
def test_every_process_must_see_the_checkpoint(own: int, other: int, tmp_path: Path) -> None:
    """One on a node without it would start anew, beside one that goes on."""
    strategy = SimpleNamespace(
        root_device="cpu", reduce=lambda number, reduce_op: number.clamp(min=theirs.pop())
    )
    theirs = [-other, other]  # what the other process passes, the latest first
    trainer = SimpleNamespace(
        world_size=2, global_step=own, default_root_dir=tmp_path, strategy=strategy, loggers=[]
    )
    if own == other:
        RunCheckpoint().on_train_start(trainer, None)
    else:
        with pytest.raises(ValueError, match=r"not all processes of this run see .*--run_dir"):
            RunCheckpoint().on_train_start(trainer, None)


class Harmful:
    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_foreign_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"state": Harmful()}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of tensors and plain data"):
        AtomicCheckpointIO().load_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


def test_measured_images_are_of_all_classes() -> None:
    """A folder is sorted by class, and so are the batches of its test."""
    callback = SampledTestImages(num_images=64)
    batches = torch.arange(500).split(40)  # 50 of each class
    trainer = SimpleNamespace(is_global_zero=True, num_test_batches=[len(batches)])
    for number, batch in enumerate(batches):
        callback.on_test_batch_start(trainer, None, (batch,), number)
    images = callback.take_images()
    assert len(set(images.tolist())) == 64
    for half in images.split(32):
        assert {image // 50 for image in half.tolist()} == set(range(10))


def test_warm_up_then_milestones() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = WarmupMultiStepLR(optimizer, milestones=[4, 6], warmup=2)
    rates = []
    for _ in range(8):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_table_takes_any_name_of_a_class(tmp_path: Path) -> None:
    """Also that of a folder whose bytes are no characters."""
    Table(("class", "acc"), [("\u00fc\u4e2d", 1.0), ("\udcff", 0.5)]).write(tmp_path / "a.csv")
    lines = (tmp_path / "a.csv").read_text(encoding="utf-8").splitlines()
    assert lines == ["class,acc", "\u00fc\u4e2d,1.0", "\\udcff,0.5"]

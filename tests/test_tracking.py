"""Weights & Biases: what a checkpoint holds is in W&B's files, and a run goes on without W&B."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launch
import methods
import pytest
import torch
import wandb_file
import yaml
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from wandb.proto.wandb_internal_pb2 import Record

import reports
from datamodules import DigitsDataModule
from running import tracking, wandb_logger
from running.tracking import Tracking, describe_wandb, open_wandb
from running.wandb_file import read_records
from running.wandb_logger import FaultTolerantWandbLogger

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run"]
OFFLINE = [*COMMAND, "--wandb.mode=offline"]


def experiment(folder: Path, **trainer: Any) -> launch.Environment:
    """Writes a small experiment and returns the environment of somebody who is not logged in."""
    config = methods.config("stochastic_depth")
    config["trainer"] |= {"max_epochs": 2, "log_every_n_steps": 1, **trainer}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    return {"WANDB_MODE": None, "WANDB_API_KEY": None, "HOME": str(folder)}


def attempts(folder: Path) -> list[Path]:
    """Returns what the printed `wandb sync` uploads, in the order of the attempts."""
    return sorted((folder / "run/wandb").glob("offline-run-*"))


def logged_to_wandb(folder: Path) -> set[tuple[int, str, float]]:
    rows = [row for attempt in attempts(folder) for row in wandb_file.history(attempt)]
    return {
        (row["trainer/global_step"], key, value)
        for row in rows
        for key, value in row.items()
        if isinstance(value, float | int)
    }


def logged_to_csv(folder: Path) -> set[tuple[int, str, float]]:
    with (folder / "run/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        (int(row["step"]), key, float(value))
        for row in rows
        for key, value in row.items()
        if key != "step" and value
    }


# --- a user's mistakes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("project", "mode", "message"),
    [
        ("team/project", None, "W&B allows no / in it (a team is given as wandb.entity)"),
        ("50%?", None, "W&B allows no ? % in it"),
        ("p" * 129, None, "wandb.project has 129 characters: W&B allows 128 at most"),
        ("project", "", "WANDB_MODE is '': unset it, or set it to online"),
        ("project", "of", "WANDB_MODE is 'of': unset it, or set it to online"),
    ],
)
def test_what_wandb_refuses_stops_before_anything_is_created(
    project: str, mode: str | None, message: str, tmp_path: Path
) -> None:
    environment = experiment(tmp_path) | {"WANDB_MODE": mode}
    command = [*COMMAND, f"--wandb.project={project}"]
    status, output = launch.run(command, tmp_path, environment)
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert status == 2
    assert message in line
    assert not (tmp_path / "run").exists()


# --- kills ----------------------------------------------------------------------------------------


class WriteSeldom(Callback):
    """Makes W&B write so seldom that its file does not hold by chance what was logged last."""

    def __init__(self) -> None:
        if "KILLED_AFTER_SAVE" in os.environ:
            tracking.FLUSH_INTERVAL = 4.0


def test_checkpoint_is_in_wandb_too(tmp_path: Path) -> None:
    """After a kill right behind a save; and all of the CSV history is there in the end."""
    environment = experiment(tmp_path, callbacks=[{"class_path": "test_tracking.WriteSeldom"}])
    assert launch.kill_after_save(OFFLINE, tmp_path, environment)
    saved = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert saved["run"]["num_history_rows"] > saved["global_step"] > 0
    assert logged_to_csv(tmp_path) <= logged_to_wandb(tmp_path)
    status, output = launch.run(OFFLINE, tmp_path, environment)
    assert status == 0, output
    assert len(attempts(tmp_path)) == 2
    assert logged_to_csv(tmp_path) <= logged_to_wandb(tmp_path)


def test_offline_wandb_keeps_one_id_over_attempts(tmp_path: Path) -> None:
    # An id in the environment that is not of a sweep.
    environment = experiment(tmp_path) | {"WANDB_RUN_ID": "stray"}
    command = [*OFFLINE, "--wandb.project=p", "--wandb.tags=[a]"]

    def wandb_has_started() -> bool:
        return any((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))

    assert launch.kill_when(wandb_has_started, command, tmp_path, environment)
    assert launch.kill_after_save(command, tmp_path, environment)
    status, output = launch.run(command, tmp_path, environment)
    assert status == 0, output
    assert "wandb sync run/wandb/offline-run-*" in output
    identity = (tmp_path / "run/wandb_id").read_text()
    assert identity != "stray"
    for attempt in attempts(tmp_path):
        runs = [record.run for record in wandb_file.records(attempt) if record.HasField("run")]
        assert {run.run_id for run in runs} == {identity}
    # One cannot tell whether the first kill came before W&B wrote anything.
    unreadable = list((tmp_path / "run/wandb").glob("unreadable-run-*"))
    assert len(attempts(tmp_path)) + len(unreadable) == 3
    assert len(unreadable) <= 1


# --- what W&B shows -------------------------------------------------------------------------------


def figure(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(file, "png")
    return file.getvalue()


class Reports(Callback):
    """Draws in the place of the room of that name, or cannot."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        reports.run_figures = self.cannot_draw if "NO_FIGURES" in os.environ else self.draw

    def draw(self, folder: Path) -> dict[str, bytes]:
        assert (folder / "finished.yaml").exists()
        return {"accuracy": figure("red"), "learning": figure("blue")}

    def cannot_draw(self, folder: Path) -> dict[str, bytes]:
        raise ValueError("no\nfonts")


def summary(attempt: Path) -> dict[str, Any]:
    """Returns what the run's summary holds after an attempt."""
    return {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in wandb_file.records(attempt)
        if record.HasField("summary")
        for item in record.summary.update
    }


@pytest.mark.slow
def test_wandb_shows_the_whole_run(tmp_path: Path) -> None:
    """Killed and resumed: one run, with panels, numbers of every point, and its checkpoint."""
    environment = experiment(tmp_path, callbacks=None)
    config = yaml.safe_load((tmp_path / "experiment.yaml").read_text())
    model = methods.config("slimmable")["model"]
    names = ["GradientMagnitudeLogger", "ThroughputMonitor"]
    config["model"] = model
    config["trainer"]["callbacks"] = [{"class_path": f"callbacks.{name}"} for name in names]
    config["trainer"]["callbacks"].append({"class_path": "test_tracking.Reports"})
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    command = [*OFFLINE, "--wandb.log_checkpoints=true"]
    assert launch.kill_after_save(command, tmp_path, environment)
    status, output = launch.run(command, tmp_path, environment)
    assert status == 0, output
    assert "W&B in this terminal: wandb leet run/wandb" in output

    identity = (tmp_path / "run/wandb_id").read_text()
    for attempt in attempts(tmp_path):
        runs = {r.run.run_id for r in wandb_file.records(attempt) if r.HasField("run")}
        assert runs == {identity}
        # `wandb sync` counts on from the last step of the file before.
        steps = [r.history.step.num for r in wandb_file.records(attempt) if r.HasField("history")]
        assert steps == list(range(len(steps)))
    last = attempts(tmp_path)[-1]
    with (tmp_path / "run/operating_points.csv").open(newline="") as file:
        points = {row.pop("name"): row for row in csv.DictReader(file)}
    assert points.keys() == {"w0.25", "full"}
    found = summary(last)
    for name, row in points.items():
        for key, value in row.items():
            assert found[f"point/{name}/{key}"] == pytest.approx(float(value))
    panels = {key: value for row in wandb_file.history(last) for key, value in row.items()}
    for key in ("operating_points", "acc_against_macs_table"):
        assert (last / "files" / panels[f"{key}.path"]).exists()
    for name, color in (("accuracy", (255, 0, 0)), ("learning", (0, 0, 255))):
        with Image.open(last / "files" / panels[f"report/{name}.path"]) as image:
            assert image.getpixel((0, 0)) == color
    artifacts = [r.artifact for r in wandb_file.records(last) if r.HasField("artifact")]
    (kept,) = (one for one in artifacts if one.type == "model")
    assert (kept.name, "best" in kept.aliases) == (f"checkpoint-{identity}", True)
    (content,) = kept.manifest.contents
    assert content.path == "best.ckpt"
    assert Path(content.local_path).read_bytes() == (tmp_path / "run/best.ckpt").read_bytes()


def test_finished_run_that_cannot_be_drawn_is_finished(tmp_path: Path) -> None:
    """And what survived is told once, at the end; its numbers every epoch."""
    environment = experiment(tmp_path) | {"NO_FIGURES": "yes"}
    config = yaml.safe_load((tmp_path / "experiment.yaml").read_text())
    config["trainer"]["callbacks"].append({"class_path": "test_tracking.Reports"})
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    status, output = launch.run(OFFLINE, tmp_path, environment)
    assert status == 0, output
    line = "W&B gets no figures of run, as drawing them failed (no fonts): the run is whole"
    assert line in output
    assert "run folder: run" in output
    assert (tmp_path / "run/finished.yaml").exists()
    (attempt,) = attempts(tmp_path)
    rows = wandb_file.history(attempt)
    assert sum("stochastic_depth/active_blocks" in row for row in rows) == 2
    plots = [row for row in rows if "stochastic_depth/survival_table.path" in row]
    assert len(plots) == 1
    artifacts = [r.artifact for r in wandb_file.records(attempt) if r.HasField("artifact")]
    assert "model" not in {artifact.type for artifact in artifacts}


# --- without a command line -----------------------------------------------------------------------


@pytest.fixture
def logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultTolerantWandbLogger]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    (tmp_path / "run").mkdir()
    (logger,) = open_wandb(Tracking(mode="offline"), tmp_path / "run", "test", seed=0, config={})
    yield logger
    wandb_logger._teardown()


def test_a_second_command_of_a_process_has_a_run_of_its_own(logger, tmp_path: Path) -> None:
    """W&B itself would go on with the first."""
    (tmp_path / "other").mkdir()
    (other,) = open_wandb(Tracking(mode="offline"), tmp_path / "other", "test", seed=1, config={})
    assert Path(other.experiment.settings.sync_dir).is_relative_to(tmp_path / "other")
    assert other.experiment.id == (tmp_path / "other" / "wandb_id").read_text()


@pytest.mark.parametrize("at_end", [False, True])
def test_flush_returns_when_the_file_holds_all(
    at_end: bool, logger: FaultTolerantWandbLogger, tmp_path: Path
) -> None:
    """The end of training, or of the test, waits for the file like a checkpoint."""
    (attempt,) = attempts(tmp_path)
    logger.flush()  # there is nothing to wait for yet
    for step in range(3):
        # More than a block of the file, and a half.
        logger.log_metrics({f"a{i}": 0.1 * i for i in range(1000)}, step)
        logger.finalize("success") if at_end else logger.flush()
        steps = [row["trainer/global_step"] for row in wandb_file.history(attempt)]
        assert steps == list(range(step + 1))


def test_flush_gives_up_once(logger: FaultTolerantWandbLogger, monkeypatch: Any) -> None:
    """For example with a W&B that writes when it likes."""
    monkeypatch.setattr(wandb_logger, "FLUSH_PATIENCE", 0.1)
    monkeypatch.setattr(wandb_logger, "read_records", lambda path, start: [])
    logger.log_metrics({"a": 1}, 0)
    with pytest.warns(UserWarning, match="does not confirm what it has written"):
        logger.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logger.flush()


def test_flush_does_not_wait_for_the_dead(logger: FaultTolerantWandbLogger) -> None:
    logger.log_metrics({"a": 1}, 0)
    kill_wandb(signal.SIGKILL)
    with pytest.warns(UserWarning, match="does not confirm what it has written"):
        logger.flush()
    assert logger.last_step_read == -1  # it did not even look
    with pytest.warns(UserWarning, match="W&B's process has ended"):
        logger.log_metrics({"a": 2}, 1)


def test_resumed_run_that_has_logged_nothing_is_not_waited_for() -> None:
    run = SimpleNamespace(settings=tracking._settings(), step=100, starting_step=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FaultTolerantWandbLogger(experiment=run).flush()


@pytest.mark.parametrize("left_in_block", [0, 6, 7, 20])
def test_records_end_where_a_block_does(left_in_block: int, tmp_path: Path) -> None:
    size = wandb_file.BLOCK - len(wandb_file.HEADER) - 7 - left_in_block
    overhead = Record(uuid="a" * size).ByteSize() - size
    first, second = Record(uuid="a" * (size - overhead)), Record(uuid="b" * 50)
    content = wandb_file.HEADER + wandb_file.part(1, first.SerializeToString())
    assert len(content) == wandb_file.BLOCK - left_in_block
    rest = second.SerializeToString()
    if left_in_block < 7:
        content += bytes(left_in_block) + wandb_file.part(1, rest)
    else:  # as many bytes as fit in, perhaps none
        cut = left_in_block - 7
        content += wandb_file.part(2, rest[:cut]) + wandb_file.part(4, rest[cut:])
    path = tmp_path / "run.wandb"
    path.write_bytes(content)
    (_, middle), (_, end) = found = list(read_records(path))
    assert [record for record, _ in found] == [first, second]
    assert end == len(content)
    assert [record for record, _ in read_records(path, middle)] == [second]
    path.write_bytes(content[:-1] + b"c")  # damaged
    assert [record for record, _ in read_records(path)] == [first]


def test_unreadable_attempts_are_put_aside(
    logger: FaultTolerantWandbLogger, tmp_path: Path, capsys: Any
) -> None:
    logger.log_metrics({"a": 1}, 0)
    logger.flush()
    (attempt,) = attempts(tmp_path)
    (file,) = attempt.glob("*.wandb")
    content = file.read_bytes()
    contents = {"empty": b"", "header": content[:7], "first": content[:20], "cut": content[:-1]}
    for name, short in contents.items():
        copy = shutil.copytree(attempt, attempt.with_name(f"offline-run-0-{name}"))
        (copy / file.name).write_bytes(short)
    attempt.with_name("offline-run-0-none").mkdir()
    assert describe_wandb([logger], tmp_path / "run") == [
        f"W&B: wandb sync {tmp_path}/run/wandb/offline-run-*",
        f"W&B in this terminal: wandb leet {tmp_path}/run/wandb",
    ]
    assert attempts(tmp_path) == [attempt.with_name("offline-run-0-cut"), attempt]
    cut = attempts(tmp_path)[0] / file.name
    *_, (_, end) = read_records(cut)
    assert end == cut.stat().st_size < len(content) - 1
    assert cut.with_suffix(".wandb.cut").read_bytes() == content[:-1]
    assert {path.name for path in attempt.parent.glob("unreadable-*")} == {
        f"unreadable-run-0-{name}" for name in ("empty", "header", "first", "none")
    }
    printed = capsys.readouterr().err
    assert "renamed to unreadable-run-0-empty" in printed
    assert "offline-run-0-cut ended within a record" in printed
    describe_wandb([logger], tmp_path / "run")  # there is nothing left to be done
    assert capsys.readouterr().err == ""


def test_attempt_in_progress_is_not_put_aside(
    logger: FaultTolerantWandbLogger, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tracking, "can_be_uploaded", lambda folder: False)
    describe_wandb([logger], tmp_path / "run")
    assert not list(tmp_path.glob("run/wandb/unreadable-*"))


def test_wandb_without_the_setting_is_not_waited_for(
    logger: FaultTolerantWandbLogger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_logger, "FLUSH_SETTING", "x_unknown")
    assert tracking._settings().silent  # W&B would refuse a setting that it does not know
    logger.log_metrics({"a": 1}, 0)
    with pytest.warns(UserWarning, match="its version does not tell when it writes"):
        logger.flush()


# --- W&B is away ----------------------------------------------------------------------------------


def test_unreachable_wandb_is_no_obstacle(tmp_path: Path) -> None:
    environment = experiment(tmp_path, max_epochs=1) | {
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "2",
    }
    status, output = launch.run(COMMAND, tmp_path, environment)
    assert status == 0, output
    assert "W&B refused or was not reached, so it tracks offline" in output
    assert attempts(tmp_path)


class WarnSelf(Callback):
    """Is sent SIGTERM in the fourth step."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 3:
            os.kill(os.getpid(), signal.SIGTERM)


class KillWandb(Callback):
    """Ends W&B's own process, as a scheduler would, while the fourth step is computed."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 3:
            kill_wandb(signal.SIGTERM)


def kill_wandb(by: signal.Signals) -> None:
    (pid,) = filter(is_wandb, children())
    os.kill(int(pid), by)
    while is_wandb(pid):
        time.sleep(0.01)


def children() -> list[str]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found += (task / "children").read_text().split()
    return found


def is_wandb(pid: str) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        _, name, state, *_ = Path(f"/proc/{pid}/stat").read_text().split()
        return name == "(wandb-core)" and state != "Z"
    return False


@pytest.mark.parametrize("warned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_run_outlives_wandb(warned: bool, tmp_path: Path) -> None:
    callbacks = [{"class_path": "test_tracking.KillWandb"}]
    if warned:
        callbacks.append({"class_path": "test_tracking.WarnSelf"})
    environment = experiment(tmp_path, max_epochs=1, callbacks=callbacks)
    status, output = launch.run(OFFLINE, tmp_path, environment)
    assert status == (143 if warned else 0), output
    assert "Traceback" not in output
    assert warned or "W&B's process has ended" in output
    checkpoint = torch.load(tmp_path / "run/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == (4 if warned else 7)


class Keyed(DigitsDataModule):
    """Data of somebody's own, from where a key is needed."""

    def __init__(self, api_key: str, token: str = "", num_tokens: str = ""):
        super().__init__(batch_size=64)


def test_nobody_reads_a_secret_in_a_run_folder(tmp_path: Path) -> None:
    """And the run is the same experiment as before."""
    experiment(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=None)
    config = yaml.safe_load((tmp_path / "experiment.yaml").read_text())
    config["data"] = {"class_path": "test_tracking.Keyed", "init_args": {"token": "hush-1"}}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(config))
    keys = ["--data.init_args.api_key=hush-2", "--data.init_args.num_tokens=told"]
    status, output = launch.run([*COMMAND, *keys], tmp_path)
    assert status == 0, output
    words = [*COMMAND, *keys, "--data.token", "hush-1", "--trainer.limit_train_batches=2"]
    status, output = launch.run(words, tmp_path)
    assert "limit_train_batches is 1 batches there" in output  # the only difference
    files = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [content for content in files if b"hush" in content]
    for name in ("config.yaml", "attempts.yaml", "error.txt"):
        assert "***" in (tmp_path / "run" / name).read_text()
        assert "told" in (tmp_path / "run" / name).read_text()


def test_nobody_reads_a_secret_in_the_files_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B notes the command by itself."""
    monkeypatch.setattr("sys.argv", ["main.py", "--data.api_key=hush", "--data.num_tokens=told"])
    (logger,) = open_wandb(Tracking(mode="offline"), tmp_path, "test", seed=0, config={})
    logger.experiment.finish()
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"hush" not in content
    assert b"told" in content


def test_a_refused_command_is_no_run_of_wandb(tmp_path: Path) -> None:
    environment = experiment(tmp_path, limit_val_batches=0)
    status, output = launch.run(OFFLINE, tmp_path, environment)
    assert "nothing is validated" in output
    assert status == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {
        *("error.txt", "lock", "metrics.csv")
    }

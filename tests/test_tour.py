"""The tour: six runs beside each other, and a page; interrupted, it goes on."""

import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import methods
import pytest
import yaml
from rich.console import Console

from running.commands import tour
from running.history import CSVHistory

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(tmp_path: Path, monkeypatch) -> Path:
    """Two methods and a few batches instead of six and all; returns the folder of the tour."""
    stops = []
    for name in ("resnet", "universally_slimmable"):
        config = methods.config(name)
        config["trainer"] |= {"max_epochs": 2, "limit_train_batches": 2}
        path = tmp_path / name / "small.yaml"
        path.parent.mkdir()
        path.write_text(yaml.safe_dump(config))
        stops.append(tour.Stop(name, "what it shows", str(path)))
    monkeypatch.setattr(tour, "STOPS", tuple(stops))
    return tmp_path / "tour"


def travel(folder: Path) -> None:
    tour.Tour(folder, Console(width=80)).travel()


@pytest.mark.slow
def test_every_stop_is_trained_told_and_shown_and_a_second_tour_trains_nothing(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(small.parent)
    tour.run(Namespace(dir=Path("tour")))
    said = capsys.readouterr().out
    page = (small / "report" / "index.html").read_text(encoding="utf-8")
    for name in ("resnet", "universally_slimmable"):
        run = small / name / "small" / "seed0"
        assert (run / "finished.yaml").exists()
        points = CSVHistory(run / "operating_points.csv").read()
        dearest = max(points, key=lambda point: float(point["macs"]))
        assert f"{name}: what it shows" in said
        assert f"{float(dearest['test_acc']):.2%}" in said
        assert f"{name}/small" in page
    assert (small / "report" / "points.csv").read_text().count("universally_slimmable/small") == 3
    assert tour.epochs_done(run) == 2
    attempts = (run / "attempts.yaml").read_text()
    travel(small)
    assert (run / "attempts.yaml").read_text() == attempts


def test_a_run_that_fails_names_its_log_and_ends_the_others(small: Path, monkeypatch) -> None:
    bad, other = tour.STOPS
    monkeypatch.setattr(tour, "STOPS", (bad._replace(options=("--trainer.max_epochs=-7",)), other))
    with pytest.raises(ValueError, match=r"status 2: see .*output\.txt, then repeat") as caught:
        travel(small)
    log = Path(str(caught.value).split("see ")[1].split(",")[0])
    assert "error: " in log.read_text()


def test_the_stops_are_the_six_papers() -> None:
    names = [yaml.safe_load((tour.EXPERIMENTS / stop.yaml).read_text()) for stop in tour.STOPS]
    classes = {config["model"]["class_path"].rsplit(".", 1)[1] for config in names}
    assert classes == {
        *("LitResNet", "LitStochasticDepth", "LitBranchyNet"),
        *("LitUniversallySlimmable", "LitDenseNet", "LitMSDNet"),
    }
    assert all(config["data"]["class_path"].endswith("Digits" + "DataModule") for config in names)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_however_a_tour_ends_its_runs_end_and_the_same_command_goes_on(
    how: signal.Signals, tmp_path: Path
) -> None:
    command = [sys.executable, str(ROOT / "main.py"), "tour", "--dir", str(tmp_path / "tour")]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        # Tests that were started in the background ignore it, and what they start would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not list(tmp_path.glob("tour/*/*/seed0/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(how)
    process.communicate()
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    (run, *_) = tmp_path.glob("tour/*/*/seed0/lock")
    deadline = time.monotonic() + 300
    while is_locked(run):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_locked(path: Path) -> bool:
    import fcntl

    with path.open("r+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False

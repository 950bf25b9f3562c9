"""The list of runs: their state is what has happened in their folders."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from run_folders import HOSTILE, checkpoint, make_run

from reports import is_locked, read_run
from running import main

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Lets another process hold a lock."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield
        process.stdin.close()


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict]:
    assert main(["runs", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_lock_is_seen_and_not_taken(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert not is_locked(lock)
    lock.touch()
    with held(lock):
        assert is_locked(lock)
    assert not is_locked(lock)
    # Who asks holds nothing.
    with lock.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {
        name: make_run(tmp_path / name, "resnet")
        for name in ("finished", "running", "resumable", "repairable", "broken", "empty")
    }
    for name in ("running", "resumable", "repairable", "empty"):
        (folders[name] / "finished.yaml").unlink()
        (folders[name] / "operating_points.csv").unlink()
    (folders["repairable"] / "last.ckpt").write_bytes(checkpoint()[:-30])
    (folders["repairable"] / "previous.ckpt").write_bytes(checkpoint())
    (folders["broken"] / "last.ckpt").write_bytes(checkpoint()[:-30])
    for name in ("last", "best"):
        (folders["empty"] / f"{name}.ckpt").unlink()
    with held(folders["running"] / "lock"):
        rows = {row["name"].split("/")[-1]: row for row in listed(capsys, str(tmp_path))}
    states = {name: row["state"] for name, row in rows.items()}
    expected = {name: name for name in folders} | {"repairable": "resumable"}
    assert states == expected
    assert rows["broken"]["why"] == "last.ckpt is damaged"
    assert "previous.ckpt" in rows["repairable"]["why"]
    assert rows["empty"]["why"] == "no checkpoint yet"


def test_a_row_says_what_the_files_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "resnet/x/seed3", "resnet", 3, epochs=5)
    hour_ago = time.time() - 3600
    for path in [*folder.iterdir(), folder]:
        os.utime(path, (hour_ago, hour_ago))
    (row,) = listed(capsys, str(tmp_path))
    assert (row["experiment"], row["seed"], row["data"]) == ("resnet/x", 3, "Digits")
    assert (row["epoch"], row["max_epochs"], row["metric"]) == (5, 5, "val/acc")
    best = max(read_run(folder).history.curves["val/acc"].values())
    assert row["best"] == best
    assert row["age_seconds"] == pytest.approx(3600, abs=60)
    assert row["device"] == "x86_64, 2 cores"


def test_the_table_fits_into_80_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/stochastic_depth/cifar10_resnet110_droppath/seed0"), "resnet")
    broken = make_run(Path("runs/msdnet/[red]x/seed1"), "msdnet", gpu="NVIDIA H100 80GB HBM3")
    (broken / "metrics.csv").write_bytes(b"\xff")
    make_run(Path("runs", HOSTILE.replace("/", "_")), "resnet")
    assert main(["runs"]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    words = output.replace("\n", "")
    for word in ("finished", "broken", "5/5", "[red]"):
        assert word in words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "runs does not exist"),
        (["none"], "none does not exist"),
        (["empty"], "empty is no run folder and holds none"),
        (["--jsn"], "unrecognized arguments: --jsn"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    assert main(["runs", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err

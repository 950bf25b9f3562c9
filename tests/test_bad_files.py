"""Whatever lies in a folder: nothing waits for it, nothing counts it wrong, nothing is lost."""

import csv
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import run_folders
import torch
from PIL import Image
from run_folders import make_run

from datamodules import prepare_images
from datamodules.image_format import ImageFormat
from reports import experiments_of, read_run, write_report
from reports.details import details
from running import load_run
from running.arguments import told
from running.command_line import main
from running.commands import profile, tour
from running.exporting import written_together
from running.exporting.check import images_in
from running.folder import RunFolder, read_yaml

MAPPING_BOMB = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{{', '.join(f'k{k}: *{before}' for k in range(9))}}}\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)
ENDLESS = {
    "bomb": f"{MAPPING_BOMB}model: *j\n",
    "self": "model: &m\n  class_path: *m\n",
    "number": f"model: {{depth: 0x{'f' * 8000}}}\n",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Who waits for a pipe, waits forever."""

    def stop(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    monkeypatch.setattr("reports.report.png", lambda figure: b"")
    monkeypatch.setattr("sys.argv", ["main.py"])
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def edit(path: Path, change: Callable[[list[list[str]]], None]) -> None:
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    change(rows)
    run_folders.write_csv(path, rows[0], rows[1:])


# --- reports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "exits.csv", "last.ckpt"])
def test_a_report_waits_for_no_pipe(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    os.mkfifo(run / name)
    assert (read_run(run).state, read_run(run).why != "") == ("broken", True)


def test_an_image_that_is_a_pipe_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = next((run / "exit_images").iterdir())
    first.unlink()
    os.mkfifo(first)
    write_report([run], tmp_path / "out")


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_configuration_without_end_is_told(kind: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text(ENDLESS[kind])
    assert read_run(run).why == "config.yaml refers to itself, or says too much"
    with pytest.raises(ValueError, match="refers to itself, or says too much: correct it"):
        read_yaml(run / "config.yaml")


def test_a_configuration_nested_too_deep_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{a: " * 3000)
    with pytest.raises(ValueError, match="is no YAML: correct it"):
        read_yaml(tmp_path / "config.yaml")


def test_a_point_that_stands_there_twice_is_no_second_seed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run / "operating_points.csv", lambda rows: rows.append(rows[1]))
    record = read_run(run)
    assert record.why == "operating_points.csv has the point 'exit1' twice"
    assert record.points == []


def test_a_column_that_stands_there_twice_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run / "operating_points.csv", lambda rows: [row.append(row[1]) for row in rows])
    assert read_run(run).why == "operating_points.csv has the column test_acc twice"


def test_the_mark_of_a_spreadsheet_is_no_part_of_a_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    before = read_run(run).points
    path = run / "operating_points.csv"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    assert before
    assert read_run(run).points == before


def test_numbers_too_large_to_add_are_none(tmp_path: Path) -> None:
    for seed in (0, 1):
        run = make_run(tmp_path / f"resnet/x/seed{seed}", "resnet", seed)
        edit(run / "operating_points.csv", lambda rows: rows[1].__setitem__(2, "1e308"))
    write_report([tmp_path], tmp_path / "out")
    (row,) = csv.DictReader((tmp_path / "out/points.csv").open())
    assert (row["num_seeds"], row["macs"]) == ("2", "")


def test_a_digit_that_is_no_number_is_a_class(tmp_path: Path) -> None:
    make_run(tmp_path / "run", classes=("\u00b2", "1", "9" * 5000))
    write_report([tmp_path], tmp_path / "out")


def test_columns_of_the_entropies_may_stand_in_any_order(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run / "exit_entropy.csv", lambda rows: [row.reverse() for row in rows])
    ((experiment,),) = experiments_of([read_run(run)]).values()
    (figure,) = [each for each in details(experiment)[0] if each.name == "exit_entropy"]
    values = figure.spec["data"]["values"]
    assert {row["exit"] for row in values} == set(run_folders.EXITS)


def test_a_negative_cost_is_none(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    edit(run / "operating_points.csv", lambda rows: rows[1].__setitem__(2, "-1"))
    assert read_run(run).why == "operating_points.csv: a number of 'exit1' is negative"


def test_a_result_that_is_lost_is_missed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "operating_points.csv").unlink()
    assert read_run(run).why == "it was tested, and operating_points.csv is lost"


def test_a_paper_of_unknown_points_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", paper={"source": "x", "test_acc": {"fulll": 0.9}})
    ((experiment,),) = experiments_of([read_run(run)]).values()
    assert experiment.notes == ["The paper's numbers of fulll are of no point of these runs."]


def test_a_paper_in_per_cent_is_not_set_beside_a_share(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", paper={"source": "x", "test_acc": {"full": 91.25}})
    assert read_run(run).paper == {}


def test_a_link_to_a_report_stays_a_link(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "out").symlink_to("disk", target_is_directory=True)
    for _ in range(2):
        write_report([tmp_path / "run"], tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out", "run"]
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "index.html").is_file()


def test_of_two_reports_at_once_none_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    write_report([run], out)
    rename = os.rename

    def other_is_faster(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).suffix == ".old":
            out.mkdir()
            (out / "index.html").write_text("of the other")

    monkeypatch.setattr(os, "rename", other_is_faster)
    with pytest.raises(OSError, match=r"cannot replace .*: write it again"):
        write_report([run], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    assert (out / "index.html").read_text() == "of the other"


def test_a_tour_sees_what_is_in_its_way_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tour.Tour, "travel", lambda self: pytest.fail("it began"))
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "notes.txt").touch()
    assert main(["tour", "--dir", str(tmp_path)]) == 2
    assert "notes.txt, which is of no report: pass another --dir" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["profile_experiment", "profile_figure"])
def test_a_profile_that_is_interrupted_leaves_nothing(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    costs = profile.Costs("point", "full", 1, 1, 1, 1, 1.0, 1.0)
    monkeypatch.setattr(profile, "profile_experiment", lambda *_: [costs])
    monkeypatch.setattr(profile, where, interrupted)
    yaml = str(Path(__file__).parents[1] / "experiments" / "quickstart.yaml")
    assert main(["profile", "-c", yaml, "--out", str(tmp_path / "a/b")]) == 130
    assert list(tmp_path.iterdir()) == []


# --- images and checkpoints -----------------------------------------------------------------------


def test_an_image_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    one = torch.ones(1, 1, 1)
    image_format = ImageFormat("x", (1, 8, 8), one, one, None, False)
    with pytest.raises(ValueError, match=r"cannot decode the image .* [(]it is no file[)]"):
        prepare_images([tmp_path / "a.png"], image_format)


CHANGES: dict[str, Callable[[dict], object]] = {
    "a text": lambda content: "pytorch-lightning_version",
    "run is no mapping": lambda content: content | {"run": [1]},
    "a version that is none": lambda content: content | {"run": {"format": "x"}},
    "no images": lambda content: content | {"images": None},
    "images with more": lambda content: content | {"images": content["images"] | {"more": 1}},
    "images of no size": lambda content: (
        content | {"images": content["images"] | {"image_shape": [1, -8, 8]}}
    ),
    "too few classes": lambda content: (
        content | {"images": content["images"] | {"class_names": ["a", "b"]}}
    ),
    "no weights": lambda content: content | {"state_dict": None},
}


@pytest.mark.parametrize("change", CHANGES)
def test_checkpoints_of_something_else_are_refused_in_a_line(
    change: str, trained, tmp_path: Path
) -> None:
    run = shutil.copytree(trained("resnet"), tmp_path / "run")
    content = torch.load(run / "last.ckpt", weights_only=True)
    torch.save(CHANGES[change](content), run / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"last\.ckpt (is not a|is no|does not fit the)|has 10 classes and"
    ):
        load_run(run, "last")


def test_a_device_without_numbers_is_refused(trained) -> None:
    with pytest.raises(ValueError, match="there is no device 'meta'"):
        load_run(trained("resnet"), "last", "meta")


# --- exports --------------------------------------------------------------------------------------


def test_an_export_replaces_exports_alone(tmp_path: Path) -> None:
    """What someone else has written stays, `--overwrite` or not."""
    folder, stages = tmp_path / "folder", tmp_path / "a_stages"
    for each in (folder, stages):
        each.mkdir()
        (each / "notes.txt").write_text("mine")
    for targets in ([folder], [tmp_path / "a.onnx", stages]):
        refused = pytest.raises(FileExistsError, match="is no export and stays: give another --out")
        with refused, written_together(targets, overwrite=True):
            pytest.fail("it began")
    assert [(each / "notes.txt").read_text() for each in (folder, stages)] == ["mine", "mine"]


def test_an_export_is_checked_on_what_can_be_decoded(tmp_path: Path) -> None:
    one = torch.ones(1, 1, 1)
    image_format = ImageFormat("x", (1, 8, 8), one, one, None, False)
    (tmp_path / "a.png").write_bytes(b"no image")
    os.mkfifo(tmp_path / "b.png")
    Image.new("L", (8, 8)).save(tmp_path / ".hidden.png")
    with pytest.raises(ValueError, match="can be decoded: give others by --images"):
        images_in(tmp_path, image_format)
    Image.new("I;16", (8, 8), 7 << 8).save(tmp_path / "c.png")
    assert images_in(tmp_path, image_format).equal(torch.full((1, 1, 8, 8), 7, dtype=torch.uint8))


def test_an_export_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), written_together([tmp_path / "a/b/c.onnx"], False):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


# --- pipes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [["-c", "{}"], ["--config={}"], ["--model", "{}"], ["--model.tuning.weights={}"]]
)
def test_a_command_waits_for_no_pipe(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    words = [word.format(tmp_path / "pipe.yaml") for word in words]
    assert main(["fit", *words]) == 2
    assert f"{tmp_path}/pipe.yaml is a pipe or a device: give a file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lock", "last.ckpt", "finished.yaml", "attempts.yaml"])
def test_a_run_folder_holds_no_pipe(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pipe or a device: remove it"):
        RunFolder(tmp_path, "x", 0).create()


def test_an_experiment_without_end_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.yaml").write_text(ENDLESS["bomb"])
    assert main(["fit", "-c", str(tmp_path / "x.yaml")]) == 2
    assert f'"{tmp_path}/x.yaml" refers to itself, or says too much' in capsys.readouterr().err


# --- what is told ---------------------------------------------------------------------------------


def test_what_the_system_says_is_a_line_with_a_remedy(capsys: pytest.CaptureFixture) -> None:
    assert main(["report", "x" * 300]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "(File name too long): name another path" in line
    assert len(line) < 300


def test_what_would_garble_a_terminal_is_spelt_out() -> None:
    assert told(ValueError("a\x1b[31m\nb")) == r"a\x1b[31m b"

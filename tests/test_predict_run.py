"""`predict --run`: a row for every image of a folder, whatever lies in there."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import assert_one_line
from test_loading import edit_checkpoint

from datamodules import DigitsDataModule, ImagesToClassify
from networks import early_exit
from running import command_line, load_run, point
from running.point import Point
from running.predictions import Prediction, PredictionFile

NUM_IMAGES = 40


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, list[str]]:
    """A folder of test images by class, the same as bytes in the order of paths, and the paths."""
    data = DigitsDataModule(eval_batch_size=360)
    data.setup("test")
    images, labels = (values[::9] for values in next(iter(data.test_dataloader())))
    folder = tmp_path_factory.mktemp("digits")
    names = [f"{label}/{number:02}.png" for number, label in enumerate(labels.tolist())]
    for name, image in zip(names, images, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(folder / name)
    order = sorted(range(NUM_IMAGES), key=names.__getitem__)
    return folder, images[order], [names[k] for k in order]


@pytest.fixture
def predict(trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Runs the command in this process; returns its exit status and what it printed."""

    def run(*options: str, run: str | Path = "resnet", images: Path = tmp_path) -> Any:
        folder = trained(run) if isinstance(run, str) else run
        args = ["--run", str(folder), "--images", str(images), "--num_workers", "0"]
        out = [] if "--out" in options else ["--out", str(tmp_path / "out.csv")]
        status = command_line.main(["predict", *args, *out, *options])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_the_answers_of_the_network(digits, predict, trained, tmp_path: Path) -> None:
    folder, images, names = digits
    status, output = predict("--batch_size", "7", images=folder)
    assert status == 0, output
    answers = load_run(trained("resnet")).point().classify(images, batch_size=7)
    found = rows(tmp_path / "out.csv")
    header = "file,label,class,probability,exit,point,error," + ",".join(
        f"class{k},probability{k}" for k in range(2, 6)
    )
    assert ",".join(found[0]) == header
    assert [row["file"] for row in found] == names
    assert [row["label"] for row in found] == [name[0] for name in names]
    probs, classes = answers.probabilities.topk(5)
    for rank, suffix in enumerate(("", "2", "3", "4", "5")):
        assert [int(row[f"class{suffix}"]) for row in found] == classes[:, rank].tolist()
        assert [float(row[f"probability{suffix}"]) for row in found] == probs[:, rank].tolist()
    assert {(row["exit"], row["point"], row["error"]) for row in found} == {("", "full", "")}
    right = sum(row["label"] == row["class"] for row in found)
    assert f"accuracy of full: {right / NUM_IMAGES:.2%} of 40 with a label" in output
    assert f"40 rows in {tmp_path / 'out.csv'}, " in output
    assert "images/s" in output
    assert "decoded" not in output
    assert "pixels" not in output


def test_workers_and_lines_hold_the_same(digits, predict, tmp_path: Path) -> None:
    folder, _, names = digits
    assert predict(images=folder)[0] == 0
    lines = tmp_path / "out.jsonl"
    options = ["--out", str(lines), "--num_workers", "2"]
    status, output = predict(*options, images=folder)
    assert status == 0, output
    parsed = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["file"] for row in parsed] == names
    for row, line in zip(rows(tmp_path / "out.csv"), parsed, strict=True):
        assert row["label"] == line["label"]
        assert row["class"] == line["class"] == line["top"][0]["class"]
        assert float(row["probability5"]) == line["top"][4]["probability"]
        assert len(line["top"]) == 5
        assert line["exit"] is line["error"] is None


def test_images_leave_early_in_their_order(
    digits, predict, trained, tmp_path: Path, monkeypatch
) -> None:
    """With full batches for the deep stages, and a corrupt image here and there."""
    folder = shutil.copytree(digits[0], tmp_path / "images")
    _, images, names = digits
    broken = ["0/000.png", "4/zz.png", "a.png", "b.png", "c.png"]
    for name in broken:
        (folder / name).write_bytes(b"broken")
    run = load_run(trained("branchynet"))
    pixels = run.image_format.normalize(images)
    scores = [torch.distributions.Categorical(logits=x).entropy() for x in run.net(pixels)]
    halves = [values.median().item() for values in scores[:2]]
    copy = shutil.copytree(trained("branchynet"), tmp_path / "run")
    edit_checkpoint(
        copy,
        lambda content: content["exit_thresholds"]["points"].update(adaptive_knee=halves),
    )
    sizes = []
    stream = point.early_exit_stream

    def spy(network, batches, thresholds, criterion, batch_size):
        sizes.append(batch_size)
        return stream(network, batches, thresholds, criterion, batch_size)

    monkeypatch.setattr(point, "early_exit_stream", spy)
    options = ["--point", "adaptive_knee", "--batch_size", "4"]
    status, output = predict(*options, run=copy, images=folder)
    assert status == 0, output
    assert "5 images could not be decoded: see the column error" in output
    logits, index = early_exit(run.net, pixels, halves)
    found = rows(tmp_path / "out.csv")
    assert [row["file"] for row in found] == sorted([*names, *broken])
    good = [row for row in found if not row["error"]]
    assert [row["file"] for row in good] == names
    assert [int(row["exit"]) for row in good] == (index + 1).tolist()
    assert index.unique().tolist() == [0, 1, 2]
    assert [int(row["class"]) for row in good] == logits.argmax(1).tolist()
    bad = [row for row in found if row["error"]]
    assert [row["file"] for row in bad] == broken
    assert [row["label"] for row in bad] == ["0", "4", "", "", ""]
    assert {row["error"] for row in bad} == {"cannot identify image file"}
    assert {(row["class"], row["exit"], row["class2"]) for row in bad} == {("", "", "")}
    assert sizes == [4]  # of stages that run on full batches


def test_names_of_every_kind(predict, trained, tmp_path: Path) -> None:
    """Each comes back from the file; nothing in it is a formula for a spreadsheet."""
    run = shutil.copytree(trained("resnet"), tmp_path / "run")
    classes = ["=1+1", "-2", "@x", "+3", "a,b", 'say "x"', "new\nline", "\tx", "plain", "naïve"]
    edit_checkpoint(run, lambda content: content["images"].update(class_names=classes))
    images = tmp_path / "images"
    image = Image.new("L", (32, 32))
    folders = [*classes, "unknown", "un,known\n"]
    for folder in folders:
        (images / folder).mkdir(parents=True)
        image.save(images / folder / "=x.png")
    image.save(images / "=2+3.png")
    (images / "=broken.png").write_bytes(b"")
    image.save(os.fsencode(images) + b"/\xff.png", "PNG")
    for hidden in (".hidden.png", ".folder/x.png", "notes.txt"):
        (images / hidden).parent.mkdir(exist_ok=True)
        (images / hidden).write_bytes(b"")
    assert predict(run=run, images=images)[0] == 0
    assert predict("--out", str(tmp_path / "out.jsonl"), run=run, images=images)[0] == 0

    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    written = [f"{folder}/=x.png" for folder in folders] + ["=2+3.png", "=broken.png", "\\xff.png"]
    assert sorted(line["file"] for line in lines) == sorted(written)
    labels = {line["file"]: line["label"] for line in lines}
    assert all(labels[f"{name}/=x.png"] == name for name in classes)
    assert labels["unknown/=x.png"] is labels["=2+3.png"] is None
    assert {line["class"] for line in lines if not line["error"]} <= set(classes)

    found = rows(tmp_path / "out.csv")
    assert len(found) == len(lines)
    for row, line in zip(found, lines, strict=True):
        for key in ("file", "label", "class"):
            value = line[key] or ""
            assert row[key] == (f"'{value}" if value[:1] in ("=", "-", "@", "+", "\t") else value)


def test_images_of_every_kind(predict, trained, tmp_path: Path) -> None:
    """They are prepared as `classify` prepares them, and those of other sizes are counted."""
    images = tmp_path / "images"
    images.mkdir()
    noise = np.random.RandomState(0).randint(0, 256, (60, 40, 4), dtype=np.uint8)
    Image.fromarray(noise).save(images / "alpha.png")
    Image.fromarray(noise[..., :3]).save(images / "colour.JPG")
    Image.fromarray(noise[:8, :8, 0]).save(images / "digit.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) << 8).save(images / "deep.tif")
    Image.fromarray(noise[:32, :32, 0]).save(images / "fits.webp", lossless=True)
    os.symlink(images / "fits.webp", images / "link.webp")
    paths = sorted(images.iterdir())
    status, output = predict(images=images)
    assert status == 0, output
    assert "3 of 6 images are not of 32 x 32 pixels, as those of DigitsDataModule are" in output
    found = rows(tmp_path / "out.csv")
    assert [row["file"] for row in found] == [path.name for path in paths]
    with pytest.warns(UserWarning, match="3 of 6 images are not of 32 x 32"):
        answers = load_run(trained("resnet")).point().classify(paths)
    probs = [float(row["probability"]) for row in found]
    assert probs == answers.probabilities.amax(1).tolist()

    single = predict("--overwrite", images=images / "digit.png")
    assert single[0] == 0
    (row,) = rows(tmp_path / "out.csv")
    assert row["file"] == "digit.png"
    assert row["class"] == found[3]["class"]


def test_only_corrupt_images(predict, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.jpg").write_bytes(b"x" * number)
    for run in ("resnet", "branchynet"):
        point = [] if run.startswith("resnet") else ["--point", "adaptive_best"]
        status, output = predict("--overwrite", *point, run=run, images=images)
        assert status == 0, output
        assert "3 images could not be decoded" in output
        assert [row["file"] for row in rows(tmp_path / "out.csv")] == ["0.jpg", "1.jpg", "2.jpg"]


def test_into_the_run_folder_and_never_over_another(digits, trained, tmp_path: Path) -> None:
    run = shutil.copytree(trained("resnet"), tmp_path / "run")
    args = ["predict", f"--run={run}", "--images", str(digits[0]), "--num_workers", "0"]
    assert command_line.main(args) == 0
    first = (run / "predictions.csv").read_bytes()
    assert len(first.splitlines()) == NUM_IMAGES + 1
    (run / "predictions.csv").write_text("mine")
    assert command_line.main(args) == 2
    assert (run / "predictions.csv").read_text() == "mine"
    assert command_line.main([*args, "--overwrite"]) == 0
    assert (run / "predictions.csv").read_bytes() == first
    assert not list(run.glob("*.part"))


def empty(folder: Path) -> None:
    (folder / "images").mkdir()


def taken(folder: Path) -> None:
    one_image(folder)
    (folder / "out.csv").write_text("mine")


def one_image(folder: Path) -> None:
    empty(folder)
    Image.new("L", (8, 8)).save(folder / "images/a.png")


def loop(folder: Path) -> None:
    one_image(folder)
    (folder / "images/self").symlink_to(folder / "images")


MISTAKES = {
    "no images": (empty, [], "no images found: looked for "),
    "no folder": (lambda folder: None, [], "there is no "),
    "loop of links": (loop, [], "are one folder: remove the link"),
    "output exists": (taken, [], "out.csv exists: pass another --out, or --overwrite"),
    "output is a folder": (one_image, ["--out", "{0}/images.csv"], "is a folder: pass a file"),
    "output in no folder": (
        one_image,
        ["--out", "{0}/no/x.csv"],
        "no/x.csv (No such file",
    ),
    "output of another kind": (one_image, ["--out", "x.parquet"], "ends neither in .csv nor in"),
    "batch of none": (one_image, ["--batch_size", "0"], "--batch_size is 0: give 1 to 1048576"),
    "workers": (one_image, ["--num_workers", "-1"], "--num_workers is -1: give 0 or more"),
    "no number": (one_image, ["--batch_size", "x"], "argument --batch_size: invalid int value"),
    "point": (one_image, ["--point", "w0.5"], "has no operating point 'w0.5': full"),
    "device": (one_image, ["--device", "abacus"], "there is no device 'abacus'"),
    "option": (
        one_image,
        ["--imagse", "x"],
        "unrecognized arguments: --imagse: did you mean --images?: see",
    ),
    "checkpoint": (one_image, ["--checkpoint", "first"], "invalid choice: 'first'"),
    "no run": (one_image, ["--run", "{0}/images"], "is no run folder: it holds no config.yaml"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_before_the_work(
    name: str, predict, tmp_path: Path, monkeypatch
) -> None:
    prepare, options, message = MISTAKES[name]
    (tmp_path / "images.csv").mkdir()
    prepare(tmp_path)
    monkeypatch.setattr(ImagesToClassify, "batches", lambda *given: pytest.fail("it began"))
    options = [option.format(tmp_path) for option in options]
    status, output = predict(*options, images=tmp_path / "images")
    assert_one_line(status, output, message.format(tmp_path))
    assert not list(tmp_path.glob("*.part"))
    if name == "output exists":
        assert (tmp_path / "out.csv").read_text() == "mine"


def test_required_options_are_named(capsys) -> None:
    assert command_line.main(["predict", "--run", "x"]) == 2
    assert "the following arguments are required: --images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (FloatingPointError("not finite"), 2)]
)
def test_what_is_interrupted_leaves_the_earlier_file(
    error: BaseException, status: int, digits, predict, tmp_path: Path, monkeypatch
) -> None:
    def fail(point: Point, images: torch.Tensor) -> None:
        raise error

    monkeypatch.setattr(Point, "_answer", fail)
    (tmp_path / "out.csv").write_text("mine")
    assert predict("--overwrite", images=digits[0])[0] == status
    assert (tmp_path / "out.csv").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_file_that_came_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    answer = Prediction("a.png", None, [("cat", 0.75), ("dog", 0.25)], None, "full")

    def write() -> None:
        with PredictionFile(path, 2) as file:
            file.write(answer)
            path.write_text("another's")

    with pytest.raises(ValueError, match="exists by now, and the answers are in") as caught:
        write()
    assert path.read_text() == "another's"
    part = Path(str(caught.value).split("answers are in ")[1].split(": ")[0])
    assert [row["class2"] for row in rows(part)] == ["dog"]

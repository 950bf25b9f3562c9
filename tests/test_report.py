"""Reports: what they say is what the files say, and nothing in a folder stops them."""

import csv
import fcntl
import io
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import run_folders
import yaml
from launch import run as run_main
from methods import config
from PIL import Image
from run_folders import CLASSES, HOSTILE, METHODS, accuracy, make_all, make_run, write_csv

from reports import experiments_of, pareto_front, read_run, run_figures, write_report
from reports.configuration import settings
from reports.figures import kind_of
from running import main

COMPARED = {"accuracy_macs", "accuracy_ms", "accuracy_params", "learning_accuracy"}
COMPARED |= {"learning_loss", "gradients"}
OF_EXITS = {"exit_share", "exit_acc", "exit_entropy", "exit_curve", "exit_images", "points"}
OF_EXITS |= {"exit_calibration"}
OF_METHOD = {
    "resnet": {"confusion"},
    "densenet": {"confusion"},
    "stochastic_depth": {"confusion", "survival"},
    "slimmable": {"confusion", "recalibration", "points"},
    "branchynet": {"confusion", *OF_EXITS},
    "msdnet": {"confusion", *OF_EXITS},
}
"""The figures that are promised of each method."""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws no PNG but for the tests that ask for `pictures`: each takes a fifth of a second."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("reports.report.png", lambda figure: b"")


@pytest.fixture
def pictures() -> None:
    """Asks for PNG files."""


def report(*places: Path, out: Path) -> str:
    write_report(places, out)
    return (out / "index.html").read_text(encoding="utf-8")


def specs(html: str) -> dict[str, dict]:
    return json.loads(re.search(r'id="specs">(.*?)</script>', html, re.DOTALL)[1])


def figures_in(html: str) -> set[str]:
    return {name.split("-")[-1] for name in specs(html)}


def points(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((out / "points.csv").read_text(encoding="utf-8"))))


# --- numbers --------------------------------------------------------------------------------------


def test_seeds_become_mean_and_standard_deviation(tmp_path: Path) -> None:
    make_all(tmp_path / "runs", seeds=range(3))
    report(tmp_path / "runs", out=tmp_path / "report")
    rows = points(tmp_path / "report")
    assert len(rows) == sum(map(len, METHODS.values()))
    for row in rows:
        method = row["experiment"].split("/")[0]
        index = METHODS[method].index(row["point"])
        accuracies = [accuracy(method, index, seed) for seed in range(3)]
        assert float(row["test_acc"]) == pytest.approx(np.mean(accuracies))
        assert float(row["test_acc_std"]) == pytest.approx(np.std(accuracies, ddof=1))
        assert (row["seeds"], row["num_seeds"]) == ("0 1 2", "3")
        assert row["device"] == "x86_64, 2 cores"


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "resnet")
    report(tmp_path, out=tmp_path / "out")
    assert points(tmp_path / "out")[0]["test_acc_std"] == ""


def test_a_seed_counts_once(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name / "resnet/x/seed0", "resnet", 0)
    html = report(tmp_path, out=tmp_path / "out")
    assert points(tmp_path / "out")[0]["num_seeds"] == "1"
    assert "has seed 0 too, and is not counted" in html


def test_configurations_under_one_name_stay_apart(tmp_path: Path) -> None:
    for place, lr in (("a", 0.1), ("b", 0.3)):
        for seed in (0, 1):
            make_run(tmp_path / place / f"resnet/x/seed{seed}", "resnet", seed, lr=lr)
    report(tmp_path, out=tmp_path / "out")
    rows = points(tmp_path / "out")
    names = ["resnet/x (optimizer.lr=0.1)", "resnet/x (optimizer.lr=0.3)"]
    assert [row["experiment"] for row in rows] == names
    assert [row["num_seeds"] for row in rows] == ["2", "2"]


def test_the_paper_stands_beside_ours(tmp_path: Path) -> None:
    paper = {"source": "table 3, He et al.", "test_acc": {"full": 0.9125}}
    make_run(tmp_path / "a", "resnet", paper=paper)
    html = report(tmp_path, out=tmp_path / "out")
    row = points(tmp_path / "out")[0]
    assert float(row["difference"]) == pytest.approx(accuracy("resnet", 0, 0) - 0.9125)
    assert "91.25 %" in html
    assert "table 3, He et al." in html


@pytest.mark.parametrize("seed", range(20))
def test_pareto_front_is_that_of_brute_force(seed: int) -> None:
    draw = np.random.default_rng(seed)
    costs = draw.integers(1, 8, 15).tolist()
    accs = draw.integers(1, 8, 15).tolist()

    def is_beaten(i: int) -> bool:
        return any(
            costs[j] <= costs[i]
            and accs[j] >= accs[i]
            and (costs[j] < costs[i] or accs[j] > accs[i])
            for j in range(15)
        )

    assert pareto_front(costs, accs) == [not is_beaten(i) for i in range(15)]


def test_times_of_two_devices_are_on_no_common_axis(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "resnet", gpu="NVIDIA H200", accelerator="gpu")
    make_run(tmp_path / "b", "slimmable")
    html = report(tmp_path, out=tmp_path / "out")
    timed = {name: spec for name, spec in specs(html).items() if "accuracy_ms" in name}
    assert len(timed) == 2
    shown = [json.dumps(spec) for spec in timed.values()]
    assert sorted("w0.25" in text for text in shown) == [False, True]
    assert {row["device"] for row in points(tmp_path / "out")} == {"NVIDIA H200", "x86_64, 2 cores"}


@pytest.mark.parametrize(
    "curves",
    [
        [["w0.25", "w0.5", "full"]],
        [["exit1", "exit2", "full"], ["adaptive_knee", "adaptive_best"]],
        [["exit1", "full"], ["ensemble1", "ensemble2"]],
        [
            ["exit1", "exit2", "full"],
            ["w0.25_exit1", "w0.25_exit2", "w0.25"],
            ["w0.5_exit1", "w0.5_exit2", "w0.5"],
            ["w0.5_knee", "w0.5_best"],
            ["adaptive_knee", "accuracy_budget"],
        ],
    ],
    ids=["widths", "exits", "ensembles", "widths and exits"],
)
def test_each_family_of_points_has_a_curve(curves: list[list[str]]) -> None:
    names = [name for curve in curves for name in curve]
    kinds = []
    for curve in curves:
        is_adaptive = curve[0].endswith("_knee")
        points = [SimpleNamespace(name=name, is_adaptive=is_adaptive) for name in curve]
        kinds.append({kind_of(point, names) for point in points})
    assert [len(kind) for kind in kinds] == [1] * len(curves)
    assert len(set.union(*kinds)) == len(curves)


def test_data_sets_share_no_axis(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "resnet", data="Digits")
    make_run(tmp_path / "b", "densenet", data="CIFAR10")
    html = report(tmp_path, out=tmp_path / "out")
    assert re.findall(r"<h2>(\w+)</h2>", html) == ["CIFAR10", "Digits", "Runs"]
    macs = [json.dumps(spec) for name, spec in specs(html).items() if "accuracy_macs" in name]
    assert len(macs) == 2
    assert not any('"resnet/x"' in text and '"densenet/x"' in text for text in macs)


@pytest.mark.parametrize(("mode", "best"), [("auto", "min"), ("max", "max"), ("min", "min")])
def test_the_best_is_what_the_run_takes_for_better(mode: str, best: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "resnet")
    content = config_of(folder) | {"checkpoint": {"monitor": "val/loss", "mode": mode}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    history = read_run(folder).history
    assert history.best == {"min": min, "max": max}[best](history.curves["val/loss"].values())


def test_the_result_of_the_fit_goes_before_that_of_a_later_test(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "resnet")
    header = ("name", "test_acc", "macs", "params", "ms_per_image")
    write_csv(folder / "operating_points_again.csv", header, [("full", 0.5, 10, 10, 1.0)])
    assert read_run(folder).points[0].test_acc == accuracy("resnet", 0, 0)
    (folder / "operating_points.csv").unlink()
    record = read_run(folder)
    assert (record.points[0].test_acc, record.is_again) == (0.5, True)
    assert "of a later test" in report(folder, out=tmp_path / "out")


def test_a_result_from_before_a_run_went_on_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", "resnet")
    (folder / "finished.yaml").unlink()
    record = read_run(folder)
    assert (record.state, record.points) == ("resumable", [])
    assert "went on after its last test" in record.why


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_run_has_the_figures_that_its_files_allow(
    method: str, tmp_path: Path, pictures: None
) -> None:
    folder = make_run(tmp_path / "run", method)
    html = report(folder, out=tmp_path / "out")
    assert figures_in(html) == COMPARED | OF_METHOD[method]
    pictures = list((tmp_path / "out/figures").iterdir())
    assert len(pictures) == len(specs(html))
    for path in pictures:
        with Image.open(path) as image:
            assert image.width > 800
    text = (tmp_path / "out/report.md").read_text()
    assert all(f"(figures/{path.name})" in text for path in pictures)


def test_run_figures_are_pictures_by_name(tmp_path: Path, pictures: None) -> None:
    figures = run_figures(make_run(tmp_path / "run", "slimmable"))
    assert figures.keys() == COMPARED | OF_METHOD["slimmable"]
    assert all(Image.open(io.BytesIO(content)).format == "PNG" for content in figures.values())


def test_an_old_run_lacks_what_is_new_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "msdnet", is_old=True)
    html = report(tmp_path, out=tmp_path / "out")
    assert figures_in(html) == COMPARED | OF_EXITS - {"exit_images", "exit_calibration"}
    assert "ECE" not in html


def test_an_experiment_keeps_its_colour_in_every_figure(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "resnet", gpu="NVIDIA H200", accelerator="gpu")
    make_run(tmp_path / "b", "slimmable")
    colours = set()
    for spec in specs(report(tmp_path, out=tmp_path / "out")).values():
        for layer in spec.get("layer", ()):
            channel = layer["encoding"].get("color", {})
            if channel.get("field") == "experiment" and "w0.25" not in str(channel):
                scale = channel["scale"]
                colours |= set(zip(scale["domain"], scale["range"], strict=True))
    assert len(colours) == 2


def test_many_classes_are_told_instead_of_drawn(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "resnet", classes=[f"c{i}" for i in range(101)])
    html = report(folder, out=tmp_path / "out")
    assert "confusion" not in figures_in(html)
    assert "No confusion matrix of 101 classes is drawn" in html


def test_long_learning_curves_are_thinned(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "resnet", epochs=3000)
    html = report(folder, out=tmp_path / "out")
    (chart,) = (spec for name, spec in specs(html).items() if "learning_loss" in name)
    rows = chart["data"]["values"]
    validation = [row for row in rows if row["of"] == "validation"]
    assert len(validation) <= 200
    assert (validation[0]["epoch"], validation[-1]["epoch"]) == (1, 3000)


def test_columns_are_found_by_name(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "msdnet")
    expected = specs(report(folder, out=tmp_path / "a"))
    with (folder / "exit_entropy.csv").open() as file:
        header, *rows = [[*row[2:], *row[:2]] for row in csv.reader(file)]
    write_csv(folder / "exit_entropy.csv", header, rows)
    found = specs(report(folder, out=tmp_path / "b"))
    (name,) = (name for name in found if name.endswith("exit_entropy"))
    assert found[name] == expected[name]


def test_images_of_elsewhere_are_not_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "msdnet")
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    header = ("exit", "kind", "rank", "file", "true", "predicted", "score")
    rows = [("exit1", "easiest", 1, name, "1", "1", 1) for name in ("../secret.png", "none.png")]
    write_csv(folder / "exit_images.csv", header, rows)
    html = report(folder, out=tmp_path / "out")
    assert "exit_images" not in figures_in(html)
    assert "could not be read" in html


# --- whatever is in a folder ----------------------------------------------------------------------


def test_hostile_names_are_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "_")
    classes = [HOSTILE, *CLASSES[1:]]
    paper = {"source": HOSTILE, "test_acc": {HOSTILE: 0.5}}
    folder = make_run(tmp_path / name, "msdnet", points=[HOSTILE, "full"], classes=classes)
    content = config_of(folder) | {"paper": paper}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    html = report(tmp_path, out=tmp_path / "out")
    assert "<script>alert" not in html
    assert HOSTILE.split("\n")[0] in json.dumps(specs(html), ensure_ascii=False).replace('\\"', '"')
    assert points(tmp_path / "out")[0]["point"] == HOSTILE
    lines = (tmp_path / "out/report.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if re.search(r"(?<!\\)<script", line)]


def config_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text())


GARBAGE = {
    "bytes": bytes(range(256)) * 4,
    "nul": b"a,b\n\0,1\n",
    "nothing": b"",
    "list": b"- 1\n- [2, 3]\n",
    "text": b"just words, and\nmore, words, than, columns\n",
    "nested": b"[" * 5000,
    "cycle": b"a: &x\n  b: *x\nmodel: &y\n  init_args: *y\n",
    "number": b"name,test_acc\nfull," + b"9" * 5000 + b"\n",
    "odd": b"model: 3\ndata: [1]\ntrainer: {max_epochs: many, callbacks: 7}\npaper: yes\n",
    "quote": b'name,test_acc\n"full,0.5\n',
}
FILES = (
    *("config.yaml", "attempts.yaml", "finished.yaml", "metrics.csv", "operating_points.csv"),
    *("last.ckpt", "best.ckpt", "survival.csv", "exits.csv", "exit_entropy.csv", "exit_curve.csv"),
    *("recalibration.csv", "confusion.csv", "exit_images.csv"),
)


@pytest.mark.parametrize("kind", GARBAGE)
def test_damaged_files_are_told_and_stop_nothing(kind: str, tmp_path: Path) -> None:
    """Every file of a run in turn; one report over all of them, and a sound run beside."""
    make_run(tmp_path / "runs/sound/x/seed0", "resnet")
    for i, file in enumerate(FILES):
        folder = make_run(tmp_path / f"runs/msdnet/x/seed{i}", "msdnet", i)
        (folder / file).write_bytes(GARBAGE[kind])
        record = read_run(folder)
        assert "\n" not in record.why
        if record.state == "broken":
            assert file in record.why
    out = tmp_path / "out"
    _, records = write_report([tmp_path / "runs"], out)
    assert len(records) == len(FILES) + 1
    assert (out / "index.html").read_text().count("<tr") > len(FILES)


@pytest.mark.parametrize(
    ("file", "content", "why"),
    [
        ("config.yaml", b"a: [", "config.yaml is no YAML"),
        ("config.yaml", None, "there is no config.yaml that says what is trained"),
        ("metrics.csv", b"\xff\xfe\x00", "metrics.csv is no CSV"),
        ("operating_points.csv", b"a,b\n1,2\n", "operating_points.csv has no column name"),
        ("operating_points.csv", b"name,test_acc\nfull,98\n", "no number in 0..1"),
        ("operating_points.csv", b"name,test_acc\nfull,nan\n", "no number in 0..1"),
        ("last.ckpt", b"PK\x03\x04", "last.ckpt is damaged"),
        ("best.ckpt", b"", "best.ckpt is damaged"),
    ],
)
def test_a_broken_run_says_why(file: str, content: bytes | None, why: str, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "resnet")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    record = read_run(folder)
    assert record.state == "broken"
    assert why in record.why
    assert why in (report(folder, out=tmp_path / "out"))


def test_a_run_that_never_began_says_why(tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text(
        "main.py fit\nTraceback\n  ...\nValueError: no such width\n\n"
    )
    record = read_run(tmp_path)
    assert (record.state, record.why) == (
        "broken",
        "training never began: ValueError: no such width",
    )


def test_a_link_in_a_circle_is_walked_once(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs/resnet/x/seed0", "resnet")
    (tmp_path / "runs/resnet/again").symlink_to(tmp_path / "runs")
    (folder / "wandb/files").mkdir(parents=True)
    (folder / "wandb/files/config.yaml").write_text("{}")
    _, records = write_report([tmp_path / "runs", folder], tmp_path / "out")
    assert [record.path for record in records] == [folder]


def test_figures_leave_the_lock_to_who_trains(tmp_path: Path) -> None:
    """A process that closes a file of its own lock lets go of it."""
    folder = make_run(tmp_path / "run", "resnet")
    with (folder / "lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        run_figures(folder)
        code = (
            "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        )
        attempt = [sys.executable, "-c", code, folder / "lock"]
        assert subprocess.run(attempt, stderr=subprocess.DEVNULL).returncode != 0


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words", "message"),
    [
        (None, ["none"], "none does not exist"),
        ("folder", ["folder"], "folder is no run folder and holds none"),
        ("file", ["file"], "file is a file"),
        ("run", ["run", "--out", "file"], "file is a file: pass another --out"),
        ("run", ["run", "--out", "run"], "which is of no report"),
        ("run", ["run", "--out", "folder"], "folder holds notes.txt"),
        ("run", ["run", "--out", "file/x"], "cannot write file/x"),
        ("run", [], "the following arguments are required: RUN"),
    ],
)
def test_a_mistake_is_one_line(
    make: str | None,
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/notes.txt").touch()
    Path("file").touch()
    if make == "run":
        make_run(Path("run"), "resnet")
    before = sorted(Path().rglob("*"))
    assert main(["report", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert message in line
    assert sorted(Path().rglob("*")) == before


def test_an_older_report_is_replaced_whole(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "slimmable")
    make_run(tmp_path / "b", "resnet")
    out = tmp_path / "out"
    report(tmp_path / "a", out=out)
    report(tmp_path / "b", out=out)
    assert not list((out / "figures").glob("*recalibration*"))
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "out"}


def test_a_page_that_is_no_report_is_kept(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "resnet")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.html").write_text("<h1>mine</h1>")
    with pytest.raises(ValueError, match="is no report"):
        write_report([tmp_path / "a"], tmp_path / "out")


def test_twelve_runs_fit_into_five_megabytes(tmp_path: Path) -> None:
    make_all(tmp_path / "runs", epochs=300)
    html = report(tmp_path / "runs", out=tmp_path / "out")
    assert len(html.encode()) < 5e6
    assert html.count("vegaEmbed=") == 1  # the libraries are there once


# --- what is really trained -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["msdnet", "stochastic_depth"])
def test_a_real_run_is_read(method: str, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config(method)))
    status, output = run_main(["fit", "-c", "small.yaml"], tmp_path)
    assert status == 0, output
    (folder,) = (tmp_path / "runs").glob("*/small/seed7")
    record = read_run(folder)
    assert (record.state, record.why, record.seed, record.data) == ("finished", "", 7, "Digits")
    assert (record.experiment, record.history.epoch) == (f"{method}/small", 3)
    with (folder / "operating_points.csv").open() as file:
        there = {row["name"]: float(row["test_acc"]) for row in csv.DictReader(file)}
    assert {point.name: point.test_acc for point in record.points} == there
    assert record.device
    assert record.history.best == max(record.history.curves["val/acc"].values())
    found = figures_in(report(folder, out=tmp_path / "out"))
    assert found >= COMPARED
    assert found >= ({"exit_share", "exit_entropy"} if method == "msdnet" else {"survival"})


@pytest.mark.slow
def test_five_hundred_runs(tmp_path: Path, pictures: None) -> None:
    """Prints how long they took (`pytest -s`): a busy machine fails no test."""
    for data, method in itertools.product(("Digits", "CIFAR10"), METHODS):
        for seed in range(42):
            folder = tmp_path / "runs" / method / data.lower() / f"seed{seed}"
            make_run(folder, method, seed, data=data, epochs=100)
    start, cpu = time.perf_counter(), time.process_time()
    _, records = write_report([tmp_path / "runs"], tmp_path / "out")
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(f"{len(records)} runs in {seconds:.1f} s, {cpu:.1f} s of them on a core")
    assert len(records) == 504
    groups = experiments_of(records)
    assert {len(group) for group in groups.values()} == {6}
    assert all(len(each.seeds) == 42 for group in groups.values() for each in group)
    assert run_folders.METHODS.keys() == {each.name.split("/")[0] for each in groups["Digits"]}


def test_a_limit_that_is_not_given_is_its_default() -> None:
    """As `fit` takes it, which goes on with such a run."""
    given = {"trainer": {"limit_train_batches": 1.0, "val_check_interval": 1.0}}
    assert settings({"trainer": {"limit_train_batches": None}}) == settings(given)
    assert settings({"trainer": {"limit_train_batches": 0.5}}) != settings(given)

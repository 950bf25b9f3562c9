"""From a run folder to a network that answers: the answers are those of the trained module."""

import ast
import random
import shutil
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import launch
import methods
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import LightningDataModule
from quiet import quiet_trainer
from test_cli import change, start_training

from datamodules import DigitsDataModule, ImageFolderDataModule
from lightning_modules import ImageClassifier
from networks import count_exit_macs, early_exit
from running import LoadedRun, load_run, loading

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run", "--test_after_fit=false"]
INIT = "model__init_args__"


def train(folder: Path, method: str, **changes: Any) -> Path:
    """Trains a few steps of a row and returns the run folder; `a__b=1` changes the key a.b."""
    config = methods.config(method)
    callbacks = config["trainer"]["callbacks"]
    wanted = [each for each in callbacks if each["class_path"] == "callbacks.BNRecalibration"]
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 3, "callbacks": wanted}
    for path, value in changes.items():
        change(config, path.replace("__", "."), value)
    folder.mkdir(exist_ok=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    status, output = launch.run(COMMAND, folder)
    assert status == 0, output
    return folder / "run"


@pytest.fixture
def copied(trained, tmp_path: Path) -> Path:
    """A run of its own, to be damaged."""
    return shutil.copytree(trained("resnet"), tmp_path / "copy")


def test_bytes(data: LightningDataModule) -> torch.Tensor:
    data.setup("test")
    return torch.cat([batch[0] for batch in data.test_dataloader()])


test_bytes.__test__ = False


def as_trained(run: Path, module: ImageClassifier, data: Any) -> dict[str, torch.Tensor]:
    """Tests a module with a run's checkpoint, as Lightning loads it; returns logits by point."""
    quiet_trainer(run.parent).test(module, data, ckpt_path=run / "best.ckpt", verbose=False)
    images = torch.cat([data.on_after_batch_transfer(x, 0)[0] for x in data.test_dataloader()])
    with torch.no_grad():
        return {name: point(images) for name, point in module.eval().operating_points().items()}


@pytest.mark.parametrize("method", methods.EXPENSIVE)
def test_points_are_those_of_the_trained_module(
    method: str, trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, from another working directory, and without the data set."""
    data = DigitsDataModule(eval_batch_size=360)
    images = test_bytes(data)
    reference = as_trained(trained(method), methods.build(methods.METHODS[method]), data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    run = load_run(shutil.copytree(trained(method), tmp_path / "moved"))
    assert run.points == list(reference)
    assert run.class_names == list("0123456789")
    for name, logits in reference.items():
        point = run.point(name)
        with torch.no_grad():
            assert torch.equal(point.run(run.image_format.normalize(images)), logits)
        answers = point.classify(images, batch_size=360)
        assert torch.equal(answers.probabilities, logits.softmax(1))
        assert torch.equal(answers.labels, logits.argmax(1))
        assert (answers.exits is None) == (point.thresholds is None)


def draw_images(folder: Path, splits: tuple[str, ...], count: int = 4) -> None:
    """Writes pictures of odd sizes and kinds, of two classes."""
    chance = np.random.RandomState(0)
    for number in range(count):
        for split in splits:
            for name, mode in (("cat", "RGB"), ("dog", "L")):
                shape = (41 + 7 * number, 67 - 3 * number, 3)[: 3 if mode == "RGB" else 2]
                (folder / split / name).mkdir(parents=True, exist_ok=True)
                pixels = chance.randint(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")


def test_run_of_an_image_folder_without_the_folder(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "there"
    draw_images(folder / "images", ("train", "val"))
    arguments = {"image_size": 32, "num_workers": 0, "batch_size": 4, "eval_batch_size": 8}
    spec = {
        "class_path": "datamodules.ImageFolderDataModule",
        "init_args": {"data_dir": "images", **arguments},
    }
    net = INIT + "net__init_args__"
    changes = {net + "in_channels": 3, net + "num_classes": 2, "trainer__limit_train_batches": 1}
    run = train(folder, "resnet", data=spec, **changes)
    data = ImageFolderDataModule(str(folder / "images"), **arguments)
    row = methods.METHODS["resnet"]
    network = {**methods.SMALL_NET["init_args"], "in_channels": 3, "num_classes": 2}
    row = {**row, "init_args": {"net": {**methods.SMALL_NET, "init_args": network}}}
    logits = as_trained(run, methods.build(row), data)["full"]

    kept = shutil.move(folder / "images/val", tmp_path / "kept")
    shutil.rmtree(folder / "images")
    monkeypatch.chdir(tmp_path)
    loaded = load_run("there/run")
    assert loaded.class_names == ["cat", "dog"]
    paths = sorted(Path(kept).rglob("*.png"))
    for images in (paths, map(str, paths), [Image.open(path) for path in paths]):
        answers = loaded.point().classify(images)
        assert torch.equal(answers.probabilities, logits.softmax(1))


def test_exits_are_those_of_early_exit(trained) -> None:
    run = load_run(trained("branchynet"))
    images = test_bytes(DigitsDataModule())
    pixels = run.image_format.normalize(images)
    assert list(run.thresholds) == ["adaptive_lossless", "adaptive_knee", "adaptive_best"]
    scores = [torch.distributions.Categorical(logits=x).entropy() for x in run.net(pixels)]
    halves = [values.median().item() for values in scores[:2]]
    run.module.given_thresholds = halves
    point = run.point("adaptive")
    logits, index = early_exit(run.net, pixels, halves)
    answers = point.classify(images, batch_size=len(images))
    assert torch.equal(answers.exits, index + 1)
    assert torch.equal(answers.probabilities, logits.softmax(1))
    assert index.unique().tolist() == [0, 1, 2]

    streamed = list(point.classify_stream(images.split(50), batch_size=50))
    assert [len(each.labels) for each in streamed] == [50] * 7 + [10]
    exits, probs = (torch.cat([each[k] for each in streamed]) for k in (2, 0))
    assert torch.equal(exits, index + 1)
    torch.testing.assert_close(probs, answers.probabilities, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["budget_macs", "budget_ms"])
def test_a_budget_is_kept(name: str, trained, tmp_path: Path, monkeypatch) -> None:
    """The milliseconds are as many as the MACs, so that no clock decides about the test."""
    monkeypatch.setattr(
        "lightning_modules.msdnet.time_exits", lambda net, images: count_exit_macs(net, images[:1])
    )
    run = shutil.copytree(trained("msdnet"), tmp_path / "copy")
    unlimited = load_run(run)
    assert "adaptive" not in unlimited.points
    costs = count_exit_macs(unlimited.net, torch.zeros(1, 1, 32, 32)).leaving
    budget = {name: 0.6 * costs[1] + 0.4 * costs[2]}
    edit_config(run, **{INIT + name: budget[name]})
    loaded = load_run(run)
    data = DigitsDataModule()
    row = methods.METHODS["msdnet"]
    module = methods.build({**row, "init_args": {**row["init_args"], **budget}})
    reference = as_trained(run, module, data)["adaptive"]
    assert loaded.thresholds["adaptive"] == module.given_thresholds
    probs = loaded.point("adaptive").classify(test_bytes(data), 360).probabilities
    assert torch.equal(probs, reference.softmax(1))


def test_nothing_of_the_caller_is_changed(trained, monkeypatch) -> None:
    """And nothing that the caller has set changes the answers."""
    images = test_bytes(DigitsDataModule())[:8]
    expected = load_run(trained("stochastic_depth")).point().classify(images)
    seen = []
    for _ in range(2):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        if seen:
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
        try:
            run = load_run(trained("stochastic_depth"))
            answers = run.point().classify(images)
            assert torch.get_default_dtype() == (torch.float64 if seen else torch.float32)
            assert torch.get_default_device().type == ("meta" if seen else "cpu")
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert torch.equal(answers.probabilities, expected.probabilities)
        assert torch.is_grad_enabled()
        assert not answers.probabilities.requires_grad
        seen.append((torch.get_rng_state().tolist(), np.random.rand(), random.random()))
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    assert seen == [(torch.get_rng_state().tolist(), np.random.rand(), random.random())] * 2


def test_averaged_weights_answer(tmp_path: Path) -> None:
    """A checkpoint calls them its weights; those of the latest step are beside them."""
    average = {
        "class_path": "pytorch_lightning.callbacks.EMAWeightAveraging",
        "init_args": {"decay": 0.5},
    }
    run = train(tmp_path / "there", "resnet", trainer__callbacks=[average])
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    weights, latest = checkpoint["state_dict"], checkpoint["current_model_state"]
    loaded = load_run(run).module.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())
    assert not torch.equal(loaded["net.conv1.weight"], latest["net.conv1.weight"])
    reference = as_trained(run, methods.build(methods.METHODS["resnet"]), DigitsDataModule())
    images = test_bytes(DigitsDataModule())
    probs = load_run(run).point().classify(images, 360).probabilities
    torch.testing.assert_close(probs, reference["full"].softmax(1))


def test_a_run_that_is_training_is_loaded(tmp_path: Path) -> None:
    process = start_training(tmp_path)
    images = test_bytes(DigitsDataModule())[:4]
    steps = set()
    try:
        while len(steps) < 3:
            run = load_run(tmp_path / "run", "last")
            run.point().classify(images)
            steps.add(torch.load(run.checkpoint, weights_only=True)["global_step"])
            assert process.is_alive()
    finally:
        process.kill()
        process.join()


def test_the_rule_of_the_run_selects_the_checkpoint(copied: Path) -> None:
    assert load_run(copied).checkpoint.name == "best.ckpt"
    assert load_run(copied, "last").checkpoint.name == "last.ckpt"
    edit_config(copied, checkpoint__select="last")
    assert load_run(str(copied)).checkpoint.name == "last.ckpt"
    assert load_run(copied, "best", torch.device("cpu")).checkpoint.name == "best.ckpt"


def test_the_lines_of_the_documentation_run(trained, tmp_path: Path, capsys, monkeypatch) -> None:
    lines = textwrap.dedent(loading.__doc__.split("\n\n", 1)[1].split("\n\nNothing")[0])
    run = trained("universally_slimmable")
    for there, here in (("runs/slimmable/digits_us/seed0", str(run)), ("w0.5", "w0.6")):
        assert lines.count(there) == 1
        lines = lines.replace(there, here)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.png", "b.jpg")):
        Image.new("L", (32, 32), 99 * number).save(name)
    exec(lines, {})
    labels, probs = capsys.readouterr().out.split("] ")
    assert set(ast.literal_eval(labels + "]")) <= set("0123456789")
    assert probs.startswith("tensor([0.")


NET = INIT + "net__"


def test_classes_of_the_users_own(copied: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "of_the_user.py").write_text(
        "from networks import CifarResNet\nclass Mine(CifarResNet): pass\n"
    )
    edit_config(copied, **{NET + "class_path": "of_the_user.Mine"})
    with pytest.raises(ValueError, match="of_the_user") as caught:
        load_run(copied)
    assert "classes of your own must be on PYTHONPATH" in str(caught.value)
    assert "\n" not in str(caught.value)
    monkeypatch.syspath_prepend(tmp_path)
    assert type(load_run(copied).net).__name__ == "Mine"


# --- mistakes -------------------------------------------------------------------------------------


def edit_config(run: Path, **changes: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    for path, value in changes.items():
        change(config, path.replace("__", "."), value)
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def edit_checkpoint(run: Path, edit: Callable[[dict], Any]) -> None:
    content = torch.load(run / "best.ckpt", weights_only=True)
    edit(content)
    torch.save(content, run / "best.ckpt")


def damage(run: Path) -> None:
    content = bytearray((run / "best.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    (run / "best.ckpt").write_bytes(content)


def make_outer(run: Path) -> None:
    shutil.copytree(run, run / "seed0")
    (run / "config.yaml").unlink()


BAD_RUNS = {
    "no folder": (shutil.rmtree, "there is no folder "),
    "no config": (lambda run: (run / "config.yaml").unlink(), "it holds no config.yaml"),
    "outer folder": (make_outer, "no config.yaml, give one of those in it: seed0"),
    "no YAML": (lambda run: (run / "config.yaml").write_text("{"), "config.yaml is no YAML"),
    "no model": (lambda run: (run / "config.yaml").write_text("a: 1"), "names no model"),
    "no best": (
        lambda run: (run / "best.ckpt").unlink(),
        "holds no best.ckpt: choose checkpoint 'last'",
    ),
    "no checkpoint": (
        lambda run: [(run / f"{name}.ckpt").unlink() for name in ("best", "last")],
        "holds no best.ckpt: train it first (fit)",
    ),
    "newer version": (
        lambda run: edit_checkpoint(run, lambda content: content["run"].update(format=99)),
        "was written by a newer version of this project (its format is 99",
    ),
    "older version": (
        lambda run: edit_checkpoint(run, lambda content: content["run"].update(format=1)),
        "was written by an older version of this project (its format is 1",
    ),
    "foreign checkpoint": (
        lambda run: edit_checkpoint(run, lambda content: content.pop("run")),
        "is no checkpoint of a run of this project",
    ),
    "no image format": (
        lambda run: edit_checkpoint(run, lambda content: content.pop("images")),
        "does not say what images it takes",
    ),
    "damaged": (damage, "or is damaged: copy another over it"),
    "class that is gone": (
        lambda run: edit_config(run, model__class_path="lightning_modules.LitGone"),
        "LitGone",
    ),
    "network that is gone": (
        lambda run: edit_config(run, **{NET + "class_path": "networks.Gone"}),
        "networks.Gone",
    ),
    "argument that is gone": (
        lambda run: edit_config(run, **{NET + "init_args__gone": 3}),
        "gone",
    ),
    "another network": (
        lambda run: edit_config(run, **{NET + "init_args__depth": 14}),
        "the checkpoint is of another network",
    ),
    "rule that is gone": (
        lambda run: edit_config(run, checkpoint__select="first"),
        "checkpoint is 'first': give best or last",
    ),
}


@pytest.mark.parametrize("name", BAD_RUNS)
def test_what_is_no_run_is_told_in_a_line(name: str, copied: Path) -> None:
    spoil, message = BAD_RUNS[name]
    spoil(copied)
    with pytest.raises((ValueError, OSError)) as caught:
        load_run(copied)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_unknown_point_names_those_there_are(trained) -> None:
    run = load_run(trained("universally_slimmable"))
    with pytest.raises(ValueError, match=r"no operating point 'w0\.65': w0\.6, w0\.25, full"):
        run.point("w0.65")
    with pytest.raises(ValueError, match=r"no operating point 'Full': full"):
        run.point("Full")


def test_point_without_statistics_is_refused(trained, tmp_path: Path) -> None:
    run = shutil.copytree(trained("universally_slimmable"), tmp_path / "copy")
    edit_config(run, **{INIT + "eval_widths": [0.25, 0.5, 1.0]})
    loaded = load_run(run)
    loaded.point("w0.25")
    with pytest.raises(ValueError, match=r"has no BN statistics of the point w0\.5"):
        loaded.point("w0.5")


def test_stale_thresholds_are_told(trained, tmp_path: Path) -> None:
    run = shutil.copytree(trained("branchynet"), tmp_path / "copy")
    edit_checkpoint(run, lambda content: content.update(global_step=content["global_step"] + 5))
    loaded = load_run(run)
    loaded.point("exit1")
    with pytest.warns(UserWarning, match="were found 5 steps before this checkpoint"):
        loaded.point("adaptive_knee")


@pytest.mark.parametrize("name", ["nonsense", "cuda:77"])
def test_unknown_device(name: str, copied: Path) -> None:
    with pytest.raises(ValueError, match=f"there is no device '{name}'") as caught:
        load_run(copied, device=name)
    assert "\n" not in str(caught.value)


BYTES = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
BAD_IMAGES = {
    "floats": (BYTES.float(), r"are \(2, 1, 32, 32\) of torch.float32: give torch.uint8 of \(N, 1"),
    "one image": (BYTES[0], r"are \(1, 32, 32\) of torch.uint8"),
    "size": (BYTES[..., :28], r"are \(2, 1, 32, 28\)"),
    "channels": (BYTES.repeat(1, 3, 1, 1), r"are \(2, 3, 32, 32\)"),
    "no tensor rows": (BYTES[:0], "no images"),
    "no list": ([], "no images"),
    "numbers": ([3], "image 0 is of int"),
    "arrays": (BYTES.numpy(), "image 0 is of ndarray"),
    "missing file": (["nowhere.png"], "cannot decode the image nowhere.png"),
    "floating pixels": ([Image.new("F", (32, 32))], "image 0 cannot be used: its pixels are float"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_do_not_fit(name: str, trained) -> None:
    images, message = BAD_IMAGES[name]
    with pytest.raises(ValueError, match=message) as caught:
        load_run(trained("resnet")).point().classify(images)
    assert "\n" not in str(caught.value)


def test_network_in_training_mode_is_refused(trained) -> None:
    run: LoadedRun = load_run(trained("resnet"))
    run.net.train()
    with pytest.raises(ValueError, match="in training mode"):
        run.point().classify(BYTES)


def test_broken_weights_are_refused(trained) -> None:
    for method in ("resnet", "branchynet"):
        run = load_run(trained(method))
        next(run.net.parameters()).data[0] = torch.nan
        for point in ("full", *run.thresholds):
            with pytest.raises(FloatingPointError, match="not finite"):
                run.point(point).classify(BYTES)

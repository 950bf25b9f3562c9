"""`python main.py export`: from a run folder to files that work without this project."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import yaml
from launch import run as launch
from methods import METHODS, OF_ANY_WIDTH, config

from datamodules import DigitsDataModule
from running import load_run
from running.command_line import main

# The numbers of these runs are nobody's: what is asked is whether files answer as checkpoints do.


def train(folder: Path, method: str) -> Path:
    """Trains a few steps of a method in a folder, and returns that of the run."""
    experiment = config(method)
    experiment["trainer"] |= {"max_epochs": 1, "limit_val_batches": 1, "callbacks": []}
    if method in OF_ANY_WIDTH:
        callback = {"class_path": "callbacks.BNRecalibration", "init_args": {"num_images": 64}}
        experiment["trainer"]["callbacks"] = [callback]
    folder.mkdir(exist_ok=True)
    (folder / "a.yaml").write_text(yaml.safe_dump(experiment))
    status, output = launch(["fit", "-c", "a.yaml", "--run_dir", method], folder)
    assert status == 0, output
    return folder / method


@pytest.fixture(scope="module")
def branchynet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs"), "branchynet")


def test_mistakes_are_one_line(
    branchynet: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run = ["export", "--run", str(branchynet)]
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    mistakes = [
        (["export", "--run", str(tmp_path)], "holds no config.yaml"),
        ([*run, "--point", "exit7"], "has no operating point 'exit7': exit1, exit2, "),
        ([*run, "--format", "tflite"], "invalid choice: 'tflite'"),
        ([*run, "--point", "adaptive_knee", "--format", "torch"], "use --format onnx"),
        ([*run, "--out", str(tmp_path / "file" / "a.onnx")], "give another --out"),
        ([*run, "--out", str(tmp_path / "file")], "give --overwrite, or another --out"),
        ([*run, "--images", str(tmp_path / "empty")], "no images found"),
    ]
    for arguments, message in mistakes:
        assert main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(run) == 2
    assert "pip install -e '.[export]'" in capsys.readouterr().err
    assert not (branchynet / "export").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_what_differs_from_the_checkpoint_is_not_written(
    branchynet: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import running.exporting.files as files

    def spoiled(piece):
        model = to_onnx(piece)
        weights = model.graph.initializer[0]
        values = onnx.numpy_helper.to_array(weights)
        weights.CopyFrom(onnx.numpy_helper.from_array(1.5 * values + 0.5, weights.name))
        return model

    to_onnx = files.to_onnx
    monkeypatch.setattr(files, "to_onnx", spoiled)
    assert main(["export", "--run", str(branchynet), "--point", "exit1"]) == 2
    assert "not written, as it differs from the checkpoint" in capsys.readouterr().err
    assert not (branchynet / "export").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_point_of_every_method(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = train(tmp_path, method)
    for point in load_run(run).points:
        for kind in ("onnx", "torch"):
            leaves_early = point in load_run(run).thresholds
            status = main(
                ["export", "--run", str(run), "--point", point, "--format", kind, "--overwrite"]
            )
            assert status == (2 if leaves_early and kind == "torch" else 0)
    printed = capsys.readouterr().out
    assert "360 images: probabilities differ by" in printed
    assert "360 same classes" in printed


BLOCKED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "networks", "running", "datamodules"}:
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocker())
"""
ALONE = """
import json, runpy
import numpy as np, onnxruntime
folder, images = sys.argv[1:]
images = np.load(images)
batched = runpy.run_path(folder + "/adaptive_knee_stages/run.py")["EarlyExit"]()(images)
session = onnxruntime.InferenceSession(folder + "/adaptive_knee.onnx")
single = [session.run(None, {"images": images[i : i + 1]}) for i in range(len(images))]
facts = session.get_modelmeta().custom_metadata_map
exits = [int(taken[0]) for _, taken in single]
assert exits == batched[1].tolist()
assert all(np.allclose(a[0], b, atol=1e-5) for (a, _), b in zip(single, batched[0]))
assert not {"torch", "running"} & set(sys.modules)
print(json.dumps([exits, batched[0].argmax(1).tolist(), json.loads(facts["class_names"])]))
"""


@pytest.mark.slow
def test_files_work_without_torch_and_this_project(branchynet: Path, tmp_path: Path) -> None:
    run = load_run(branchynet)
    out = tmp_path / "adaptive_knee.onnx"
    arguments = ["export", "--run", str(branchynet), "--point", "adaptive_knee", "--out", str(out)]
    assert main(arguments) == 0
    data = DigitsDataModule()
    data.setup("test")
    images = next(iter(data.load_eval([torch.arange(50)], "test")))[0]
    np.save(tmp_path / "images.npy", images.numpy())
    script = [sys.executable, "-I", "-c", BLOCKED + ALONE, tmp_path, tmp_path / "images.npy"]
    result = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    exits, labels, names = json.loads(result.stdout)
    expected = run.point("adaptive_knee").run(run.image_format.normalize(images))
    assert labels == expected.argmax(1).tolist()
    assert names == [str(digit) for digit in range(10)]
    folder = tmp_path / "adaptive_knee_stages"
    assert len((folder / "run.py").read_text().splitlines()) <= 60
    shown = subprocess.run(
        [sys.executable, "-I", str(folder / "run.py"), str(tmp_path / "images.npy")],
        capture_output=True,
        text=True,
    )
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert [(int(label), int(taken)) for label, _, taken in lines] == [
        *zip(labels, exits, strict=True)
    ]

"""Averaged weights are what is validated, selected, tested, loaded, predicted with and exported.

The average is computed by hand, in float64, from the weights of every step.
"""

import csv
from pathlib import Path
from typing import Any

import launch
import methods
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EMAWeightAveraging
from quiet import quiet_trainer
from torch import Tensor

from datamodules import DigitsDataModule
from lightning_modules import ImageClassifier
from running import RunCheckpoint, command_line, load_run

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run"]
DECAY = 0.6


class ByHand(Callback):
    """Averages weights and BN statistics, and writes the average down at every validation."""

    only_observes = True

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        self.num_steps = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.num_steps:
            return  # within a step of several batches
        self.num_steps = trainer.global_step
        state = {k: v.double() for k, v in pl_module.state_dict().items() if v.is_floating_point()}
        old = self.average or state
        self.average = {k: self.decay * old[k] + (1 - self.decay) * v for k, v in state.items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(self.average, Path(trainer.default_root_dir, f"{trainer.global_step}.pt"))


def experiment(folder: Path, method: str, **average: Any) -> None:
    config = methods.config(method)
    config["trainer"] |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
    config["trainer"]["callbacks"] = [
        {"class_path": "test_averaging.ByHand", "init_args": {"decay": DECAY}},
        {
            "class_path": "pytorch_lightning.callbacks.EMAWeightAveraging",
            "init_args": {"decay": DECAY, **average},
        },
    ]
    config["model"]["init_args"]["recipe"] = {"label_smoothing": 0.1, "mixup_alpha": 0.2}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))


def answers_by_hand(module: ImageClassifier, average: dict[str, Tensor], images: Tensor) -> Any:
    """Returns the logits, by exit or width, of the averaged weights in float64."""
    module = module.double().eval()
    missing = module.load_state_dict(average, strict=False).missing_keys
    assert all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        points = module.evaluated_points().items()
        return {name: point(images.double()) for name, point in points}


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "exports"), [("branchynet", False), ("slimmable", True)])
def test_average_is_what_counts(method: str, exports: bool, tmp_path: Path) -> None:
    experiment(tmp_path, method)
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 0, output
    run = tmp_path / "run"
    data = DigitsDataModule(eval_batch_size=360)
    data.setup("fit")
    ((val, val_labels),), ((test, test_labels),) = (
        [(data.on_after_batch_transfer(batch, 0)[0], batch[1]) for batch in loader]
        for loader in (data.val_dataloader(), data.test_dataloader())
    )

    def by_hand(checkpoint: str, images: Tensor) -> dict[str, Tensor]:
        """And compares the weights of a checkpoint: parameters and BN statistics."""
        saved = torch.load(run / checkpoint, weights_only=True)
        average = torch.load(run / f"{saved['global_step']}.pt", weights_only=True)
        latest = saved["current_model_state"]
        for key, value in average.items():
            torch.testing.assert_close(
                saved["state_dict"][key].double(), value, rtol=1e-4, atol=1e-6
            )
        assert any("running_var" in key for key in average)
        assert any((latest[key] - value).abs().max() > 1e-2 for key, value in average.items())
        built = methods.build(methods.METHODS[method])
        return answers_by_hand(built, average, images)

    # Validated, and selected by that: of the last epochs, as `last.ckpt` holds it, and the best.
    known = [row for row in read(run / "metrics.csv") if row["val/acc"]]
    scores = [float(row["val/acc"]) for row in known]
    saved = torch.load(run / "best.ckpt", weights_only=True)
    best = [int(row["step"]) + 1 for row in known][int(np.argmax(scores))]
    assert saved["global_step"] == best
    for name, score in (("last.ckpt", scores[-1]), ("best.ckpt", max(scores))):
        assert score == pytest.approx(accuracy(by_hand(name, val)["full"], val_labels))
    if method == "branchynet":  # thresholds are found for the average
        found = saved["exit_thresholds"]["last_accuracy"]
        assert found == pytest.approx(max(scores))

    # Tested, loaded, predicted with and exported.
    expected = by_hand("best.ckpt", test)
    tested = {row["name"]: float(row["test_acc"]) for row in read(run / "operating_points.csv")}
    loaded = load_run(run)
    pixels = next(iter(data.test_dataloader()))[0]
    for name, logits in expected.items():
        assert tested[name] == pytest.approx(accuracy(logits, test_labels))
        probs = loaded.point(name).classify(pixels, 360).probabilities
        torch.testing.assert_close(probs.double(), logits.softmax(1), rtol=1e-3, atol=1e-4)
    assert_predicted(run, pixels[:12], expected["full"].softmax(1)[:12])
    if exports:
        assert_exported(run, pixels[:12], expected["full"].softmax(1)[:12])


def assert_predicted(run: Path, pixels: Tensor, probs: Tensor) -> None:
    images, out = run.parent / "images", run.parent / "out.csv"
    images.mkdir()
    for number, image in enumerate(pixels[:, 0].numpy()):
        Image.fromarray(image).save(images / f"{number:02}.png")
    options = ["--images", str(images), "--out", str(out), "--num_workers", "0"]
    assert command_line.main(["predict", "--run", str(run), "--point", "full", *options]) == 0
    told = [float(row["probability"]) for row in read(out)]
    assert told == pytest.approx(probs.amax(1).tolist(), abs=1e-3)


def assert_exported(run: Path, pixels: Tensor, probs: Tensor) -> None:
    assert command_line.main(["export", "--run", str(run), "--point", "full"]) == 0
    session = onnxruntime.InferenceSession(run / "export/full.onnx")
    exported = session.run(None, {"images": pixels.numpy()})
    assert any(np.allclose(each, probs.numpy(), atol=1e-3) for each in exported if each.ndim == 2)


@pytest.mark.parametrize("validates", [True, False])
def test_average_of_nothing_is_refused(validates: bool, tmp_path: Path) -> None:
    """Before its first update it is the weights that the network was made with."""
    average = EMAWeightAveraging(decay=DECAY, update_starting_at_step=1000)
    trainer = quiet_trainer(
        tmp_path,
        limit_train_batches=2,
        limit_val_batches=int(validates),
        enable_checkpointing=True,
        callbacks=[average, RunCheckpoint()],
    )
    with pytest.raises(ValueError, match="EMAWeightAveraging has averaged nothing yet"):
        trainer.fit(methods.build(methods.METHODS["resnet"]), datamodule=DigitsDataModule())
    assert trainer.global_step == 2

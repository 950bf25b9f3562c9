"""A run folder holds one experiment: what may differ when it is used again, and what may not."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import launch
import methods
import pytest
import torch
import yaml
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import LambdaCallback
from test_cli import assert_one_line, change
from torch.optim import Optimizer

from callbacks import ThroughputMonitor
from lightning_modules import ImageClassifier
from running import load_run
from running.checkpoint_checks import check_parts, check_structure
from running.experiment import evaluated, first_difference, renamed, trained
from running.given_callbacks import check_callbacks

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run"]
EMA = "--trainer.callbacks+=EMAWeightAveraging"


def write(folder: Path, **changes: Any) -> Path:
    """Writes an experiment of a few batches, without callbacks; `a__b=1` changes the key a.b."""
    config = methods.config("stochastic_depth")
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 2, "callbacks": None}
    for path, value in changes.items():
        change(config, path.replace("__", "."), value)
    folder.mkdir(exist_ok=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("finished"))
    status, output = launch.run(COMMAND, folder)
    assert status == 0, output
    return folder


def points(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


OTHER_TRAINING = {
    "batch size": (
        ["--data.batch_size=32"],
        "64 images per step (batch_size times processes), and this command has 32: set batch_size",
    ),
    "precision": (["--trainer.precision=bf16-mixed"], "precision is 32-true there and bf16-mixed"),
    "average": (
        [EMA],
        "trainer.callbacks.EMAWeightAveraging.class is None there and pytorch_lightning.callbacks",
    ),
    "schedule": (
        ["--model.init_args.lr_scheduler.init_args.milestones=[3]"],
        "milestones is [1, 2] there and [3] here",
    ),
}


@pytest.mark.parametrize("unfinished", [False, True], ids=["finished", "unfinished"])
@pytest.mark.parametrize("name", OTHER_TRAINING)
def test_another_training_is_refused(
    name: str, unfinished: bool, finished: Path, tmp_path: Path
) -> None:
    options, message = OTHER_TRAINING[name]
    folder = shutil.copytree(finished, tmp_path / "folder")
    if unfinished:
        (folder / "run/finished.yaml").unlink()
    before = (folder / "run/last.ckpt").read_bytes()
    assert_one_line(*launch.run([*COMMAND, *options], folder), message)
    assert (folder / "run/last.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    ("there", "here", "is_same"),
    [
        ({"limit_train_batches": 1.0}, {"limit_train_batches": 1}, False),
        ({"limit_val_batches": 1}, {"limit_val_batches": 1.0}, False),
        ({"val_check_interval": 1}, {}, False),
        ({"overfit_batches": 1.0}, {"overfit_batches": 1}, False),
        ({"limit_train_batches": None}, {"limit_train_batches": 1.0}, True),
        ({"overfit_batches": 0.0}, {}, True),
        ({"sync_batchnorm": True}, {"sync_batchnorm": False}, False),
    ],
)
def test_one_batch_is_not_all_of_them(there: Any, here: Any, is_same: bool) -> None:
    one, other = (trained({"trainer": each}) for each in (there, here))
    assert (first_difference(one, other) is None) == is_same


def test_how_a_network_runs_may_differ() -> None:
    """Memory-efficient or not, the numbers are the same."""
    one, other = (
        {"model": {"init_args": {"net": {"init_args": {"lazy": x, "memory_efficient": x}}}}}
        for x in (False, True)
    )
    assert first_difference(trained(one), trained(other)) is None
    assert first_difference(evaluated(one), evaluated(other)) is None


def test_argument_that_is_newer_than_the_run(finished: Path, tmp_path: Path) -> None:
    """Its default is what the run was trained with; another value is another experiment."""
    folder = shutil.copytree(finished, tmp_path / "folder")
    path = folder / "run/config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["model"]["init_args"]["net"]["init_args"]["stride_in_1x1"]
    config["checkpoint"]["mode"] = "max"  # which "auto" means for an accuracy
    path.write_text(yaml.safe_dump(config))
    for command in ("fit", "test"):
        status, output = launch.run([command, *COMMAND[1:]], folder)
        assert status == 0, output
    del config["model"]["init_args"]["net"]["init_args"]["conv_bias"]
    path.write_text(yaml.safe_dump(config))
    options = ["--model.init_args.net.init_args.conv_bias=true"]
    assert_one_line(*launch.run([*COMMAND, *options], folder), "conv_bias is False there and True")
    config["model"]["init_args"]["net"]["init_args"]["gone"] = 1
    path.write_text(yaml.safe_dump(config))
    assert_one_line(*launch.run(COMMAND, folder), "is of another version of this project")


def test_fewer_epochs_are_no_result_of_more(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "folder")
    assert launch.run([*COMMAND, "--trainer.max_epochs=2"], folder)[0] == 0
    message = "was trained for trainer.max_epochs=2, and this command asks for 1"
    assert_one_line(*launch.run(COMMAND, folder), message)


def test_steps_alone_are_a_limit(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", trainer__max_epochs=None, trainer__max_steps=2)
    assert launch.run(COMMAND, folder)[0] == 0
    status, output = launch.run(COMMAND, folder)
    assert status == 0, output
    assert "finished already" in output


def test_refused_run_stays_finished(tmp_path: Path) -> None:
    schedule = {"class_path": "lightning_modules.LinearDecayLR"}
    folder = write(tmp_path / "folder", model__init_args__lr_scheduler=schedule)
    assert launch.run(COMMAND, folder)[0] == 0
    files = {name: (folder / "run" / name).read_bytes() for name in ("metrics.csv", "config.yaml")}
    message = "the length of LinearDecayLR was 1 in this run, and is 2 now"
    assert_one_line(*launch.run([*COMMAND, "--trainer.max_epochs=2"], folder), message)
    for name, content in files.items():
        assert (folder / "run" / name).read_bytes() == content
    assert "finished already" in launch.run(COMMAND, folder)[1]


def test_another_run_goes_on_in_a_folder_of_its_own(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "folder")
    command = [*COMMAND[:3], "--run_dir", "other", "--ckpt_path", "run/last.ckpt"]
    longer = [*command, "--trainer.max_epochs=2"]
    options = ["--trainer.accumulate_grad_batches=4"]
    assert_one_line(*launch.run([*longer, *options], folder), "accumulate_grad_batches is 1 there")
    checkpoint = torch.load(folder / "run/last.ckpt", weights_only=True)
    checkpoint["callbacks"]["RunCheckpoint"]["best_score"] = 2.0  # which nothing can beat
    torch.save(checkpoint, folder / "run/last.ckpt")
    status, output = launch.run(longer, folder)
    assert status == 0, output
    assert (folder / "other/best.ckpt").exists()


def test_what_does_not_decide_the_result_may_differ(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "folder")
    options = ["--trainer.precision=32", "--trainer.callbacks+=callbacks.ThroughputMonitor"]
    status, output = launch.run([*COMMAND, *options, "--data.eval_batch_size=7"], folder)
    assert status == 0, output
    assert "finished already" in output


OTHER_EVALUATION = {
    "shortcut": ["--model.init_args.net.init_args.shortcut=A-average"],
    "normalization": ["--data.init_args.normalization=scale"],
    "split_seed": ["--data.init_args.split_seed=3"],
    "final_survival_prob": ["--model.init_args.final_survival_prob=0.9"],
}


@pytest.mark.parametrize("key", OTHER_EVALUATION)
def test_another_evaluation_is_refused(key: str, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "folder")
    for command in ("validate", "test", "predict") if key == "split_seed" else ("test",):
        status, output = launch.run([command, *COMMAND[1:], *OTHER_EVALUATION[key]], folder)
        assert_one_line(status, output, f"{key} is")
    assert not (folder / "run/predictions.csv").exists()


def test_what_only_chooses_what_is_evaluated_may_differ() -> None:
    net = {"class_path": "networks.SlimmableCifarResNet", "init_args": {"depth": 8}}
    config = {
        "model": {"class_path": "LitSlimmable", "init_args": {"net": net, "eval_widths": [1.0]}},
        "data": {"class_path": "Digits", "init_args": {"split_seed": 0, "data_dir": "here"}},
    }
    other = yaml.safe_load(yaml.safe_dump(config))
    other["model"]["init_args"] |= {"eval_widths": [0.5, 1.0], "budget_macs": 1e6, "seed": 3}
    other["data"]["init_args"] |= {"data_dir": "there", "predict_dir": "images"}
    trains = {"recipe": {"label_smoothing": 0.1}, "teacher": "labels", "num_widths": 3}
    other["model"]["init_args"] |= trains
    other["data"]["init_args"] |= {"random_erasing": 0.5, "horizontal_flip": False}
    assert first_difference(evaluated(config), evaluated(other)) is None
    assert first_difference(trained(config), trained(other)).startswith("data.init_args.horizontal")
    other["data"]["init_args"]["split_seed"] = 1
    difference = first_difference(evaluated(config), evaluated(other))
    assert difference == "data.init_args.split_seed is 0 there and 1 here"


@pytest.mark.parametrize(
    ("there", "here", "is_same"),
    [
        (None, "32-true", True),
        ("32", 32, True),
        ("16", "16-mixed", True),
        ("bf16", "bf16-mixed", True),
        (None, "16-mixed", False),
        ("64", "32", False),
    ],
)
def test_precisions_by_their_meaning(there: Any, here: Any, is_same: bool) -> None:
    one, other = (trained({"trainer": {"precision": each}}) for each in (there, here))
    assert (first_difference(one, other) is None) == is_same


def callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


def test_callbacks_that_observe_are_not_compared() -> None:
    observers = [
        callback(f"callbacks.{name}")
        for name in ("ExitStatistics", "GradientMagnitudeLogger", "RecalibrationSweep")
    ] + [callback("pytorch_lightning.callbacks.TQDMProgressBar", refresh_rate=3)]
    bare = trained({"trainer": {"callbacks": None}})
    assert first_difference(bare, trained({"trainer": {"callbacks": observers}})) is None
    for each in (
        callback("callbacks.BNRecalibration", num_images=64),
        callback("pytorch_lightning.callbacks.EarlyStopping", monitor="val/acc"),
        callback("nowhere.Gone"),
        callback("test_experiment.Unknown"),
        callback("test_experiment.Derived"),
        callback("test_experiment.callback"),
    ):
        assert first_difference(bare, trained({"trainer": {"callbacks": each}}))


def test_changed_argument_of_a_callback_is_named() -> None:
    name = "pytorch_lightning.callbacks.EarlyStopping"
    one, other = (
        trained({"trainer": {"callbacks": [callback(name, monitor="val/acc", patience=n)] * 2}})
        for n in (2, 3)
    )
    difference = "trainer.callbacks.EarlyStopping.patience is 2 there and 3 here"
    assert first_difference(one, other) == difference
    assert "trainer.callbacks.EarlyStopping1.patience" in one


def test_two_callbacks_without_a_state_may_be_of_one_class() -> None:
    given: list[Callback] = [LambdaCallback(on_fit_start=print), LambdaCallback(on_fit_end=print)]
    check_callbacks(given)
    assert {*given} <= {*Trainer(callbacks=given, logger=False).callbacks}


class Unknown:
    """What a callback of the user's own does is not known."""


class Derived(ThroughputMonitor):
    """Nor what it does beside what its base does."""


# --- checkpoints ----------------------------------------------------------------------------------


def of_adam(content: dict[str, Any]) -> None:
    weights = [torch.zeros(2).requires_grad_()]
    content["optimizer_states"] = [torch.optim.Adam(weights).state_dict()]


def without(*path: str) -> Callable[[dict[str, Any]], object]:
    def change(content: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            content = content[key]
        del content[last]

    return change


def group(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["optimizer_states"][0]["param_groups"][0].update(values)


def half(content: dict[str, Any]) -> None:
    content["state_dict"]["net.fc.bias"] = content["state_dict"]["net.fc.bias"].half()


def other_buffers(content: dict[str, Any]) -> None:
    state = content["optimizer_states"][0]["state"]
    state[0], state[1] = state[1], state[0]


CHANGED = {
    "no callbacks": (without("callbacks"), "it holds no callbacks"),
    "no optimizer": (without("optimizer_states"), "it holds no optimizer_states"),
    "no place in the epoch": (without("loops", "fit_loop"), "no loops.fit_loop.epoch_progress"),
    "no best score": (without("callbacks", "RunCheckpoint"), "no callbacks.RunCheckpoint.best"),
    "no images per step": (without("run", "images_per_step"), "no run.images_per_step"),
    "negative step": (lambda content: content.update(global_step=-5), "its global_step is -5"),
    "no epoch": (lambda content: content.update(epoch="x"), "its epoch is x"),
    "half a weight": (half, "net.fc.bias is of torch.float16 there and torch.float32 here"),
    "two optimizers": (
        lambda content: content["optimizer_states"].append({}),
        "it has not as many optimizers as this training, 1",
    ),
    "no schedule": (
        lambda content: content.update(lr_schedulers=[]),
        "it has not as many schedules as this training, 1",
    ),
    "another schedule": (
        lambda content: content.update(lr_schedulers=[{"T_max": 3}]),
        "it is of another schedule than MultiStepLR",
    ),
    "another optimizer": (of_adam, "its groups of parameters are not those of SGD"),
    "an optimizer of the same keys": (
        lambda content: content["run"].update(optimizers=["LARS"]),
        "its optimizers are ['LARS'], and those of this training ['SGD']",
    ),
    "weight decay": (group(weight_decay=9.0), "weight_decay of SGD is 9.0 there and 0.0001 here"),
    "initial rate": (group(initial_lr=9.0), "initial_lr of SGD is 9.0 there and"),
    "other buffers": (other_buffers, "momentum_buffer of SGD is of shape "),
}


@pytest.fixture(scope="module")
def resumed(finished: Path) -> tuple[SimpleNamespace, ImageClassifier]:
    """What a training has that goes on from the checkpoint of a finished one."""
    module = load_run(finished / "run", "last").module
    optimizer = module.optimizer(module.parameters())
    schedule = SimpleNamespace(scheduler=module.lr_scheduler(optimizer))
    return SimpleNamespace(optimizers=[optimizer], lr_scheduler_configs=[schedule]), module


def check(content: dict[str, Any], resumed: tuple[SimpleNamespace, ImageClassifier]) -> None:
    check_parts(content, "a.ckpt")
    check_structure(content, *resumed, "a.ckpt")


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_checkpoint_does_not_go_on(name: str, finished: Path, resumed) -> None:
    """torch and Lightning would load what fits, and go on."""
    edit, reason = CHANGED[name]
    content = torch.load(finished / "run/last.ckpt", weights_only=True)
    check(content, resumed)
    edit(content)
    with pytest.raises(ValueError, match="is of another training, or was changed") as caught:
        check(content, resumed)
    assert reason in str(caught.value)


def stepped(kind: type[Optimizer], **arguments: Any) -> tuple[dict[str, Any], SimpleNamespace]:
    """A checkpoint after one step, and a training of its kind that has not begun."""
    net = torch.nn.Linear(3, 2)

    def loss() -> torch.Tensor:
        value = net(torch.ones(4, 3)).square().sum()
        value.backward()
        return value

    optimizer = kind(net.parameters(), **arguments)
    optimizer.step(loss)
    fresh = SimpleNamespace(
        optimizers=[kind(net.parameters(), **arguments)], lr_scheduler_configs=[]
    )
    states = [optimizer.state_dict()]
    return {"state_dict": {}, "optimizer_states": states, "lr_schedulers": []}, fresh


OPTIMIZERS = [
    *("Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "LBFGS", "NAdam"),
    *("RAdam", "RMSprop", "Rprop", "SGD"),
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_on_from_its_own_state_alone(name: str) -> None:
    module = torch.nn.Module()
    content, fresh = stepped(getattr(torch.optim, name))
    check_structure(content, fresh, module, "a.ckpt")
    other = torch.optim.Adam if name == "SGD" else torch.optim.SGD
    with pytest.raises(ValueError, match="is of another training"):
        check_structure(content, stepped(other)[1], module, "a.ckpt")


def test_what_another_torch_does_not_know_goes_on() -> None:
    content, fresh = stepped(torch.optim.Adam)
    (there,) = content["optimizer_states"][0]["param_groups"]
    del there["decoupled_weight_decay"]
    (here,) = fresh.optimizers
    schedule = torch.optim.lr_scheduler.MultiStepLR(here, [3])
    fresh.lr_scheduler_configs = [SimpleNamespace(scheduler=schedule)]
    state = {key: value for key, value in schedule.state_dict().items() if key != "_step_count"}
    content["lr_schedulers"] = [{**state, "verbose": False, "_is_new": True}]
    check_structure(content, fresh, torch.nn.Module(), "a.ckpt")
    content["lr_schedulers"][0]["step_size"] = content["lr_schedulers"][0].pop("milestones")
    with pytest.raises(ValueError, match="it is of another schedule than MultiStepLR"):
        check_structure(content, fresh, torch.nn.Module(), "a.ckpt")


def test_a_checkpoint_of_nothing_to_go_on_from(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "folder")
    content = torch.load(folder / "run/last.ckpt", weights_only=True)
    torch.save(content["state_dict"], folder / "weights.ckpt")
    del content["callbacks"]
    torch.save(content, folder / "less.ckpt")
    for name, reason in (
        ("weights", "holds weights alone, and no state of a training: start from them by"),
        ("less", "it holds no callbacks"),
    ):
        command = [*COMMAND[:3], "--run_dir", name, "--ckpt_path", f"{name}.ckpt"]
        assert_one_line(*launch.run(command, folder), reason)


# --- results --------------------------------------------------------------------------------------


def test_part_of_a_test_is_no_result(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder", data__init_args__eval_batch_size=90)
    result, again = (folder / f"run/operating_points{suffix}.csv" for suffix in ("", "_again"))
    for limit in ("0", "1"):
        status, output = launch.run([*COMMAND, f"--trainer.limit_test_batches={limit}"], folder)
        assert status == 0, output
        assert not result.exists()
        assert "finished already" not in output
    (partial,) = points(again)
    status, output = launch.run(["test", *COMMAND[1:], "--trainer.limit_test_batches=0"], folder)
    assert status == 0, output
    assert "operating points" not in output
    assert not again.exists()
    status, output = launch.run(COMMAND, folder)
    assert status == 0, output
    (whole,) = points(result)
    assert whole["macs"] == partial["macs"]
    assert "finished already" in launch.run(COMMAND, folder)[1]


def test_what_was_selected_is_what_is_tested(tmp_path: Path) -> None:
    """The average of so few steps is far from the weights of the last."""
    average = callback("pytorch_lightning.callbacks.EMAWeightAveraging", decay=0.97)
    folder = write(
        tmp_path / "folder",
        trainer__callbacks=[average],
        trainer__limit_train_batches=1.0,
        trainer__max_epochs=2,
        model__init_args__final_survival_prob=1.0,
    )
    status, output = launch.run(COMMAND, folder)
    assert status == 0, output
    assert launch.run(["test", *COMMAND[1:]], folder)[0] == 0
    (result,), (again,) = (
        points(folder / f"run/operating_points{suffix}.csv") for suffix in ("", "_again")
    )
    assert result["test_acc"] == again["test_acc"]
    # The weights of the latest step would answer otherwise.
    best = torch.load(folder / "run/best.ckpt", weights_only=True)
    latest = best.pop("current_model_state")
    torch.save(best | {"state_dict": latest}, folder / "latest.ckpt")
    assert launch.run(["test", *COMMAND[1:], "--ckpt_path", "latest.ckpt"], folder)[0] == 0
    (of_latest,) = points(folder / "run/operating_points_again.csv")
    assert of_latest["test_acc"] != result["test_acc"]


def test_average_that_is_in_no_checkpoint_is_refused(tmp_path: Path) -> None:
    average = callback("pytorch_lightning.callbacks.StochasticWeightAveraging", swa_lrs=0.1)
    folder = write(tmp_path / "folder", trainer__callbacks=[average])
    message = "changes the weights after the last checkpoint"
    assert_one_line(*launch.run(COMMAND, folder), message)


def test_statistics_of_other_weights_than_the_average_are_refused(tmp_path: Path) -> None:
    callbacks = [
        callback("callbacks.BNRecalibration"),
        callback("pytorch_lightning.callbacks.EMAWeightAveraging"),
    ]
    folder = write(tmp_path / "folder", trainer__callbacks=callbacks)
    assert_one_line(*launch.run(COMMAND, folder), "remove one of them from trainer.callbacks")


def test_predictions_of_broken_weights_are_refused(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "folder")
    checkpoint = torch.load(folder / "run/best.ckpt", weights_only=True)
    checkpoint["state_dict"]["net.fc.bias"].fill_(torch.nan)
    torch.save(checkpoint, folder / "bad.ckpt")
    command = ["predict", *COMMAND[1:], "--ckpt_path", "bad.ckpt"]
    assert_one_line(*launch.run(command, folder), "answers to batch 0 are not finite")
    assert not (folder / "run/predictions.csv").exists()


def test_checkpoint_of_another_format_does_not_go_on(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished, tmp_path / "folder")
    path = folder / "run/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["run"]
    torch.save(checkpoint, path)
    command = [*COMMAND, "--trainer.max_epochs=2"]
    assert_one_line(*launch.run(command, folder), "written by another version of this")


def test_trunks_of_before_are_weights_of_today() -> None:
    """Runs of BranchyNet say `trunk_checkpoint`, null in stage 1."""
    for trunk in (None, "runs/trunk/best.ckpt"):
        config = {"model": {"class_path": "x", "init_args": {"trunk_checkpoint": trunk, "seed": 1}}}
        model = renamed(config)["model"]
        assert model == {"class_path": "x", "init_args": {"seed": 1, "tuning": {"weights": trunk}}}
        assert "trunk_checkpoint" in config["model"]["init_args"]
    for config in ({"model": {"class_path": "x"}}, {"data": 1}, {"model": "x"}):
        assert renamed(config) is config

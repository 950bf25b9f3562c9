"""What a command line may not say: nothing that it says is dropped or taken for something else."""

import inspect
import types
import typing
from pathlib import Path
from typing import Any

import jsonargparse
import launch
import methods
import pytest
import pytorch_lightning as pl
import torch
import yaml

import callbacks
import datamodules
import lightning_modules
import networks
from running import ExperimentCLI, Tracking
from running.arguments import StrictParser, load_yaml, one_line, refuse_empty
from running.checkpoint import RunCheckpoint
from running.command_line import main
from running.suggestions import nearest_file

QUICKSTART = str(Path(__file__).parent.parent / "experiments/quickstart.yaml")
TRUNK = yaml.safe_dump({"model": methods.METHODS["branchynet"]})


class Parser(ExperimentCLI):
    """Builds the parser of the command line, and goes no further."""

    def parse_arguments(self, parser: jsonargparse.ArgumentParser, args: Any) -> None:
        raise StopIteration


@pytest.fixture(scope="module")
def parser() -> jsonargparse.ArgumentParser:
    experiment_cli = Parser.__new__(Parser)
    with pytest.raises(StopIteration):
        experiment_cli.__init__(["fit"])
    return experiment_cli.parser


@pytest.fixture
def parse(parser, tmp_path: Path):
    """Parses the quickstart with more arguments; a text of several lines is a YAML file."""

    def parse(*args: str) -> jsonargparse.Namespace:
        names = [
            str(as_file(tmp_path / f"{number}.yaml", arg)) if "\n" in arg else arg
            for number, arg in enumerate(args)
        ]
        return parser.parse_args(["fit", "-c", QUICKSTART, *names]).fit

    return parse


def as_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def assert_refused(parse, args: tuple[str, ...], *messages: str) -> None:
    with pytest.raises((jsonargparse.ArgumentError, ValueError)) as caught:
        parse(*args)
    line = one_line(caught.value)
    for message in messages:
        assert message in line
    assert "unicode string" not in line


# --- linked arguments -----------------------------------------------------------------------------

SEEDS = {
    "model.seed": ("--model.seed=7",),
    "model.init_args.seed": ("--model.init_args.seed=7",),
    "data.seed": ("--data.seed=7",),
    "data.init_args.seed": ("--data.init_args.seed", "7"),
    "YAML": ("-c", "model: {init_args: {seed: 7}}\n"),
    "YAML without init_args": ("-c", "model: {seed: 7}\n"),
    "YAML of the data": ("-c", "data: {init_args: {seed: 7}}\n"),
    "the default of both": ("--seed_everything=7", "--model.seed=0"),
    "contradicting YAML": ("-c", "seed_everything: 3\nmodel: {init_args: {seed: 7}}\n"),
    "before a file": ("--model.seed=7", "-c", "trainer: {max_epochs: 1}\n"),
    "nested file": (
        "--model",
        "class_path: lightning_modules.LitResNet\n"
        "init_args: {net: {class_path: networks.CifarResNet}, seed: 7}\n",
    ),
}


@pytest.mark.parametrize("name", SEEDS)
def test_a_seed_beside_the_run_s_is_refused(name: str, parse) -> None:
    assert_refused(parse, SEEDS[name], ".init_args.seed is ", "use --seed_everything")


@pytest.mark.parametrize("seed", [0, 7])
def test_the_run_s_seed_is_everyone_s(seed: int, parse) -> None:
    config = parse(f"--seed_everything={seed}", f"--model.init_args.seed={seed}")
    assert config.seed_everything == config.model.init_args.seed == config.data.init_args.seed
    assert config.model.init_args.seed == seed


def test_the_config_of_a_run_folder_is_a_config(parser, parse, tmp_path: Path) -> None:
    """It holds both seeds. A new seed for the run is one for all."""
    config = parse("--seed_everything=7")
    whole = jsonargparse.Namespace(subcommand="fit", fit=config)
    dump = yaml.safe_load(parser.dump(whole, skip_link_targets=False, format="yaml"))
    assert dump["fit"]["model"]["init_args"]["seed"] == 7
    file = as_file(tmp_path / "config.yaml", yaml.safe_dump(dump["fit"]))
    config.config = None
    for args, seed in (((), 7), (("--seed_everything=8",), 8)):
        again = parser.parse_args(["fit", "-c", str(file), *args]).fit
        assert again.seed_everything == seed
        assert again.model.init_args.seed == seed
        assert again.data.init_args.seed == seed
        if not args:
            again.config = None
            assert again == config


# --- null -----------------------------------------------------------------------------------------

NULLS = {
    "choice": (("-c", "model: {init_args: {mode: null}}\n"), "mode", "one of 'batch', 'row'"),
    "on the command line": (("--model.init_args.mode=null",), "mode", "one of 'batch', 'row'"),
    "without init_args": (("--model.mode", "null"), "mode", "one of 'batch', 'row'"),
    "bool": (
        ("-c", "model: {init_args: {update_dropped_blocks: null}}\n"),
        "update_dropped_blocks",
        "a bool",
    ),
    "nested network": (
        ("-c", "model: {init_args: {net: {init_args: {shortcut: null}}}}\n"),
        "shortcut",
        "one of 'A', ",
    ),
    "optimizer": (("-c", "model: {init_args: {optimizer: null}}\n"), "optimizer", "a value"),
    "optimizer's number": (
        ("-c", "model: {init_args: {optimizer: {init_args: {momentum: null}}}}\n"),
        "momentum",
        "a float",
    ),
    "scheduler's number": (
        ("-c", "model: {init_args: {lr_scheduler: {init_args: {gamma: null}}}}\n"),
        "gamma",
        "a float",
    ),
    "data": (("-c", "data: {init_args: {batch_size: null}}\n"), "batch_size", "an int"),
    "callback": (
        ("--trainer.callbacks+=callbacks.BNRecalibration", "--trainer.callbacks.widths=null"),
        "widths",
        "a value",
    ),
    "checkpoint.mode": (
        ("-c", "checkpoint:\n  mode:\n"),
        "checkpoint.mode",
        "one of 'auto', 'min', 'max'",
    ),
    "checkpoint.select": (("-c", "checkpoint: {select: null}\n"), "checkpoint.select", "one of"),
    "wandb": (("-c", "wandb: {mode: null}\n"), "wandb.mode", "one of 'auto', 'online'"),
    "test_after_fit": (("-c", "wandb: {}\ntest_after_fit:\n"), "test_after_fit", "a bool"),
    "section": (("-c", "trainer:\n  # max_epochs: 1\nwandb: {}\n"), "trainer", "a value"),
    "trainer": (("-c", "trainer: {devices: null}\n"), "trainer.devices", "or an int"),
}


@pytest.mark.parametrize("name", NULLS)
def test_null_for_what_needs_a_value_is_refused(name: str, parse) -> None:
    args, key, needs = NULLS[name]
    assert_refused(parse, args, f"{key} is null, but needs ", needs, "or remove the line")


def test_a_seed_of_null_is_refused(parse) -> None:
    assert_refused(parse, ("-c", "seed_everything: null\nwandb: {}\n"), "seed_everything")


def test_null_for_what_is_optional_is_a_value(parse) -> None:
    config = parse("-c", "model: {init_args: {lr_scheduler: null}}\ntrainer: {max_time: null}\n")
    assert config.model.init_args.lr_scheduler is None
    assert config.trainer.max_time is None
    config = parse("-c", "trainer: {callbacks: null, enable_progress_bar: null}\nrun_dir: null\n")
    assert config.trainer.enable_progress_bar is None
    branchy = ("-c", TRUNK, "-c", "model: {init_args: {exit_thresholds: null}}\n")
    assert parse(*branchy).model.init_args.exit_thresholds is None


def test_the_later_file_decides(parse) -> None:
    config = parse("--checkpoint.mode", "min", "-c", "checkpoint: {mode: max}\n")
    assert config.checkpoint.mode == "max"


ROOMS = (networks, lightning_modules, datamodules, callbacks)
CLASSES = [
    value
    for room in ROOMS
    for name in room.__all__
    if inspect.isclass(value := getattr(room, name)) and not inspect.isabstract(value)
    if not issubclass(value, tuple | torch.utils.data.Dataset)  # what no YAML names
]
CLASSES += [
    Tracking,
    RunCheckpoint,
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.lr_scheduler.StepLR,
    pl.callbacks.EarlyStopping,
]


def admits_null(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return any(map(admits_null, typing.get_args(annotation)))
    return annotation in (types.NoneType, Any, inspect.Parameter.empty)


@pytest.mark.parametrize("which", CLASSES, ids=lambda which: which.__name__)
def test_null_is_refused_wherever_its_type_does(which: type) -> None:
    """And nowhere else; what has no default is missing instead."""
    given = StrictParser(exit_on_error=False)
    given.add_class_arguments(which, "it", fail_untyped=False, skip={"optimizer", "params"})
    hints = typing.get_type_hints(which.__init__)
    for name, parameter in inspect.signature(which).parameters.items():
        if name in ("optimizer", "params") or parameter.kind is parameter.VAR_KEYWORD:
            continue
        with_default = parameter.default is not parameter.empty
        needs = with_default and parameter.default is not None and not admits_null(hints[name])
        try:
            given.parse_object({"it": {name: None}}, defaults=False)
            message = ""
        except jsonargparse.ArgumentError as error:
            message = str(error)
        assert (f"it.{name} is null" in message) == needs, (name, message)


# --- empty ----------------------------------------------------------------------------------------

EMPTY = {
    "run_dir": (("--run_dir=",), "--run_dir"),
    "run_dir in two words": (("--run_dir", ""), "--run_dir"),
    "blank": (("--run_dir= ",), "--run_dir"),
    "quotes": (("--run_dir=''",), "--run_dir"),
    "run_dir in a YAML": (("-c", "run_dir: ''\n"), "run_dir"),
    "config": (("-c", ""), "-c"),
    "config in one word": (("--config=",), "--config"),
    "weights": (("-c", TRUNK, "--model.init_args.tuning.weights="), "tuning.weights"),
    "weights in two words": (
        ("-c", TRUNK, "--model.init_args.tuning.weights", ""),
        "tuning.weights",
    ),
    "weights in a YAML": (
        ("-c", TRUNK, "-c", 'model: {init_args: {tuning: {weights: ""}}}\n'),
        "tuning.weights",
    ),
    "data": (("--data.data_dir=",), "--data.data_dir"),
    "project": (("-c", "wandb: {project: ''}\n"), "wandb.project"),
    "item": (("-c", "wandb: {tags: [a, '']}\n"), "wandb.tags"),
    "ckpt_path": (("--ckpt_path=",), "--ckpt_path"),
    "number": (("--trainer.max_epochs=",), "--trainer.max_epochs"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_argument_is_refused(name: str, parse) -> None:
    args, key = EMPTY[name]
    assert_refused(parse, args, f"{key} is empty: is a variable unset?")


def test_an_empty_argument_without_an_option_is_refused() -> None:
    with pytest.raises(ValueError, match="an argument is empty"):
        refuse_empty(["fit", "", "--run_dir=x"])


def test_an_empty_list_is_a_value(parse) -> None:
    assert parse("--trainer.callbacks=[]").trainer.callbacks == []
    assert parse("-c", "wandb: {tags: []}\n").wandb.tags == []


def test_an_equals_sign_belongs_to_a_value(parse) -> None:
    assert parse("--run_dir=a=").run_dir == "a="


# --- YAML -----------------------------------------------------------------------------------------

TWICE = {
    "section": ("trainer: {max_epochs: 1}\nseed_everything: 0\ntrainer: {max_time: null}\n", 1, 3),
    "nested": ("trainer:\n  max_epochs: 1\n  max_epochs: 1\n", 2, 3),
    "quoted": ("trainer:\n  max_epochs: 1\n  'max_epochs': 2\n", 2, 3),
    "in a list": (
        "trainer:\n  callbacks:\n    - class_path: callbacks.ThroughputMonitor\n"
        "      class_path: callbacks.ThroughputMonitor\n",
        3,
        4,
    ),
    "with dots": ("trainer.max_epochs: 1\ntrainer:\n  max_epochs: 2\n", 1, 3),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_key_given_twice_is_refused(name: str, parse, tmp_path: Path) -> None:
    text, first, second = TWICE[name]
    key = {"section": "trainer", "in a list": "trainer.callbacks.0.class_path"}
    assert_refused(
        parse,
        ("-c", text),
        f"the key {key.get(name, 'trainer.max_epochs')} is given twice",
        f'"{tmp_path}/1.yaml", on lines {first} and {second}',
    )


@pytest.mark.parametrize("option", ["--trainer", "--model"])
def test_a_key_given_twice_in_a_file_of_a_section_is_refused(option: str, parse) -> None:
    text = "max_epochs: 1\nmax_time: null\nmax_epochs: 2\n"
    assert_refused(parse, (option, text), "the key max_epochs is given twice", "lines 1 and 3")


def test_a_key_given_twice_on_the_command_line_is_refused(parse) -> None:
    assert_refused(
        parse, ("--trainer={max_epochs: 1, max_epochs: 2}",), "max_epochs is given twice"
    )


def test_an_anchor_is_no_repetition() -> None:
    text = "a: &a {x: 1e-3, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n"
    first = {"x": 0.001, "y": 2}
    assert load_yaml(text) == {"a": first, "b": first, "c": {"x": 0.001, "y": 3}}


def test_a_yaml_that_is_none_says_which_file(parse, tmp_path: Path) -> None:
    assert_refused(parse, ("-c", "trainer: {max_epochs: 1\n"), f'in "{tmp_path}/1.yaml", line 1')


def test_a_yaml_of_another_encoding_says_which_file(parse, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes("a: b\n".encode("utf-16"))
    assert_refused(parse, ("-c", str(tmp_path / "x.yaml")), f"{tmp_path}/x.yaml", "UTF-8")


def test_numbers_are_read_as_before(parse) -> None:
    config = parse("-c", "model: {init_args: {optimizer: {init_args: {weight_decay: 1e-3}}}}\n")
    assert config.model.init_args.optimizer.init_args.weight_decay == 0.001


# --- what was meant -------------------------------------------------------------------------------

SCHEDULE = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_siz": 3}}
TYPOS = {
    "--trainer.max_epoch=3": "--trainer.max_epochs",
    "--trainer.accelrator=cpu": "--trainer.accelerator",
    "--model.init_args.final_survival=0.5": "final_survival_prob",
    "--model.final_survival=0.5": "final_survival_prob",
    "--model.init_args.net.init_args.dept=8": "depth",
    "--data.init_args.batchsize=8": "batch_size",
    "--model=LitResnet": "lightning_modules.LitResNet",
    "--model=lightning_modules.LitResnet": "lightning_modules.LitResNet",
    "--data=CIFAR10": "datamodules.CIFAR10DataModule or datamodules.CIFAR100DataModule",
    "--data.help=ImageFolder": "datamodules.ImageFolderDataModule",
    "--model.init_args.net=CifarResnet": "networks.CifarResNet",
    "--model.init_args.optimizer=SDG": "torch.optim.SGD",
    "--trainer.callbacks+=EarlyStoping": "pytorch_lightning.callbacks.EarlyStopping",
    "--lr=0.1": "--model.init_args.optimizer.init_args.lr",
    "--seed=3": "--seed_everything",
    "--batch_size=3": "--data.init_args.batch_size",
    "--checkpoint.selct=last": "--checkpoint.select",
    "--model.init_args.decay=liner": "linear",
    "--rundir=x": "--run_dir",
    "--model.init_args.optimizer.init_args.momentun=0": "momentum",
    "--config=experiments/quikstart.yaml": "experiments/quickstart.yaml",
    f"--model.init_args.lr_scheduler={SCHEDULE}": "step_size",
    "--model.init_args.recipe.mixup=0.2": "--recipe.mixup_alpha",
    "--model.init_args.recipe={mixup: 0.2}": "mixup_alpha",
    "--model.init_args.tuning.weight=x.ckpt": "--tuning.weights",
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_told_what_it_may_mean(typo: str, parse, monkeypatch) -> None:
    monkeypatch.chdir(launch.ROOT)
    assert_refused(parse, (typo,), f": did you mean {TYPOS[typo]}?")


def test_a_class_of_another_kind_is_told_which_there_are(parse) -> None:
    """Without those that no YAML can name."""
    words = "--model=LitBranchyNet", "--model.init_args.net=CifarResNet"
    line = "give one of BranchyAlexNet, BranchyLeNet, BranchyResNet, MSDNet, ResNetWithExits, "
    assert_refused(parse, words, f"{line}SlimmableWithExits, WithExits")


def test_a_key_that_no_class_has_is_told_with_its_file(parse, tmp_path: Path) -> None:
    place = f"'trainer.max_epoch' (in {tmp_path}/1.yaml): did you mean trainer.max_epochs?"
    assert_refused(parse, ("-c", "trainer:\n  max_epoch: 3\n"), place)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("trian", "fit"),
        ("train", "fit"),
        ("evaluat", "test"),
        ("reprot", "report"),
        ("export --format=onxx --run=x", "onnx"),
        ("predict --run=x --image=y", "--images"),
        ("report runs --ot=y", "--out"),
    ],
)
def test_a_mistyped_command_is_told_what_it_may_mean(word: str, meant: str, capsys) -> None:
    assert main(word.split()) == 2
    assert f": did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["fit"], ["test"]])
def test_a_command_alone_shows_how_to_begin(words: list[str], capsys) -> None:
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert sum(line.startswith("python main.py ") for line in lines) == 3
    assert "experiments/" in lines[-4]
    assert len(lines) < 9


def test_a_file_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(launch.ROOT)
    for name in ("quickstart", "experimnts/quickstart.yaml", "quikstart.yaml"):
        assert nearest_file(Path(name)) == ": did you mean experiments/quickstart.yaml?"
    assert nearest_file(Path("nothing/like/it")) == ""


SHORT = """
model: {class_path: LitStochasticDepth, init_args: {net: CifarResNet, lr_scheduler: LinearDecayLR}}
data: DigitsDataModule
trainer: {callbacks: [ThroughputMonitor, {class_path: EarlyStopping, init_args: {monitor: a}}]}
wandb: {tags: [CifarResNet]}
"""


def test_classes_have_short_names(parse) -> None:
    """Also where Lightning has a class of that name, which is not meant."""
    config = parse("-c", SHORT)
    assert config.model.class_path == "lightning_modules.LitStochasticDepth"
    assert config.model.init_args.net.class_path == "networks.CifarResNet"
    assert config.model.init_args.lr_scheduler.class_path == "lightning_modules.LinearDecayLR"
    assert config.data.class_path == "datamodules.DigitsDataModule"
    names = [each.class_path for each in config.trainer.callbacks]
    assert names == ["callbacks.ThroughputMonitor", "pytorch_lightning.callbacks.EarlyStopping"]
    assert config.wandb.tags == ["CifarResNet"]
    config = parse("--data", "CIFAR10DataModule", "--trainer.callbacks+=ThroughputMonitor")
    assert config.data.class_path == "datamodules.CIFAR10DataModule"
    assert config.trainer.callbacks[-1].class_path == "callbacks.ThroughputMonitor"


# --- to the end -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-c", QUICKSTART, "--model.seed=7"], "use --seed_everything"),
        (["-c", QUICKSTART, "--model.mode=null"], "mode is null, but needs one of 'batch', 'row'"),
        (["-c", QUICKSTART, "--ckpt_path="], "--ckpt_path is empty"),
        (["-c", "twice.yaml"], "the key trainer is given twice"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(args, message: str, tmp_path: Path) -> None:
    as_file(tmp_path / "twice.yaml", "trainer: {max_epochs: 1}\n" * 2)
    status, output = launch.run(["fit", *args], tmp_path)
    assert status == 2, output
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert message in errors[0]
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()

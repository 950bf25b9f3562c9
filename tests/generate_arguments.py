"""Values of every argument of every class that a YAML can name, and what a command makes of them.

    python tests/generate_arguments.py --cases 2500 --seed 0 --folder /tmp/generated

runs as many command lines in this process and prints how they ended. A command line shall be
refused in one line before the first training step, or run.
"""

import argparse
import contextlib
import copy
import inspect
import io
import itertools
import math
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import methods
import torch
import yaml
from generate_runs import damaged_runs
from PIL import Image

import callbacks
import datamodules
import datamodules.mnist
import lightning_modules
import networks
import reports.report
from running import command_line

LONG = [1] * 300
WHATEVER: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 16, 10**12, 1e12, 1e-9, -0.5, 0.5, 1.0, math.nan, math.inf, -math.inf),
    *("", "x", "3", None, True, [], [0], [-1], [1, 1], [0.5, 1.0], [math.nan], [0.5, "x"], LONG),
    *({}, {"a": 1}, [[1]], "datamodules.DigitsDataModule", {"class_path": "networks.CifarResNet"}),
)
PATIENCE = 60
"""Seconds that a command may take."""

SMALL = methods.SMALL_NET
NETWORKS: dict[str, dict[str, Any]] = {
    "CifarResNet": SMALL["init_args"],
    "ResNet": {"depth": 18, "num_classes": 10, "in_channels": 1},
    "CifarDenseNet": {"depth": 7, "growth_rate": 4, "in_channels": 1},
    "DenseNet": {"depth": 121, "num_classes": 10, "in_channels": 1},
    "BranchyLeNet": {"image_size": 32},
    "BranchyAlexNet": {"in_channels": 1},
    "BranchyResNet": {"depth": 8, "in_channels": 1},
    "ResNetWithExits": {"trunk": SMALL, "exits_after": [0, 2]},
    "WithExits": {"network": SMALL, "after": ["layer1.0", "layer2.0"]},
    "SlimmableResNet": {"num_classes": 10, "in_channels": 1, "width_mults": [0.25, 1.0]},
    "SlimmableCifarResNet": {"depth": 8, "in_channels": 1, "width_mults": [0.25, 1.0]},
    "SlimmableWithExits": {
        "trunk": {
            "class_path": "networks.SlimmableCifarResNet",
            "init_args": {"depth": 8, "in_channels": 1, "width_mults": [0.25, 1.0]},
        },
        "exits_after": [1],
    },
    "SlimmableMobileNetV1": {"num_classes": 10, "in_channels": 1, "width_mults": [0.25, 1.0]},
    "SlimmableMobileNetV2": {"num_classes": 10, "in_channels": 1, "width_mult_range": [0.25, 1.0]},
    **{
        methods.METHODS[name]["init_args"]["net"]["class_path"].rsplit(".", 1)[1]: (
            methods.METHODS[name]["init_args"]["net"]["init_args"]
        )
        for name in ("msdnet", "vision_transformer", "convnext")
    },
}
"""Arguments with which each network runs on the digits."""
METHODS = {
    "LitResNet": "CifarResNet",
    "LitStochasticDepth": "CifarResNet",
    "LitDenseNet": "CifarDenseNet",
    "LitBranchyNet": "ResNetWithExits",
    "LitMSDNet": "MSDNet",
    "LitSlimmable": "SlimmableCifarResNet",
    "LitSlimmableExits": "SlimmableWithExits",
    "LitUniversallySlimmable": "universal",
}
"""A network for each method."""
UNIVERSAL = {"depth": 8, "in_channels": 1, "width_mult_range": [0.25, 1.0]}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "torch.optim.SGD": {"lr": 0.1},
    "torch.optim.Adam": {},
    "torch.optim.AdamW": {},
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "torch.optim.lr_scheduler.MultiStepLR": {"milestones": [1]},
    "torch.optim.lr_scheduler.StepLR": {"step_size": 1},
    "torch.optim.lr_scheduler.CosineAnnealingLR": {"T_max": 1},
    "lightning_modules.LinearDecayLR": {},
    "lightning_modules.WarmupCosineLR": {},
    "lightning_modules.WarmupMultiStepLR": {"milestones": [1], "warmup": 1},
}
CALLBACKS = [
    name
    for name in callbacks.__all__
    if inspect.isclass(getattr(callbacks, name)) and hasattr(getattr(callbacks, name), "setup")
    if name != "SampledTestImages"  # the base of others
]


ANY_NUMBER = (
    *("seed", "split_seed", "layer_scale", "budget_macs", "budget_ms"),
    *("mixup_alpha", "cutmix_alpha"),
)


class Case(NamedTuple):
    """One argument of one class, and a value of it."""

    room: str
    """What the class is: "net", "model", "data", "optimizer", "lr_scheduler" or "callback"."""
    name: str
    argument: str
    value: Any

    @property
    def is_odd(self) -> bool:
        """Whether nobody can mean this value."""
        # Of torch's own arguments, and of these, any finite number says something.
        free = self.room in ("optimizer", "lr_scheduler") or self.argument in ANY_NUMBER
        return is_odd(self.value, *((-math.inf, math.inf) if free else (0, 1e9)))


def is_odd(value: Any, least: float, most: float) -> bool:
    if isinstance(value, list):
        return any(is_odd(each, least, most) for each in value)
    if isinstance(value, str):
        return not value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return not (math.isfinite(value) and least <= value <= most)


def arguments_of(which: type) -> dict[str, Any]:
    """Returns the annotation of every argument that a class takes."""
    ours = not which.__module__.startswith("torch.")  # some of torch's cannot be read
    hints = typing.get_type_hints(which.__init__) if ours else {}
    return {
        name: hints.get(name, Any)
        for name, parameter in inspect.signature(which).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }


def values_for(annotation: Any) -> tuple[Any, ...]:
    choices = [each for each in walk(annotation) if typing.get_origin(each) is typing.Literal]
    return (*WHATEVER, *(value for each in choices for value in typing.get_args(each)))


def may_fit(value: Any, annotation: Any) -> bool:
    """Tells roughly whether a value is of the type of an argument, so that its class gets it."""
    leaves = {typing.get_origin(each) or each for each in walk(annotation)}
    if Any in leaves:
        return True
    if isinstance(value, list):
        return not leaves.isdisjoint((Sequence, list, tuple))
    fitting = {bool: {bool}, int: {int, float}, float: {float}, str: {str, typing.Literal}}
    return type(value) in fitting and not leaves.isdisjoint(fitting[type(value)])


def walk(annotation: Any) -> Iterator[Any]:
    """Yields a type and all that it is made of."""
    if not isinstance(annotation, list):  # the arguments of a Callable
        yield annotation
    for each in typing.get_args(annotation):
        yield from walk(each)


def classes() -> Iterator[tuple[str, str, type]]:
    """Yields room, name and class of what is generated for; all that a YAML can name."""
    for name in NETWORKS:
        yield "net", name, getattr(networks, name)
    for name in METHODS:
        yield "model", name, getattr(lightning_modules, name)
    for name in datamodules.__all__:
        if name.endswith("DataModule") and name not in ("ImageDataModule", "InMemoryDataModule"):
            yield "data", name, getattr(datamodules, name)
    for name in CALLBACKS:
        yield "callback", name, getattr(callbacks, name)
    yield "tuning", "Tuning", lightning_modules.Tuning
    yield "recipe", "Recipe", lightning_modules.Recipe
    for room, table in (("optimizer", OPTIMIZERS), ("lr_scheduler", SCHEDULERS)):
        for path in table:
            package, name = path.rsplit(".", 1)
            yield room, path, getattr(sys.modules[package], name)


def cases() -> list[Case]:
    """Returns a case for every value of every argument; of those of other types, every tenth."""
    found = [
        (Case(room, name, argument, value), annotation)
        for room, name, which in classes()
        for argument, annotation in arguments_of(which).items()
        if (room, argument) not in (("optimizer", "params"), ("lr_scheduler", "optimizer"))
        for value in values_for(annotation)
    ]
    return [
        case
        for number, (case, annotation) in enumerate(found)
        if may_fit(case.value, annotation) or number % 10 == 0
    ]


# --- command lines --------------------------------------------------------------------------------


def net(name: str) -> dict[str, Any]:
    if name == "universal":
        return {"class_path": "networks.SlimmableCifarResNet", "init_args": UNIVERSAL}
    return {"class_path": f"networks.{name}", "init_args": NETWORKS[name]}


def method_for(name: str) -> str:
    """Returns a method that trains a network."""
    which = getattr(networks, name)
    if name == "SlimmableWithExits":
        return "LitSlimmableExits"
    if issubclass(which, networks.SlimmableNetwork):
        ranged = "width_mult_range" in NETWORKS[name]
        return "LitUniversallySlimmable" if ranged else "LitSlimmable"
    return "LitBranchyNet" if issubclass(which, networks.MultiExitNetwork) else "LitResNet"


def experiment(method: str, network: str, data: str, folder: Path) -> dict[str, Any]:
    """Returns a whole experiment of one step."""
    init_args: dict[str, Any] = {"batch_size": 8, "eval_batch_size": 60}
    if data != "DigitsDataModule":
        init_args |= {"data_dir": str(folder / "data"), "val_size": 0}
    if data.startswith("Image"):
        init_args |= {"num_workers": 0, "image_size": 32}
    recalibration = {"class_path": "callbacks.BNRecalibration", "init_args": {"num_batches": 1}}
    return {
        "model": {
            "class_path": f"lightning_modules.{method}",
            "init_args": {"net": copy.deepcopy(net(network))},
        },
        "data": {"class_path": f"datamodules.{data}", "init_args": init_args},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "fast_dev_run": True,
            "enable_progress_bar": False,
            "callbacks": [recalibration] if method == "LitUniversallySlimmable" else [],
        },
    }


def command(case: Case, folder: Path) -> list[str]:
    """Writes the YAML of a case, and returns its command line."""
    method, network, data = "LitResNet", "CifarResNet", "DigitsDataModule"
    if case.room == "net":
        method, network = method_for(case.name), case.name
    elif case.room == "model":
        method, network = case.name, METHODS[case.name]
    elif case.room == "data":
        data = case.name
    config = experiment(method, network, data, folder)
    model = config["model"]["init_args"]
    places = {
        "net": "--model.init_args.net.init_args",
        "model": "--model.init_args",
        "data": "--data.init_args",
        "callback": "--trainer.callbacks",
        "tuning": "--model.init_args.tuning",
        "recipe": "--model.init_args.recipe",
        "optimizer": "--model.init_args.optimizer.init_args",
        "lr_scheduler": "--model.init_args.lr_scheduler.init_args",
    }
    for room, table in (("optimizer", OPTIMIZERS), ("lr_scheduler", SCHEDULERS)):
        if case.room == room:
            model[room] = {"class_path": case.name, "init_args": table[case.name]}
    if case.room == "data":
        which = getattr(datamodules, case.name)
        known = isinstance(which.num_classes, int)
        classes, channels = (which.num_classes, which.image_shape[0]) if known else (3, 3)
        small = {"depth": 8, "num_classes": classes, "in_channels": channels}
        model["net"] = {"class_path": "networks.CifarResNet", "init_args": small}
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(config))
    args = ["fit", "-c", str(path)]
    if case.room == "callback":
        args.append(f"--trainer.callbacks+=callbacks.{case.name}")
    value = yaml.safe_dump(case.value, default_flow_style=True, width=10**6).strip()
    return [*args, f"{places[case.room]}.{case.argument}={value.removesuffix('...').strip()}"]


def combinations(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields every network in every method, and every callback with every method."""
    for method in METHODS:
        for network in (*NETWORKS, "universal"):
            path = folder / f"{method}_{network}.yaml"
            path.write_text(yaml.safe_dump(experiment(method, network, "DigitsDataModule", folder)))
            yield f"{method} x {network}", ["fit", "-c", str(path)]
        for callback in CALLBACKS:
            path = folder / f"{method}_{METHODS[method]}.yaml"
            args = ["fit", "-c", str(path), f"--trainer.callbacks+=callbacks.{callback}"]
            if callback == "RecalibrationSweep":
                args.append("--trainer.callbacks.num_images=[16]")
            yield f"{method} x {callback}", args


STRANGERS: dict[str, dict[str, Any]] = {
    "torch.nn.Identity": {},
    "torch.nn.Flatten": {},
    "torch.nn.Linear": {"in_features": 1024, "out_features": 10},
    "torchvision.models.resnet18": {},
    "torchvision.models.AlexNet": {"num_classes": 10},
    "networks.SlimmableConv2d": {"in_channels": 1, "out_channels": 10, "kernel_size": 3},
    "networks.SlimmableBatchNorm2d": {"num_features": 1},
    "networks.EarlyExit": {"network": net("BranchyAlexNet"), "thresholds": [0.1, 0.1]},
    "networks.CapturedNetwork": {"network": SMALL},
    "networks.OnlyUsed": {"network": SMALL},
    "networks.ResidualNetwork": {},
    "networks.MultiExitNetwork": {},
    "datamodules.DigitsDataModule": {},
    "networks.Nothing": {},
    "nothing.Nothing": {},
}
"""What is no network of images to logits, or does not say how many classes it has."""


def strangers(folder: Path) -> Iterator[tuple[str, list[str]]]:
    for method in ("LitResNet", "LitStochasticDepth", "LitMSDNet", "LitSlimmable"):
        for name, init_args in STRANGERS.items():
            config = experiment(method, METHODS[method], "DigitsDataModule", folder)
            config["model"]["init_args"]["net"] = {"class_path": name, "init_args": init_args}
            path = folder / "stranger.yaml"
            path.write_text(yaml.safe_dump(config))
            yield f"{method} x {name}", ["fit", "-c", str(path)]


# --- how they end ---------------------------------------------------------------------------------


class Hang(BaseException):
    """A command takes too long."""


class Ending(NamedTuple):
    """How a command line ended."""

    outcome: str
    """ "ran", "refused", "late", "traceback", "hang", "lines"."""
    line: str


@contextlib.contextmanager
def impatient(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def end_of(args: list[str]) -> Ending:
    """Runs a command line in this process."""
    began = []
    start = lightning_modules.ImageClassifier.on_train_batch_start

    def starts(module: Any, *rest: Any) -> None:
        began.append(True)
        start(module, *rest)

    lightning_modules.ImageClassifier.on_train_batch_start = starts
    out, err = io.StringIO(), io.StringIO()
    try:
        with impatient(PATIENCE), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = command_line.main(args)
    except Hang:
        return Ending("hang", "")
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return Ending("traceback", f"{type(error).__name__} at {where}: {str(error)[:200]}")
    finally:
        lightning_modules.ImageClassifier.on_train_batch_start = start
    if status == 0:
        return Ending("ran", "")
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    if status != 2 or len(lines) != 1:
        return Ending("lines", f"status {status}: {lines}")
    line = lines[0].removeprefix("error: ").removesuffix(" (TRACEBACK=1 shows where)")
    return Ending("late" if began else "refused", line)


def write_images(folder: Path, splits: Sequence[str], classes: int, side: int, each: int) -> None:
    for split in splits:
        for number in range(classes):
            place = folder / split / f"class{number:02}"
            place.mkdir(parents=True)
            for image in range(each):
                colour = (2 * number, 10 * image, 99)
                Image.new("RGB", (side, side), colour).save(place / f"{image}.png")


def write_data(folder: Path) -> None:
    """Writes an image folder and small sets in the formats of the others, but SVHN."""
    write_images(folder, ("train", "val"), classes=3, side=28, each=8)
    write_images(folder / "cifar10", ("train", "test"), classes=10, side=32, each=2)
    write_images(folder / "cifar100", ("train", "test"), classes=100, side=32, each=1)
    for number, name in enumerate(datamodules.mnist.FILES):
        shape = (20,) if number % 2 else (20, 28, 28)
        sizes = b"".join(size.to_bytes(4, "big") for size in shape)
        values = bytes(index % 10 for index in range(math.prod(shape)))
        (folder / name).write_bytes(bytes([0, 0, 8, len(shape)]) + sizes + values)


def limit_memory(gigabytes: int) -> None:
    """Has what asks for more fail, instead of the machine."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + gigabytes * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    only = "values, combinations, runs, or what room.Class.argument begins with"
    parser.add_argument("--only", default="", help=only)
    options = parser.parse_args()
    folder = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    write_data(folder / "data")
    tempfile.tempdir = str(folder / "temporary")
    Path(tempfile.tempdir).mkdir()
    torch.set_num_threads(1)
    limit_memory(8)
    prefix = "" if options.only == "values" else options.only
    chosen = [case for case in cases() if ".".join(case[:3]).startswith(prefix)]
    chosen = [case for case in chosen if case.name != "SVHNDataModule"]  # it would be downloaded
    if len(chosen) > options.cases:
        chosen = random.Random(options.seed).sample(chosen, options.cases)
    counts: Counter[str] = Counter()

    def run(label: str, args: list[str], is_odd: bool) -> None:
        ending = end_of(args)
        outcome = "nonsense" if is_odd and ending.outcome == "ran" else ending.outcome
        counts[outcome] += 1
        print(f"{outcome}\t{label}\t{ending.line}", flush=True)
        shutil.rmtree(tempfile.tempdir)
        Path(tempfile.tempdir).mkdir()

    for case in chosen:
        run(f"{'.'.join(case[:3])}={case.value!r}"[:120], command(case, folder), case.is_odd)
    if not options.only or options.only == "combinations":
        for label, args in itertools.chain(combinations(folder), strangers(folder)):
            run(label, args, False)
    if not options.only or options.only == "runs":
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))  # V8, which draws figures, wants it all
        reports.report.png = lambda figure: b""
        for label, args in damaged_runs(folder, options.seed, command_line.main):
            run(label, args, False)
    print(f"# {counts.total()} command lines: {dict(counts)}")


if __name__ == "__main__":
    main()

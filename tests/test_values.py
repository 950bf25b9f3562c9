"""Any value of any argument that a YAML can name: refused in a line at the start, or it runs."""

import importlib
import random
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import generate_arguments
import jsonargparse
import methods
import pytest
import torch
from generate_arguments import Case, impatient
from test_rooms import BASES

import lightning_modules
import networks
from lightning_modules import check_data
from lightning_modules.schedules import check_schedule, make
from running.arguments import StrictParser

CASES: dict[tuple[str, str], list[Case]] = {}
for case in generate_arguments.cases():
    CASES.setdefault((case.room, case.name), []).append(case)
CLASSES = {(room, name): which for room, name, which in generate_arguments.classes()}
GIVEN_APART = {
    *("params", "optimizer", "net", "trunk", "network", "early_exits", "exits", "tuning", "recipe"),
}
BIG = (
    "ResNet",
    "DenseNet",
    "SlimmableResNet",
    "SlimmableMobileNetV1",
    "SlimmableMobileNetV2",
    "MSDNet",
)


def given(room: str, name: str) -> dict[str, Any]:
    """Returns the arguments of a class that are not under test."""
    if room == "net":
        return {
            key: methods.build(value) for key, value in generate_arguments.NETWORKS[name].items()
        }
    if room == "model":
        return {"net": methods.build(generate_arguments.net(generate_arguments.METHODS[name]))}
    tables = {
        "optimizer": generate_arguments.OPTIMIZERS,
        "lr_scheduler": generate_arguments.SCHEDULERS,
    }
    return tables.get(room, {}).get(name, {})


def parser_of(which: type) -> jsonargparse.ArgumentParser:
    parser = StrictParser(exit_on_error=False)
    parser.add_class_arguments(which, "it", fail_untyped=False, skip=GIVEN_APART)
    return parser


def construct(room: str, which: type, arguments: dict[str, Any]) -> None:
    """Goes as far as a run does before its first step."""
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    if room == "optimizer":
        make("optimizer", partial(which, **arguments), parameters)
        return
    if room == "lr_scheduler":
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        check_schedule(make("lr_scheduler", partial(which, **arguments), optimizer), 10, "epoch")
        return
    made = which(**arguments)
    if room == "net" and which.__name__ not in BIG:
        channels = next(m.in_channels for m in made.modules() if isinstance(m, torch.nn.Conv2d))
        side = getattr(made, "image_size", None) or 32
        check_data(made, made.num_classes, (channels, side, side))


@pytest.mark.parametrize("room_and_name", CASES, ids="-".join)
def test_a_value_is_refused_in_a_line_or_is_no_nonsense(room_and_name: tuple[str, str]) -> None:
    room, name = room_and_name
    which = CLASSES[room_and_name]
    parser = parser_of(which)
    with torch.device("meta"):
        others = given(room, name)
    plain = {key: value for key, value in others.items() if key not in GIVEN_APART}
    outcomes = []
    for case in CASES[room_and_name]:
        if case.argument in GIVEN_APART:
            continue
        try:
            parsed = parser.parse_object(
                {"it": {**plain, case.argument: case.value}}, defaults=False
            )
        except (jsonargparse.ArgumentError, ValueError):
            continue
        arguments = {**others, case.argument: parsed.it[case.argument]}
        try:
            with impatient(60), torch.device("meta" if room in ("net", "model") else "cpu"):
                construct(room, which, arguments)
        except ValueError as error:
            outcome = str(error)
        else:
            outcome = "accepted nonsense\n" if case.is_odd else "accepted"
        assert "\n" not in outcome, case
        outcomes.append(outcome)
    assert outcomes or not CASES[room_and_name]


@pytest.mark.slow
def test_a_command_line_runs_or_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sample of what `generate_arguments.py` runs."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    generate_arguments.write_data(tmp_path / "data")
    known = [each for each in generate_arguments.cases() if each.name != "SVHNDataModule"]
    for number, each in enumerate(random.Random(0).sample(known, 80)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "data").symlink_to(tmp_path / "data")
        outcome, line = generate_arguments.end_of(generate_arguments.command(each, folder))
        # Only a step shows that a rate is too high.
        expected = ("refused", "late") if each.room == "optimizer" else ("refused",)
        assert outcome in (expected if each.is_odd else (*expected, "ran")), (each, line)


def test_no_class_is_left_out() -> None:
    known = {name for _, name in CLASSES} | {
        *("ResidualNetwork", "MultiExitNetwork", "Slimmable", "SlimmableNetwork"),  # bases
        *("ImageDataModule", "InMemoryDataModule", "ImageClassifier", "MultiExitClassifier"),
        *("SampledTestImages", "NarrowWithExits", "AtWidth"),  # what others make
    }
    for room, bases in BASES.items():
        for name in importlib.import_module(room).__all__:
            which = getattr(importlib.import_module(room), name)
            if isinstance(which, type) and issubclass(which, bases):
                assert name in known or f"{room}.{name}" in known


def methods_that_fit(net: torch.nn.Module) -> set[str]:
    if isinstance(net, networks.SlimmableWithExits):
        return {"LitSlimmableExits"}
    if isinstance(net, networks.MultiExitNetwork):
        return {"LitBranchyNet", "LitMSDNet"}
    if isinstance(net, networks.SlimmableNetwork):
        return {"LitSlimmable" if net.width_mults else "LitUniversallySlimmable"}
    gated = {"LitStochasticDepth"} if isinstance(net, networks.ResidualNetwork) else set()
    return {"LitResNet", "LitDenseNet"} | gated


@pytest.mark.parametrize("name", [*generate_arguments.NETWORKS, "universal"])
def test_a_network_that_a_method_does_not_train_is_refused_and_one_is_named(name: str) -> None:
    with torch.device("meta"):
        net = methods.build(generate_arguments.net(name))
    fitting = methods_that_fit(net)
    for method in generate_arguments.METHODS:
        build = partial(getattr(lightning_modules, method), net)
        if method in fitting:
            assert build().net is net
            continue
        with pytest.raises(ValueError, match=r": (give|set) .* use Lit") as caught:
            build()
        assert fitting & set(re.findall(r"Lit\w+", str(caught.value).partition(" use ")[2]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: networks.CifarResNet(8)(x, gates=0.5), "gates is 0.5: give one number per"),
        (lambda x: networks.CifarResNet(8)(x, gates=torch.tensor(1.0)), "gates is 1.0: give one"),
        (lambda x: networks.CifarResNet(8)(x, gates=[None] * 3), "give one number per block"),
        (lambda x: universal()(x, width_mult="1"), "width is '1': give a number, or one per"),
        (lambda x: universal()(x, width_mult=torch.tensor(0.5)), "give a number, or one per"),
        (lambda x: networks.recalibrate(universal(), [x[:0]]), "no training images to recalib"),
    ],
)
def test_what_is_no_number_of_gates_or_widths_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 3, 32, 32))


def universal() -> networks.SlimmableNetwork:
    return networks.SlimmableCifarResNet(8, width_mult_range=(0.25, 1.0))


def test_no_images_have_no_logits() -> None:
    """Whatever they are gated by."""
    network = networks.CifarResNet(8)
    for gates in (None, [0.5] * 3, torch.ones(3), torch.ones(3, 0)):
        assert network(torch.zeros(0, 3, 32, 32), gates=gates).shape == (0, 10)
    exits = networks.BranchyAlexNet().eval()
    answers = networks.early_exit(exits, torch.zeros(0, 3, 32, 32), [0.5, 0.5])
    assert (answers.logits.shape, answers.exit_index.shape) == ((0, 10), (0,))


@pytest.mark.parametrize("side", [1, 32])
def test_a_size_that_a_network_does_not_take_is_told_before_the_first_step(side: int) -> None:
    net = networks.CifarDenseNet(7, 4)
    if side == 1:
        with pytest.raises(ValueError, match="CifarDenseNet does not run on images of 3 x 1 x 1: "):
            check_data(net, 10, (3, side, side))
        return
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    check_data(net, 10, (3, side, side))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class AsksForNumbers(torch.nn.Module):
    num_classes = 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :2] * (1 if images.sum().item() == 0 else 2)


def test_a_network_that_reads_its_values_is_no_mistake() -> None:
    check_data(AsksForNumbers(), 2, (3, 8, 8))
    with pytest.raises(ValueError, match="Identity has no num_classes: give it that attribute"):
        check_data(torch.nn.Identity(), 2, (3, 8, 8))

"""Any value of any argument that a YAML can name: refused in a line at the start, or it runs."""

from functools import partial
from typing import Any

import generate_arguments
import jsonargparse
import methods
import pytest
import torch
from generate_arguments import Case, impatient

from lightning_modules import check_data
from lightning_modules.schedules import check_schedule, make
from running.arguments import StrictParser

CASES: dict[tuple[str, str], list[Case]] = {}
for case in generate_arguments.cases():
    CASES.setdefault((case.room, case.name), []).append(case)
CLASSES = {(room, name): which for room, name, which in generate_arguments.classes()}
GIVEN_APART = {"params", "optimizer", "net", "trunk", "network", "early_exits", "exits", "tuning"}
BIG = ("ResNet", "DenseNet", "SlimmableResNet", "SlimmableMobileNetV1", "SlimmableMobileNetV2")


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
    for case in CASES[room_and_name]:
        if case.argument in GIVEN_APART:
            continue
        try:
            parsed = parser.parse_object({"it": {case.argument: case.value}}, defaults=False)
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

"""Every experiment parses, builds, and says in its header how to run it."""

import importlib
import re
from pathlib import Path

import methods
import pytest
import torch
import yaml
from jsonargparse import Namespace

from running import cli

ROOT = Path(__file__).parent.parent
MACHINES = sorted((ROOT / "experiments/machines").glob("*.yaml"))
SWEEP = ROOT / "experiments/sweep.yaml"  # see test_sweep.py
SCIENCE = sorted(set((ROOT / "experiments").rglob("*.yaml")) - {SWEEP, *MACHINES})


class Parser(cli.ExperimentCLI):
    """Parses a command line, and goes no further."""

    def before_instantiate_classes(self) -> None:
        raise StopIteration

    @classmethod
    def parse(cls, *paths: Path) -> Namespace:
        cli = cls.__new__(cls)
        files = [arg for path in paths for arg in ("-c", str(path))]
        with pytest.raises(StopIteration):
            cli.__init__(["fit", *files])
        return cli.config.fit


@pytest.mark.parametrize("path", SCIENCE, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_experiment_builds(path: Path) -> None:
    config = Parser.parse(path)
    model = config.model.init_args
    with torch.device("meta"):
        net = methods.build(model.net.as_dict())
    data_room, data_name = config.data.class_path.split(".")
    data = getattr(importlib.import_module(data_room), data_name)
    # A folder of images has as many classes as subfolders.
    folders = {"data/imagenet": 1000, "data/tiny-imagenet-200": 200}
    is_known = isinstance(data.num_classes, int)
    expected = data.num_classes if is_known else folders[config.data.init_args.data_dir]
    assert net.num_classes == expected
    header = path.read_text().split("model:")[0]
    assert f"python main.py fit -c {path.relative_to(ROOT)}" in header
    assert "Paper:" in header
    assert "Ours: ." not in header


SHIPPED = {f"{path.parent.name}/{path.stem}": path for path in SCIENCE}


def paper_of_header(text: str) -> dict[str, float]:
    """Returns the accuracies that a header reports of the paper, by point or, of one, by ""."""
    header = " ".join(line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    sentence = header.partition("Paper: ")[2]
    if match := re.match(r"top-1 error ([\d., and]+)% at widths ([\d., and]+)\. ", sentence):
        errors, widths = (re.findall(r"\d+(?:\.\d+)?", part) for part in match.groups())
        points = ["full" if width == "1" else f"w{width}" for width in widths]
        return {p: 1 - float(e) / 100 for p, e in zip(points, errors, strict=True)}
    if match := re.match(r"([\d.]+)% (?:\(.*?\) )?(accuracy|test error|top-1 error)", sentence):
        share = float(match[1]) / 100
        return {"": share if match[2] == "accuracy" else 1 - share}
    assert not re.match(r"\D{0,12}\d", sentence), f"a number of another kind: {sentence}"
    return {}


@pytest.mark.parametrize("name", SHIPPED)
def test_number_of_the_paper_is_a_key(name: str) -> None:
    """And is of a point that the network has."""
    text = SHIPPED[name].read_text()
    expected, paper = paper_of_header(text), yaml.safe_load(text).get("paper")
    if not expected:
        assert paper is None
        return
    assert re.search(r"\d{4}", paper["source"])
    numbers = paper["test_acc"]
    if "" in expected:
        (point,) = numbers
        is_adaptive = name.startswith("branchynet") and not name.endswith("trunk")
        assert point == ("adaptive_knee" if is_adaptive else "full")
        expected = {point: expected[""]}
    else:
        net = yaml.safe_load(text)["model"]["init_args"]
        widths = net.get("eval_widths") or net["net"]["init_args"].get("width_mults")
        widths = widths or (0.25, 0.5, 0.75, 1.0)
        assert expected.keys() == {"full" if w == 1 else f"w{w:g}" for w in widths}
    assert numbers == pytest.approx(expected)


def test_most_experiments_of_a_paper_have_its_number() -> None:
    found = [path for path in SCIENCE if paper_of_header(path.read_text())]
    assert len(found) == 30


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_machine_decides_nothing_but_the_machine(path: Path) -> None:
    science = Parser.parse(SCIENCE[0])
    both = Parser.parse(SCIENCE[0], path)
    for key in ("accelerator", "devices", "num_nodes", "strategy", "precision", "deterministic"):
        science.trainer[key] = both.trainer[key] = None
    science.config = both.config = science.machine = both.machine = None
    assert science == both


@pytest.mark.parametrize(
    "method",
    [
        *("resnet", "stochastic_depth", "branchynet", "slimmable", "densenet", "msdnet"),
        "slimmable_exits",
    ],
)
def test_method_has_a_card(method: str) -> None:
    card = (ROOT / "experiments" / method / "README.md").read_text()
    for heading in ("## Method", "## Choices", "## Results"):
        assert heading in card

"""Every experiment parses, builds, and says in its header how to run it."""

import importlib
from pathlib import Path

import methods
import pytest
import torch
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


@pytest.mark.parametrize("path", MACHINES, ids=lambda path: path.stem)
def test_machine_decides_nothing_but_the_machine(path: Path) -> None:
    science = Parser.parse(SCIENCE[0])
    both = Parser.parse(SCIENCE[0], path)
    for key in ("accelerator", "devices", "num_nodes", "strategy", "precision", "deterministic"):
        science.trainer[key] = both.trainer[key] = None
    science.config = both.config = science.machine = both.machine = None
    assert science == both


@pytest.mark.parametrize(
    "method", ["resnet", "stochastic_depth", "branchynet", "slimmable", "densenet", "msdnet"]
)
def test_method_has_a_card(method: str) -> None:
    card = (ROOT / "experiments" / method / "README.md").read_text()
    for heading in ("## Method", "## Choices", "## Results"):
        assert heading in card

"""The numbers of a paper stand in the configuration of a run, and decide nothing."""

from pathlib import Path
from typing import Any

import launch
import methods
import pytest
import yaml

from running import Paper
from running.experiment import evaluated, trained

COMMAND = ["fit", "-c", "experiment.yaml", "--run_dir", "run", "--test_after_fit=false"]


def experiment(folder: Path, paper: Any, max_epochs: int = 1) -> None:
    config = methods.config("resnet") | {"paper": paper}
    config["trainer"] |= {"max_epochs": max_epochs, "limit_train_batches": 1, "callbacks": None}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_another_number_is_no_other_experiment(tmp_path: Path) -> None:
    """Added to a run, and changed after it has finished."""
    written = tmp_path / "run/config.yaml"
    papers = [None, {"source": "He et al. 2015", "test_acc": {"full": 0.9125, "w0.5": 1.0}}]
    for max_epochs, paper in enumerate(papers, start=1):
        experiment(tmp_path, paper, max_epochs)
        status, output = launch.run(COMMAND, tmp_path)
        assert status == 0, output
        assert yaml.safe_load(written.read_text())["paper"] == paper
    experiment(tmp_path, {"source": "another", "test_acc": {}}, max_epochs=2)
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 0, output
    assert "finished already" in output


def test_it_is_not_compared() -> None:
    config = methods.config("resnet")
    with_paper = config | {"paper": {"source": "a", "test_acc": {}}}
    assert trained(with_paper) == trained(config)
    assert evaluated(with_paper) == evaluated(config)


SHARES = "give an accuracy from 0 to 1"
TAKES = "paper takes source, a text, and test_acc, accuracies by operating point: "


@pytest.mark.parametrize(
    ("accuracy", "message"),
    [
        (94.2, f"paper.test_acc.full is 94.2: {SHARES}, as in 0.942 for 94.2%"),
        (-0.1, f"paper.test_acc.full is -0.1: {SHARES}"),
        (float("nan"), f"paper.test_acc.full is nan: {SHARES}"),
        (float("inf"), f"paper.test_acc.full is inf: {SHARES}"),
    ],
)
def test_what_is_no_share_is_refused(accuracy: float, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared whole)
        Paper("a", {"full": accuracy})
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("paper", "message"),
    [
        ({"source": "a", "test_acc": {"full": 94.2}}, f"full is 94.2: {SHARES}, as in 0.942"),
        ({"source": "a", "test_acc": {}, "year": 1}, f"{TAKES}Option 'year' is not accepted"),
        ({"test_acc": {}}, f"{TAKES}the following arguments are required: source"),
        ("He et al.", TAKES),
        ({"source": "a", "test_acc": {"full": "much"}}, "Expected a <class 'float'>"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(paper: Any, message: str, tmp_path: Path) -> None:
    experiment(tmp_path, paper)
    status, output = launch.run(COMMAND, tmp_path)
    assert status == 2
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert message in line
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()

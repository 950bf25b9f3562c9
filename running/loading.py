"""From the folder of a run to its network: weights, operating points, and what its answers mean.

    from running import load_run

    run = load_run("runs/slimmable/digits_us/seed0")  # its network, its weights, its points
    point = run.point("w0.5")
    answers = point.classify(["a.png", "b.jpg"])  # or Pillow's images, or uint8 (N, C, H, W)
    print([point.class_names[label] for label in answers.labels], answers.probabilities.amax(1))

Nothing but the run folder is read. Classes of the user's own, named in its config.yaml, are
imported from where Python finds them (PYTHONPATH). The network computes in float32, whatever
precision it was trained in.
"""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:  # data sets take long to import
    pass

Built = TypeVar("Built")


@contextmanager
def _refused_if_unfit(path: Path) -> Iterator[None]:
    """Whatever a checkpoint lacks or has too much, it is of another network."""
    try:
        yield
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{path} does not fit the config.yaml beside it ({textwrap.shorten(reason, 200)}): "
            "restore the file of the two that was changed"
        ) from error


@contextmanager
def _torch_as_it_was() -> Iterator[None]:
    """Networks are built as training has built them, whatever the caller has made the default."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(default)

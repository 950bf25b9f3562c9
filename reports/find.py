"""Run folders, where they are."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

SIGNS = (
    *("config.yaml", "attempts.yaml", "finished.yaml", "metrics.csv", "operating_points.csv"),
    *("last.ckpt", "best.ckpt"),
)
"""A folder that holds one of these is a run's, whatever has happened to the others."""


def is_run_folder(path: Path) -> bool:
    return any(os.path.isfile(path / name) for name in SIGNS)  # False if it may not be looked at


def find_runs(places: Iterable[str | Path]) -> list[Path]:
    """Returns the run folders that are given, or lie in those that are given, each once.

    What a run folder holds is not searched: W&B writes a config.yaml of its own there.

    Raises:
        FileNotFoundError: a place does not exist.
        NotADirectoryError: it is a file.
        ValueError: it is no run folder and holds none.
    """
    found: dict[Path, Path] = {}
    for place in map(Path, places):
        if not place.exists():
            raise FileNotFoundError(f"{place} does not exist: give run folders, or what holds them")
        if not place.is_dir():
            raise NotADirectoryError(f"{place} is a file: give the run folder that it lies in")
        runs = list(_below(place, set()))
        if not runs:
            raise ValueError(
                f"{place} is no run folder and holds none: a run folder has a config.yaml, "
                "as `main.py fit` writes it"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def _below(place: Path, seen: set[Path]) -> Iterator[Path]:
    """Yields run folders; `seen` are those visited, as links may lead back to them."""
    real = place.resolve()
    if real in seen:
        return
    seen.add(real)
    if is_run_folder(place):
        yield place
        return
    try:
        folders = sorted(Path(entry) for entry in os.scandir(place) if entry.is_dir())
    except OSError:  # one that may not be read hides no other
        return
    for folder in folders:
        if not folder.name.startswith(".") and folder.name != "wandb":
            yield from _below(folder, seen)

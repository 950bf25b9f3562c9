"""An operating point of a run as files that need neither this project nor, as ONNX, torch."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from running.exporting.check import (
    BATCH_SIZE,
    checkpoint,
    compare,
    find_images,
    in_batches,
    time_both,
    time_exits_taken,
)
from running.exporting.files import SUFFIXES, Format, targets, write
from running.exporting.onnx_graph import require_extra
from running.exporting.pieces import EarlyExit, Network, take_out
from running.loading import LoadedRun, load_run

STAGE = re.compile(r"(stage|exit)\d+\.onnx|manifest\.json|run\.py")
"""What a folder of stages holds."""


def export_point(
    folder: Path,
    name: str,
    kind: Format,
    out: Path | None = None,
    images: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes an operating point if it answers as the checkpoint does; prints how fast it is.

    Args:
        folder: of the run.
        name: of the point.
        kind: of the file. Early exit as ONNX is two things: a file, and beside it the folder
            `<its name>_stages`.
        out: the file; None: `export/<point>.onnx` (or `.pt2`) in the run folder.
        images: a folder of real images, on which it is checked; None: the run's test data.
        overwrite: whether what is there may be replaced.

    Returns:
        The file.

    Raises:
        ValueError, OSError: no such run or point, missing packages, images that do not fit, or
            answers that differ; nothing is left then.
    """
    require_extra()
    run = load_run(folder)
    point = take_out(run, name)
    if kind == "torch" and isinstance(point, EarlyExit):
        raise ValueError(
            f"{name} leaves early, which one torch program cannot: use --format onnx, or export "
            f"one of {', '.join(run.module.exit_names)}"
        )
    out = run.folder / "export" / f"{name}{SUFFIXES[kind]}" if out is None else out
    with written_together(targets(out, point), overwrite) as there:
        check_and_time(run, name, point, kind, there / out.name, images)
    for path in targets(out, point):
        files = [path] if path.is_file() else path.iterdir()
        print(f"wrote {path} ({sum(file.stat().st_size for file in files) / 1e6:.2f} MB)")
    return out


def check_and_time(
    run: LoadedRun,
    name: str,
    point: Network | EarlyExit,
    kind: Format,
    file: Path,
    folder: Path | None,
) -> None:
    """Writes the files of a point, compares them with the checkpoint, and measures."""
    images, source = find_images(run, folder)
    ours = checkpoint(run, name)
    answers = in_batches(ours, images, BATCH_SIZE)
    print(f"checking {name} of {run.folder} on {source}")
    for path, classify, batch_sizes in write(run, name, point, kind, file):
        theirs = in_batches(classify, images, batch_sizes[0])
        print(f"{path.name}: {compare(run, name, images, answers, theirs)}")
        for size in batch_sizes:
            print(f"  {time_both(ours, classify, images, size)}")
        if theirs.exits is not None and 1 in batch_sizes:
            for line in time_exits_taken(classify, images, theirs.exits, len(point.exits)):
                print(f"  {line}")


@contextlib.contextmanager
def written_together(paths: list[Path], overwrite: bool) -> Iterator[Path]:
    """Gives a folder for files, which go to their place if all is well, and else vanish.

    Args:
        paths: files and folders of one parent.
        overwrite: whether what is there may be replaced.

    Raises:
        FileExistsError: something is there, which may not be replaced.
        OSError: the parent cannot be written to.
    """
    there = [path for path in paths if path.exists()]
    strange = [path for path in there if not is_export(path, path == paths[0])]
    if strange:
        raise FileExistsError(f"{strange[0]} is no export and stays: give another --out")
    if there and not overwrite:
        names = " and ".join(map(str, there))
        raise FileExistsError(f"{names} exist: give --overwrite, or another --out")
    parent = paths[0].parent
    missing = [each for each in (parent, *parent.parents) if not each.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".export-", dir=parent))
    except OSError as error:
        raise OSError(f"cannot write to {parent} ({error.strerror}): give another --out") from error
    try:
        yield beside
        for path in paths:
            if path.is_dir() and not path.is_symlink():
                os.replace(path, beside / f"old-{path.name}")
            os.replace(beside / path.name, path)
    finally:
        shutil.rmtree(beside)
        for each in missing:
            if not any(each.iterdir()):
                each.rmdir()


def is_export(path: Path, is_file: bool) -> bool:
    """Tells whether something could have been exported: a file, or a folder of stages alone."""
    if is_file:
        return path.is_file()
    return path.is_dir() and all(
        STAGE.fullmatch(each.name) or each.name == "__pycache__" for each in path.iterdir()
    )

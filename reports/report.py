"""A report over run folders: a page, tables, and a picture of every figure."""

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import vl_convert
from rich.console import Console
from rich.progress import Progress

from reports.aggregate import Experiment, experiments_of
from reports.details import details
from reports.figures import comparisons
from reports.find import find_runs
from reports.markdown import report_md
from reports.page import GENERATOR, Detail, Section, page
from reports.page_parts import VEGA_LITE
from reports.run_record import RunRecord, read_run
from reports.style import WIDTH, Figure, slug
from reports.tables import points_csv

INDEX, FIGURES = "index.html", "figures"
FILES = (INDEX, "report.md", "points.csv", FIGURES)
MAX_DETAILED = 12
"""Experiments of a data set that have figures of their own."""


def write_report(places: Iterable[str | Path], out: Path) -> tuple[Path, list[RunRecord]]:
    """Writes a report over all run folders that are given, or lie in those that are given.

    A report that is there is replaced, whole; nothing else ever is.

    Args:
        places: run folders, or folders that hold them.
        out: folder of the report.

    Returns:
        The page, and what was read.

    Raises:
        ValueError, OSError: no run folder, or a folder that cannot be written.
    """
    out = out.resolve() if out.is_symlink() else out  # a link stays
    check_out(out)
    part = make_part(out)
    try:
        folders = find_runs(places)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("reading runs", total=len(folders))
            records = []
            for folder in folders:
                records.append(read_run(folder))
                progress.advance(task)
            groups = experiments_of(records)
            sections = [section(data, each) for data, each in groups.items()]
            pictures = name_pictures(sections)
            task = progress.add_task("drawing figures", total=sum(map(len, pictures.values())))
            for of_one in pictures.values():
                for path, figure in of_one:
                    (part / path).write_bytes(png(figure))
                    progress.advance(task)
        write = {
            INDEX: page(records, sections),
            "report.md": report_md(records, groups, pictures),
            "points.csv": points_csv(groups),
        }
        for name, content in write.items():
            (part / name).write_text(content, encoding="utf-8")
        replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out / INDEX, records


def section(data: str, experiments: Sequence[Experiment]) -> Section:
    """Returns what is said of one data set."""
    shown = [Detail(each.name, *details(each)) for each in experiments[:MAX_DETAILED]]
    shown = [detail for detail in shown if detail.figures or detail.notes]
    notes = []
    if len(experiments) > MAX_DETAILED:
        notes.append(
            f"The first {MAX_DETAILED} of {len(experiments)} experiments have figures of their "
            "own: report on fewer run folders to see those of the others."
        )
    return Section(data, experiments, comparisons(experiments), shown, notes)


def name_pictures(sections: Sequence[Section]) -> dict[str, list[tuple[str, Figure]]]:
    """Returns by data set every figure, each with the path of its PNG in the report."""
    taken: set[str] = set()

    def path(*parts: str) -> str:
        stem = "-".join(slug(part) for part in parts)
        name = stem
        while name in taken:
            name = f"{stem}-{len(taken)}"
        taken.add(name)
        return f"{FIGURES}/{name}.png"

    return {
        each.data: [(path(each.data, figure.name), figure) for figure in each.figures]
        + [
            (path(each.data, detail.name, figure.name), figure)
            for detail in each.details
            for figure in detail.figures
        ]
        for each in sections
    }


def png(figure: Figure) -> bytes:
    """Returns a figure as a picture, two pixels to a point."""
    spec = figure.spec | {"width": WIDTH}
    return vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2)


def run_figures(folder: Path) -> dict[str, bytes]:
    """Returns the figures of one run as PNG files, by name; those that its files allow.

    The process that trains in the folder may call it: the lock is left alone.
    """
    groups = experiments_of([read_run(Path(folder), ask_lock=False)])
    figures: dict[str, bytes] = {}
    for experiments in groups.values():
        for experiment in experiments:
            for figure in [*comparisons([experiment]), *details(experiment)[0]]:
                figures[figure.name] = png(figure)
    return figures


def check_out(out: Path, option: str = "--out") -> None:
    """Refuses to write where something else than a report lies.

    Args:
        out: folder of the report.
        option: by which a user names it.

    Raises:
        ValueError: says what.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: pass another {option}")
    names = {path.name for path in out.iterdir()}
    others = sorted(names - set(FILES))
    pictures = out / FIGURES
    if pictures.is_dir():
        others += sorted(path.name for path in pictures.iterdir() if path.suffix != ".png")
    if others:
        raise ValueError(f"{out} holds {others[0]}, which is of no report: pass another {option}")
    if names and not _is_report(out / INDEX):
        raise ValueError(f"{out} is no report of this command: pass another {option}")


def _is_report(index: Path) -> bool:
    try:
        with index.open(encoding="utf-8") as file:
            return f'name="generator" content="{GENERATOR}"' in file.read(2000)
    except (OSError, UnicodeDecodeError):
        return False


def make_part(out: Path) -> Path:
    """Returns a new folder beside a report, in which the next one is written.

    Raises:
        OSError: nothing can be written there.
    """
    part = out.absolute().with_name(f".{out.absolute().name}.{os.getpid()}.part")
    try:
        (part / FIGURES).mkdir(parents=True)
    except OSError as error:
        raise OSError(f"cannot write {out} ({error.strerror}): pass another --out") from error
    return part


def replace(part: Path, out: Path) -> None:
    """Puts a folder in the place of another one."""
    old = part.with_suffix(".old")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(part, out)
    except OSError as error:  # another report was faster
        raise OSError(f"cannot replace {out} ({error.strerror}): write it again") from error
    finally:
        if old.exists() and not out.exists():
            os.rename(old, out)
        shutil.rmtree(old, ignore_errors=True)

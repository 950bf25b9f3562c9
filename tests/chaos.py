"""Kills runs in every phase, starts them again, and compares them with runs left alone.

    python tests/chaos.py --kills 50 --seed 0
    python tests/chaos.py --kills 12 --methods universally_slimmable msdnet

Every row of `methods.py` is trained once without and once with kills (SIGKILL), which come at
random within a drawn phase. A run that ends before it was killed as often as it should is followed
by another. Prints a line per broken run, whose kills are counted under the phase that the process
was really in. The exit status is 1 if a run does not end, or not with the same bits.
"""

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import launch
import methods
from test_resume import COMMAND, assert_same_run, write

PHASES = ("start-up", "training", "validation", "recalibration", "checkpoint", "test")
COLUMNS = (*PHASES, "attempts", "identical")
ONCE = ("start-up", "test")  # what an attempt goes through at most once


@dataclass
class BrokenRun:
    method: str
    kills: Counter[str] = field(default_factory=Counter)  # by phase
    num_attempts: int = 0
    ended: bool = False
    identical: bool = False


def experiment(method: str) -> dict[str, Any]:
    config = methods.config(method)
    config["trainer"]["max_epochs"] = 4
    config["trainer"]["callbacks"].append({"class_path": "phase_probe.PhaseProbe"})
    return config


def phases_of(method: str) -> tuple[str, ...]:
    callbacks = methods.config(method)["trainer"]["callbacks"]
    recalibrates = {"class_path": "callbacks.BNRecalibration"}.items()
    if any(recalibrates <= callback.items() for callback in callbacks):
        return PHASES
    return tuple(phase for phase in PHASES if phase != "recalibration")


def start_log(folder: Path) -> float:
    """Forgets the phases of the attempt before and returns when the next begins."""
    (folder / "phases.txt").unlink(missing_ok=True)
    return time.monotonic()


def read_log(folder: Path) -> list[tuple[float, str]]:
    """Returns when which phase of this attempt began, after the start-up."""
    log = folder / "phases.txt"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []  # the last: half written
    return [(float(begin), phase) for begin, phase in (line.split(" ") for line in lines)]


def phases_so_far(folder: Path) -> list[str]:
    return ["start-up", *(phase for _, phase in read_log(folder))]


def mean_seconds(log: Sequence[tuple[float, str]]) -> dict[str, float]:
    """Returns how long each phase lasts when it is entered; the last entry ends the one before."""
    seconds: dict[str, list[float]] = {}
    for (begin, phase), (end, _) in itertools.pairwise(log):
        seconds.setdefault(phase, []).append(end - begin)
    return {phase: statistics.mean(values) for phase, values in seconds.items()}


def draw_plan(phases: Sequence[str], num_kills: int, chance: random.Random) -> list[str]:
    """Draws where to kill: every phase equally often; the test last, as no training follows it."""
    num_rounds = -(-num_kills // len(phases))
    rounds = [chance.sample(phases, len(phases)) for _ in range(num_rounds)]
    return sorted(list(itertools.chain(*rounds))[:num_kills], key="test".__eq__)


def draw_moment(
    folder: Path, phase: str, seconds: float, chance: random.Random
) -> Callable[[], bool]:
    """Returns what tells when to kill: up to `seconds` after one of the next two visits began."""
    visit = 1 if phase in ONCE else chance.randint(1, 2)
    delay = chance.uniform(0, seconds)

    def moment() -> bool:
        phases = phases_so_far(folder)
        if phases[-1] != phase or phases.count(phase) < visit:
            return False
        time.sleep(delay)
        return True

    return moment


def break_run(
    run: BrokenRun, folder: Path, num_kills: int, seconds: dict[str, float], chance: random.Random
) -> None:
    """Kills a run up to `num_kills` times and lets it end."""
    for phase in draw_plan(phases_of(run.method), num_kills, chance):
        run.num_attempts += 1
        start_log(folder)
        moment = draw_moment(folder, phase, seconds[phase], chance)
        if not launch.kill_when(moment, COMMAND, folder):
            break
        run.kills[phases_so_far(folder)[-1]] += 1
    else:
        run.num_attempts += 1
        launch.run(COMMAND, folder)
    run.ended = (folder / "run/finished.yaml").exists()


def break_method(
    method: str, num_kills: int, folder: Path, chance: random.Random
) -> list[BrokenRun]:
    """Kills runs of a method `num_kills` times in all."""
    whole = write(folder / f"{method}_whole", experiment(method))
    launch.run(["--help"], whole)  # starts the fork server, which belongs to no run
    start = start_log(whole)
    status, output = launch.run(COMMAND, whole)
    assert status == 0, output
    seconds = mean_seconds([(start, "start-up"), *read_log(whole), (time.monotonic(), "end")])
    runs: list[BrokenRun] = []
    num_left = num_kills
    while num_left > 0 and all(run.identical for run in runs):
        broken = write(folder / f"{method}_broken{len(runs)}", experiment(method))
        run = BrokenRun(method)
        break_run(run, broken, num_left, seconds, chance)
        try:
            assert run.ended, (broken / "output.txt").read_text()
            assert_same_run(whole, broken)
            run.identical = True
        except AssertionError:
            traceback.print_exc()
        print_row(run)
        runs.append(run)
        num_left -= run.kills.total()
    return runs


def print_cells(first: str, cells: Sequence[Any]) -> None:
    padded = [str(cell).rjust(len(name)) for cell, name in zip(cells, COLUMNS, strict=False)]
    print(first.ljust(21), *padded, sep="  ", flush=True)


def print_row(run: BrokenRun) -> None:
    kills = [run.kills[phase] for phase in PHASES]
    print_cells(run.method, [*kills, run.num_attempts, "yes" if run.identical else "no"])


def print_sums(runs: Sequence[BrokenRun]) -> None:
    kills = sum((run.kills for run in runs), Counter())
    print_cells("all", [kills[phase] for phase in PHASES])
    num_resumed = sum(run.kills.total() for run in runs if run.ended)
    num_identical = sum(run.identical for run in runs)
    print(
        f"{num_resumed} of {kills.total()} kills resumed, "
        f"{num_identical} of {len(runs)} runs identical"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="over all methods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--methods", nargs="+", choices=methods.METHODS, default=list(methods.METHODS)
    )
    arguments = parser.parse_args()
    sys.path.append(str(launch.ROOT))  # where the runs find main
    chance = random.Random(arguments.seed)
    shares = Counter(itertools.islice(itertools.cycle(arguments.methods), arguments.kills))
    print_cells("method", COLUMNS)
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for method, num_kills in shares.items():
            runs += break_method(method, num_kills, Path(folder), chance)
    print_sums(runs)
    return 0 if all(run.identical for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())

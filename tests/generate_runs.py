"""Run folders of which one file is damaged, and commands that look at them."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import methods
import yaml


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(3):
        if content:
            content[chance.randrange(len(content))] = chance.randrange(256)
    path.write_bytes(content)


def replace(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    """Returns a damage that puts something else in the place of a file."""

    def damage(path: Path, chance: random.Random) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "gone": replace(lambda path: None),
    "empty": lambda path, chance: path.write_bytes(b""),
    "cut": lambda path, chance: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "bytes": lambda path, chance: path.write_bytes(bytes(range(256))),
    "text": lambda path, chance: path.write_text("a: [1, {b: x}]\n"),
    "number": lambda path, chance: path.write_text("1e999\n"),
    "flipped": flip,
    "folder": replace(Path.mkdir),
    "pipe": replace(os.mkfifo),
    "link to itself": replace(lambda path: path.symlink_to(path.name)),
}
LOOKED_INTO = ("config.yaml", "last.ckpt", "best.ckpt")
"""Files that commands read which need the network; the others read all."""


def train(folder: Path, method: str, main: Callable[[list[str]], int]) -> Path:
    """Trains a few steps of a row of `methods` and returns the run folder."""
    config = methods.config(method)
    config["trainer"] |= {"max_epochs": 1, "limit_train_batches": 3}
    path = folder / f"{method}.yaml"
    path.write_text(yaml.safe_dump(config))
    run = folder / "runs" / method
    assert main(["fit", "-c", str(path), "--run_dir", str(run), "--wandb.mode=disabled"]) == 0
    return run


def damaged_runs(
    folder: Path, seed: int, main: Callable[[list[str]], int]
) -> Iterator[tuple[str, list[str]]]:
    """Yields command lines; a folder is damaged when its first one is asked for."""
    chance = random.Random(seed)
    images = folder / "data" / "val"
    for method in ("resnet", "branchynet"):
        whole = train(folder, method, main)
        names = sorted(path.name for path in whole.iterdir() if path.is_file())
        for name in names:
            for damage, make in DAMAGES.items():
                run = folder / "damaged" / method
                shutil.rmtree(run, ignore_errors=True)
                shutil.copytree(whole, run)
                make(run / name, chance)
                out = str(folder / "out")
                commands = [["runs", str(run)], ["report", str(run), "--out", out]]
                if name in LOOKED_INTO:
                    answers = ["--images", str(images), "--out", f"{out}.csv", "--overwrite"]
                    commands += [
                        ["predict", "--run", str(run), *answers],
                        ["export", "--run", str(run), "--format=torch", "--overwrite"],
                        ["profile", "-c", str(run / "config.yaml"), "--batch_size=2"],
                    ]
                for command in commands:
                    yield f"{command[0]} of {method} with {name} {damage}", command

"""The files of an export: written, and loaded again as whoever gets them does."""

import json
import math
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from running.environment import environment
from running.exporting.check import BATCH_SIZE, Answers, Classify
from running.exporting.onnx_graph import OPSET, add_metadata, join_exits, save_program, to_onnx
from running.exporting.pieces import EarlyExit, Network
from running.loading import LoadedRun

Format = Literal["onnx", "torch"]
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
RUNNER = Path(__file__).with_name("runner.py")


class Exported(NamedTuple):
    """Something that was written."""

    path: Path
    classify: Classify
    batch_sizes: list[int]
    """Images at a time for which it is meant; it is checked with the first of them."""


def stages_folder(file: Path) -> Path:
    """Returns the folder that lies beside a file of early exit."""
    return file.with_name(f"{file.stem}_stages")


def targets(file: Path, point: Network | EarlyExit) -> list[Path]:
    """Returns what an export will be: a file, and of early exit a folder beside it."""
    return [file] if isinstance(point, Network) else [file, stages_folder(file)]


def write(
    run: LoadedRun, name: str, point: Network | EarlyExit, kind: Format, file: Path
) -> Iterator[Exported]:
    """Writes the targets of a point, and yields each when it is there."""
    facts = describe(run, name)
    if kind == "torch":
        save_program(point.piece, file, facts)
        yield Exported(file, torch_classifier(file), [BATCH_SIZE, 1])
        return
    facts["opset"] = OPSET
    if isinstance(point, Network):
        save_onnx(to_onnx(point.piece), file, facts)
        yield Exported(file, onnx_classifier(file), [BATCH_SIZE, 1])
        return
    stages = [to_onnx(piece) for piece in point.stages]
    exits = [to_onnx(piece) for piece in point.exits]
    limits = [*map(as_json, point.thresholds), None]
    facts |= {"criterion": point.criterion, "thresholds": limits[:-1]}
    save_onnx(join_exits(point, stages, exits), file, facts)
    yield Exported(file, onnx_classifier(file), [1])
    folder = stages_folder(file)
    folder.mkdir()
    facts["exits"] = []
    for number, (stage, exit_here) in enumerate(zip(stages, exits, strict=True), start=1):
        names = {"stage": f"stage{number}.onnx", "exit": f"exit{number}.onnx"}
        facts["exits"].append({**names, "threshold": limits[number - 1]})
        for each, model in zip(names.values(), (stage, exit_here), strict=True):
            save_onnx(model, folder / each, {})
    (folder / "manifest.json").write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    shutil.copyfile(RUNNER, folder / "run.py")
    yield Exported(folder, stages_classifier(folder), [BATCH_SIZE])


def as_json(threshold: float) -> float | str:
    """Returns a number, or the name of an infinity, for which JSON has none."""
    return threshold if math.isfinite(threshold) else str(threshold)


def describe(run: LoadedRun, name: str) -> dict[str, Any]:
    """Returns what whoever gets a file has to know."""
    import onnx

    return {
        "point": name,
        "run": "/".join(run.folder.resolve().parts[-3:]),
        "data": run.image_format.data,
        "class_names": run.image_format.class_names,
        "image_shape": list(run.image_format.image_shape),
        "images": f"{run.image_format.preparation}; normalisation is part of the network",
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "project_commit": environment()["git_commit"],
    }


# --- loading --------------------------------------------------------------------------------------


def save_onnx(model: Any, path: Path, facts: dict[str, Any]) -> None:
    """Checks and writes a model; what is no text is metadata as JSON."""
    import onnx

    add_metadata(
        model,
        {key: each if isinstance(each, str) else json.dumps(each) for key, each in facts.items()},
    )
    onnx.save_model(model, path)


def session_options() -> Any:
    """Returns options for onnxruntime with which it has as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return options


def onnx_classifier(path: Path) -> Classify:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(path), session_options(), providers=["CPUExecutionProvider"]
    )

    def classify(images: Tensor) -> Answers:
        return Answers(*map(torch.from_numpy, session.run(None, {"images": images.numpy()})))

    return classify


def stages_classifier(folder: Path) -> Classify:
    network = runpy.run_path(str(folder / "run.py"))["EarlyExit"](folder, session_options())

    def classify(images: Tensor) -> Answers:
        return Answers(*map(torch.from_numpy, network(images.numpy())))

    return classify


def torch_classifier(path: Path) -> Classify:
    program: nn.Module = torch.export.load(path).module()

    @torch.no_grad()
    def classify(images: Tensor) -> Answers:
        return Answers(program(images))

    return classify

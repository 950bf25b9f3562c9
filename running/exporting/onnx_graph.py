"""ONNX files of operating points; early exit as one file, whose `If` nodes hold the rest.

    images -> stage 1 -> exit 1 -> If(all have left) { answers } else { stage 2 -> ... If ... }

With one image the runtime stops where the image leaves. With more it stops where the last of them
does, and each has the answer of the exit where it was sure first.
"""

import contextlib
import importlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from networks import Criterion
from running.exporting.pieces import EarlyExit, Piece

OPSET = 18
"""The newest that torch's exporter writes itself: from there its files would be converted."""
IR_VERSION = 10
BATCH = "batch"
EXTRA = "exporting needs more packages: pip install -e '.[export]'"


def require_extra() -> None:
    """Raises ValueError unless the packages of the extra `export` are there."""
    try:
        for package in ("onnx", "onnxruntime", "onnxscript"):  # torch's exporter needs the last
            importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"{EXTRA} ({error})") from error


class Single(nn.Module):
    """A module of one tensor in, one tensor out."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        return self.module([images])[0]


def save_program(piece: Piece, path: Path, facts: dict[str, Any]) -> None:
    """Writes a module of one tensor as a program of torch, with facts in `facts.json`."""
    program = to_program(Single(piece.module), piece.example[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights whose channels come last in memory
        torch.export.save(program, path, extra_files={"facts.json": json.dumps(facts)})


def to_program(module: nn.Module, example: Tensor | list[Tensor]) -> ExportedProgram:
    """Exports a module with any number of images."""
    batch = torch.export.Dim(BATCH)
    shapes = {0: batch} if isinstance(example, Tensor) else [{0: batch} for _ in example]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, (example,), dynamic_shapes=(shapes,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def to_onnx(piece: Piece) -> Any:
    """Returns an ONNX model (`onnx.ModelProto`) of a module."""
    program = to_program(piece.module, piece.example)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            input_names=piece.inputs,
            output_names=piece.outputs,
            opset_version=OPSET,
            dynamo=True,
        )
    graph = exported.model_proto.graph
    return make_model(
        [clean(node) for node in graph.node],
        list(graph.initializer),
        [describe(value) for value in graph.input],
        [describe(value) for value in graph.output],
    )


def clean(node: Any) -> Any:
    """Drops what torch notes at a node: where in its source it is from, say."""
    del node.metadata_props[:]
    node.doc_string = ""
    return node


def describe(value: Any) -> Any:
    """Returns a graph's input or output, its first dimension being the batch."""
    from onnx import helper

    kind = value.type.tensor_type
    shape = [dim.dim_value or dim.dim_param for dim in kind.shape.dim]
    return helper.make_tensor_value_info(value.name, kind.elem_type, [BATCH, *shape[1:]])


def make_model(nodes: list, initializers: list, inputs: list, outputs: list) -> Any:
    from onnx import helper

    graph = helper.make_graph(nodes, "network", inputs, outputs, initializers)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(
        graph, producer_name="dynamic-networks", opset_imports=[opset], ir_version=IR_VERSION
    )


def add_metadata(model: Any, facts: dict[str, str]) -> None:
    from onnx import checker, helper

    helper.set_model_props(model, facts)
    checker.check_model(model, full_check=True)


# --- early exit -----------------------------------------------------------------------------------

OUTPUTS = ("probabilities", "exit")


def join_exits(point: EarlyExit, stages: list[Any], exits: list[Any]) -> Any:
    """Returns one model of the models of all stages and exits."""
    from onnx import TensorProto, helper

    nodes, tensors = _from_stage(1, OUTPUTS, point, stages, exits)
    num_classes = exits[0].graph.output[0].type.tensor_type.shape.dim[1].dim_value
    outputs = [
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [BATCH, num_classes]),
        helper.make_tensor_value_info("exit", TensorProto.INT64, [BATCH]),
    ]
    return make_model(nodes, tensors, list(stages[0].graph.input), outputs)


def _from_stage(
    number: int, outputs: tuple[str, str], point: EarlyExit, stages: list[Any], exits: list[Any]
) -> tuple[list, list]:
    """Returns nodes and constants that lead from a stage, from 1, to two outputs.

    They read the state before it, and of the exit before it `left{k}`, `answer{k}` and `taken{k}`.
    """
    from onnx import TensorProto, helper

    parts = [
        _renamed(model.graph, number, kind)
        for model, kind in ((stages[number - 1], "stage"), (exits[number - 1], "exit"))
    ]
    nodes = [node for part in parts for node in part.node]
    tensors = [tensor for part in parts for tensor in part.initializer]
    tensors.append(helper.make_tensor(f"number{number}", TensorProto.INT64, [1], [number]))
    if number == len(stages):
        return [*nodes, *_answer(number, *outputs)], tensors
    threshold = point.thresholds[number - 1]
    tensors.append(helper.make_tensor(f"threshold{number}", TensorProto.FLOAT, [], [threshold]))
    nodes += _answer(number, f"answer{number}", f"taken{number}")
    nodes += _leave(number, point.criterion)
    stop, go_on = (
        tuple(f"{name}_{where}{number}" for name in OUTPUTS) for where in ("at", "behind")
    )
    given = [
        helper.make_node("Identity", [f"answer{number}"], [stop[0]]),
        helper.make_node("Identity", [f"taken{number}"], [stop[1]]),
    ]
    rest = _from_stage(number + 1, go_on, point, stages, exits)
    choice = helper.make_node(
        "If",
        [f"all{number}"],
        list(outputs),
        f"If{number}",
        then_branch=_branch(f"leave_at_{number}", given, [], stop),
        else_branch=_branch(f"from_stage_{number + 1}", *rest, go_on),
    )
    return [*nodes, choice], tensors


def _branch(name: str, nodes: list, tensors: list, outputs: tuple[str, str]) -> Any:
    from onnx import TensorProto, helper

    kinds = TensorProto.FLOAT, TensorProto.INT64
    values = [
        helper.make_tensor_value_info(output, kind, None)
        for output, kind in zip(outputs, kinds, strict=True)
    ]
    return helper.make_graph(nodes, name, [], values, tensors)


def _answer(number: int, answer: str, taken: str) -> list:
    """Returns the nodes that choose between the answer of this exit and those before."""
    from onnx import helper

    make = helper.make_node
    own, this = f"probabilities{number}", f"this{number}"
    nodes = [
        make("Shape", [f"score{number}"], [f"shape{number}"]),
        make("Expand", [f"number{number}", f"shape{number}"], [this]),
    ]
    if number == 1:
        return [*nodes, make("Identity", [own], [answer]), make("Identity", [this], [taken])]
    left, rows = f"left{number - 1}", f"rows{number}"
    return [
        *nodes,
        make("Where", [left, f"taken{number - 1}", this], [taken]),
        make("Unsqueeze", [left, "number1"], [rows]),  # behind axis 1
        make("Where", [rows, f"answer{number - 1}", own], [answer]),
    ]


def _leave(number: int, criterion: Criterion) -> list:
    """Returns the nodes that tell who has left by an exit, and whether all have; NaN stays."""
    from onnx import TensorProto, helper

    make = helper.make_node
    compare = "Less" if criterion == "entropy" else "GreaterOrEqual"
    left, sure, inside = f"left{number}", f"sure{number}", f"inside{number}"
    nodes = [make(compare, [f"score{number}", f"threshold{number}"], [sure])]
    before = [sure, sure] if number == 1 else [f"left{number - 1}", sure]
    return [
        *nodes,
        make("Or", before, [left]),
        make("Not", [left], [inside]),
        make("Cast", [inside], [f"ones{number}"], to=TensorProto.INT64),
        make("ReduceSum", [f"ones{number}"], [f"count{number}"], keepdims=0),
        make("Cast", [f"count{number}"], [f"any{number}"], to=TensorProto.BOOL),
        make("Not", [f"any{number}"], [f"all{number}"]),
    ]


def _renamed(graph: Any, number: int, kind: str) -> Any:
    """Returns a graph whose inner names no other graph has; states have one name in all."""
    copy = type(graph)()
    copy.CopyFrom(graph)
    states = {value.name for value in (*graph.input, *graph.output)} - {"probabilities", "score"}

    def name(old: str) -> str:
        if old in ("probabilities", "score"):
            return f"{old}{number}"
        return old if old in states or not old else f"{kind}{number}/{old}"

    for node in copy.node:
        node.name = f"{kind}{number}/{node.name}"
        node.input[:] = list(map(name, node.input))
        node.output[:] = list(map(name, node.output))
    for tensor in copy.initializer:
        tensor.name = name(tensor.name)
    return copy

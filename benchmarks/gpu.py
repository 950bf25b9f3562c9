"""Claims of speed on a GPU, each beside the best that a user would write otherwise.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --rows depth exits --seconds 120

Needs a CUDA device. No row begins after five minutes. A row is printed when it is done, and a table
of all promises at the end: ratio, goal, verdict. Contenders take turns in an order of each round's
own, a sample is several steps, medians count. One that fails is a line that says why. Weights and
images are random. The other side is, where it applies: the plain eager loop, `torch.compile` by
default and with mode="reduce-overhead" (of ResNet-20: ResNet-110 compiles for minutes),
torchvision's networks and its stochastic_depth, timm's DropPath, a CUDA graph of the whole network.

All contenders may use TF32, and cuDNN's kernels are those of its heuristics, as in a training with
machines/gpu.yaml, unless a name says "kernels tried out", as with `trainer.benchmark`. (Trying them
out takes half a minute for a network with a gate per sample.) All optimizers are torch's SGD.
"""

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch

from benchmarks import gpu_depth, gpu_families, gpu_inference, gpu_trainer, gpu_training
from benchmarks.gpu_report import Report, Setting, row
from benchmarks.timing import describe_machine

ROWS: dict[str, Callable[[Report, Setting], None]] = {
    "depth": gpu_depth.depth,
    "exits": gpu_inference.exits,
    "sandwich": gpu_training.widths,
    "width": gpu_inference.widths,
    "recalibration": gpu_inference.recalibration,
    "dense": gpu_training.dense,
    "trainer": gpu_trainer.trainer,
    "data": gpu_trainer.data,
    "latency": gpu_inference.latency,
    "compile": gpu_training.compiled,
    "families": gpu_families.families,
}
LIMIT = 300
"""Seconds after which no row begins: the longest take a minute."""


def run(names: Sequence[str], limit: float, setting: Setting) -> Report:
    """Runs rows, as many as begin within `limit` seconds; prints them, and a table at the end."""
    start = time.monotonic()
    report = Report()
    report.say(describe_machine(setting.device))
    try:
        for name in names:
            if time.monotonic() - start > limit:
                report.add(f"row {name}", None, reason=f"{limit:.0f} seconds are over")
                continue
            with row(report, name, setting):
                ROWS[name](report, setting)
            report.say(f"[{time.monotonic() - start:.0f} s: {name}]")
    finally:  # a table of what there is, after Ctrl+C, too
        report.say(f"\n{describe_machine(setting.device)}")
        for line in report.lines:
            report.say(report.format(line))
    return report


def main(args: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="no row begins after that")
    options = parser.parse_args(args)
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch finds none", file=sys.stderr)
        return 2
    # Deterministic products of matrices need it before the first of them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_float32_matmul_precision("high")
    # Ours stay: a network that could not be recorded says so, and its time is that of eager code.
    warnings.filterwarnings("ignore", module="torch|pytorch_lightning|timm")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    # So that a time limit of a scheduler or of `timeout` ends with the table, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run(options.rows, options.seconds, Setting(torch.device("cuda", 0)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

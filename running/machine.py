"""How a network runs, and where: the matter of a machine file, not of an experiment."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from lightning_modules import ImageClassifier
from networks import Capture, check_capture
from running.memory import keep_freed_memory


@dataclass
class Machine:
    """How networks run on this machine. It changes no result beyond rounding.

    Args:
        capture: run training steps kernel by kernel ("none"), as CUDA graphs ("graphs"), or as CUDA
            graphs of compiled blocks ("compiled").
        resident_data: keep a data set that fits on the GPU, where the images of many training
            batches are then made at once.
        tf32: let a GPU multiply float32 numbers with 10 bits after the point (TensorFloat-32).
        keep_memory: on a CPU, keep the memory that a step has used for the next one, instead of
            giving it back to the system.

    Raises:
        ValueError: an unknown way to capture.
    """

    capture: Capture = "none"
    resident_data: bool = True
    tf32: bool = True
    keep_memory: bool = True

    def __post_init__(self) -> None:
        check_capture(self.capture)

    def apply(self, trainer: Trainer, model: ImageClassifier, data: LightningDataModule) -> None:
        """Tells those whose matter it is."""
        model.capture = self.capture
        data.resident = self.resident_data
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32
        # Deterministic kernels need no memory filled that they are about to write.
        torch.utils.deterministic.fill_uninitialized_memory = False
        is_cpu = trainer.strategy.root_device.type == "cpu"
        if is_cpu and self.keep_memory:
            keep_freed_memory()
        if self.capture != "none" and trainer.strategy.root_device.type != "cuda":
            rank_zero_warn(
                f"machine.capture is {self.capture}, and there is no GPU to record for: nothing "
                "gets faster; set it to none"
            )


def check_tasks(trainer: Trainer) -> None:
    """Raises ValueError if a launcher has started another number of processes than asked for."""
    processes = trainer.num_devices * trainer.num_nodes
    if TorchElasticEnvironment.detect() and int(os.environ["WORLD_SIZE"]) != processes:
        raise ValueError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and this command asks for "
            f"{processes}: make trainer.num_nodes its --nnodes and trainer.devices its "
            "--nproc_per_node"
        )
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if SLURMEnvironment.detect() and int(tasks) != processes:
        raise ValueError(
            f"SLURM started {tasks} tasks for {processes} processes: start the job with as many "
            "--nodes as trainer.num_nodes and with --ntasks-per-node as many as trainer.devices, "
            "and the tasks with srun"
        )


def on_first_process(trainer: Trainer, action: Callable[[], None]) -> None:
    """Does what the first process alone has to do; if that is refused, it is to all of them.

    Processes that a launcher has started would otherwise wait for a first one that has left. Where
    Lightning starts them, there is only one as yet.

    Raises:
        ValueError, OSError: in all processes, what it raised in the first.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size == 1 or isinstance(environment, LightningEnvironment):
        action()
        return
    trainer.strategy.setup_environment()
    problem = None
    try:
        action()
    except (ValueError, OSError) as error:
        problem = error
    problem = trainer.strategy.broadcast(problem)
    if problem is not None:
        raise problem

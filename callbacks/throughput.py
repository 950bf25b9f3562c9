"""How fast it trains, and what share of the device that is."""

import copy
import re
import time
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from callbacks.outlets import log_metrics
from networks import count_macs, wait_for

PEAKS = {
    # Data sheets of NVIDIA, teraFLOP/s of tensor cores without sparsity: 16 bits, 32 bits (TF32;
    # V100 and T4 have none, and compute in float32).
    "B200": (2250, 1125),
    "H200": (989, 494.5),
    "GH200": (989, 494.5),
    "H100": (989, 494.5),  # SXM
    "H100 PCIe": (756, 378),
    "H100 NVL": (835, 417.5),
    "A100": (312, 156),
    "A40": (149.7, 74.8),
    "A10": (125, 62.5),
    "L40S": (362, 183),
    "L4": (121, 60),
    "V100": (125, 15.7),
    "T4": (65, 8.1),
    "4090": (165, 82.6),
    "3090": (71, 35.6),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Returns the FLOP/s that a device reaches at best, dense; None if it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        precision: the Trainer's; float32 is taken as TF32 where the device has it.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", device_name))
    bits = re.match(r"(bf)?(16|32)-", precision)
    # A part of a device, or one with fewer cores or watts under the same number.
    if bits is None or words & {"MIG", "Laptop", "D"}:
        return None
    fitting = [name for name in PEAKS if set(name.split()) <= words]
    if not fitting:
        return None
    half, full = PEAKS[max(fitting, key=len)]
    return 1e12 * (half if bits[2] == "16" else full)


def training_flops(net: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """Returns the FLOPs of a training step per image: backward costs twice the forward pass.

    Two per multiply-accumulate; of the whole network with all its exits, whatever a method leaves
    out or runs again at other widths.
    """
    # BN cannot normalise by one image; a copy, for its statistics; in training a width needs none.
    net = copy.deepcopy(net).train()
    parameter = next(net.parameters())
    images = torch.zeros(2, *image_shape, dtype=parameter.dtype, device=parameter.device)
    return 3 * count_macs(net, images)


class ThroughputMonitor(Callback):
    """Logs `time/epoch_seconds` and `time/images_per_second` of the training part of every epoch.

    Loading, and the checkpoints within an epoch, count; validation and what was lost to a kill do
    not. Images are those of all ranks. On a GPU whose peak is known it also logs `train/mfu`, model
    FLOP/s utilisation: the FLOP/s that training the whole network takes at this pace (see
    `training_flops`), as a share of the devices' peak (see `peak_flops`). A step never waits for
    the device; the end of an epoch and the start of a validation do.
    """

    only_observes = True

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_images = 0
        self.since: float | None = None
        self.device = torch.device("cpu")
        self.utilisation_per_rate: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.utilisation_per_rate = None
        self.device = pl_module.device
        shape = getattr(trainer.datamodule, "image_shape", None)
        if self.device.type != "cuda" or shape is None:
            return
        peak = peak_flops(torch.cuda.get_device_name(self.device), str(trainer.precision))
        if peak:
            flops = training_flops(pl_module.net, shape)
            self.utilisation_per_rate = flops / (peak * trainer.world_size)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.since is None:
            self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.count_time()
        self.num_images += len(batch[0]) * trainer.world_size

    def count_time(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self.since
        self.since = now

    def catch_up(self) -> None:
        """Counts what the device still has to do: its queue holds many steps."""
        if self.device.type == "cuda" and self.since is not None:
            wait_for(self.device)
            self.count_time()
        self.since = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.catch_up()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.catch_up()
        rate = self.num_images / self.seconds if self.seconds else 0.0
        metrics = {"time/epoch_seconds": self.seconds, "time/images_per_second": rate}
        if self.utilisation_per_rate is not None:
            metrics["train/mfu"] = rate * self.utilisation_per_rate
        self.seconds, self.num_images = 0.0, 0
        log_metrics(trainer, metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "num_images": self.num_images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

"""A callback that compares the ranks of a distributed run; tests name it in their YAML."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset


class OwnData(LightningDataModule):
    """What a user brings along: ordinary loaders, and nothing of what ours have beside them."""

    def loader(self) -> DataLoader:
        images = torch.randn(60, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(60) % 10), batch_size=10)

    def train_dataloader(self) -> DataLoader:
        return self.loader()

    def val_dataloader(self) -> DataLoader:
        return self.loader()

    def test_dataloader(self) -> DataLoader:
        return self.loader()

    def predict_dataloader(self) -> DataLoader:
        return self.loader()


class CountsCollectives(Callback):
    """Writes `collectives.json`: how many there were from the start of each batch to the next.

    DDP's own, of gradients and buffers, are not counted: they do not go through Python.
    """

    def __init__(self) -> None:
        self.num_calls = 0
        self.before_batch: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = "all_reduce", "reduce", "broadcast", "all_gather", "barrier"
        for name in (*names, "broadcast_object_list", "all_gather_object"):
            setattr(torch.distributed, name, self.counted(getattr(torch.distributed, name)))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            return function(*args, **kwargs)

        return call

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.before_batch.append(self.num_calls)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            counts = [after - before for before, after in pairwise(self.before_batch)]
            Path(trainer.default_root_dir, "collectives.json").write_text(json.dumps(counts))


class RuinsSecondRank(Callback):
    """Gives the second process images that are no numbers, in step 13."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 13:
            batch[0].fill_(torch.nan)


class RanksAgree(Callback):
    """Writes `agreement.json`: how many steps were compared, and what the ranks had in common."""

    def __init__(self) -> None:
        self.same_gates: list[bool] = []
        self.same_widths: list[bool] = []
        self.num_syncs = 0
        self.batches: list[int] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def count(_: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
            self.num_syncs += bucket.is_last()
            return allreduce_hook(None, bucket)

        trainer.strategy.model.register_comm_hook(None, count)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        images = pl_module.all_gather(batch[0])
        self.batches.append(int(torch.equal(images[0], images[1])))
        if getattr(pl_module, "gates", None) is not None:
            gates = pl_module.all_gather(pl_module.gates)
            self.same_gates.append(torch.equal(gates[0], gates[1]))
        if hasattr(pl_module, "widths"):
            widths = pl_module.all_gather(torch.tensor(pl_module.widths))
            self.same_widths.append(torch.equal(widths[0], widths[1]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = torch.cat([p.detach().flatten() for p in pl_module.net.parameters()])
        weights = pl_module.all_gather(weights)
        report = {
            "world_size": trainer.world_size,
            "num_steps": trainer.global_step,
            "same_weights": torch.equal(weights[0], weights[1]),
            "same_gates": self.same_gates,
            "same_widths": self.same_widths,
            "num_syncs": self.num_syncs,
            "same_images": self.batches,
        }
        if trainer.is_global_zero:
            Path(trainer.default_root_dir, "agreement.json").write_text(json.dumps(report))

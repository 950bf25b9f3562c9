"""Stochastic Depth: Huang et al., Deep Networks with Stochastic Depth (arXiv 1603.09382).

    H_l = ReLU(id(H_{l-1}) + b_l f_l(H_{l-1})),  b_l ~ Bernoulli(p_l) in training, b_l = p_l at test
    p_l = 1 - (l / L) (1 - p_L),  l = 1..L

Differences from the released code:
    * The gates are drawn by a generator keyed by (seed, step), so that all ranks and all resumed
      runs agree.
    * `mode="row"` draws one gate per sample, and `rescale=True` divides by p_l in training instead
      of multiplying by p_l at test: together they are the DropPath of later libraries. Here, too, a
      branch is computed only for the samples that keep it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from chance import generator
from lightning_modules.base import (
    Batch,
    ImageClassifier,
    OptimizerFactory,
    SchedulerFactory,
    sgd,
)
from lightning_modules.metrics import FULL
from lightning_modules.schedules import Interval
from networks import ResidualNetwork, check_choice

Decay = Literal["linear", "uniform"]
Mode = Literal["batch", "row"]


def survival_probabilities(
    num_blocks: int, final_survival_prob: float, decay: Decay
) -> list[float]:
    """Returns p_1..p_L: "linear" falls from 1 at the stem (l = 0) to p_L, "uniform" is p_L.

    Raises:
        ValueError: `final_survival_prob` is outside (0, 1], or an unknown decay.
    """
    check_choice("decay", decay, Decay)
    if not 0 < final_survival_prob <= 1:
        raise ValueError(f"final_survival_prob {final_survival_prob} is outside (0, 1]")
    if decay == "uniform":
        return [final_survival_prob] * num_blocks
    return [
        1 - block / num_blocks * (1 - final_survival_prob) for block in range(1, num_blocks + 1)
    ]


class LitStochasticDepth(ImageClassifier):
    """Trains a residual network with randomly closed blocks; tests all of them, scaled.

    Args:
        net: a network of gated blocks.
        final_survival_prob: p_L, the probability that the last block is open.
        decay: how p_l falls from 1 to p_L.
        mode: one gate per block and mini-"batch", as in the paper, or per block and sample ("row").
        rescale: divide open branches by p_l in training and leave them alone at test.
        update_dropped_blocks: a closed block still gets weight decay and momentum (its gradient is
            0, not absent), as in the released code.
        optimizer, lr_scheduler, lr_interval, seed: see `ImageClassifier`.

    Attributes:
        survival_probs: p_1..p_L.
        gates: those of the latest training step, (num_blocks,) or (num_blocks, N), on the CPU.

    Raises:
        ValueError: `final_survival_prob` is outside (0, 1], or an unknown decay or mode.
    """

    def __init__(
        self,
        net: ResidualNetwork,
        final_survival_prob: float = 0.5,
        decay: Decay = "linear",
        mode: Mode = "batch",
        rescale: bool = False,
        update_dropped_blocks: bool = True,
        optimizer: OptimizerFactory = sgd,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Interval = "epoch",
        seed: int = 0,
    ):
        super().__init__(net, optimizer, lr_scheduler, lr_interval, seed)
        self.survival_probs = survival_probabilities(net.num_blocks, final_survival_prob, decay)
        check_choice("mode", mode, Mode)
        self.mode = mode
        self.rescale = rescale
        self.update_dropped_blocks = update_dropped_blocks
        self.gates: Tensor | None = None

    def draw_gates(self, num_images: int, batch_idx: int) -> Tensor:
        """Draws the gates of a batch: (num_blocks,), in row mode (num_blocks, num_images).

        In batch mode all ranks, and all batches that are accumulated into one step, have the same
        gates. In row mode the samples of the ranks are the columns of one table, so they all
        differ.
        """
        probs = torch.tensor(self.survival_probs, dtype=torch.float64)
        if self.mode == "batch":
            draws = torch.rand(
                len(probs),
                dtype=probs.dtype,
                generator=generator("gates", self.seed, self.global_step),
            )
        else:
            probs = probs.unsqueeze(1)
            world_size = self.trainer.world_size
            draws = torch.rand(
                len(probs),
                num_images * world_size,
                dtype=probs.dtype,
                generator=generator("gates", self.seed, self.global_step, batch_idx),
            )[:, self.global_rank :: world_size]
        gates = (draws < probs).to(probs.dtype)
        return (gates / probs if self.rescale else gates).float()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        self.gates = self.draw_gates(len(images), batch_idx)
        logits = self.net(images, gates=self.gates)
        loss = F.cross_entropy(logits, labels)
        self.log_training(loss, logits, labels, batch_idx)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.update_dropped_blocks:
            for parameter in self.net.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def operating_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        gates = None if self.rescale else self.survival_probs
        return {FULL: partial(self.net, gates=gates)}

    def on_fit_start(self) -> None:
        strategy = self.trainer.strategy
        is_ddp = isinstance(strategy, DDPStrategy)
        if is_ddp and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise ValueError(
                "closed blocks leave parameters unused, and plain DDP would wait for their "
                "gradients: set trainer.strategy to ddp_find_unused_parameters_true"
            )

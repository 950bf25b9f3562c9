"""Stochastic Depth: Huang et al., Deep Networks with Stochastic Depth (arXiv 1603.09382).

    H_l = ReLU(id(H_{l-1}) + b_l f_l(H_{l-1})),  b_l ~ Bernoulli(p_l) in training, b_l = p_l at test
    p_l = 1 - (l / L) (1 - p_L),  l = 1..L

Differences from the released code:
    * The gates are drawn by a generator keyed by (seed, step), so that all ranks and all resumed
      runs agree.
    * `mode="row"` draws one gate per sample, and `rescale=True` divides by p_l in training instead
      of multiplying by p_l at test: together they are the DropPath of later libraries. Here, too, a
      branch is computed only for the samples that keep it. By default their number is fixed, as in
      DINOv2 (Oquab et al., arXiv 2304.07193): round(p_l N) of N samples, one at least, so that
      every step has the same shapes. `rescale` then divides by the share that survives.
    * `decay="drop_path"` has the rates of those libraries, which begin with 0 in the first layer.
      The two branches of a ViT's layer have the same rate, and a gate each:

        p = 1 - (i / (L - 1)) (1 - p_L),  i = 0..L-1 counts the layers
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Literal

import torch
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from chance import generator
from lightning_modules.base import (
    PLAIN,
    Batch,
    ImageClassifier,
    OptimizerFactory,
    SchedulerFactory,
    Tuning,
    sgd,
)
from lightning_modules.metrics import FULL
from lightning_modules.recipe import NONE, Recipe
from lightning_modules.schedules import Interval
from networks import ResidualNetwork, check_choice, check_numbers

Decay = Literal["linear", "uniform", "drop_path"]
Mode = Literal["batch", "row"]
RowCounts = Literal["fixed", "random"]


def survival_probabilities(
    num_blocks: int, final_survival_prob: float, decay: Decay, blocks_per_layer: int = 1
) -> list[float]:
    """Returns p_1..p_L: "linear" falls from 1 at the stem (l = 0) to p_L, "uniform" is p_L.

    "drop_path" falls from 1 in the first layer (timm's rates), the same for all blocks of a layer.

    Raises:
        ValueError: `final_survival_prob` is outside (0, 1], or an unknown decay.
    """
    check_choice("decay", decay, Decay)
    check_numbers("(0, 1]", final_survival_prob=final_survival_prob)
    if decay == "uniform":
        return [final_survival_prob] * num_blocks
    if decay == "drop_path":
        last = max(1, num_blocks // blocks_per_layer - 1)
        depths = (block // blocks_per_layer / last for block in range(num_blocks))
        return [1 - depth * (1 - final_survival_prob) for depth in depths]
    return [
        1 - block / num_blocks * (1 - final_survival_prob) for block in range(1, num_blocks + 1)
    ]


def draw_open(probs: Tensor, seed: int, step: int) -> Tensor:
    """Draws which blocks are open in a step, (L,) bool: the same on all ranks.

    Args:
        probs: p_1..p_L, float64.
        seed: of the run.
        step: the optimizer's.
    """
    chance = generator("gates", seed, step)
    return torch.rand(len(probs), dtype=probs.dtype, generator=chance) < probs


def zero_missing_gradients(parameters: Iterable[Tensor]) -> None:
    """Gives parameters without a gradient one of zeros: weight decay and momentum then act.

    Not those that are frozen.
    """
    missing = [each for each in parameters if each.grad is None and each.requires_grad]
    zeros = [torch.empty_like(parameter) for parameter in missing]
    if zeros:
        torch._foreach_zero_(zeros)  # in one kernel
    for parameter, zero in zip(missing, zeros, strict=True):
        parameter.grad = zero


class LitStochasticDepth(ImageClassifier):
    """Trains a residual network with randomly closed blocks; tests all of them, scaled.

    Args:
        net: a network of gated blocks.
        final_survival_prob: p_L, the probability that the last block is open.
        decay: how p_l falls from 1 to p_L, see `survival_probabilities`.
        mode: one gate per block and mini-"batch", as in the paper, or per block and sample ("row").
        row_counts: of the N samples of a process, "fixed": round(p_l N), one at least, keep a
            block; "random": each by itself. In "row" mode alone.
        rescale: divide open branches by p_l in training and leave them alone at test.
        update_dropped_blocks: a closed block still gets weight decay and momentum (its gradient is
            0, not absent), as in the released code.
        optimizer, lr_scheduler, lr_interval, seed, tuning, recipe: see `ImageClassifier`.

    Attributes:
        survival_probs: p_1..p_L.
        gates: those of the latest training step, (num_blocks,) or (num_blocks, N), on the CPU.

    Raises:
        ValueError: `final_survival_prob` is outside (0, 1], or an unknown decay, mode or
            `row_counts`.
    """

    def __init__(
        self,
        net: ResidualNetwork,
        final_survival_prob: float = 0.5,
        decay: Decay = "linear",
        mode: Mode = "batch",
        row_counts: RowCounts = "fixed",
        rescale: bool = False,
        update_dropped_blocks: bool = True,
        optimizer: OptimizerFactory = sgd,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Interval = "epoch",
        seed: int = 0,
        tuning: Tuning = PLAIN,
        recipe: Recipe = NONE,
    ):
        super().__init__(net, optimizer, lr_scheduler, lr_interval, seed, tuning, recipe)
        self.survival_probs = survival_probabilities(
            net.num_blocks, final_survival_prob, decay, net.blocks_per_layer
        )
        check_choice("mode", mode, Mode)
        check_choice("row_counts", row_counts, RowCounts)
        self.mode = mode
        self.row_counts = row_counts
        self.rescale = rescale
        self.update_dropped_blocks = update_dropped_blocks
        self.gates: Tensor | None = None

    @property
    def has_random_shapes(self) -> bool:
        """Whether the number of rows that a block computes differs from step to step."""
        return self.mode == "row" and self.row_counts == "random"

    @property
    def open_gates(self) -> list[float]:
        """The value of an open gate, by block; fixed rows with `rescale` have N / k instead."""
        probs = torch.tensor(self.survival_probs, dtype=torch.float64)
        return (1 / probs if self.rescale else torch.ones_like(probs)).float().tolist()

    def draw_gates(self, num_images: int, batch_idx: int) -> Tensor:
        """Draws the gates of a batch: (num_blocks,), in row mode (num_blocks, num_images).

        In batch mode all ranks, and all batches that are accumulated into one step, have the same
        gates. In row mode the samples of the ranks are the columns of one table, so they all
        differ; of fixed counts every rank has the same.
        """
        probs = torch.tensor(self.survival_probs, dtype=torch.float64)
        opened = torch.tensor(self.open_gates)
        if self.mode == "batch":
            return opened * draw_open(probs, self.seed, self.global_step)
        world_size = self.trainer.world_size
        draws = torch.rand(
            len(probs),
            num_images * world_size,
            dtype=probs.dtype,
            generator=generator("gates", self.seed, self.global_step, batch_idx),
        )[:, self.global_rank :: world_size]
        probs, opened = probs.unsqueeze(1), opened.unsqueeze(1)
        if self.row_counts == "random":
            return opened * (draws < probs)
        counts = (probs * num_images).round().clamp(min=1)
        if self.rescale:
            opened = (num_images / counts).float()
        return opened * (draws.argsort(1).argsort(1) < counts)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.mixed(batch, batch_idx)
        self.gates = self.draw_gates(len(images), batch_idx)
        run = self.net if self.has_random_shapes else self.trained_net
        logits = run(images, gates=self.gates)
        loss = self.label_loss(logits, targets)
        self.log_training(loss, logits, targets, batch_idx)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.update_dropped_blocks:
            zero_missing_gradients(self.net.parameters())

    def operating_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        gates = None if self.rescale else self.survival_probs
        return {FULL: partial(self.net, gates=gates)}

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.has_random_shapes and self.capture != "none":
            rank_zero_warn(
                "with row_counts random every step has other shapes, which cannot be recorded: the "
                "network runs eagerly; set row_counts to fixed"
            )
        strategy = self.trainer.strategy
        is_ddp = isinstance(strategy, DDPStrategy)
        if is_ddp and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise ValueError(
                "closed blocks leave parameters unused, and plain DDP would wait for their "
                "gradients: set trainer.strategy to ddp_find_unused_parameters_true"
            )

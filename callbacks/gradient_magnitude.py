"""How much gradient reaches the first layer: figure 7 of the Stochastic Depth paper."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from callbacks.outlets import log_metrics


class GradientMagnitudeLogger(Callback):
    """Logs `gradients/first_conv`, the epoch's mean |gradient| of the first convolution.

    Reads of the module: `net`.

    Raises:
        ValueError: the network has no convolution, or the first is frozen.
    """

    only_observes = True

    def __init__(self) -> None:
        self.first: nn.Conv2d | None = None
        self.total: float | Tensor = 0.0
        self.num_steps = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        convs = [module for module in pl_module.net.modules() if isinstance(module, nn.Conv2d)]
        if not convs:
            raise ValueError(
                f"GradientMagnitudeLogger has nothing to log of {type(pl_module.net).__name__}, "
                "which has no convolution: remove it from trainer.callbacks"
            )
        self.first = convs[0]
        if not self.first.weight.requires_grad:
            raise ValueError(
                "GradientMagnitudeLogger logs the gradient of the first convolution, which is "
                "frozen: remove it from trainer.callbacks"
            )

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        # A tensor: reading it every step would make an accelerator wait.
        self.total = self.total + self.first.weight.grad.abs().mean()
        self.num_steps += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mean = float(self.total) / max(1, self.num_steps)
        self.total, self.num_steps = 0.0, 0
        log_metrics(trainer, {"gradients/first_conv": mean})

    def state_dict(self) -> dict[str, Any]:
        return {"total": float(self.total), "num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

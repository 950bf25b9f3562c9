"""What a training step learns from: a batch as the recipe mixes it, and one loss against labels."""

from typing import Any

import pytorch_lightning as pl
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.recipe import Recipe, mix_images, mix_labels

Batch = tuple[Tensor, Tensor]


class LearningModule(pl.LightningModule):
    """Base of the methods: a `training_step` begins with `mixed`, and takes `label_loss`.

    Attributes:
        net: has an attribute `num_classes`.
        recipe: how training batches are mixed and their labels softened.
        seed: the run's seed, which keys the mixing.
    """

    net: nn.Module
    recipe: Recipe
    seed: int
    _mixes = _smoothes = False  # whether a training step has asked for it

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes the hook that runs, some 50 times a step, and torch would look for that
        # name among its parameters, modules and buffers.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def mixed(self, batch: Batch, batch_idx: int) -> Batch:
        """Returns a training batch as `recipe` mixes it; every `training_step` begins with it.

        Returns:
            Images (N, C, H, W), and targets for `label_loss`: the labels (N,), or of mixed images
            the share of every class, (N, num_classes).

        Raises:
            ValueError: there is one image, and nothing to mix it with.
        """
        if not self._mixes:
            self._mixes = True
        if not self.recipe.mixes:
            return batch
        images, labels = batch
        if len(images) == 1:
            if batch_idx and self.trainer.is_last_batch:
                return batch  # what is left of an epoch
            raise ValueError(
                "recipe mixes the images of a batch, and this one holds one image: raise batch_size"
            )
        mix = self.recipe.draw(*images.shape[2:], self.seed, self.global_step, batch_idx)
        if mix is None:
            return batch
        return mix_images(images, mix), mix_labels(labels, mix, self.net.num_classes)

    def label_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Returns the cross-entropy with the targets of `mixed`, smoothed as `recipe` says.

        Every loss against labels, of any exit or width, is this one.

        Args:
            logits: (N, num_classes).
            targets: see `mixed`.
        """
        if not self._smoothes:
            self._smoothes = True
        return F.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Raises ValueError if there is a recipe that the training step has not followed."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        recipe, name = self.recipe, type(self).__name__
        if recipe.mixes and not self._mixes:
            raise ValueError(
                f"{name} does not mix as recipe says: begin its training_step with mixed"
            )
        if recipe.label_smoothing and not self._smoothes:
            raise ValueError(
                f"{name} does not smooth labels as recipe says: take its losses from label_loss"
            )

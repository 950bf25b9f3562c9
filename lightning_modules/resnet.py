"""Residual networks: He et al., Deep Residual Learning for Image Recognition (arXiv 1512.03385).

    H_l = ReLU(shortcut(H_{l-1}) + residual(H_{l-1})),    loss = CE(logits, label)

Differences from the released code:
    * None in the step. The warm-up of ResNet-110 is a fixed 400 iterations; the paper's condition
      is a training error below 80%, which it says takes about 400.
"""

from torch import Tensor

from lightning_modules.base import Batch, ImageClassifier


class LitResNet(ImageClassifier):
    """Trains a network of constant depth (any network from images to logits) by cross-entropy."""

    takes_logits = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.mixed(batch, batch_idx)
        logits = self.trained_net(images)
        loss = self.label_loss(logits, targets)
        self.log_training(loss, logits, targets, batch_idx)
        return loss

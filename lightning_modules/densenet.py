"""DenseNet: Huang, Liu, van der Maaten, Weinberger, Densely Connected Convolutional Networks
(CVPR 2017, arXiv 1608.06993).

    x_l = H_l([x_0, x_1, ..., x_{l-1}]),    loss = CE(logits, label)

Differences from the released code:
    * None in the step. The rate falls after epochs 150 and 225 as the paper says; in the released
      code one epoch earlier.
"""

from torch import Tensor

from lightning_modules.base import Batch, ImageClassifier


class LitDenseNet(ImageClassifier):
    """Trains a DenseNet by cross-entropy."""

    takes_logits = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = self.mixed(batch, batch_idx)
        logits = self.trained_net(images)
        loss = self.label_loss(logits, targets)
        self.log_training(loss, logits, targets, batch_idx)
        return loss

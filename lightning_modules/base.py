"""What every method shares: optimizer wiring, metrics over operating points, keyed seeds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from chance import key_to_seed
from lightning_modules.answers import PointAnswers, gather_points
from lightning_modules.fitting import check_data, check_same_network
from lightning_modules.learning import Batch, LearningModule
from lightning_modules.losses import LossWatch, stopped
from lightning_modules.metrics import FULL, MeanOverImages, accuracy_name, answers_right
from lightning_modules.recipe import NONE, Recipe
from lightning_modules.schedules import Interval
from lightning_modules.tuned import OptimizerFactory, SchedulerFactory, TunedModule, sgd
from lightning_modules.tuning import PLAIN, Tuning
from networks import Capture, CapturedNetwork, count_macs, count_params


class Cost(NamedTuple):
    """What an operating point costs."""

    macs: float
    """Multiply-accumulates per image; a mean where they depend on the image."""
    params: int


class ImageClassifier(LearningModule, TunedModule):
    """Base of the methods; each writes a `training_step`, and `operating_points` if it has several.

    Args:
        net: from images (N, C, H, W) to what the method expects; has an attribute `num_classes`.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the scheduler from the optimizer; None keeps the learning rate.
        lr_interval: whether the scheduler is stepped per "epoch" or per optimizer "step".
        seed: the run's seed; keys everything that is drawn (see `chance`).
        tuning: what a fit starts from, what it changes and how fast.
        recipe: how training batches are mixed and their labels softened.

    Attributes:
        capture: how training steps run the network; the machine's matter, set before they do.
        open_gates: see `CapturedNetwork`.
        test_answers: of every operating point, those of the latest test, all ranks together.
    """

    open_gates: Sequence[float] | None = None

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerFactory = sgd,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: Interval = "epoch",
        seed: int = 0,
        tuning: Tuning = PLAIN,
        recipe: Recipe = NONE,
    ):
        # The memory format in which CPUs and tensor cores convolve fastest; the weights decide it.
        net = net.to(memory_format=torch.channels_last)
        super().__init__(net, optimizer, lr_scheduler, lr_interval, tuning)
        self.seed = seed
        self.recipe = recipe
        self.capture: Capture = "none"
        self._recorded: dict[str, CapturedNetwork] = {}
        self.losses = LossWatch()
        self.test_answers: dict[str, PointAnswers] = {}
        self._answers: list[dict[str, PointAnswers]] = []  # of the batches of the present test

        # Not persistent: no part of the weights.
        self.eval_loss = MeanOverImages()
        self.eval_acc = nn.ModuleDict()

    # --- what a method says -----------------------------------------------------------------------

    def operating_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Returns, by name, each way to run the trained network, from images to logits.

        `FULL` is the whole network. Metrics, tables and the cost profile are made of these.
        """
        return {FULL: self.net}

    def evaluated_points(self) -> Mapping[str, Callable[[Tensor], Tensor]]:
        """Returns the operating points that `evaluate` runs; all, if a method says no less."""
        return self.operating_points()

    def evaluate(self, images: Tensor) -> dict[str, Tensor]:
        """Returns the logits (N, num_classes) of the points of `evaluated_points`."""
        return {name: classify(images) for name, classify in self.evaluated_points().items()}

    def uncalibrated_points(self) -> list[str]:
        """Returns the names of the evaluated points whose BN statistics are missing."""
        return []

    def calibration_runs(self, names: Iterable[str]) -> list[Callable[[Tensor], object]]:
        """Returns functions that run every BN of some of these points: for `recalibrate`."""
        points = self.evaluated_points()
        return [points[name] for name in names]

    def costs(self, images: Tensor) -> dict[str, Cost]:
        """Returns what every operating point costs.

        Args:
            images: one image, (1, C, H, W).
        """
        return {
            name: Cost(count_macs(run, images), count_params(self.net))
            for name, run in self.operating_points().items()
        }

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits (N, num_classes) of the full network."""
        return self.operating_points()[FULL](images)

    @property
    def trained_net(self) -> CapturedNetwork:
        """The network as a `training_step` calls it: recorded, if the machine says so."""
        return self.recorded("", None)

    def recorded(self, name: str, run: Callable[[Tensor], Any] | None) -> CapturedNetwork:
        """Returns the network, or a way to run it, for batches of the size that training has.

        Args:
            name: of the way.
            run: see `CapturedNetwork`.
        """
        known = self._recorded.get(name)
        if known is None or known.network is not self.net or known.capture != self.capture:
            data = self.trainer.datamodule if self._trainer is not None else None
            self._recorded[name] = CapturedNetwork(
                self.net,
                self.capture,
                self.open_gates,
                getattr(data, "batch_size", None),
                run,
                rank_zero_info,
            )
        return self._recorded[name]

    # --- optimization -----------------------------------------------------------------------------

    def batches_in_step(self, batch_idx: int) -> int:
        """Returns how many batches are accumulated in the optimizer step that a batch is part of.

        At the end of an epoch they may be fewer than `accumulate_grad_batches`.
        """
        period = self.trainer.accumulate_grad_batches
        first = batch_idx - batch_idx % period
        return min(period, self.trainer.num_training_batches - first)

    def ends_step(self, batch_idx: int) -> bool:
        """Tells whether the optimizer steps after this batch."""
        period = self.trainer.accumulate_grad_batches
        return (batch_idx + 1) % period == 0 or self.trainer.is_last_batch

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a loss, so that a step has the mean over its batches.

        Lightning divides every loss by `accumulate_grad_batches`, even where a step has fewer.
        """
        period = self.trainer.accumulate_grad_batches
        if period > 1:
            num_batches = self.batches_in_step(self.trainer.fit_loop.epoch_loop.batch_idx)
            if num_batches != period:
                loss = loss * (period / num_batches)
        super().backward(loss)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Dropout and the like draw from the global generator. Seeding it by the step, rather than
        # saving its state, serves every rank and every device, and a checkpoint of another number
        # of ranks.
        seed = key_to_seed("train", self.seed, self.global_step, batch_idx, self.global_rank)
        # Not torch.manual_seed: it formats a stack trace, every step, for devices not there.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    @property
    def is_fitting(self) -> bool:
        """Whether a trainer is at hand, and trains."""
        return self._trainer is not None and self._trainer.state.fn == "fit"

    # --- training metrics -------------------------------------------------------------------------

    def log_training(self, loss: Tensor, logits: Tensor, targets: Tensor, batch_idx: int) -> None:
        """Records one training batch; every method calls it at the end of its `training_step`.

        The accuracy is that of the label with the largest share in `targets` (see `mixed`).

        Values go to the loggers at once, not after the batch as with `self.log`: a checkpoint that
        is saved at the end of this batch must not be ahead of the metrics, or a resumed run would
        miss a row.

        Means over the epoch are added up when losses are checked. `loss` is kept until then: nobody
        may change it in place.
        """
        trainer, step = self.trainer, self.global_step
        labels = targets.argmax(1) if targets.is_floating_point() else targets
        loss = loss.detach()
        self.losses.add(loss, answers_right(logits.detach(), labels), step, self.current_epoch)
        # For callbacks that monitor it. `self.log` would take a fifth of the time of the Trainer.
        trainer.callback_metrics["train/loss"] = loss
        if (step + 1) % trainer.log_every_n_steps == 0 and self.ends_step(batch_idx):
            self.losses.check(trainer)
            value = loss.item()
            # The progress bar would wait for a tensor, after every batch.
            trainer.progress_bar_metrics["train/loss"] = value
            self.log_now({"train/loss": value}, step)

    def on_validation_start(self) -> None:
        if self.is_fitting:
            self.losses.check(self.trainer)

    def on_train_epoch_end(self) -> None:
        self.losses.check(self.trainer)
        self.log_now(self.losses.sums.means(self.device), self.global_step - 1)
        self.losses.sums.reset()

    def log_now(self, metrics: dict[str, float], step: int) -> None:
        """Gives metrics to every logger under a step, with the epoch."""
        for logger in self.loggers:
            logger.log_metrics({**metrics, "epoch": self.current_epoch}, step=step)

    # --- evaluation -------------------------------------------------------------------------------

    @property
    def validates(self) -> bool:
        """Whether the present fit has anything to validate on."""
        data = self.trainer.datamodule
        return bool(self.trainer.limit_val_batches) and (
            data is None or len(data.val_dataloader()) > 0
        )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self.losses.forget()  # those of a training that has failed
        data = self.trainer.datamodule
        # A data module of the user's own need not say what is in it.
        check_data(self.net, getattr(data, "num_classes", None), getattr(data, "image_shape", None))
        for name in self.evaluated_points():
            if _key(name) not in self.eval_acc:
                self.eval_acc[_key(name)] = MeanOverImages().to(self.device)

    def eval_step(self, batch: Batch) -> dict[str, Tensor]:
        """Counts one batch, and returns its logits."""
        images, labels = batch
        logits = self.evaluate(images)
        loss = F.cross_entropy(logits[FULL], labels)
        self.eval_loss.update(loss * len(labels), len(labels))
        for name, values in logits.items():
            self.eval_acc[_key(name)].update(answers_right(values, labels).sum(), len(labels))
        return logits

    def finish_evaluation(self, split: str) -> dict[str, Tensor]:
        """Returns the metrics of an evaluation over all ranks, and starts anew."""
        loss = self.eval_loss.compute()
        self.eval_loss.reset()
        if not loss.isfinite():
            if self.is_fitting:
                raise stopped(loss.item(), self.global_step, self.current_epoch)
            raise FloatingPointError(
                f"the loss is {loss.item()}: check the weights of the checkpoint and the images"
            )
        metrics = {f"{split}/loss": loss}
        for name in self.evaluated_points():
            accuracy = self.eval_acc[_key(name)]
            metrics[accuracy_name(split, name)] = accuracy.compute()
            accuracy.reset()
        return metrics

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.eval_step(batch)

    def on_validation_epoch_end(self) -> None:
        for name, value in self.finish_evaluation("val").items():
            self.log(name, value, prog_bar=name == accuracy_name("val"))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0:
            self._answers = []  # of a test that has failed
        points = self.eval_step(batch).items()
        self._answers.append({name: PointAnswers.of(logits, batch[1]) for name, logits in points})

    def on_test_epoch_end(self) -> None:
        metrics = self.finish_evaluation("test")
        self.test_answers = self.gather_answers()
        self.log_dict(metrics, logger=False)
        # Lightning's own step and epoch depend on whether training was resumed before this test.
        for logger in self.loggers:
            values = {name: value.item() for name, value in metrics.items()}
            logger.log_metrics(values, step=self.global_step)

    def gather_answers(self) -> dict[str, PointAnswers]:
        """Returns the test's answers of every operating point; see `test_answers`."""
        batches, self._answers = self._answers, []
        return gather_points(batches, self.trainer.world_size)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns class probabilities, (N, num_classes).

        Raises:
            FloatingPointError: one is not finite.
        """
        probs = self(batch[0]).softmax(1)
        if not probs.isfinite().all():
            raise FloatingPointError(
                f"the network's answers to batch {batch_idx} are not finite: check its images and "
                "the weights of the checkpoint"
            )
        return probs

    # --- checkpoints ------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.losses.check(self.trainer)
        # Every rank comes here, and rank 0 writes. The sums of the ranks are kept apart: added in
        # another order they would round differently.
        sums = self.losses.sums.to_checkpoint()
        ranks = [sums]
        if self.trainer.world_size > 1:
            ranks = [{}] * self.trainer.world_size
            torch.distributed.all_gather_object(ranks, sums)
        checkpoint["train_metrics"] = ranks

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        check_same_network(self.state_dict(), checkpoint["state_dict"])
        if not self.is_fitting:
            return
        ranks = checkpoint.get("train_metrics", [{}])
        if len(ranks) == self.trainer.world_size:
            sums = ranks[self.global_rank]
        elif self.global_rank == 0:
            sums = {key: sum(rank[key] for rank in ranks) for key in ranks[0]}
        else:
            return
        if sums:
            self.losses.sums.from_checkpoint(sums)


def _key(name: str) -> str:
    """Returns the name of an operating point as the name of a submodule, which holds no dot."""
    return name.replace(".", "_")

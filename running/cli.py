"""The command line: fit, validate, test and predict, each in the folder of a run."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace
from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.callbacks import (
    LearningRateMonitor,
    ProgressBar,
    Timer,
)
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

import preemption
from callbacks import SampledTestImages
from lightning_modules import ImageClassifier
from running.arguments import StrictParser, check_trainer, one_line
from running.building import building
from running.checkpoint import RunCheckpoint
from running.checkpoint_io import AtomicCheckpointIO
from running.commands import LOOKING
from running.error_file import ErrorFile
from running.folder import RunFolder, check_evaluated, check_trained
from running.given_callbacks import check_callbacks
from running.light_trainer import NoProfiler, progress_bar
from running.machine import Machine, check_tasks, on_first_process
from running.masking import masked
from running.paper import Paper
from running.predictions import PredictionWriter
from running.result import OperatingPoints, result_files, show_points
from running.tracking import Tracking, show_finished
from running.weights import read_weights


class ExperimentCLI(LightningCLI):
    """LightningCLI with run folders. Subcommands: fit, validate, test, predict.

    Args:
        args: the command line; None: that of the process.
        errors: hears of the run folder, once it is made.
    """

    def __init__(self, args: Sequence[str] | None = None, errors: ErrorFile | None = None):
        self.errors = errors or ErrorFile(args or [])
        parser = {"exit_on_error": False, "allow_abbrev": False}
        others = ", ".join(LOOKING)
        super().__init__(
            ImageClassifier,
            LightningDataModule,
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # The run folder keeps the config: Lightning's callback raises when a requeued job finds
            # one.
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=StrictParser,
            parser_kwargs={
                **parser,
                "epilog": f"Commands that look at what there is, each with its --help: {others}",
                **{name: dict(parser) for name in self.subcommands()},
            },
            trainer_defaults={
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
            },
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Returns the subcommands, each with the Trainer's arguments that it does not offer."""
        data = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
        decided = {"weights_only", "verbose", "return_predictions"}
        return {name: data | decided for name in ("fit", "validate", "test", "predict")}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="Seed of the run: weights, order, augmentation, gates.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="Folder of the run (default: runs/<method>/<yaml stem>/seed<k>).",
        )
        parser.add_argument(
            "--test_after_fit",
            type=bool,
            default=True,
            help="Whether fit ends with one evaluation of the test set.",
        )
        parser.add_argument(
            "--paper",
            type=Paper | None,
            default=None,
            help="What a paper reports, for reports to compare with; decides nothing.",
        )
        parser.add_class_arguments(RunCheckpoint, "checkpoint")
        parser.add_class_arguments(Tracking, "wandb")
        parser.add_class_arguments(Machine, "machine")
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def _set_seed(self) -> None:
        seed = self.config[self.subcommand].seed_everything
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed_everything is {seed}: use 0 to 2^32 - 1")
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Does nothing: Lightning would lay a checkpoint's hyper-parameters over an edited YAML."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        init = self.config_init[self.subcommand].trainer
        if init.logger is not None or init.default_root_dir is not None:
            raise ValueError(
                "trainer.logger and trainer.default_root_dir are the run folder's: "
                "use --wandb.mode and --run_dir"
            )
        check_trainer(init)
        method = type(self.model).__module__.rsplit(".", 1)[-1]
        self.run_folder = RunFolder.of(self.config[self.subcommand], method)
        if init.fast_dev_run and self.subcommand == "fit":
            self.temporary = tempfile.TemporaryDirectory(prefix="fast_dev_run")
            self.run_folder.path = Path(self.temporary.name)
        given = init.plugins if isinstance(init.plugins, list) else [init.plugins or []]
        plugins = [*filter(None, given), AtomicCheckpointIO()]
        if SLURMEnvironment.detect():
            # Lightning's requeue saves in the middle of a batch, and in every loader worker.
            plugins.append(SLURMEnvironment(auto_requeue=False))
        trainer = super().instantiate_trainer(
            max_time=None,  # the checkpoint's timer obeys it
            max_epochs=-1 if init.max_time and init.max_epochs is None else init.max_epochs,
            default_root_dir=str(self.run_folder.path),
            logger=False,  # fit opens them, once it knows that there is something to train
            plugins=plugins,
            profiler=init.profiler or NoProfiler(),
            callbacks=self.make_callbacks(init),
        )
        check_tasks(trainer)
        self.config_init[self.subcommand].machine.apply(trainer, self.model, self.datamodule)
        return trainer

    def make_callbacks(self, init: Namespace) -> list[Callback]:
        """Returns the callbacks of the YAML, and those that every run has."""
        given = init.callbacks or []
        given = given if isinstance(given, list) else [given]
        check_callbacks(given)
        self.checkpoint.timer = Timer(init.max_time)
        has_bar = any(isinstance(each, ProgressBar) for each in given)
        has_rates = any(isinstance(each, LearningRateMonitor) for each in given)
        progress = [] if has_bar or init.enable_progress_bar is False else [progress_bar()]
        rates = [] if has_rates or self.subcommand != "fit" else [LearningRateMonitor()]
        # Every callback takes its time in every step, even one that does nothing there.
        result = [PredictionWriter() if self.subcommand == "predict" else OperatingPoints()]
        return [*progress, *given, *result, *rates, self.checkpoint]

    @property
    def checkpoint(self) -> RunCheckpoint:
        return self.config_init[self.subcommand].checkpoint

    def instantiate_classes(self) -> None:
        with building(masked(self.config[self.subcommand].as_dict())):
            super().instantiate_classes()

    def _dump_config(self) -> None:
        super()._dump_config()
        self.config_dump = masked(self.config_dump)

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the method of that name; Lightning would call the Trainer's."""
        self._dump_config()
        try:
            getattr(self, subcommand)(self.config[subcommand].ckpt_path)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning ends with 1
                raise KeyboardInterrupt from error
            raise
        finally:
            if hasattr(self, "temporary"):
                self.temporary.cleanup()

    def make_folder(self) -> None:
        """Makes the run folder, where errors are kept from now on."""
        self.run_folder.create()
        if not self.trainer.fast_dev_run:
            self.errors.folder = self.run_folder.path

    # --- fit --------------------------------------------------------------------------------------

    def fit(self, ckpt_path: str | None) -> None:
        """Trains, or goes on training, then tests once.

        1. Listens to a scheduler's warnings, in Lightning's place.
        2. Makes the run folder and locks it.
        3. Refuses another experiment than the folder holds.
        4. If the run is finished, prints its result and ends.
        5. Goes on from last.ckpt, or from previous.ckpt if that is damaged; otherwise from
           --ckpt_path, or from the start.
        6. Opens the history. Once nothing can be refused any more, writes down the configuration
           and the attempt, and opens W&B.
        7. Trains. After a warning, or when max_time is over, it saves and leaves.
        8. Tests the selected checkpoint, unless told not to.
        9. Marks the run as finished, gives W&B its figures, and prints where it is.
        """
        preemption.listen()
        # Lightning would install a handler of SIGTERM that talks to the other ranks, wherever they
        # are at that moment.
        self.trainer._signal_connector.register_signal_handlers = preemption.listen
        folder, trainer, test = self.run_folder, self.trainer, self.config.fit.test_after_fit
        on_first_process(trainer, self.make_folder)
        on_first_process(trainer, folder.lock)
        folder.check_trained(self.config_dump, self.complete)
        if folder.is_finished(trainer, self.datamodule, test):
            if rank_zero_only.rank == 0:
                there = f"finished already: {folder.path}"
                print(f"{there}; pass --run_dir or another seed for a new run")
                show_points(result_files(folder.path, again=False)[0])
            return
        try:
            self.train(ckpt_path)
        except preemption.TimeIsOver:
            rank_zero_info("trainer.max_time is over: repeat the command to go on")
            return
        limit = trainer.limit_test_batches
        is_result = isinstance(limit, float) and limit == 1  # all batches, not one
        if test:
            self.run_test(self.checkpoint.selected(trainer), again=not is_result)
        folder.mark_finished(trainer, tested=test and is_result)
        keeps = self.config_init.fit.wandb.log_checkpoints
        show_finished(trainer, keeps and self.checkpoint.selected)
        if trainer.is_global_zero:
            print(folder.describe(trainer.loggers))
        # Ranks with nothing to write wait here: a scheduler may give the last process little time.
        trainer.strategy.barrier()

    def train(self, ckpt_path: str | None) -> None:
        """Goes on from where the run folder is, if it is anywhere; steps 5 to 7 of `fit`."""
        folder, tracking = self.run_folder, self.config_init.fit.wandb
        if self.trainer.fast_dev_run:
            tracking.mode = "disabled"
        folder.repair()
        resume_from = folder.last_checkpoint or self.run_file(ckpt_path)
        if folder.last_checkpoint and ckpt_path:
            rank_zero_warn(
                f"goes on from {folder.last_checkpoint}, not from --ckpt_path {ckpt_path}"
            )
        elif ckpt_path:
            self.check_start(resume_from)
        self.trainer.loggers = [folder.history()]
        self.checkpoint.on_begin = self.begin
        self.model.read_weights = read_weights
        self.trainer.fit(self.model, datamodule=self.datamodule, ckpt_path=resume_from)

    def begin(self) -> None:
        """Writes down the attempt, and tracks it: a training that is refused is no run of W&B.

        Raises:
            FileNotFoundError: there are no images for the test that is to follow.
        """
        if self.config.fit.test_after_fit and hasattr(self.datamodule, "num_samples"):
            self.datamodule.num_samples("test")
        self.run_folder.record_attempt(self.config_dump)
        tracking = self.config_init.fit.wandb
        self.trainer.loggers += self.run_folder.trackers(tracking, self.config_dump)

    def check_start(self, checkpoint: Path) -> None:
        """Refuses to start from a checkpoint of another experiment, or from that and weights."""
        weights = self.model.tuning.weights
        if weights is not None and not (checkpoint.parent / "config.yaml").exists():
            raise ValueError(
                f"--ckpt_path {checkpoint} goes on from there, and tuning.weights {weights} starts "
                "anew: give one of them"
            )
        check_trained(checkpoint.parent, self.config_dump, self.complete)

    def complete(self, config: dict[str, Any]) -> dict[str, Any]:
        """Returns the configuration of an earlier attempt with the defaults of today's arguments.

        Raises:
            ValueError: it names what is no longer there.
        """
        parser = self._subcommand_parsers[self.subcommand]
        try:
            completed = parser.parse_object(config)
        except ArgumentError as error:
            raise ValueError(
                f"the run folder is of another version of this project ({one_line(error)}): use "
                "that version (attempts.yaml names its commit), or pass another --run_dir"
            ) from error
        dump = parser.dump(completed, skip_link_targets=False, skip_none=False)
        return yaml.safe_load(dump)

    # --- what is trained --------------------------------------------------------------------------

    def validate(self, ckpt_path: str | None) -> None:
        """Prints the metrics of the validation split."""
        self.trainer.validate(self.model, self.datamodule, ckpt_path=self.trained(ckpt_path))

    def test(self, ckpt_path: str | None) -> None:
        """Prints the operating points, and writes them to `operating_points_again.csv`."""
        self.run_test(self.trained(ckpt_path), again=True)

    def run_test(self, checkpoint: Path, again: bool) -> None:
        """Tests a checkpoint and prints its operating points; see `SampledTestImages.again`."""
        for callback in self.trainer.callbacks:
            if isinstance(callback, SampledTestImages):
                callback.again = again
        files = result_files(self.run_folder.path, again)
        if self.trainer.is_global_zero:
            for path in files:
                path.unlink(missing_ok=True)  # a test of no batches would leave that of another
        self.trainer.test(self.model, self.datamodule, ckpt_path=checkpoint, verbose=False)
        if self.trainer.is_global_zero:
            show_points(files[0])

    def predict(self, ckpt_path: str | None) -> None:
        """Writes `predictions.csv`."""
        path = self.trained(ckpt_path)
        self.trainer.predict(
            self.model, datamodule=self.datamodule, ckpt_path=path, return_predictions=False
        )

    def trained(self, ckpt_path: str | None) -> Path:
        """Returns the checkpoint to evaluate: the given one, otherwise the run's selected one."""
        path = self.run_file(ckpt_path) or self.checkpoint.selected(self.trainer)
        check_evaluated(path, self.config_dump, self.complete)
        self.make_folder()
        return path

    def run_file(self, ckpt_path: str | None) -> Path | None:
        """Returns the path of a checkpoint; "last" and "best" are those of the run folder."""
        if ckpt_path in ("last", "best"):
            return self.run_folder.path / f"{ckpt_path}.ckpt"
        return ckpt_path and Path(ckpt_path)

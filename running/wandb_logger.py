"""Weights & Biases, without which a run goes on."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from running.wandb_file import START, read_records

PATIENCE = 60
"""Seconds for which a run that ends waits for W&B."""
FLUSH_SETTING = "x_transaction_log_flush_interval"
"""W&B's name for the seconds after which it writes its file; not in every version."""
FLUSH_PATIENCE = 10
"""Seconds for which a checkpoint waits for W&B."""


class FaultTolerantWandbLogger(WandbLogger):
    """Warns instead of raising when the process that W&B starts beside ours has ended.

    A scheduler's SIGTERM goes to every process of a job and ends that one, while ours has yet to
    save. What is logged then is missing in W&B, not in the CSV history.
    """

    is_lost = False
    can_flush = True
    num_bytes_read = START
    last_step_read = -1

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs numbers, tables or panels."""
        self._tell(partial(super().log_metrics, metrics, step))

    @rank_zero_only
    def summarize(self, numbers: Mapping[str, float]) -> None:
        """Puts numbers into the summary of the run, by which W&B compares runs."""
        self._tell(lambda: self.experiment.summary.update(dict(numbers)))

    @rank_zero_only
    def log_checkpoint(self, path: Path) -> None:
        """Keeps a checkpoint as an artifact, a new version of that of the same run."""
        import wandb  # slow

        artifact = wandb.Artifact(f"checkpoint-{self.experiment.id}", type="model")
        artifact.add_file(str(path))  # a copy: a run that goes on changes the file
        self._tell(lambda: self.experiment.log_artifact(artifact, aliases=[path.stem]))

    def _tell(self, what: Callable[[], object]) -> None:
        """Calls W&B, and never again once its process has ended."""
        if self.is_lost:
            return
        try:
            what()
        except ConnectionError as error:
            self.is_lost = True
            rank_zero_warn(
                f"W&B's process has ended ({error}): from here on, this attempt logs to "
                "metrics.csv alone"
            )
            self._close()

    @rank_zero_only
    def flush(self) -> None:
        """Returns when W&B's file holds all that was logged: from then on no kill can undo it.

        If W&B does not write it within `FLUSH_PATIENCE`, the run goes on with a warning, and later
        calls return at once.
        """
        if self.is_lost or not self.can_flush:
            return
        try:
            self._wait_for_file()
        except Exception as error:  # whatever it is, a checkpoint has to be saved
            self.can_flush = False
            rank_zero_warn(
                f"W&B does not confirm what it has written ({error or type(error).__name__}): if "
                "this attempt is killed, its last seconds may be missing in W&B, not in metrics.csv"
            )

    def _wait_for_file(self) -> None:
        run = self.experiment
        if not hasattr(run.settings, FLUSH_SETTING):
            raise NotImplementedError("its version does not tell when it writes")
        last_step = run.step - 1  # W&B's own count of what was logged; raises if W&B has ended
        deadline = time.monotonic() + FLUSH_PATIENCE
        while self.last_step_read < last_step and last_step >= run.starting_step:
            for record, end in read_records(Path(run.settings.sync_file), self.num_bytes_read):
                self.num_bytes_read = end
                if record.HasField("history"):
                    self.last_step_read = record.history.step.num
            if time.monotonic() > deadline:
                raise TimeoutError(f"it has not within {FLUSH_PATIENCE} s")
            time.sleep(0.002)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status == "success":
            self.flush()
        else:
            self._close()

    def _close(self) -> None:
        """Ends W&B's process. Otherwise its loss would be told when ours ends.

        A scheduler does not wait for what it cannot upload: neither do we, for long.
        """
        thread = threading.Thread(target=_teardown, daemon=True)
        thread.start()
        thread.join(PATIENCE)


def _teardown() -> None:
    import wandb  # slow

    # It exits with the status of its process, which may be that of a signal.
    with contextlib.suppress(ConnectionError, SystemExit):
        wandb.teardown(exit_code=1)

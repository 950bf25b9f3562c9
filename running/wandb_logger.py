"""Weights & Biases, without which a run goes on."""

import contextlib
import threading
from collections.abc import Mapping
from typing import Any

from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

PATIENCE = 60
"""Seconds for which a run that ends waits for W&B."""


class FaultTolerantWandbLogger(WandbLogger):
    """Warns instead of raising when the process that W&B starts beside ours has ended.

    A scheduler's SIGTERM goes to every process of a job and ends that one, while ours has yet to
    save. What is logged then is missing in W&B, not in the CSV history.
    """

    is_lost = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Logs numbers, tables or panels."""
        if self.is_lost:
            return
        try:
            super().log_metrics(metrics, step)
        except ConnectionError as error:
            self.is_lost = True
            rank_zero_warn(
                f"W&B's process has ended ({error}): from here on, this attempt logs to "
                "metrics.csv alone"
            )
            self._close()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status != "success":
            self._close()

    def _close(self) -> None:
        """Ends W&B's process, else its loss would be told at the exit of ours.

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

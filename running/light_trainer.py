"""What every run gives its Trainer, so that Lightning's own part of a step is short.

Where a GPU waits for Python, as with small networks, whatever else Python does makes a step longer.
"""

from contextlib import AbstractContextManager, nullcontext

from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.profilers import PassThroughProfiler

REFRESHES = 10
"""Of the progress bar, per second."""


class NoProfiler(PassThroughProfiler):
    """Profiles nothing, as a Trainer does that is given no profiler.

    Of its own one Lightning enters a context some 60 times in a step, each a new generator.
    """

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager:
        return self._nothing


def progress_bar() -> RichProgressBar:
    """Returns a progress bar that is drawn less often.

    Lightning's draws itself 100 times in a second, while the thread that trains has to wait.
    """
    return RichProgressBar(refresh_rate=REFRESHES)

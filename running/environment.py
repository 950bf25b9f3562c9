"""What a number must be read with: time, command, commit, versions, hardware."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from running.masking import masked_words


def environment() -> dict[str, Any]:
    """Returns what a number must be read with: time, command, commit, versions, hardware."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *masked_words(sys.argv[1:])]),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": bool(
            _git("status", "--porcelain", "--untracked-files=no")
            # Code that is in no commit at all.
            or _git("status", "--porcelain", "--untracked-files=all", "--", "*.py")
        ),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pytorch_lightning": pl.__version__,
        "cpu": f"{platform.machine()}, {os.cpu_count()} cores",
        "gpus": devices,
        "host": platform.node(),
    }


def _git(*args: str) -> str | None:
    """Returns what git says of the repository that this file is in; None if it is in none.

    A copy of the project that lies in another repository is not that repository. Its hooks and
    monitors are programs, and nobody has asked for them.
    """
    root = Path(__file__).parent.parent
    options = ("-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}")
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.parent)}
    environment = {k: v for k, v in environment.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    try:
        result = subprocess.run(
            ["git", *options, *args],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()
